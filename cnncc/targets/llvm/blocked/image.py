"""What the layout pass knows of each tensor: its axes, and where its channels lie.

A blocked tensor's channels may be spread over several tensors in memory: concatenations, splits and shuffles of
channels only note which channel is which, and nothing is moved until an operator needs the channels side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.targets.llvm.blocked.geometry import blocks_of

NCHW = "nchw"
"""The axes of an image, in the order in which blocked tensors hold them (before the channels are blocked)."""

ORDERS = ("nchw", "nhwc", "ncw", "nwc", "nc", "c")
"""Orders of axes that a tensor may be reshaped to; what an order lacks has size 1."""

Dims = tuple[int, int, int, int]
"""Sizes of the axes of `NCHW`."""


@dataclass
class Channels:
    """The channels of a blocked tensor.

    Attributes:
        dims: Batch, channels, height, width.
        sources: Blocked tensors in memory (Relax variables ``[n, block, h, w, lane]``) and how many channels each has.
        places: For each channel its source and its number there, ``[c, 2]``.
        whole: The variable that holds exactly these channels in order, once there is one.
    """

    dims: Dims
    sources: tuple[tuple[Any, int], ...]
    places: NDArray[np.int64]
    whole: Any | None = None

    @classmethod
    def of(cls, variable: Any, dims: Dims) -> Channels:
        """Return the channels of a blocked tensor in memory."""
        return cls(dims, ((variable, dims[1]),), _counted(dims[1]), variable)

    def settled(self) -> Channels:
        """Return the same channels with as few sources as there are by now."""
        return self if self.whole is None else Channels.of(self.whole, self.dims)

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> Channels:
        """Return some of the channels, in an order of their own."""
        batch, _, height, width = self.dims
        held = self.settled()
        places = held.places[np.asarray(numbers, dtype=np.int64)]
        used = sorted(set(places[:, 0].tolist()))
        renumbered = np.searchsorted(used, places[:, 0])
        return Channels(
            (batch, len(places), height, width),
            tuple(held.sources[number] for number in used),
            np.stack([renumbered, places[:, 1]], axis=1),
        )

    @property
    def ordered(self) -> bool:
        """Whether these are all channels of one source, in order."""
        return len(self.sources) == 1 and np.array_equal(self.places, _counted(self.sources[0][1]))


def _counted(channels: int) -> NDArray[np.int64]:
    return np.stack([np.zeros(channels, np.int64), np.arange(channels)], axis=1)


def concatenated(parts: Sequence[Channels]) -> Channels:
    """Return the channels of several tensors after each other."""
    sources: dict[Any, int] = {}
    counts: list[tuple[Any, int]] = []
    places = []
    for part in parts:
        held = part.settled()
        numbers = []
        for variable, count in held.sources:
            if variable not in sources:
                sources[variable] = len(counts)
                counts.append((variable, count))
            numbers.append(sources[variable])
        places.append(np.stack([np.asarray(numbers)[held.places[:, 0]], held.places[:, 1]], axis=1))
    batch, _, height, width = parts[0].dims
    joined = np.concatenate(places)
    return Channels((batch, len(joined), height, width), tuple(counts), joined)


@dataclass
class Image:
    """A tensor of images whose channels are blocked.

    Attributes:
        channels: Where its channels lie.
        order: The tensor's axes as the graph has them, letters of `NCHW`; an axis that is missing has size 1.
        name: Name of the variables that are made for it.
    """

    channels: Channels
    order: str
    name: str | None

    @property
    def dims(self) -> Dims:
        """Batch, channels, height, width."""
        return self.channels.dims

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape as the graph has it."""
        return shape_in(self.dims, self.order)

    def reordered(self, order: str, name: str | None) -> Image:
        """Return the same blocked tensor under another order of axes."""
        return Image(self.channels, order, name)


def shape_in(dims: Dims, order: str) -> tuple[int, ...]:
    """Return the shape of a tensor whose axes are in some order."""
    return tuple(dims[NCHW.index(letter)] for letter in order)


def dims_of(shape: Sequence[int], order: str) -> Dims:
    """Return the sizes of an image's axes, where a tensor's last axes are the last of an order.

    Args:
        shape: Shape of the tensor, of at most as many axes as the order has.
        order: Letters of `NCHW`.
    """
    sizes = dict(zip(reversed(order), reversed(shape), strict=False))
    batch, channels, height, width = (int(sizes.get(letter, 1)) for letter in NCHW)
    return batch, channels, height, width


def fitting_orders(dims: Dims, shape: Sequence[int], preferred: str) -> Iterator[str]:
    """Yield the orders in which an image has a shape, the preferred one first."""
    for order in dict.fromkeys((preferred, *ORDERS)):
        if shape_in(dims, order) == tuple(shape) and dims_of(shape, order) == dims:
            yield order


def filled(channels: int, block: int) -> bool:
    """Whether some channels fill their blocks."""
    return blocks_of(channels, block) * block == channels


@dataclass
class Steps:
    """A quantized tensor; see `cnncc.targets.llvm.schedule.products.ZERO`.

    Attributes:
        scale: Of a step.
        image: Blocked; None where the tensor is plain.
        plain: As the graph has it; None where it is blocked.
        reshaped: Whether the graph split the image's channels into several axes, or joined them with the pixels.
        grid: As in `Value`, where it did.
    """

    scale: float
    image: Image | None = None
    plain: Any | None = None
    reshaped: bool = False
    grid: tuple[int, ...] = ()

    @property
    def flat(self) -> bool:
        """Whether channels and pixels are rows of features, ``[n, c · h · w]``."""
        return self.reshaped and not self.grid

    @property
    def is_image(self) -> bool:
        """Whether these are images as operators on ``[n, c, h, w]`` take them, blocked or plain."""
        return self.image is None or (self.image.order == NCHW and not self.reshaped)

    def moved(self) -> Value:
        """Return the steps as the value that an operator would move."""
        if self.reshaped:
            return Value(base=self.image, grid=self.grid)
        return Value(image=self.image)


@dataclass
class Value:
    """What a variable of the graph became.

    Attributes:
        plain: The tensor as the graph has it, or None until it is needed.
        image: Its blocked form, or None while there is none.
        base: The image (of order `NCHW`) that the graph reshaped to this, until the tensor itself is needed.
        grid: How the graph split the base's channels into several axes, ``[n, *grid, h, w]``; empty where it joined
            them with the pixels, ``[n, c · h · w]``.
        steps: What it was dequantized from; its floats are computed when somebody needs them.
    """

    plain: Any | None = None
    image: Image | None = None
    base: Image | None = None
    grid: tuple[int, ...] = ()
    steps: Steps | None = None
