"""What is decided of two engines' times, and which layers of them are compared."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc.compiler.bench.report import Interval
from cnncc.compiler.payoff import (
    FP32,
    INT8,
    MEASURED,
    MIXED,
    PREDICTED,
    Contender,
    KernelTimes,
    LayerTime,
    Payoff,
    decided,
    layer_times,
    predicted,
)
from cnncc_runtime.bundle import LayerRecord, to_plain


def of(**against: tuple[float, float, float]) -> Payoff:
    """Return what is decided of ratios to fp32 and the ends of their intervals."""
    contenders = [Contender(FP32, 1e-3, None)]
    contenders += [
        Contender(name, value * 1e-3, Interval(value, low, high)) for name, (value, low, high) in against.items()
    ]
    return decided(MEASURED, "a CPU", 1, contenders, ())


@pytest.mark.parametrize(
    ("against", "chosen"),
    [
        ({"int8": (0.5, 0.49, 0.51)}, INT8),
        ({"int8": (1.2, 1.19, 1.21)}, FP32),
        ({"int8": (1.02, 0.99, 1.05)}, INT8),  # within the scatter: what was asked for
        ({"int8": (1.2, 1.19, 1.21), "mixed": (0.9, 0.89, 0.91)}, MIXED),
        ({"int8": (1.2, 1.19, 1.21), "mixed": (1.1, 1.08, 1.12)}, FP32),
        ({"int8": (0.62, 0.61, 0.63), "mixed": (0.73, 0.72, 0.74)}, INT8),
        ({"int8": (0.82, 0.81, 0.83), "mixed": (0.80, 0.79, 0.805)}, MIXED),
        ({"int8": (0.82, 0.80, 0.83), "mixed": (0.80, 0.79, 0.81)}, INT8),
        ({"int8": (1.2, 1.19, 1.21), "mixed": (1.0, 0.97, 1.03)}, FP32),  # no gain beyond doubt: the simplest
    ],
)
def test_int8_is_taken_unless_another_is_faster_beyond_the_scatter(
    against: dict[str, tuple[float, float, float]], chosen: str
) -> None:
    assert of(**against).chosen == chosen


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_what_is_chosen_is_never_slower_than_int8_or_fp32_beyond_doubt(a: list[float], b: list[float]) -> None:
    (low, value, high), (low2, value2, high2) = sorted(a), sorted(b)
    found = of(int8=(value, low, high), mixed=(value2, low2, high2))
    taken = found.of(found.chosen)
    assert taken is not None
    least = taken.against.low if taken.against else 1.0
    assert least <= high
    assert found.chosen != MIXED or least <= 1.0


def test_a_prediction_is_told_as_one() -> None:
    found = predicted({FP32: 2e6, INT8: 3e6}, "pi5 (cortex-a76)")
    assert (found.chosen, found.basis, found.threads) == (FP32, PREDICTED, 0)
    assert str(found) == "int8 takes 1.50 of fp32's time, predicted for pi5 (cortex-a76)"
    assert predicted({FP32: 0.0, INT8: 0.0}, "a network without convolutions").chosen == INT8


def test_a_payoff_survives_its_file() -> None:
    found = of(int8=(0.5, 0.49, 0.51))
    assert msgspec.convert(to_plain(found), Payoff) == found


def kernel(name: str, *nodes: tuple[str, str]) -> LayerRecord:
    return LayerRecord(name, (), tuple(node for node, _ in nodes), tuple(op for _, op in nodes), "float32", "direct")


def test_layers_add_up_their_kernels_and_share_those_of_several() -> None:
    conv, other, relu = ("a", "Conv"), ("b", "Conv"), ("r", "Relu")
    floats = KernelTimes((kernel("transform", conv), kernel("multiply", conv, relu), kernel("both", other)), (1, 2, 5))
    steps = KernelTimes((kernel("quantize", ("q", "QuantizeLinear")), kernel("both", conv, other, relu)), (7, 4))
    assert layer_times(floats, steps, {"a": "features.0"}) == (
        LayerTime("features.0", "a", 3, 2),
        LayerTime("b", "b", 5, 2),
    )


def test_layers_that_matter_are_slower_by_more_than_kernels_scatter() -> None:
    layers = (
        LayerTime("slow", "slow", 1e-4, 2e-4),
        LayerTime("same", "same", 1e-4, 1.04e-4),
        LayerTime("fast", "fast", 2e-4, 1e-4),
        LayerTime("tiny", "tiny", 1e-7, 1e-6),
    )
    contenders = (Contender(FP32, 1e-3, None), Contender(INT8, 1e-3, Interval(1, 1, 1)))
    found = decided(MEASURED, "a CPU", 1, contenders, layers)
    assert [layer.module for layer in found.slower] == ["slow"]
