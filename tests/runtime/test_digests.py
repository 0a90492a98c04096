"""Digests: equal data, equal digest; different data, another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc_runtime.digests import canonical_json, digest_array, digest_bytes, digest_file, digest_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
PLAIN = st.recursive(
    SCALARS.filter(lambda value: not isinstance(value, str) or value.encode(errors="ignore").decode() == value),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(PLAIN)
def test_the_digest_does_not_depend_on_key_order(value: Any) -> None:
    assert digest_json(reordered(value)) == digest_json(value)


@given(PLAIN, PLAIN)
def test_different_data_has_different_text(a: Any, b: Any) -> None:
    assert (canonical_json(a) == canonical_json(b)) == (repr(reordered(a)) == repr(reordered(b)) or a_is(a, b))


def a_is(a: Any, b: Any) -> bool:
    """Whether two values are the same JSON: dictionaries without order, floats by their text."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a_is(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(a_is, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_numbers_that_json_lacks_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # more than one piece
    (tmp_path / "f").write_bytes(data)
    assert digest_file(tmp_path / "f") == digest_bytes(data) == "sha256:" + hashlib.sha256(data).hexdigest()


def test_an_array_is_told_by_dtype_shape_and_elements() -> None:
    base = np.arange(12, dtype=np.int32)
    others = [base.astype(np.int64), base.reshape(3, 4), base.reshape(4, 3), base.view(np.float32), base[::-1]]
    assert len({digest_array(array) for array in [base, *others]}) == 6
    assert digest_array(base.reshape(3, 4)[:, ::2]) == digest_array(np.ascontiguousarray(base.reshape(3, 4)[:, ::2]))
