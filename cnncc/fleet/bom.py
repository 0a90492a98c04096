"""What is in an engine: a bill of materials (CycloneDX 1.6, ECMA-424), made of what its bundle says of itself.

    metadata.component   the engine
    components           the model with its card, the bundle's files, what runs the engine, the device that it is for
    formulation          the tools that built it: they are no part of it, and scanners leave them alone

`cyclonedx-python-lib` has no class for a model's card or for a formulation, so it is written here as plain JSON, and
that library validates it in the tests.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

import cnncc
from cnncc_runtime.bundle import CALIBRATION, Manifest
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import UsageError
from cnncc_runtime.releases import ABI, CPU, DEVICE, FEATURES, FORMAT, GPU, PRECISION, device_files

BOM = "application/vnd.cyclonedx+json"

EPOCH = "SOURCE_DATE_EPOCH"
"""Environment variable: the time that is written into it, in seconds since 1970 (reproducible-builds.org)."""

_PREFIX = "dev.cnncc."
_PYPI = frozenset({"apache-tvm", "apache-tvm-ffi", "cnncc-runtime", "onnx", "onnxruntime", "torch"})
"""Tools of a bundle's toolchain that are packages of that name on PyPI."""
_LATEST = 253402300799  # the last second of the year 9999


def bill_of_materials(bundle: Manifest, engine: str) -> bytes:
    """Return an engine's bill of materials; the same engine gives the same bytes, whenever it is made.

    Args:
        bundle: The bundle's manifest.
        engine: Digest of the engine's manifest in a registry.

    Raises:
        UsageError: ``SOURCE_DATE_EPOCH`` is no time.
    """
    files = [_file(name, bundle) for name in sorted(bundle.files)]
    runtime = _runtime(bundle)
    needed = [f"file:{name}" for name in sorted(device_files(bundle))]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, engine)}",
        "version": 1,
        "metadata": {
            **_timestamp(),
            "tools": {"components": [{"type": "application", "name": "cnncc", "version": cnncc.__version__}]},
            "component": {
                "type": "application",
                "bom-ref": "engine",
                "name": bundle.name,
                "hashes": _hashes(engine),
                "properties": _properties(
                    {DEVICE: bundle.target.device, FORMAT: bundle.engine.format, PRECISION: bundle.precision}
                    | {ABI: bundle.engine.abi, f"{_PREFIX}parity": bundle.parity}
                ),
            },
        },
        "components": [_model(bundle), *files, *runtime, _device(bundle)],
        "dependencies": [
            {"ref": "engine", "dependsOn": ["model", *needed, *(each["bom-ref"] for each in runtime), "device"]}
        ],
    }
    if bundle.toolchain:
        tools = [_package("tool", name, version) for name, version in sorted(bundle.toolchain.items())]
        document["formulation"] = [{"bom-ref": "build", "components": tools}]
    return canonical_json(document)


def _timestamp() -> dict[str, str]:
    text = os.environ.get(EPOCH)
    if text is None:
        return {}
    if not (text.isascii() and text.isdecimal() and int(text) <= _LATEST):
        raise UsageError(f"{EPOCH} is '{text}', which is no time", hint="seconds since 1970, as of `date +%s`")
    return {"timestamp": datetime.fromtimestamp(int(text), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}


def _model(bundle: Manifest) -> dict[str, Any]:
    graph = bundle.model.get("graph", "")
    parameters = {
        "inputs": [{"format": str(spec)} for spec in bundle.inputs],
        "outputs": [{"format": str(spec)} for spec in bundle.outputs],
    }
    notes = {f"{_PREFIX}model.{name}": value for name, value in bundle.model.items()}
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": bundle.name,
        **({"hashes": _hashes(graph)} if graph else {}),
        "modelCard": {"modelParameters": parameters},
        "properties": _properties({**notes, PRECISION: bundle.precision}),
    }


def _file(name: str, bundle: Manifest) -> dict[str, Any]:
    record = bundle.files[name]
    return {
        "type": "data" if name == CALIBRATION else "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": _hashes(record.sha256),
        "properties": _properties({f"{_PREFIX}role": record.role, f"{_PREFIX}size": str(record.size)}),
    }


def _runtime(bundle: Manifest) -> list[dict[str, Any]]:
    """Return what runs the engine: this project's runtime, and each interface that the engine's ABI names."""
    own = _package("runtime", "cnncc-runtime", bundle.toolchain.get("cnncc", ""))
    others = (part.partition(" ") for part in bundle.engine.abi.split(", ") if part)
    return [own, *(_package("runtime", name, version) for name, _, version in others)]


def _device(bundle: Manifest) -> dict[str, Any]:
    target = bundle.target
    notes = {f"{_PREFIX}machine": target.machine, CPU: target.cpu, FEATURES: " ".join(target.features)}
    return {
        "type": "device",
        "bom-ref": "device",
        "name": target.device,
        "properties": _properties({**notes, GPU: target.gpu, f"{_PREFIX}triple": target.triple}),
    }


def _package(kind: str, name: str, version: str) -> dict[str, Any]:
    known = name in _PYPI
    return {
        "type": "library" if known or kind == "runtime" else "application",
        "bom-ref": f"{kind}:{name}",
        "name": name,
        **({"version": version} if version else {}),
        **({"purl": f"pkg:pypi/{name}@{quote(version, safe='')}"} if known and version else {}),
    }


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]


def _properties(values: dict[str, str]) -> list[dict[str, str]]:
    named: Iterable[tuple[str, str]] = sorted(values.items())
    return [{"name": name, "value": value} for name, value in named if value]
