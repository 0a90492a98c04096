"""Kernels for machines that TVM's own runtime is not built for, 32-bit ARM and RISC-V, under qemu."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnncc.graph.reference import Reference
from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import find_device, machine_name, resolve_profile
from cnncc.targets.llvm.target import LlvmTarget
from cnncc_runtime.elf import read_elf
from tests.calibration.graphs import feeds_of, images
from tests.qemu.kernels import PREFIXES, Bare, make_bare
from tests.targets.conformance import small_graph
from tests.targets.llvm.test_aarch64 import SHAPE, network
from tests.targets.llvm.test_convolutions import Case, cases, graph_of_case
from tests.targets.llvm.test_integers import EXTREMES, LARGEST, check, check_largest, integer_cases

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


@given(case=integer_cases(), steps=EXTREMES, weights=EXTREMES, seed=st.integers(0, 2**32 - 1))
@hypothesis
def test_a_convolution_of_int8_is_exact(machine: Bare, case: Case, steps: str, weights: str, seed: int) -> None:
    check(case, machine.run, steps, weights, seed)


@pytest.mark.parametrize(("of_steps", "of_weights"), LARGEST)
def test_the_largest_sums_are_exact(machine: Bare, of_steps: str, of_weights: str) -> None:
    check_largest(machine.run, of_steps, of_weights)
