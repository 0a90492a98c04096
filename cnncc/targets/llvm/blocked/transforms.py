"""The matrices of Winograd's convolution: Toom-Cook interpolation at a few points.

An output tile of m × m pixels under a 3 × 3 kernel is Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, where d are the (m + 2) × (m + 2)
pixels under it (Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4). Bᵀ takes polynomial
products at points, G evaluates the kernel there, Aᵀ interpolates.

The points are 0, infinity and pairs ±p. F(4×4) with the usual ±1 and ±2 is 4.3 times less accurate than the direct
sum, with ±5/8 and ±3/2 only 2 times, at the same number of operations: powers of a point spread less the nearer it is
to one (Barabasz, Anderson, Soodhalter & Gregg, Error Analysis and Improving the Accuracy of Winograd Convolution for
Deep Neural Networks, 2020, section 5). Squares and cubes of both are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

KERNEL_SIZE = 3
"""Rows and columns of the kernel."""

Name = Callable[[Any], Any]
"""Computes a value once: returns what stands for it."""
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Transform:
    """Winograd's convolution of one tile size, along one axis.

    Attributes:
        outputs: Pixels of an output tile, m.
        points: The positive one of each pair of points.
        data: Bᵀ, ``[m + 2, m + 2]``; its rows follow 0, p, −p, q, −q, infinity.
        kernel: G, ``[m + 2, 3]``.
        result: Aᵀ, ``[m, m + 2]``.
    """

    outputs: int
    points: tuple[float, ...]
    data: Matrix
    kernel: Matrix
    result: Matrix

    @property
    def size(self) -> int:
        """Pixels under a tile, and products along one axis."""
        return self.outputs + KERNEL_SIZE - 1

    @property
    def frequencies(self) -> int:
        """Products of a tile."""
        return self.size * self.size

    def spread(self, pixels: Sequence[Any], name: Name) -> list[Any]:
        """Return Bᵀ d along one axis; the rows of ±p share their even and odd parts.

        Args:
            pixels: m + 2 expressions.
            name: Names the shared parts.
        """
        rows: list[Any] = [_linear(self.data[0], pixels)]
        for pair in range(len(self.points)):
            row = self.data[1 + 2 * pair]
            even = name(_linear([c if k % 2 == 0 else 0.0 for k, c in enumerate(row)], pixels))
            lead = next(c for k, c in reversed(list(enumerate(row))) if c and k % 2)
            odd = name(_linear([c / lead if k % 2 else 0.0 for k, c in enumerate(row)], pixels))
            step = odd if lead == 1.0 else odd * lead
            rows += [even + step, even - step]
        return [*rows, _linear(self.data[-1], pixels)]

    def gather(self, products: Sequence[Any], name: Name) -> list[Any]:
        """Return Aᵀ m along one axis; ±p contribute their sum or their difference.

        Args:
            products: m + 2 expressions.
            name: Names the shared parts.
        """
        pairs = range(len(self.points))
        sums = [name(products[1 + 2 * k] + products[2 + 2 * k]) for k in pairs]
        differences = [name(products[1 + 2 * k] - products[2 + 2 * k]) for k in pairs]
        found = []
        for power, row in enumerate(self.result):
            parts = differences if power % 2 else sums
            values = [products[0], products[-1], *parts]
            found.append(_linear([row[0], row[-1], *(row[1 + 2 * k] for k in pairs)], values))
        return found

    @property
    def weight_matrix(self) -> NDArray[np.float64]:
        """G ⊗ G, ``[frequencies, taps]``: G g Gᵀ of a kernel whose rows follow each other."""
        return np.kron(np.array(self.kernel), np.array(self.kernel))


@cache
def transform_of(outputs: int) -> Transform:
    """Return F(m, 3), for m of 2 or 4."""
    points = _POINTS[outputs]
    signed = [Fraction(0), *(s * p for p in points for s in (1, -1))]
    size = outputs + KERNEL_SIZE - 1
    data = [_product(q for q in signed if q != p) for p in signed] + [_product(iter(signed))]
    scales = [_difference(p, signed) for p in signed]
    kernel = [[p**k / scale for k in range(KERNEL_SIZE)] for p, scale in zip(signed, scales, strict=True)]
    result = [[p**power for p in signed] + [Fraction(power == outputs - 1)] for power in range(outputs)]
    return Transform(
        outputs,
        tuple(float(p) for p in points),
        _matrix([row + [Fraction(0)] * (size - len(row)) for row in data]),
        _matrix([*kernel, [Fraction(0)] * (KERNEL_SIZE - 1) + [Fraction(1)]]),
        _matrix(result),
    )


_POINTS = {2: (Fraction(1),), 4: (Fraction(5, 8), Fraction(3, 2))}


def _product(points: Any) -> list[Fraction]:
    """Return the coefficients of ∏ (x − p), lowest power first."""
    polynomial = [Fraction(1)]
    for point in points:
        shifted = [Fraction(0), *polynomial]
        polynomial = [high - point * low for high, low in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
    return polynomial


def _difference(point: Fraction, points: Sequence[Fraction]) -> Fraction:
    product = Fraction(1)
    for other in points:
        if other != point:
            product *= point - other
    return product


def _matrix(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in rows)


def _linear(coefficients: Sequence[float], values: Sequence[Any]) -> Any:
    """Return a sum of products, as a chain of multiply-adds that starts with a term that needs no product."""
    terms = [(c, v) for c, v in zip(coefficients, values, strict=True) if c]
    terms.sort(key=lambda term: term[0] != 1.0)
    (first, value), *rest = terms
    total = value if first == 1.0 else value * first
    for coefficient, value in rest:
        if abs(coefficient) == 1.0:
            total = total + value if coefficient > 0 else total - value
        else:
            total = total + value * coefficient
    return total
