"""Tensor specs: what fits goes through, what does not is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import DTYPES, TensorSpec, check_feeds

SIZES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@given(SIZES, SIZES, st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_an_array_fits_its_own_spec_and_no_other(
    want: tuple[int, ...], have: tuple[int, ...], want_dtype: str, have_dtype: str
) -> None:
    spec = TensorSpec("x", want, want_dtype)
    array = np.zeros(have, have_dtype)
    if (want, want_dtype) == (have, have_dtype):
        spec.check(array)
    else:
        with pytest.raises(DataRefused, match="input 'x' has"):
            spec.check(array)


def test_a_symbol_takes_any_size_until_it_is_bound() -> None:
    spec = TensorSpec("x", ("N", 3, "N"))
    assert spec.symbols == ("N",)
    assert str(spec) == "x: float32[N, 3, N]"
    spec.check(np.zeros((5, 3, 7), "f"))
    with pytest.raises(DataRefused, match=r"takes \[2, 3, 2\]"):
        spec.bind({"N": 2}).check(np.zeros((5, 3, 7), "f"))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "inputs missing: a, b"),
        ({"a": np.zeros(1, "f")}, "inputs missing: b"),
        ({"a": np.zeros(1, "f"), "b": np.zeros(1, "f"), "c": np.zeros(1, "f")}, "unknown inputs: c"),
        ({"a": np.zeros(1, "f"), "b": np.zeros(2, "f")}, "input 'b' has shape"),
        ({"a": np.zeros(1, "f"), "b": [0.0]}, "input 'b' is a list"),
    ],
    ids=["none", "one missing", "one too many", "shape", "no array"],
)
def test_feeds_that_do_not_fit_are_named(feeds: dict[str, np.ndarray], message: str) -> None:  # type: ignore[type-arg]
    specs = (TensorSpec("a", (1,)), TensorSpec("b", (1,)))
    with pytest.raises(DataRefused, match=message):
        check_feeds(specs, feeds)
