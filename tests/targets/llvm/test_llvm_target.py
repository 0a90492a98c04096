from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cnncc.targets.base import BuildOptions, Engine, MeasureOptions, Target
from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.target import LlvmTarget
from cnncc_runtime.elf import read_elf
from cnncc_runtime.errors import UsageError
from tests.targets.conformance import TargetConformance
from tests.targets.llvm.running import run_engine


class TestLlvmTarget(TargetConformance):
    @pytest.fixture
    def target(self) -> Target:
        return LlvmTarget(resolve_profile())

    def run(self, engine: Engine, entry: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return run_engine(engine, entry, list(feeds.values()))


@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_engines_for_lesser_x86_processors_compute_the_same(cpu: str, tmp_path: Path) -> None:
    suite = TestLlvmTarget()
    suite.test_an_engine_computes_what_the_graph_says(
        LlvmTarget(resolve_profile(mtriple="x86_64-linux-gnu", mcpu=cpu)), tmp_path
    )


BUILD = """
import hashlib, pathlib, sys
from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.target import LlvmTarget
from tests.targets.conformance import small_graph
profile = resolve_profile()
engine = LlvmTarget(profile).build(small_graph(), BuildOptions(profile), pathlib.Path(sys.argv[1]))
for role, path in engine.files.values():
    print(role, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_separate_processes_make_the_same_bytes_and_say_nothing(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "another_longer_name"):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stderr == ""
        digests.append(done.stdout)
        for role, file in (("engine", "engine.so"), ("weights", "weights.bin")):
            data = (folder / file).read_bytes()
            assert str(tmp_path).encode() not in data
            assert f"{role} {hashlib.sha256(data).hexdigest()}\n" in done.stdout
    assert digests[0] == digests[1]


def test_an_engine_needs_no_library_by_name(tmp_path: Path) -> None:
    suite = TestLlvmTarget()
    target = LlvmTarget(resolve_profile())
    from tests.targets.conformance import small_graph

    engine = suite.build(target, small_graph(), tmp_path)
    found = read_elf(engine.payload)
    assert found.needed == ()
    assert found.machine == engine.target.machine


@pytest.mark.parametrize(
    ("options", "suggestion"),
    [
        ({"name": "hots"}, "host"),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a77x"}, "cortex-a77"),
        ({"mattr": ["+avx512fq"]}, "avx512f"),
        ({"mtriple": "aarch64-apple-macos"}, "aarch64-linux-gnu"),
        ({"mtriple": "pdp11-linux"}, "known"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(options: dict[str, Any], suggestion: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_profile(**options)
    assert suggestion in caught.value.hint


def test_a_cross_profile_has_the_features_of_its_cpu() -> None:
    profile = resolve_profile(mtriple="aarch64-linux-gnu", mcpu="cortex-a76")
    assert {"neon", "dotprod", "fullfp16"} <= set(profile.features)


def test_a_feature_that_is_taken_away_is_gone() -> None:
    assert "avx2" not in resolve_profile(mtriple="x86_64-linux-gnu", mcpu="x86-64-v3", mattr=["-avx2"]).features


def test_loading_the_registry_imports_no_compiler() -> None:
    code = (
        "import sys, cnncc.targets.registry as r, cnncc.targets.llvm.target; r.target_names(); "
        "assert not {'tvm', 'torch', 'onnxruntime', 'onnx'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nan_passes_through_relu(tmp_path: Path) -> None:
    from onnx import helper

    from tests.targets.conformance import graph_of

    graph = graph_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [1, 64]}, {"y": [1, 64]})
    engine = TestLlvmTarget().build(LlvmTarget(resolve_profile()), graph, tmp_path)
    x = np.full((1, 64), np.nan, "float32")
    assert np.isnan(run_engine(engine, "main", [x])[0]).all()


def refusal(device: str, precision: str, float_type: str = "fp32") -> str:
    """Return what the preflight of a build says, empty where it may go on."""
    profile = resolve_profile(device)
    try:
        LlvmTarget(profile).preflight(BuildOptions(profile, precision=precision, float_type=float_type))
    except UsageError as exc:
        return f"{exc.message}; {exc.hint}"
    return ""


@pytest.mark.parametrize("device", ["raspberry-pi-5", "jetson-orin-cpu", "graviton3"])
def test_float16_is_for_cpus_that_multiply_vectors_of_it(device: str) -> None:
    assert refusal(device, "fp16") == ""


@pytest.mark.parametrize("device", ["raspberry-pi-4", "cortex-a7", "riscv64", "x86-64-v4"])
def test_other_cpus_refuse_float16_and_say_why(device: str) -> None:
    said = refusal(device, "fp16")
    assert device in said
    assert "converted to float32 and back" in said
    assert "--precision fp32" in said


def test_bfloat16_and_the_float_part_of_int8_in_half_precision_are_refused() -> None:
    assert "does not compute in bf16" in refusal("graviton3", "bf16")
    assert "computes what is not int8 in float32" in refusal("raspberry-pi-5", "int8", "fp16")


def test_kernels_of_float16_are_not_measured() -> None:
    from tests.targets.conformance import small_graph

    profile = resolve_profile("raspberry-pi-5")
    with pytest.raises(UsageError, match="not measured"):
        LlvmTarget(profile).measure(small_graph(), MeasureOptions(BuildOptions(profile, precision="fp16")))


def test_a_graph_in_float16_adds_up_in_float32_on_a_cpu_without_kernels_for_it() -> None:
    from onnx import TensorProto, helper, numpy_helper

    from tests.targets.conformance import graph_of
    from tests.targets.llvm.running import run_graph

    ones = numpy_helper.from_array(np.ones((5000, 8), "float16"), "w")
    half = TensorProto.FLOAT16
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    graph = graph_of(nodes, {"x": (half, [1, 5000])}, {"y": (half, [1, 8])}, [ones])
    (got,) = run_graph(graph, {"x": np.ones((1, 5000), "float16")}, resolve_profile(mcpu="x86-64-v3"))
    np.testing.assert_array_equal(got, np.full((1, 8), 5000, "float16"))  # float16 would stay at 2048
