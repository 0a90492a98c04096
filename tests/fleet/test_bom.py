"""Bills of materials: valid by CycloneDX's own schema, whatever a bundle holds, and the same bytes every time."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st

import cnncc
from cnncc.fleet.bom import EPOCH, bill_of_materials
from cnncc_runtime.bundle import EngineRecord, FileRecord, Manifest, TargetRecord
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import UsageError
from tests.runtime.engine_files import manifest

VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)
ENGINE = digest_bytes(b"an engine's manifest")
ORIN = TargetRecord("cuda", "jetson-orin", "", "", "aarch64", (), "8.7")


def record(role: str, content: bytes) -> FileRecord:
    return FileRecord(digest_bytes(content), len(content), role)


def int8() -> Manifest:
    """A bundle as `cnncc compile --precision int8` records it."""
    return manifest(
        name="vision",
        model={"source": "model.py:build", "digest": digest_bytes(b"m"), "graph": digest_bytes(b"g")},
        precision="int8",
        toolchain={"cnncc": "0.1.0", "torch": "2.13.0+cpu", "linker": "GNU ld 2.40", "apache-tvm": "0.27.0.post1"},
        files={
            "engine.so": record("engine", b"e"),
            "weights.bin": record("weights", b"w"),
            "golden.npz": record("golden", b"golden"),
            "calibration.json": record("report", b"{}"),
            "reference.onnx": record("reference", b"onnx"),
        },
    )


def problem(data: bytes) -> str:
    """Return what CycloneDX's own schema has against a document."""
    found = VALIDATOR.validate_str(data.decode())
    return "" if found is None else str(found)


def made(bundle: Manifest, engine: str = ENGINE) -> dict[str, Any]:
    data = bill_of_materials(bundle, engine)
    assert problem(data) == ""
    found: dict[str, Any] = json.loads(data)
    return found


def test_a_bill_of_materials_names_the_model_every_file_the_tools_and_the_device() -> None:
    bundle = int8()
    found = made(bundle)
    parts = {each["bom-ref"]: each for each in found["components"]}
    assert found["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": ENGINE[7:]}]
    assert parts["model"]["type"] == "machine-learning-model"
    assert parts["model"]["hashes"] == [{"alg": "SHA-256", "content": bundle.model["graph"][7:]}]
    assert parts["model"]["modelCard"]["modelParameters"] == {
        "inputs": [{"format": "x: float32[1, 3, 16, 16]"}],
        "outputs": [{"format": "y: float32[1, 8, 16, 16]"}],
    }
    assert {"name": "dev.cnncc.precision", "value": "int8"} in parts["model"]["properties"]
    for name, its in bundle.files.items():
        assert parts[f"file:{name}"]["hashes"] == [{"alg": "SHA-256", "content": its.sha256[7:]}]
    assert parts["file:calibration.json"]["type"] == "data"
    assert parts["file:engine.so"]["type"] == "file"
    assert (parts["device"]["type"], parts["device"]["name"]) == ("device", "host")
    assert parts["runtime:cnncc-runtime"]["version"] == "0.1.0"
    assert parts["runtime:tvm"]["version"] == "0.27"
    tools = {each["name"]: each for each in found["formulation"][0]["components"]}
    assert {name: tool["version"] for name, tool in tools.items()} == bundle.toolchain
    assert tools["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert "purl" not in tools["linker"]
    [dependency] = found["dependencies"]
    assert {*dependency["dependsOn"]} <= parts.keys()
    assert "file:reference.onnx" not in dependency["dependsOn"], "a device does not need it"
    assert found["metadata"]["tools"]["components"][0]["version"] == cnncc.__version__


def test_cyclonedx_own_library_reads_it() -> None:
    bom = Bom.from_json(made(int8()))  # type: ignore[attr-defined]
    assert {component.name for component in bom.components} >= {"vision", "engine.so", "weights.bin", "host"}


def test_an_engine_for_a_gpu_names_the_library_that_opens_it() -> None:
    engine = EngineRecord("engine.plan", "tensorrt", "tensorrt 10.16.1.11+", {0: "profile 0"})
    found = made(replace(int8(), target=ORIN, engine=engine, precision="fp16"))
    parts = {each["bom-ref"]: each for each in found["components"]}
    assert parts["runtime:tensorrt"]["version"] == "10.16.1.11+"
    assert {"name": "dev.cnncc.cuda.sm", "value": "8.7"} in parts["device"]["properties"]


def test_a_bundle_that_says_nothing_of_its_build_has_a_valid_one() -> None:
    found = made(manifest(model={}, toolchain={}))
    assert "formulation" not in found
    [model] = [each for each in found["components"] if each["bom-ref"] == "model"]
    assert "hashes" not in model


def test_the_same_engine_gives_the_same_bytes_and_another_one_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EPOCH, raising=False)
    bundle = int8()
    first = bill_of_materials(bundle, ENGINE)
    tools, files = (dict(reversed(each.items())) for each in (bundle.toolchain, bundle.files))
    turned = replace(bundle, toolchain=tools, files=files)
    assert bill_of_materials(turned, ENGINE) == first
    assert b"timestamp" not in first
    other = made(bundle, digest_bytes(b"another"))
    assert other["serialNumber"] != json.loads(first)["serialNumber"]


def test_its_time_is_the_one_that_reproducible_builds_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EPOCH, "1893456000")
    assert made(int8())["metadata"]["timestamp"] == "2030-01-01T00:00:00Z"
    for wrong in ("", "now", "-1", "1e9", "9" * 30, "²"):
        monkeypatch.setenv(EPOCH, wrong)
        with pytest.raises(UsageError, match="is no time"):
            bill_of_materials(int8(), ENGINE)


def test_the_validator_refuses_what_is_no_bill_of_materials() -> None:
    found = made(int8())
    found["components"][0]["hashes"] = [{"alg": "SHA-256", "content": "short"}]
    assert problem(json.dumps(found).encode()) != ""


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["source", "digest", "graph", "program"]), st.just(ENGINE)),
    st.dictionaries(st.text(), st.text(), max_size=5),
    st.dictionaries(st.text(min_size=1), st.sampled_from(["engine", "report", "runtime"]), max_size=5),
    st.text(),
)
def test_whatever_a_bundle_says_its_bill_of_materials_is_valid(
    model: dict[str, str], toolchain: dict[str, str], files: dict[str, str], text: str
) -> None:
    engine = EngineRecord("engine.so", "tvm-vm", text, {0: "main"})
    target = TargetRecord("llvm", text, text, text, text, (text,))
    records = {name: record(role, b"") for name, role in files.items()}
    made(manifest(name=text, model=model, toolchain=toolchain, engine=engine, target=target, files=records))
