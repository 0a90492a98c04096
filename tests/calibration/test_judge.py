"""The signal to noise ratio that every step is judged by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from onnx import helper

from cnncc.calibration.judge import BEST_DB, Judge, Noise
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.specs import Tensors
from tests.graph.graphs import graph_of

Array = NDArray[np.float32]

values = arrays_of.arrays(np.float32, (2, 3), elements=st.floats(-100, 100, width=32))


def db(*samples: tuple[Tensors, Tensors]) -> float:
    noise = Noise()
    for truth, found in samples:
        noise.add(truth, found)
    return noise.db


def scaled(*factors: float) -> OnnxGraph:
    """A graph whose outputs are the input times each factor."""
    names = [f"y{index}" for index in range(len(factors))]
    nodes = [helper.make_node("Mul", ["x", f"k{name}"], [name], name=name) for name in names]
    constants = {f"k{name}": np.float32(factor) for name, factor in zip(names, factors, strict=True)}
    return graph_of(nodes, {"x": (2, 3)}, constants, names)


# ---- noise


@settings(deadline=None)
@given(st.lists(st.tuples(values, values), min_size=1, max_size=4))
def test_the_ratio_is_that_of_all_samples_together(pairs: list[tuple[Array, Array]]) -> None:
    signal = sum(float((truth.astype(np.float64) ** 2).sum()) for truth, _found in pairs)
    noise = sum(float(((found.astype(np.float64) - truth) ** 2).sum()) for truth, found in pairs)
    found = db(*(({"y": truth}, {"y": found}) for truth, found in pairs))
    if noise == 0:
        assert found == BEST_DB
    elif signal == 0:
        assert found == -BEST_DB
    else:
        ratio = 10 * math.log10(signal / noise)
        assert found == pytest.approx(min(BEST_DB, ratio), abs=1e-9)


def test_ten_percent_of_error_are_twenty_decibels() -> None:
    x = np.float32([[3.0, -4.0]])
    assert db(({"y": x}, {"y": x * np.float32(1.1)})) == pytest.approx(20.0, abs=1e-4)


def test_of_several_outputs_the_shares_are_averaged_whatever_their_magnitudes() -> None:
    small, large = np.ones((1, 4), np.float32), np.full((1, 4), 1e6, np.float32)
    shares = (0.01, 0.03)
    found = {"a": small * (1 + math.sqrt(shares[0])), "b": large * (1 + math.sqrt(shares[1]))}
    assert db(({"a": small, "b": large}, found)) == pytest.approx(-10 * math.log10(0.02), abs=1e-4)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.uint8])
def test_integers_say_nothing(dtype: Any) -> None:
    one, other = np.zeros(3, dtype), np.ones(3, dtype)
    assert db(({"y": one}, {"y": other})) == BEST_DB
    x = np.ones(3, np.float32)
    both = db(({"x": x, "y": one}, {"x": x * np.float32(1.1), "y": other}))
    assert both == pytest.approx(20.0, abs=1e-4)


def test_no_error_is_the_best_there_is() -> None:
    x = np.float32([1.0, 2.0])
    assert db(({"y": x}, {"y": x})) == BEST_DB
    assert db(({"y": 0 * x}, {"y": 0 * x})) == BEST_DB
    assert db() == BEST_DB


@pytest.mark.parametrize(
    ("truth", "found"), [(1.0, math.nan), (1.0, math.inf), (0.0, 1.0), (math.inf, math.inf), (math.nan, 1.0)]
)
def test_what_cannot_be_measured_is_the_worst_there_is(truth: float, found: float) -> None:
    assert db(({"y": np.float32([truth])}, {"y": np.float32([found])})) == -BEST_DB


# ---- judge


def test_a_judge_compares_with_the_float_model_on_its_samples() -> None:
    feeds = [{"x": np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)} for seed in range(3)]
    judge = Judge(scaled(2.0, 3.0), feeds)
    assert judge.sqnr(scaled(2.0, 3.0)) == BEST_DB
    assert judge.sqnr(scaled(2.2, 3.3)) == pytest.approx(20.0, abs=1e-3)
    assert judge.sqnr(scaled(2.0, 3.3)) == pytest.approx(23.01, abs=1e-2)
    assert judge.sqnr(scaled(2.2, 3.3)) < judge.sqnr(scaled(2.02, 3.03)) < judge.sqnr(scaled(2.0, 3.0))


def test_an_output_that_is_always_zero_does_not_drown_the_others() -> None:
    noise = Noise()
    zeros, x = np.zeros(4, np.float32), np.ones(4, np.float32)
    noise.add({"a": zeros, "b": x}, {"a": zeros + 0.1, "b": np.float32(1.1) * x})
    assert noise.db == pytest.approx(20, abs=1e-3)
