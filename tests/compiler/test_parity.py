"""The rules of parity: what they accept, what they reject, and what they say about it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.compiler.parity import (
    ERROR_MULTIPLE,
    FLOOR_ULPS,
    SCHEMA,
    Comparison,
    OutputParity,
    SubjectParity,
    compare,
    derive_tolerance,
    from_plain,
    judge_floor,
    judge_output,
    make_report,
)
from cnncc_runtime.bundle import to_plain
from cnncc_runtime.errors import BundleRefused

EPS = float(np.finfo(np.float32).eps)
seeds = st.integers(0, 2**32 - 1)


def judge(truths, candidates, floors):
    """Judge one output over samples, with the tolerance derived from the floors."""
    names = [f"s{n}" for n in range(len(truths))]
    tolerance = derive_tolerance([compare(t, f, f) for t, f in zip(truths, floors, strict=True)])
    found = [compare(t, c, f) for t, c, f in zip(truths, candidates, floors, strict=True)]
    return judge_output("the engine", "y", names, found, tolerance)


def convolution(seed, *, weights=None, order=None, dtype=np.float32, outputs=64, depth=288):
    """A 1×1 convolution as a product: float64 truth, and float32 sums in the order asked for."""
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((outputs, depth)).astype(np.float32)
    x = generator.standard_normal((depth, 49)).astype(np.float32)
    used = w if weights is None else weights(w)
    picks = np.arange(depth) if order is None else order(generator, depth)
    truth = w.astype(np.float64) @ x.astype(np.float64)
    found = (used[:, picks].astype(dtype) @ x[picks].astype(dtype)).astype(np.float32)
    return truth, found


def sequential(seed, outputs=64, depth=288):
    """The same product, summed one after another: the worst order there is."""
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((outputs, depth)).astype(np.float32)
    x = generator.standard_normal((depth, 49)).astype(np.float32)
    total = np.zeros((outputs, 49), np.float32)
    for k in range(depth):
        total += w[:, k, None] * x[k]
    return total


class TestAccepts:
    def test_an_exact_copy(self):
        truth, floor = convolution(0)
        result = judge([truth], [floor], [floor])
        assert result.failures == ()
        exact = truth.astype(np.float32)
        assert judge([exact.astype(np.float64)], [exact], [exact]).sqnr_db is None

    @given(seeds)
    @settings(max_examples=50, deadline=None)
    def test_sums_in_any_order(self, seed):
        truth, floor = convolution(seed)
        _, shuffled = convolution(seed, order=lambda generator, depth: generator.permutation(depth))
        result = judge([truth], [shuffled], [floor])
        assert result.failures == (), result
        assert judge([truth], [sequential(seed)], [floor]).failures == ()

    @given(seeds)
    @settings(max_examples=50, deadline=None)
    def test_sums_in_any_order_when_only_ten_logits_tell(self, seed):
        truth, floor = convolution(seed, outputs=10)
        _, shuffled = convolution(seed, outputs=10, order=lambda generator, depth: generator.permutation(depth))
        truth, floor, shuffled = truth[:, :1].T, floor[:, :1].T, shuffled[:, :1].T
        assert judge([truth] * 2, [shuffled] * 2, [floor] * 2).failures == ()

    def test_one_more_rounding_where_the_reference_is_exact(self):
        floor = np.linspace(1, 2, 1000, dtype=np.float32)
        assert judge([floor.astype(np.float64)], [np.nextafter(floor, 3)], [floor]).failures == ()


WRONG_WEIGHTS = {
    "two channels exchanged": lambda w: w[[1, 0, *range(2, len(w))]],
    "weights off by 1 %": lambda w: w * np.float32(1.01),
    "weights rounded to float16": lambda w: w.astype(np.float16).astype(np.float32),
    "one weight lost": lambda w: w * (np.arange(w.size).reshape(w.shape) != 77),
}


class TestRejects:
    @pytest.mark.parametrize("case", WRONG_WEIGHTS)
    @given(seed=seeds)
    @settings(max_examples=25, deadline=None)
    def test_wrong_weights(self, case, seed):
        truth, floor = convolution(seed)
        _, wrong = convolution(seed, weights=WRONG_WEIGHTS[case])
        assert judge([truth], [wrong], [floor]).failures

    @given(seeds)
    @settings(max_examples=25, deadline=None)
    def test_float16_outputs_of_right_weights(self, seed):
        truth, floor = convolution(seed)
        assert judge([truth], [floor.astype(np.float16).astype(np.float32)], [floor]).failures

    @given(seeds)
    @settings(max_examples=25, deadline=None)
    def test_one_wrong_pixel_among_many(self, seed):
        truth, floor = convolution(seed, outputs=256)
        wrong = floor.copy()
        wrong[3, 3] += np.float32(1e-4) * np.abs(truth).max()
        failures = judge([truth], [wrong], [floor]).failures
        assert any("one element" in failure for failure in failures)

    def test_a_wrong_sample_among_right_ones(self):
        pairs = [convolution(seed) for seed in range(8)]
        candidates = [floor for _, floor in pairs]
        candidates[5] = candidates[5] * np.float32(1.001)
        result = judge([t for t, _ in pairs], candidates, [f for _, f in pairs])
        assert result.worst_sample == "s5"
        assert "on sample 's5'" in result.failures[0]

    def test_an_error_in_a_sample_that_is_small_beside_the_others(self):
        truth, floor = convolution(1)
        small, small_floor = truth * 2**-20, floor * np.float32(2**-20)
        wrong = small_floor * np.float32(1.001)
        assert judge([truth, small], [floor, wrong], [floor, small_floor]).failures


class TestInvariance:
    @given(seeds, st.integers(-60, 60))
    @settings(max_examples=40, deadline=None)
    def test_scaling_everything_changes_nothing_relative(self, seed, power):
        truth, floor = convolution(seed, outputs=8)
        _, other = convolution(seed, outputs=8, order=lambda generator, depth: generator.permutation(depth))
        scale = 2.0**power
        plain = judge([truth], [other], [floor])
        scaled = judge([truth * scale], [other * np.float32(scale)], [floor * np.float32(scale)])
        assert scaled.failures == plain.failures
        assert scaled.rel_l2 == pytest.approx(plain.rel_l2, rel=1e-12)
        assert scaled.max_scaled == pytest.approx(plain.max_scaled, rel=1e-12)
        assert scaled.cosine == pytest.approx(plain.cosine, rel=1e-12)
        assert scaled.max_abs == pytest.approx(plain.max_abs * scale, rel=1e-12)

    @given(seeds, st.permutations(range(4)))
    @settings(max_examples=40, deadline=None)
    def test_the_order_of_samples_does_not_matter(self, seed, order):
        truths, floors = zip(*[convolution(seed + n, outputs=4) for n in range(4)], strict=True)
        found = [f + np.float32(n * 1e-6) for n, f in enumerate(floors)]
        a = judge(truths, found, floors)
        b = judge([truths[n] for n in order], [found[n] for n in order], [floors[n] for n in order])
        assert (a.rel_l2, a.max_abs, a.cosine, a.tolerance) == (b.rel_l2, b.max_abs, b.cosine, b.tolerance)
        assert bool(a.failures) == bool(b.failures)

    @given(seeds, st.floats(1e-9, 1e-2), st.floats(1.1, 100))
    @settings(max_examples=60, deadline=None)
    def test_more_noise_is_never_better(self, seed, amplitude, factor):
        truth, floor = convolution(seed, outputs=8)
        noise = np.random.default_rng(seed).standard_normal(truth.shape)
        less, more = truth + amplitude * noise, truth + amplitude * factor * noise
        tolerance = derive_tolerance([compare(truth, floor, floor)])
        low, high = (
            judge_output("the engine", "y", ["s"], [compare(truth, found)], tolerance) for found in (less, more)
        )
        assert low.rel_l2 < high.rel_l2
        assert low.max_abs < high.max_abs
        assert low.sqnr_db > high.sqnr_db
        assert high.failures or not low.failures


class TestTolerance:
    def test_is_the_stated_multiple_of_the_floor(self):
        truth, floor = convolution(0, outputs=512)
        tolerance = derive_tolerance([compare(truth, floor, floor)])
        error = np.linalg.norm(floor - truth) / np.linalg.norm(truth)
        assert tolerance.floor_rel_l2 == pytest.approx(error)
        # the floor under the floor rules here: a product of 288 terms is nearly exact
        assert tolerance.rel_l2 == pytest.approx(ERROR_MULTIPLE * max(error, FLOOR_ULPS * EPS), rel=0.03)

    def test_follows_a_badly_conditioned_model(self):
        generator = np.random.default_rng(0)
        x = generator.standard_normal((1, 1000)).astype(np.float32)
        truth = (x.astype(np.float64) + 1e3) - 1e3
        floor = (x + np.float32(1e3)) - np.float32(1e3)
        other = x + np.float32(0)  # more exact than the floor
        tolerance = derive_tolerance([compare(truth, floor, floor)])
        assert tolerance.floor_rel_l2 > 100 * EPS
        assert judge([truth], [other], [floor]).failures == ()

    def test_is_wider_where_few_elements_tell(self):
        few = [Comparison(size=2, elements=2, error_norm=1e-5, truth_norm=1, max_error=1e-5, max_truth=1, epsilon=EPS)]
        many = [Comparison(10**6, 10**6, 1e-5, 1, 1e-5, 1, epsilon=EPS)]
        assert derive_tolerance(few).rel_l2 > 5 * derive_tolerance(many).rel_l2
        assert derive_tolerance(many).rel_l2 == pytest.approx(ERROR_MULTIPLE * 1e-5, rel=0.01)

    def test_a_floor_that_proves_nothing_is_a_failure(self):
        truth = np.random.default_rng(0).standard_normal((1, 100))
        floor = (truth * 1.01).astype(np.float32)
        result = judge_floor("y", ["s"], [compare(truth, floor, floor)])
        assert any("badly conditioned" in failure for failure in result.failures)

    def test_a_floor_that_is_nan_everywhere_is_a_failure(self):
        floor = np.full((1, 4), np.nan, np.float32)
        result = judge_floor("y", ["s"], [compare(np.ones((1, 4)), floor, floor)])
        assert any("every element" in failure for failure in result.failures)


class TestNonFinite:
    @pytest.mark.parametrize(
        ("reference", "engine", "differ"),
        [
            (np.nan, np.nan, 0),
            (np.inf, np.inf, 0),
            (np.inf, -np.inf, 1),
            (np.nan, 1.0, 1),
            (1.0, np.nan, 1),
            (1.0, np.inf, 1),
            (1.0, -np.inf, 1),
            (-np.inf, 1.0, 1),
            (np.inf, np.nan, 1),
        ],
    )
    def test_must_be_where_float32_makes_them(self, reference, engine, differ):
        truth = np.ones((1, 50))
        floor, found = np.ones((2, 1, 50), np.float32)
        floor[0, 7], found[0, 7] = reference, engine
        result = judge([truth], [found], [floor])
        assert result.nonfinite == differ
        assert bool(result.failures) == bool(differ)
        if differ:
            assert "output 'y' is NaN or Inf in 1 elements" in result.failures[0]

    def test_overflow_that_float64_does_not_have_is_no_failure(self):
        truth = np.array([[1e39, 1.0, 2.0]])
        floor = np.array([[np.inf, 1.0, 2.0]], np.float32)
        result = judge([truth], [floor.copy()], [floor])
        assert result.failures == ()
        assert result.elements == 2


class TestOddOutputs:
    def test_integers_must_be_equal(self):
        truth = np.arange(10)
        wrong = truth.copy()
        wrong[3] = 0
        assert judge([truth], [truth], [truth]).failures == ()
        result = judge([truth], [wrong], [truth])
        assert result.differing == 1
        assert "1 of 10 integer elements" in result.failures[0]

    def test_bools_must_be_equal(self):
        truth = np.array([True, False])
        assert judge([truth], [~truth], [truth]).differing == 2

    def test_an_integer_that_float32_cannot_decide_is_not_judged(self):
        truth, floor, found = np.array([3, 4]), np.array([2, 4]), np.array([2, 4])
        assert judge([truth], [found], [floor]).failures == ()

    def test_a_scalar(self):
        truth, floor = np.array(1.5), np.array(1.5, np.float32)
        assert judge([truth] * 2, [floor] * 2, [floor] * 2).failures == ()
        assert judge([truth] * 2, [floor * np.float32(1.001)] * 2, [floor] * 2).failures

    def test_an_empty_output(self):
        empty = np.zeros((1, 0, 4), np.float32)
        result = judge([empty.astype(np.float64)], [empty], [empty])
        assert (result.failures, result.elements, result.rel_l2, result.cosine) == ((), 0, None, None)

    def test_an_output_that_is_zero_must_stay_zero(self):
        zero = np.zeros((1, 8), np.float32)
        assert judge([zero.astype(np.float64)], [zero], [zero]).failures == ()
        assert judge([zero.astype(np.float64)], [zero + np.float32(1e-3)], [zero]).failures

    def test_a_sample_that_is_zero_borrows_the_scale_of_the_others(self):
        truth, floor = convolution(0)
        zero = np.zeros_like(truth)
        tiny = np.full(truth.shape, 1e-8, np.float32)
        assert judge([truth, zero], [floor, tiny], [floor, tiny * 0]).failures == ()
        assert judge([truth, zero], [floor, floor], [floor, tiny * 0]).failures

    def test_a_constant_output(self):
        constant = np.full((1, 16), 0.1, np.float32)
        truth = np.full((1, 16), 0.1)
        assert judge([truth], [constant], [constant]).failures == ()

    @pytest.mark.parametrize(
        ("found", "sentence"),
        [
            (None, "is missing"),
            (np.zeros((1, 3), np.float32), "has shape [1, 3], the model gives [1, 4]"),
            (np.zeros((1, 4), np.float64), "has dtype float64, the model gives float32"),
            (np.zeros((1, 4), np.int32), "has dtype int32, the model gives float32"),
        ],
    )
    def test_what_cannot_be_compared_fails(self, found, sentence):
        floor = np.zeros((1, 4), np.float32)
        assert sentence in judge([floor.astype(np.float64)], [found], [floor]).failures[0]

    def test_huge_and_tiny_values_neither_overflow_nor_vanish(self):
        for scale in (1e300, 1e-300):
            truth = np.array([[3.0, 4.0]]) * scale
            found = compare(truth, truth * 1.1)
            assert found.error_norm / found.truth_norm == pytest.approx(0.1)


class TestTopOne:
    def test_counts_classes_along_the_right_axis(self):
        logits = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
        other = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
        assert compare(logits, other).top1_equal == 1
        maps = np.zeros((1, 2, 2, 2))
        maps[0, 1, 0, 0] = 1
        found = compare(maps, np.zeros_like(maps))
        assert (found.top1_equal, found.top1_total) == (3, 4)

    @pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 4), (1, 0), ()])
    def test_says_nothing_of_outputs_that_are_no_classes(self, shape):
        assert compare(np.ones(shape), np.ones(shape)).top1_total == 0


def subject(name, *failures, judged=True):
    output = OutputParity("y", 1, 0.0, 0.0, 0.0, None, None, None, 0, 0, "s", None, failures)
    return SubjectParity(name, "truth", judged, (output,))


class TestReport:
    def test_passes_when_every_judged_subject_does(self):
        report = make_report(["s"], [subject("onnxruntime"), subject("engine"), subject("pair", "bad", judged=False)])
        assert report.passed
        assert report.failures == ()

    def test_that_judged_nobody_did_not_pass(self):
        assert not make_report([], []).passed

    @pytest.mark.parametrize(
        ("failed", "note"),
        [
            ({"pytorch"}, "the export changed the model"),
            ({"cleaned", "engine"}, "a graph pass changed the model"),
            ({"engine"}, "the target built it wrong"),
            ({"onnxruntime", "engine"}, None),
            (set(), None),
        ],
    )
    def test_says_which_stage_broke_the_model(self, failed, note):
        names = ("onnxruntime", "pytorch", "cleaned", "engine")
        report = make_report(["s"], [subject(name, *(["bad"] if name in failed else [])) for name in names])
        assert report.passed == (not failed)
        assert [note in text for text in report.notes] == ([True] if note else [])

    def test_survives_json(self):
        truth, floor = convolution(0)
        judged = SubjectParity("engine", "truth", True, (judge([truth], [floor * np.float32(1.1)], [floor]),))
        report = make_report(["a"], [judged], notes=["n"])
        assert not report.passed
        assert from_plain(json.loads(json.dumps(to_plain(report), allow_nan=False))) == report

    @pytest.mark.parametrize("bad", [None, [], {}, {"schema": "cnncc.parity/0"}, {"schema": SCHEMA, "passed": "yes"}])
    def test_refuses_what_is_no_report(self, bad):
        with pytest.raises(BundleRefused):
            from_plain(bad)
