"""Releases in a real registry: what is published, what is refused, and what other tools make of it."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc.fleet.publish import UNPROVEN, check_bundles, publish
from cnncc_runtime.bundle import Manifest, TargetRecord, write_bundle
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import (
    BundleRefused,
    NetworkFailed,
    NoArtifact,
    ParityFailed,
    UsageError,
    VerificationFailed,
)
from cnncc_runtime.gpu import HostGpu
from cnncc_runtime.oci.formats import Index, read_index, read_manifest
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.releases import ENGINE, EVIDENCE, Hardware, choose, offers_of
from tests.oci import registries
from tests.oci.registries import Fault, FaultProxy, Registry
from tests.runtime.engine_files import manifest

X86 = TargetRecord("llvm", "x86-64-v3", "x86_64-linux-gnu", "x86-64-v3", "x86_64", ("avx", "avx2", "fma"))
X86_OLD = TargetRecord("llvm", "x86-64-v2", "x86_64-linux-gnu", "x86-64-v2", "x86_64", ("sse4.2",))
PI4 = TargetRecord("llvm", "raspberry-pi-4", "aarch64-linux-gnu", "cortex-a72", "aarch64", ("crc", "neon"))
PI5 = TargetRecord("llvm", "raspberry-pi-5", "aarch64-linux-gnu", "cortex-a76", "aarch64", ("crc", "dotprod", "neon"))
ORIN = TargetRecord("cuda", "sm87", "", "", "aarch64", (), "8.7")
AMPERE = TargetRecord("cuda", "sm80", "", "", "aarch64", (), "8.0+")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def bundle(folder: Path, target: TargetRecord, *, engine: bytes = b"", **changes: object) -> Path:
    """Write a bundle for a target, its reports and its model in it."""
    made = manifest(target=target, **{"parity": "passed", **changes})
    path = folder / f"{target.device}.cnncc"
    path.mkdir(parents=True)
    content = engine or f"an engine for {target.device} ".encode() * 1000
    files: dict[str, tuple[str, Path | bytes]] = {
        "engine.so": ("engine", content),
        "golden.npz": ("golden", b"golden"),
        "reference.onnx": ("reference", b"a model " * 5000),
        "parity.json": ("report", b"{}"),
    }
    write_bundle(path, made, files)
    return path


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    return [bundle(tmp_path / "bundles", target) for target in (X86, PI4, PI5)]


def put(repository: Repository, paths: list[Path], version: str = "1.0.0") -> Index:
    published = publish(check_bundles(paths), repository, version)
    data = repository.manifest(version)
    assert digest_bytes(data) == published.digest
    return read_index(data)


def test_a_release_is_an_index_of_engines_with_what_each_needs(registry: Registry, bundles: list[Path]) -> None:
    repository = registry.repository("release")
    index = put(repository, bundles)
    assert {entry.platform.architecture for entry in index.manifests if entry.platform} == {"amd64", "arm64"}
    for entry in index.manifests:
        engine = read_manifest(repository.manifest(entry.digest))
        assert engine.artifact_type == ENGINE
        titles = {layer.annotations["org.opencontainers.image.title"] for layer in engine.layers}
        assert titles == {"manifest.json", "engine.so", "golden.npz"}, "and not the model, which devices do not need"
        [evidence] = repository.referrers(entry.digest, EVIDENCE)
        beside = read_manifest(repository.manifest(evidence.digest))
        assert {layer.annotations["org.opencontainers.image.title"] for layer in beside.layers} == {
            "reference.onnx",
            "parity.json",
        }
    # a registry that collects what has no tag collects nothing of a release
    tagged = {digest_bytes(repository.manifest(tag)) for tag in repository.tags()}
    assert {entry.digest for entry in index.manifests} <= tagged
    assert {entry.digest for each in index.manifests for entry in repository.referrers(each.digest)} <= tagged


def test_publishing_again_sends_nothing_and_changes_nothing(registry: Registry, bundles: list[Path]) -> None:
    repository = registry.repository("again")
    first = publish(check_bundles(bundles), repository, "1.0.0")
    assert first.sent > 100_000
    again = publish(check_bundles(list(reversed(bundles))), repository, "1.0.0")
    assert (again.sent, again.digest) == (0, first.digest)


def test_a_version_stays_what_it_was(registry: Registry, bundles: list[Path]) -> None:
    repository = registry.repository("fixed")
    put(repository, bundles)
    with pytest.raises(UsageError, match=r"has another release 1\.0\.0 already"):
        publish(check_bundles(bundles[:1]), repository, "1.0.0")
    assert len(put(repository, bundles[:1], "1.0.1").manifests) == 1


@pytest.mark.parametrize("version", ["", "1/2", ".1", "a b", "x" * 65, "latest\n"])
def test_what_is_no_version_is_refused(registry: Registry, bundles: list[Path], version: str) -> None:
    with pytest.raises(UsageError, match="is no version"):
        publish(check_bundles(bundles), registry.repository("none"), version)


@pytest.mark.parametrize("parity", ["failed", "pending"])
def test_what_nobody_proved_is_published_only_by_name(registry: Registry, tmp_path: Path, parity: str) -> None:
    path = bundle(tmp_path, X86, parity=parity)
    with pytest.raises(ParityFailed, match="nobody proved") as caught:
        check_bundles([path])
    assert caught.value.where == (f"{path}: parity {parity}",)
    allowed = {path.name: "engineer@example.com"}
    repository = registry.repository(f"unproven-{parity}")
    publish(check_bundles([path], unproven=allowed), repository, "1", unproven=allowed)
    [entry] = read_index(repository.manifest("1")).manifests
    notes = read_manifest(repository.manifest(entry.digest)).annotations
    assert notes[UNPROVEN] == f"{parity}; allowed by engineer@example.com"


def test_a_damaged_bundle_is_not_published(registry: Registry, bundles: list[Path]) -> None:
    with (bundles[0] / "engine.so").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(BundleRefused, match="was changed"):
        check_bundles(bundles)


def test_what_makes_no_release_is_refused(tmp_path: Path, bundles: list[Path]) -> None:
    with pytest.raises(UsageError, match="no bundles were given"):
        check_bundles([])
    twin = bundle(tmp_path / "twin", X86, engine=b"another")
    with pytest.raises(UsageError, match="offered to the same devices"):
        check_bundles([*bundles, twin])
    other = bundle(tmp_path / "other", X86_OLD, name="another-model")
    with pytest.raises(UsageError, match="a release is of one model"):
        check_bundles([*bundles, other])


@pytest.mark.parametrize("step", range(1, 8))
def test_a_publisher_that_dies_leaves_no_half_release(registry: Registry, bundles: list[Path], step: int) -> None:
    repository = registry.repository(f"dies{step}")
    put_manifest, left = repository.put_manifest, [step]

    def dying(*args: str | bytes, **more: str) -> str:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return put_manifest(*args, **more)  # type: ignore[arg-type]

    repository.put_manifest = dying  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        publish(check_bundles(bundles), repository, "1")
    assert not registry.repository(f"dies{step}").has("1")
    assert len(put(registry.repository(f"dies{step}"), bundles, "1").manifests) == 3


def test_a_publisher_that_died_inside_a_large_file_goes_on_there(registry: Registry, tmp_path: Path) -> None:
    checked = check_bundles([bundle(tmp_path, X86, engine=random.Random(3).randbytes(40 << 20))])
    repository, sessions = registry.repository("large"), tmp_path / "uploads"
    went: list[int] = []

    def dying(name: str, came: int, size: int) -> None:
        went.append(came)
        if size == 40 << 20 and sum(went) > 30 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(checked, repository, "1", sessions=sessions, progress=dying)
    again = publish(checked, registry.repository("large"), "1", sessions=sessions)
    whole = publish(checked, registry.repository("large-whole"), "1")
    assert again.digest == whole.digest
    assert sum(went) + again.sent == whole.sent
    assert again.sent < 9 << 20


def test_a_network_that_breaks_is_survived(registry: Registry, bundles: list[Path]) -> None:
    faults = [Fault("cut", 100), Fault("reset"), Fault("refuse"), Fault("cut")] * 3
    with FaultProxy(registry.port, *faults) as proxy:
        index = put(registry.repository("broken", port=proxy.port), bundles)
    assert len(index.manifests) == 3
    with FaultProxy(registry.port, always=Fault("refuse")) as proxy, pytest.raises(NetworkFailed):
        put(registry.repository("away", port=proxy.port), bundles)


def hardware(target: TargetRecord, *more: str, gpus: tuple[str, ...] = (), name: str = "") -> Hardware:
    found = tuple(HostGpu(f"GPU {capability}", capability) for capability in gpus)
    return Hardware(target.machine, frozenset({*target.features, *more}), found, name)


@pytest.fixture(scope="module")
def index(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("bundles")
    paths = [bundle(folder, target) for target in (X86, X86_OLD, PI4, PI5)]
    index = put(registry.repository("choice"), paths)
    gpus = [
        replace(
            index.manifests[0],
            digest=digest_bytes(gpu.gpu.encode()),
            annotations={"dev.cnncc.cuda.sm": gpu.gpu, "dev.cnncc.device": gpu.device},
            platform=replace(index.manifests[0].platform, architecture="arm64")
            if index.manifests[0].platform
            else None,
        )
        for gpu in (ORIN, AMPERE)
    ]
    return replace(index, manifests=(*index.manifests, *gpus))


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (hardware(X86, "bmi"), ["x86-64-v3"]),
        (hardware(X86, "sse4.2"), ["x86-64-v3", "x86-64-v2"]),
        (hardware(X86_OLD), ["x86-64-v2"]),
        (hardware(PI5), ["raspberry-pi-5", "raspberry-pi-4"]),
        (hardware(PI5, name="raspberry-pi-4"), ["raspberry-pi-4", "raspberry-pi-5"]),
        (hardware(PI4), ["raspberry-pi-4"]),
        (hardware(PI5, gpus=("8.7",)), ["sm87", "sm80", "raspberry-pi-5", "raspberry-pi-4"]),
        (hardware(PI5, gpus=("9.0",)), ["sm80", "raspberry-pi-5", "raspberry-pi-4"]),
        (hardware(PI5, gpus=("7.5",)), ["raspberry-pi-5", "raspberry-pi-4"]),
    ],
)
def test_a_device_is_offered_what_it_can_run_the_most_specific_first(
    index: Index, device: Hardware, chosen: list[str]
) -> None:
    assert [offer.device for offer in choose(index, device)] == chosen


def test_a_device_for_which_there_is_nothing_is_told_why(index: Index) -> None:
    with pytest.raises(NoArtifact, match="no engine for this riscv64") as caught:
        choose(index, Hardware("riscv64", frozenset()))
    assert caught.value.exit_code == 40
    assert len(caught.value.where) == len(index.manifests)
    with pytest.raises(NoArtifact) as caught:
        choose(index, replace(hardware(PI5), free=1000))
    assert any("MiB are free" in why for why in caught.value.where)
    assert any("it is for x86_64" in why for why in caught.value.where)


@given(
    st.sets(st.sampled_from(["avx", "avx2", "fma", "sse4.2", "crc", "neon", "dotprod"])),
    st.sampled_from(["x86_64", "aarch64"]),
)
def test_no_device_is_offered_what_it_cannot_run(index: Index, features: set[str], machine: str) -> None:
    device = Hardware(machine, frozenset(features))
    try:
        offers = choose(index, device)
    except NoArtifact:
        assert all(offer.obstacle(device) for offer in offers_of(index))
        return
    for offer in offers:
        assert offer.features <= features
        assert offer.machine == machine
        assert not offer.gpu


def test_what_is_no_release_is_refused(index: Index) -> None:
    with pytest.raises(VerificationFailed, match="is no release"):
        offers_of(replace(index, artifact_type="application/vnd.other"))
    for entry in (
        replace(index.manifests[0], platform=None),
        replace(index.manifests[0], annotations={"dev.cnncc.bytes": "-1"}),
    ):
        with pytest.raises(VerificationFailed, match="does not say what it is for"):
            offers_of(replace(index, manifests=(entry,)))


def test_skopeo_copies_a_release_there_and_back_and_its_digests_stay(
    registry: Registry, bundles: list[Path], tmp_path: Path
) -> None:
    if shutil.which("skopeo") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("skopeo not found: apt-get install skopeo")
    put(registry.repository("skopeo"), bundles)  # with all that is attached: tests/fleet/test_evidence.py
    there = f"docker://localhost:{registry.port}/skopeo:1.0.0"
    back = f"docker://localhost:{registry.port}/skopeo-back:1.0.0"
    layout = f"oci:{tmp_path / 'layout'}:1.0.0"
    copy = ["skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests"]
    subprocess.run([*copy, "--src-tls-verify=false", there, layout], check=True, capture_output=True)
    subprocess.run([*copy, "--dest-tls-verify=false", layout, back], check=True, capture_output=True)
    assert registry.repository("skopeo-back").manifest("1.0.0") == registry.repository("skopeo").manifest("1.0.0")
    listed = json.loads((tmp_path / "layout/index.json").read_text())["manifests"][0]["digest"]
    assert listed == digest_bytes(registry.repository("skopeo").manifest("1.0.0"))


def test_oras_pulls_an_engine(registry: Registry, bundles: list[Path], tmp_path: Path) -> None:
    client = importlib.import_module("oras.client")
    index = put(registry.repository("oras"), bundles[:1])
    target = f"localhost:{registry.port}/oras@{index.manifests[0].digest}"
    client.OrasClient(insecure=True).pull(target=target, outdir=str(tmp_path / "pulled"))
    for name in ("engine.so", "golden.npz", "manifest.json"):
        assert (tmp_path / "pulled" / name).read_bytes() == (bundles[0] / name).read_bytes()
    assert isinstance(Manifest.from_bytes((tmp_path / "pulled/manifest.json").read_bytes()), Manifest)
