"""Parity rules: does an engine compute what the model computes? Pure arithmetic on arrays, no I/O.

The tolerance is derived, not guessed. *Truth* is the exported graph evaluated in float64. The *noise floor* is the
error that float32 itself makes: ONNX Runtime's, with every optimization off, against the truth on the same samples.
An engine must lie within `ERROR_MULTIPLE` times that floor, in relative L2 and in scaled maximum error, on every
sample. A model that is badly conditioned gets a wide tolerance because its float32 reference is wide; a model that
is well conditioned gets a narrow one; neither was chosen by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.errors import BundleRefused

SCHEMA = "cnncc.parity/1"

ERROR_MULTIPLE = 8.0
"""How many times the float32 noise floor an engine's error may be.

Right kernels differ from the reference by the order of their sums (Higham, Accuracy and Stability of Numerical
Algorithms, section 4.2: the error constant of a sum of n terms goes from n, one after another, to log₂ n, pairwise)
and by their algorithm (Barabasz et al., ACM TOMS 46(4), 2020: Winograd's error grows exponentially with the tile).
Measured on eight networks (a small CNN, ResNet-18 and -50, U-Net, VGG-11, SqueezeNet, MobileNetV2, DenseNet-121;
random weights, three inputs each), the largest relative L2 | scaled maximum error as multiples of the floor: ONNX
Runtime optimized 1.5 | 2.1, PyTorch 2.6 | 3.2, PyTorch channels-last 3.6 | 4.7, Winograd F(4,3) in every 3×3
convolution 3.0 | 5.0 (3.3 | 5.0 with its channels summed one after another, on four of the networks); bfloat16 at
least 11000 | 7900. Eight leaves right kernels a factor of 1.6 and wrong ones none.
"""

FLOOR_ULPS = 4.0
"""The floor is at least this many machine epsilons of the output's dtype, relative to the output's magnitude.

Copies, ReLU and max pooling are exact and have a floor of 0, while a right kernel may round once more than the
reference, or use an exp, tanh or erf of its own that is good to a few units in the last place.
"""

SAMPLING_Z = 3.0
"""Standard deviations of luck granted to a floor that was estimated from few elements."""

FLOOR_CEILING = 1e-3
"""A relative floor above this proves nothing: `ERROR_MULTIPLE` times it would accept a 1 % error."""


QUANTIZED_MULTIPLE = 1.0
"""The same for a quantized graph, whose floor is the worst of several runs with jitter (`cnncc.graph.jitter`).

A value that goes a step up instead of down makes all later layers round otherwise, so right evaluations differ nearly
as much as the quantization noise itself: on a residual network, MobileNetV2 and a network with squeeze-and-excite, 16
to 28 quantized layers, the floor was 0.05 to 0.07 of the output and an engine's error 0 to 0.65 of the floor. So this
finds what is grossly wrong; it cannot find a layer that rounds a little otherwise than it should.
"""

QUANTIZED_CEILING = 0.25
"""A relative floor of a quantized graph above this proves nothing: its noise is within 12 dB of its signal."""

FP16_MULTIPLE, BF16_MULTIPLE = 4.0, 2.0
"""The same for graphs in half precision, whose floor is the worst of several emulations (`cnncc.graph.half`).

Right evaluations differ by where they round. Measured on the trained digits CNN, ResNet-18, MobileNetV2, SqueezeNet and
EfficientNet-B0 (random weights, 96×96), the largest relative L2 error as multiples of the floor: no rounding 0.0, half
of the roundings left out 0.8, Winograd F(2,3) on rounded transforms 1.2, sums of float16 rounded after every 64
products 1.6, after every 16 (one instruction of a tensor core) 2.8. Only float16 is ever summed in its own type: tensor
cores sum products of bfloat16 in float32 (PTX ISA, mma), so its multiple needs no room for that. F(4,3) on rounded
transforms, 1.1 to 4.4, may be refused. Wrong ones in float16, wherever the outputs depend on the layer: its weights 1 %
off at least 8, its bias dropped 3 to 300, 3 % off in one channel of the last layer 2 to 18 (scaled maximum error).
bfloat16 hides eight times as much.
"""

HALF_CEILING = 0.125
"""A relative floor of a graph in half precision above this proves nothing: rounding leaves 18 dB of the worst sample.

`cnncc.compiler.narrow_stage` asks for 20 dB of all samples together.
"""

HALF_LUCK = 1.0
"""`SAMPLING_Z` for such a floor: the worst of eight runs is no lucky one."""


INTEGERS_LUCK = 1e-3
"""Share of an output's integers, such as classes of pixels, that may differ though they did in no run with jitter."""


@dataclass(frozen=True)
class Rules:
    """How a tolerance follows from a floor.

    Attributes:
        multiple: Of the floor that an engine's error may be.
        ceiling: Floor above which nothing is proven.
        luck: Standard deviations that the floor may have been lucky by.
        integers: Whether integers may differ too, as often as they do in the floor, times the multiple.
    """

    multiple: float
    ceiling: float
    luck: float = SAMPLING_Z
    integers: bool = True


FLOAT_RULES = Rules(ERROR_MULTIPLE, FLOOR_CEILING, integers=False)
FP16_RULES = Rules(FP16_MULTIPLE, HALF_CEILING, HALF_LUCK)
BF16_RULES = Rules(BF16_MULTIPLE, HALF_CEILING, HALF_LUCK)
QUANTIZED_RULES = Rules(QUANTIZED_MULTIPLE, QUANTIZED_CEILING)


@dataclass(frozen=True)
class Comparison:
    """One output of one sample, measured against another evaluation of it.

    Attributes:
        size: Elements of the output.
        elements: Elements compared (finite on both sides and in the reference).
        error_norm: ‖candidate − truth‖₂.
        truth_norm: ‖truth‖₂.
        max_error: Largest |candidate − truth|.
        max_truth: Largest |truth|.
        cosine: Cosine of the angle between the two; None where one of them is zero or nothing was compared.
        top1_equal: Positions whose largest class is the same.
        top1_total: Positions with classes; 0 for outputs that are no classes.
        nonfinite: Elements that are NaN, +Inf or −Inf on one side and something else on the other.
        differing: Elements of an integer or bool output that differ.
        epsilon: Machine epsilon of the output's dtype; 0 for integers.
        problem: Why the two cannot be compared (shape, dtype, absence); empty when they can.
    """

    size: int = 0
    elements: int = 0
    error_norm: float = 0.0
    truth_norm: float = 0.0
    max_error: float = 0.0
    max_truth: float = 0.0
    cosine: float | None = None
    top1_equal: int = 0
    top1_total: int = 0
    nonfinite: int = 0
    differing: int = 0
    epsilon: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Tolerance:
    """What an output's error may be.

    Attributes:
        rel_l2: Bound on ‖error‖₂ / ‖truth‖₂; None where the truth is zero.
        max_scaled: Bound on max|error| / max|truth| (on max|error| where the truth is zero).
        floor_rel_l2: The noise floor that ``rel_l2`` was derived from; None where it is not known (golden data).
        floor_max_scaled: The noise floor that ``max_scaled`` was derived from; None likewise.
        differing: Integers of a sample that may differ, where rounding decides some.
    """

    rel_l2: float | None
    max_scaled: float
    floor_rel_l2: float | None
    floor_max_scaled: float | None
    differing: int = 0


@dataclass(frozen=True)
class OutputParity:
    """One output over all samples.

    Attributes:
        output: Its name.
        elements: Elements compared, over all samples.
        max_abs: Largest absolute error, in the output's own unit.
        max_scaled: Largest error relative to the largest |truth| of its sample.
        rel_l2: Relative L2 error of the worst sample; None where the truth is zero.
        cosine: Smallest cosine; None where undefined.
        sqnr_db: Signal to noise of the worst sample, decibels; None where there is no error or no signal.
        top1_agreement: Fraction of positions whose largest class agrees; None for outputs that are no classes.
        nonfinite: Elements that are NaN or Inf on one side only.
        differing: Elements of an integer or bool output that differ.
        worst_sample: Sample with the largest relative error.
        tolerance: What was allowed; None where the pair is reported, not judged.
        failures: Sentences; empty when the output passed.
    """

    output: str
    elements: int
    max_abs: float
    max_scaled: float
    rel_l2: float | None
    cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None
    nonfinite: int
    differing: int
    worst_sample: str
    tolerance: Tolerance | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class SubjectParity:
    """One evaluation of the model against another.

    Attributes:
        subject: ``engine``, ``pytorch``, ``cleaned`` (the graph after its passes) or ``onnxruntime``.
        against: ``truth``, ``pytorch``, ``onnxruntime`` or ``golden``.
        judged: Whether it had to lie within a tolerance.
        outputs: One record per output.
    """

    subject: str
    against: str
    judged: bool
    outputs: tuple[OutputParity, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Every sentence of every output."""
        return tuple(failure for output in self.outputs for failure in output.failures)


@dataclass(frozen=True)
class LayerParity:
    """One intermediate tensor of the engine against the truth.

    Attributes:
        module: PyTorch module path.
        node: ONNX node name.
        op: ONNX operator.
        tensor: ONNX tensor.
        rel_l2: Relative L2 error of the engine; None where the truth is zero.
        sqnr_db: Signal to noise, decibels; None where there is no error or no signal.
        max_abs: Largest absolute error.
        floor_rel_l2: What float32 ONNX Runtime reaches here.
        within: Whether the engine lies within the tolerance derived for this tensor.
    """

    module: str
    node: str
    op: str
    tensor: str
    rel_l2: float | None
    sqnr_db: float | None
    max_abs: float
    floor_rel_l2: float | None
    within: bool


@dataclass(frozen=True)
class ParityReport:
    """The verdict on one engine.

    Attributes:
        schema: `SCHEMA`.
        passed: Whether every judged subject lies within its tolerance.
        failures: Sentences that say what does not, and on which output and sample.
        notes: What the failures point at, and what could not be checked.
        samples: Names of the inputs used.
        multiple: Of the noise floor that was allowed, as it was when the report was made.
        subjects: Who was compared with whom.
        layers: Layer by layer, in the graph's order; empty unless asked for.
    """

    schema: str
    passed: bool
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    samples: tuple[str, ...]
    multiple: float
    subjects: tuple[SubjectParity, ...]
    layers: tuple[LayerParity, ...] = ()

    def subject(self, subject: str, against: str = "truth") -> SubjectParity | None:
        """Return one comparison, or None where it was not made."""
        return next((s for s in self.subjects if (s.subject, s.against) == (subject, against)), None)


def make_report(
    samples: Sequence[str],
    subjects: Sequence[SubjectParity],
    *,
    notes: Sequence[str] = (),
    layers: Sequence[LayerParity] = (),
    rules: Rules = FLOAT_RULES,
) -> ParityReport:
    """Collect subjects into a verdict.

    Args:
        samples: Names of the inputs used.
        subjects: Judged and reported comparisons; only the judged ones decide.
        notes: Added to what the failures themselves point at.
        layers: Layer by layer, where asked for.
        rules: By which tolerances were derived.
    """
    judged = [subject for subject in subjects if subject.judged]
    failures = tuple(failure for subject in judged for failure in subject.failures)
    return ParityReport(
        SCHEMA,
        bool(judged) and not failures,
        failures,
        (*notes, *_diagnosis(judged)),
        tuple(samples),
        rules.multiple,
        tuple(subjects),
        tuple(layers),
    )


def from_plain(value: Any) -> ParityReport:
    """Read a report back from plain data (the content of ``parity.json``).

    Raises:
        BundleRefused: Another schema, or not a report.
    """
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise BundleRefused(f"the parity report's schema is not '{SCHEMA}'", hint="build the bundle again")
    try:
        return msgspec.convert(value, ParityReport)
    except msgspec.ValidationError as exc:
        raise BundleRefused(f"the parity report is not valid: {exc}", hint="build the bundle again") from exc


def compare(truth: NDArray[Any], candidate: NDArray[Any] | None, reference: NDArray[Any] | None = None) -> Comparison:
    """Measure a candidate's output against the truth.

    Args:
        truth: Float64 (or integer) evaluation, any shape.
        candidate: The output to judge; None where it is missing.
        reference: A float32 evaluation of the same output. It decides which elements are NaN or Inf (float64 does
            not overflow where float32 must), which dtype is right, and which integer elements float32 can decide;
            None takes the truth's own.
    """
    reference = truth if reference is None else reference
    if problem := _problem(truth, candidate, reference):
        return Comparison(problem=problem)
    assert candidate is not None  # _problem says so otherwise
    if reference.dtype.kind in "biu":
        decided = reference == truth
        differing = int(np.count_nonzero((candidate != truth) & decided))
        return Comparison(int(truth.size), int(truth.size), differing=differing)
    top1_equal, top1_total = _top1(truth, candidate)
    mask = np.isfinite(reference) & np.isfinite(candidate) & np.isfinite(truth)
    exact, found = truth[mask].astype(np.float64), candidate[mask].astype(np.float64)
    error = found - exact
    return Comparison(
        size=int(truth.size),
        elements=int(exact.size),
        error_norm=_norm(error),
        truth_norm=_norm(exact),
        max_error=_peak(error),
        max_truth=_peak(exact),
        cosine=_cosine(exact, found),
        top1_equal=top1_equal,
        top1_total=top1_total,
        nonfinite=_nonfinite_differences(candidate, reference),
        epsilon=float(np.finfo(candidate.dtype).eps),
    )


def derive_tolerance(floor: Sequence[Comparison], *, rules: Rules = FLOAT_RULES) -> Tolerance:
    """Derive an output's tolerance from the float32 reference's comparisons with the truth.

    The floor is the worst sample's: how many digits float32 gives is a property of the model more than of a sample.
    It is estimated from finitely many errors, so it is widened by the luck that few elements allow: the logarithm
    of the ratio of two root mean squares over n errors each has a standard deviation near √(1/n), hence the factor
    exp(`Rules.luck`/√n): with `SAMPLING_Z`, 7.7 for 2 elements, 2.6 for 10 logits, 1.1 for 1000.

    Args:
        floor: One comparison per sample.
        rules: Say the factor on the floor, and the luck.
    """
    scale_norm, scale_peak = _scales(floor)
    least = FLOOR_ULPS * max((c.epsilon for c in floor), default=0.0)
    counts = [c.elements for c in floor if c.elements]
    factor = rules.multiple * math.exp(rules.luck / math.sqrt(min(counts))) if counts else rules.multiple
    differing = 0
    if rules.integers and not least:  # floats have an epsilon
        lucky = min((c.size for c in floor), default=0) * INTEGERS_LUCK
        differing = int(rules.multiple * max((c.differing for c in floor), default=0) + lucky)
    floor_peak = max((c.max_error / (c.max_truth or scale_peak or 1.0) for c in floor), default=0.0)
    if not scale_norm:
        return Tolerance(None, factor * floor_peak, None, floor_peak, differing)
    floor_rel = max(c.error_norm / (c.truth_norm or scale_norm) for c in floor)
    return Tolerance(factor * max(floor_rel, least), factor * max(floor_peak, least), floor_rel, floor_peak)


def judge_output(
    subject: str,
    output: str,
    samples: Sequence[str],
    comparisons: Sequence[Comparison],
    tolerance: Tolerance | None = None,
) -> OutputParity:
    """Judge one output over all samples.

    Args:
        subject: Who produced it, as sentences name it (``the engine``).
        output: The output's name.
        samples: Sample names, in the order of ``comparisons``.
        comparisons: One per sample.
        tolerance: What is allowed; None reports the metrics without a verdict.
    """
    scale_norm, scale_peak = _scales(comparisons)
    relative = [c.error_norm / (c.truth_norm or scale_norm) if scale_norm else 0.0 for c in comparisons]
    scaled = [c.max_error / (c.max_truth or scale_peak or 1.0) for c in comparisons]
    worst = int(np.argmax(relative if scale_norm else scaled)) if comparisons else 0
    rel_l2 = max(relative) if scale_norm else None
    positions = sum(c.top1_total for c in comparisons)
    result = OutputParity(
        output=output,
        elements=sum(c.elements for c in comparisons),
        max_abs=max((c.max_error for c in comparisons), default=0.0),
        max_scaled=max(scaled, default=0.0),
        rel_l2=rel_l2,
        cosine=min((c.cosine for c in comparisons if c.cosine is not None), default=None),
        sqnr_db=-20 * math.log10(rel_l2) if rel_l2 else None,
        top1_agreement=sum(c.top1_equal for c in comparisons) / positions if positions else None,
        nonfinite=sum(c.nonfinite for c in comparisons),
        differing=sum(c.differing for c in comparisons),
        worst_sample=samples[worst] if comparisons else "",
        tolerance=tolerance,
        failures=(),
    )
    if tolerance is None:
        return result
    hard = _hard_failures(subject, output, samples, comparisons, tolerance.differing)
    failures = (*hard, *_soft_failures(subject, result))
    return replace(result, failures=failures)


def judge_floor(
    output: str, samples: Sequence[str], comparisons: Sequence[Comparison], *, rules: Rules = FLOAT_RULES
) -> OutputParity:
    """Judge whether float32 ONNX Runtime lies close enough to the truth to derive a tolerance from.

    Args:
        output: The output's name.
        samples: Sample names, in the order of ``comparisons``.
        comparisons: ONNX Runtime against the truth, one per sample.
        rules: Say where nothing can be proven any more.
    """
    subject = "float32 ONNX Runtime"
    tolerance = derive_tolerance(comparisons, rules=rules)
    result = judge_output(subject, output, samples, comparisons, tolerance)
    failures = list(result.failures)
    if tolerance.floor_rel_l2 is not None and tolerance.floor_rel_l2 > rules.ceiling:
        failures.append(
            f"{subject} reproduces output '{output}' only to {tolerance.floor_rel_l2:.1e} of its magnitude: the model "
            f"is badly conditioned there, and nothing can be proven about an engine"
        )
    failures += [
        f"{subject} gives NaN or Inf in every element of output '{output}': nothing is left to compare "
        f"(sample '{sample}')"
        for sample, found in zip(samples, comparisons, strict=True)
        if found.size and not found.elements and not found.problem
    ]
    return replace(result, failures=tuple(failures))


def _hard_failures(
    subject: str, output: str, samples: Sequence[str], comparisons: Sequence[Comparison], differing: int
) -> list[str]:
    """What no tolerance of errors forgives: shapes, dtypes, NaN, Inf, and more integers than may differ."""
    failures = []
    for sample, found in zip(samples, comparisons, strict=True):
        if found.problem:
            failures.append(f"{subject}: output '{output}' {found.problem} (sample '{sample}')")
        if found.nonfinite:
            failures.append(
                f"{subject}: output '{output}' is NaN or Inf in {found.nonfinite} elements where float32 ONNX Runtime "
                f"is not, or the other way round (sample '{sample}')"
            )
        if found.differing > differing:
            failures.append(
                f"{subject}: {found.differing} of {found.elements} integer elements of output '{output}' differ "
                f"(sample '{sample}')"
            )
    return failures


def _soft_failures(subject: str, found: OutputParity) -> list[str]:
    tolerance = found.tolerance
    assert tolerance is not None  # judge_output returns before this otherwise
    failures = []
    if found.rel_l2 is not None and tolerance.rel_l2 is not None and found.rel_l2 > tolerance.rel_l2:
        failures.append(
            f"{subject}: output '{found.output}' is off by {found.rel_l2:.1e} relative L2 on sample "
            f"'{found.worst_sample}', allowed is {tolerance.rel_l2:.1e}{_floor_words(tolerance.floor_rel_l2)}"
        )
    if found.max_scaled > tolerance.max_scaled:
        failures.append(
            f"{subject}: one element of output '{found.output}' is off by {found.max_scaled:.1e} of the output's "
            f"largest value, allowed is {tolerance.max_scaled:.1e}{_floor_words(tolerance.floor_max_scaled)}"
        )
    return failures


def _floor_words(floor: float | None) -> str:
    return "" if floor is None else f" (float32 ONNX Runtime reaches {floor:.1e})"


def _diagnosis(judged: Sequence[SubjectParity]) -> list[str]:
    """Say which stage broke the model: the first in the chain that left its tolerance."""
    stages = {
        "pytorch": "PyTorch and the exported graph disagree: the export changed the model",
        "cleaned": "the graph after its passes and the exported graph disagree: a graph pass changed the model",
        "engine": "the graphs agree and the engine does not: the target built it wrong",
    }
    failed = {subject.subject for subject in judged if subject.failures}
    if "onnxruntime" in failed:  # no tolerance, so no verdict on any stage
        return []
    passed = {subject.subject for subject in judged} - failed
    first = next((stage for stage in stages if stage in failed), None)
    if first is None or (first == "engine" and "cleaned" not in passed):
        return []
    return [stages[first]]


def _problem(truth: NDArray[Any], candidate: NDArray[Any] | None, reference: NDArray[Any]) -> str:
    if candidate is None:
        return "is missing"
    if candidate.shape != truth.shape:
        return f"has shape {list(candidate.shape)}, the model gives {list(truth.shape)}"
    float_like = candidate.dtype.kind == "f" and reference.dtype.kind == "f"
    # truth is float64 where the model is float32: without a float32 reference any float dtype will do
    if candidate.dtype != reference.dtype and not (float_like and reference is truth):
        return f"has dtype {candidate.dtype}, the model gives {reference.dtype}"
    return ""


def _norm(values: NDArray[np.float64]) -> float:
    """Euclidean norm that neither overflows nor underflows: the largest element is scaled to 1 first."""
    peak = _peak(values)
    return peak * float(np.sqrt(np.sum(np.square(values / peak)))) if peak else 0.0


def _peak(values: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(values))) if values.size else 0.0


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    norm_a, norm_b = _norm(a), _norm(b)
    if not norm_a or not norm_b:
        return None
    return min(1.0, max(-1.0, float(np.sum((a / norm_a) * (b / norm_b)))))


def _top1(truth: NDArray[Any], candidate: NDArray[Any]) -> tuple[int, int]:
    """Count positions whose largest class agrees: the last axis of [N, classes], axis 1 of [N, classes, H, W]."""
    axis = {2: 1, 4: 1}.get(truth.ndim)
    if axis is None or truth.size == 0 or truth.shape[axis] < 2:
        return 0, 0
    agree = np.argmax(truth, axis=axis) == np.argmax(candidate, axis=axis)
    return int(np.count_nonzero(agree)), int(agree.size)


def _nonfinite_differences(candidate: NDArray[Any], reference: NDArray[Any]) -> int:
    differ = np.isnan(candidate) != np.isnan(reference)
    differ |= np.isposinf(candidate) != np.isposinf(reference)
    differ |= np.isneginf(candidate) != np.isneginf(reference)
    return int(np.count_nonzero(differ))


def _scales(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Magnitudes that a sample whose truth is all zero borrows from the others; 0 when all are zero."""
    norm = max((c.truth_norm for c in comparisons), default=0.0)
    return norm, max((c.max_truth for c in comparisons), default=0.0)
