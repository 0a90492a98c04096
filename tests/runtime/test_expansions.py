"""Weights that are made when an engine first runs: what comes out, what is refused, and whose memory it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cnncc_runtime
from cnncc_runtime.weights import Expansion, WeightRecord, WeightsRecord, expand
from tests.runtime.conftest import WEIGHTY
from tests.runtime.engine_files import PARTS, ROWS, WEIGHTS, WEIGHTY_RECORD, make_bundle, manifest
from tests.runtime.test_sessions import FOUR, Make, in_process
from tests.runtime.test_weights import assert_refused

TIMES = 8
X = np.linspace(0, 1, 1024, dtype="f")[None]
MATRIX = np.array([[1.0], [0.5], [-2.0], [3.0], [0.25], [-1.0], [4.0], [1.5]])
STORED = np.random.default_rng(0).uniform(0.5, 1.5, (PARTS, ROWS // TIMES, 1, 1024)).astype("f")


@pytest.fixture
def expanded(engines: Path, tmp_path: Path) -> Path:
    """A bundle whose engine takes 48 MiB of weights, made of a file of 6."""
    size = STORED[0].nbytes
    tensors = [
        WeightRecord(part * size, (ROWS, 1024), "float32", Expansion(PARTS, ROWS // TIMES)) for part in range(PARTS)
    ]
    matrix = WeightRecord(PARTS * size, MATRIX.shape, "float64")
    record = WeightsRecord(WEIGHTS, (*tensors, matrix), {0: tuple(range(PARTS))})
    described = manifest(*WEIGHTY, engine=replace(WEIGHTY_RECORD, weights=record))
    content = STORED.tobytes() + MATRIX.tobytes()
    return make_bundle(tmp_path / "expanded.cnncc", described, engines / "weighty.so", content)


def test_an_engine_takes_what_is_made_of_the_file(expanded: Path) -> None:
    assert (expanded / WEIGHTS).stat().st_size == STORED.nbytes + MATRIX.nbytes
    made = MATRIX @ STORED.astype("d")
    with cnncc_runtime.open(expanded) as one, cnncc_runtime.open(expanded) as two:
        for session in (one, two):
            np.testing.assert_allclose(session.run({"x": X})["y"], X + made.sum((0, 1, 2)) * X, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    parts=st.integers(1, 4), rows=st.integers(1, 36), columns=st.integers(1, 9), width=st.integers(1, 9000),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_an_expansion_is_a_product_rounded_once(parts: int, rows: int, columns: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, stored = rng.standard_normal((rows, columns)), rng.standard_normal((parts, columns, width)).astype("f")
    got = np.full((parts, rows, width), np.nan, "f")
    expand(matrix, stored, got)
    exact = np.einsum("rc,pcw->prw", matrix, stored.astype("d"))
    np.testing.assert_allclose(got, exact, rtol=6.1e-8, atol=1e-12)


def tensor(**fields: Any) -> Callable[[Any], None]:
    return lambda weights: weights["tensors"][1].update(fields)


def matrix(**fields: Any) -> Callable[[Any], None]:
    return lambda weights: weights["tensors"][PARTS].update(fields)


def expansion(**fields: Any) -> Callable[[Any], None]:
    return lambda weights: weights["tensors"][1]["expansion"].update(fields)


@pytest.mark.parametrize(
    ("title", "change"),
    [
        ("a matrix that is not there", expansion(matrix=PARTS + 1)),
        ("a matrix before the first", expansion(matrix=-1)),
        ("itself as matrix", expansion(matrix=1)),
        ("another expanded tensor as matrix", expansion(matrix=0)),
        ("a matrix of float32", matrix(dtype="float32")),
        ("a matrix of three axes", matrix(shape=[TIMES, 1, 1])),
        ("a matrix without columns", matrix(shape=[TIMES, 0])),
        ("a matrix that makes sixteen of one", matrix(shape=[2 * TIMES, 1])),
        ("a matrix that is expanded", matrix(expansion={"matrix": PARTS, "parts": 1})),
        ("no parts", expansion(parts=0)),
        ("parts that do not divide it", expansion(parts=ROWS * 1024 + 1)),
        ("another dtype", tensor(dtype="int32")),
        ("a size of zero", tensor(shape=[0, 1024])),
        ("more than the file holds", tensor(shape=[8 * TIMES * ROWS, 1024])),
        ("a surplus field", expansion(surplus=1)),
    ],
)
def test_a_hostile_expansion_is_refused_unread(expanded: Path, title: str, change: Callable[[Any], None]) -> None:
    assert_refused(expanded, title, change)


def test_memory_is_taken_by_the_first_run_and_the_files_pages_are_given_back(bundle: Make, expanded: Path) -> None:
    code = f"""
import numpy as np
from tests.runtime.test_sessions import pages, rss
import cnncc_runtime
small = cnncc_runtime.open({str(bundle("identity", *FOUR))!r})
small.run({{"x": np.ones(4, "f")}})
before = rss("VmHWM")
session = cnncc_runtime.open({str(expanded)!r})
opened = rss("VmHWM") - before
for _ in range(2):
    session.run({{"x": np.ones((1, 1024), "f")}})
print(opened, rss("VmHWM") - before, pages("weights.bin")["Rss"] / 1024)
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr
    opened, peak, resident = map(float, done.stdout.split())
    assert opened < 4, "nothing has run yet"
    assert resident < 0.5, "pages of the file that nobody reads again"
    assert 48 < peak < 48 * 1.15 + 3, "there was a copy"


def test_weights_for_which_no_memory_is_left_are_an_error_with_the_way_out(expanded: Path) -> None:
    code = f"""
import resource
import numpy as np
import cnncc_runtime
from tests.runtime.test_sessions import rss
np.ones((8, 8)) @ np.ones((8, 4096))  # BLAS takes its own memory at its first product
session = cnncc_runtime.open({str(expanded)!r}, threads=1)
most = int((rss("VmSize") + 16) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    session.run({{"x": np.ones((1, 1024), "f")}})
except cnncc_runtime.errors.RunFailed as exc:
    print(exc)
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr
    assert "no memory is left for the engine's weights" in done.stdout
    assert "--winograd-growth" in done.stdout
