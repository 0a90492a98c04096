"""Kernels for machines that TVM's own runtime is not built for, 32-bit ARM and RISC-V, under qemu."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import Device, find_device, machine_name
from cnncc.targets.llvm.target import LlvmTarget
from cnncc_runtime.elf import read_elf
from tests.calibration.graphs import feeds_of, images
from tests.qemu.kernels import PREFIXES, Bare, make_bare
from tests.targets.conformance import small_graph
from tests.targets.llvm.running import kernels_of
from tests.targets.llvm.test_aarch64 import SHAPE, network
from tests.targets.llvm.test_convolutions import Case, cases, graph_of_case
from tests.targets.llvm.test_integers import EXTREMES, LARGEST, check, check_largest, integer_cases
from tests.targets.llvm.test_operators import CASES
from tests.targets.llvm.test_operators import feeds_of as operator_feeds
from tests.targets.llvm.test_operators import graph_of_case as operator_graph

pytestmark = pytest.mark.slow

DEVICES = ("cortex-a7", "riscv64")

hypothesis = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """One of `DEVICES`."""
    return make_bare(tmp_path_factory.mktemp(request.param), request.param)


def test_a_network_computes_what_onnx_runtime_computes(machine: Bare) -> None:
    graph = small_graph()
    rng = np.random.default_rng(0)
    feeds = {spec.name: rng.standard_normal(spec.shape).astype("float32") for spec in graph.inputs}
    (got,) = machine.run(graph, feeds)
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-5, atol=1e-6)


def test_a_quantized_network_is_exact(machine: Bare) -> None:
    [feeds] = feeds_of(images(1, seed=1, shape=SHAPE))
    (got,) = machine.run(network(), feeds)
    (want,) = Reference(network()).run(feeds).values()
    assert len(np.unique(want)) == want.size
    np.testing.assert_array_equal(got, want)


@given(case=cases())
@hypothesis
def test_a_convolution_computes_what_onnx_runtime_computes(machine: Bare, case: Case) -> None:
    graph = graph_of_case(case)
    rng = np.random.default_rng(6)
    feeds = {spec.name: rng.standard_normal(spec.shape).astype("float32") for spec in graph.inputs}
    (got,) = machine.run(graph, feeds)
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("inputs", [16, 18, 13], ids="{} channels".format)
def test_winograds_method_computes_what_onnx_runtime_computes(machine: Bare, inputs: int) -> None:
    """Of whole blocks of channels, of even ones, and of odd ones: steps of the products are of one channel or two."""
    case = Case(1, 1, inputs, 24, (26, 23), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, False, "relu")
    graph = graph_of_case(case)
    assert [name for name in kernels_of(graph, machine.device.profile) if "winograd" in name]
    feeds = {"x": np.random.default_rng(6).standard_normal((1, inputs, 26, 23)).astype("float32")}
    (got,) = machine.run(graph, feeds)
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-4, atol=2e-5)


@given(case=integer_cases(), steps=EXTREMES, weights=EXTREMES, seed=st.integers(0, 2**32 - 1))
@hypothesis
def test_a_convolution_of_int8_is_exact(machine: Bare, case: Case, steps: str, weights: str, seed: int) -> None:
    check(case, machine.run, steps, weights, seed)


@pytest.mark.parametrize(("of_steps", "of_weights"), LARGEST)
def test_the_largest_sums_are_exact(machine: Bare, of_steps: str, of_weights: str) -> None:
    check_largest(machine.run, of_steps, of_weights)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnx_runtime_computes(machine: Bare, name: str) -> None:
    graph = operator_graph(CASES[name])
    feeds = operator_feeds(graph)
    if CASES[name][0] == "Sqrt":
        feeds = {key: np.abs(value) for key, value in feeds.items()}
    (got,) = machine.run(graph, feeds)
    want = Reference(graph).run(feeds)["y"]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6 * max(1.0, float(np.abs(want).max())))
    assert not unbound(machine.folder / "kernels.so", machine.device)


def unbound(library: Path, device: Device) -> set[str]:
    """Return the symbols that nothing will give a library: neither TVM, nor the oldest C library of its device.

    Debian's C library says of every symbol since which version it has had it; engines ask for no version, and get what
    is there.
    """
    prefix = PREFIXES[machine_name(device.profile.triple)]

    def symbols(path: Path) -> list[list[str]]:
        command = [f"{prefix}-objdump", "-T", str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [line.split() for line in lines if re.match(r"[0-9a-f]+ ", line)]

    since: dict[str, list[int]] = {}
    for file in ("libc.so.6", "libm.so.6", "ld-linux*.so.*"):
        for path in Path(f"/usr/{prefix}/lib").glob(file):
            for fields in symbols(path):
                since.setdefault(fields[-1], []).extend(
                    int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", str(fields))
                )
    floor = int(device.glibc.removeprefix("2."))
    wanted = {fields[-1] for fields in symbols(library) if "*UND*" in fields}
    # Unwinding tables of 32-bit ARM name it without needing it: nothing is relocated by it.
    foreign = {name for name in wanted if not name.startswith("TVM")} - {"__aeabi_unwind_cpp_pr0"}
    return {name for name in foreign if not any(minor <= floor for minor in since.get(name, ()))}


@pytest.mark.parametrize("name", [*DEVICES, "raspberry-pi-4"])
def test_an_engine_needs_no_library_and_nothing_newer_than_its_device_has(name: str, tmp_path: Path) -> None:
    device = find_device(name)
    engine = LlvmTarget(device.profile).build(small_graph(), BuildOptions(device.profile), tmp_path)
    found = read_elf(engine.payload)
    assert (found.machine, found.needed) == (engine.target.machine, ())
    assert not unbound(engine.payload, device)
    assert unbound(engine.payload, replace(device, glibc="2.3")), "not even the oldest has them all"


EDGES = [0, 1, -1, 2, -2, 7, -7, 2**24 + 1, 2**31, -(2**31), 2**53 + 1, -(2**53) - 1, 2**54 + 2**30 + 1,
         2**62 + 2**38 + 1, 2**63 - 1, -(2**63), -(2**63) + 1, 10**18]  # fmt: skip


def wide_graph(operator: str, given: list[str], made: str, **attributes: int) -> OnnxGraph:
    """Return one operator on vectors."""
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
    values = [helper.make_tensor_value_info(f"i{at}", types[kind], [324]) for at, kind in enumerate(given)]
    node = helper.make_node(operator, [value.name for value in values], ["y"], "the_node", **attributes)
    result = helper.make_tensor_value_info("y", types[made], [324])
    opsets = [helper.make_opsetid("", 20)]
    return OnnxGraph(
        helper.make_model(helper.make_graph([node], "g", values, [result]), opset_imports=opsets, ir_version=10)
    )


@pytest.mark.parametrize("operator", ["Div", "Mod"])
def test_whole_numbers_of_64_bits_are_divided(machine: Bare, operator: str) -> None:
    left, right = (values.ravel() for values in np.meshgrid(np.array(EDGES), np.array(EDGES)))
    right = np.where((right == 0) | ((right == -1) & (left == -(2**63))), 3, right)
    (got,) = machine.run(wide_graph(operator, ["int64"] * 2, "int64"), {"i0": left, "i1": right})
    floor = np.floor_divide(left, right)
    towards_zero = floor + ((floor < 0) & (floor * right != left))
    np.testing.assert_array_equal(got, towards_zero if operator == "Div" else np.mod(left, right))


@pytest.mark.parametrize(
    ("given", "made"), [("int64", "float32"), ("int64", "float64"), ("float32", "int64"), ("float64", "int64")]
)
def test_whole_numbers_of_64_bits_become_floats_and_back(machine: Bare, given: str, made: str) -> None:
    bits = np.random.default_rng(0).integers(-(2**63), 2**63, 324 - len(EDGES))
    shifted = bits >> np.arange(len(bits)) % 63
    values = np.array([*EDGES, *shifted], "int64") if given == "int64" else (
        np.array([*EDGES, *(shifted * 0.37)], given).clip(-(2.0**62), 2.0**62)
    )  # fmt: skip
    kind = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}[made]
    (got,) = machine.run(wide_graph("Cast", [given], made, to=kind), {"i0": values})
    np.testing.assert_array_equal(got, values.astype(made))
