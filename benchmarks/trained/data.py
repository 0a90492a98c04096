"""The data sets: scikit-learn's digits, rendered glyphs, and rendered scenes with a class for every pixel.

``glyphs`` and ``scenes`` are drawn with the fonts of this machine; training and test take other families. Every array
follows from the seed, the fonts and the libraries' versions; pictures are kept between runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from benchmarks.trained import pictures
from benchmarks.trained.fonts import CHARACTERS, find_fonts
from cnncc_runtime.digests import digest_array, digest_file, digest_json
from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import atomic_file
from cnncc_runtime.preprocess import Preprocessing

MEAN, STD = 0.5, 0.25
"""Pictures are scaled to 0 … 1, then normalized with these."""


@dataclass(frozen=True)
class Counts:
    """How many pictures a data set holds.

    Attributes:
        train: To train with.
        pool: To calibrate with: of the training's fonts, and never trained on.
        test: Of other fonts.
    """

    train: int
    pool: int
    test: int


COUNTS = {"digits": Counts(0, 0, 0), "glyphs": Counts(18_000, 2048, 3600), "scenes": Counts(3000, 1024, 600)}
"""By data set; the digits are as many as scikit-learn has."""


@dataclass(frozen=True, eq=False)
class Part:
    """Inputs and what they are.

    Attributes:
        x: ``uint8[n, 3, h, w]`` or ``float32`` where they are normalized already.
        y: ``int64[n]``, or ``int64[n, h, w]`` for scenes.
    """

    x: NDArray[np.uint8] | NDArray[np.float32]
    y: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> Part:
        """Return the rows of an index."""
        return Part(self.x[index], self.y[index])

    @property
    def inputs(self) -> NDArray[np.float32]:
        """What a network takes: ``float32[n, 3, h, w]``, normalized."""
        if self.x.dtype == np.uint8:
            return ((self.x.astype(np.float32) / 255 - MEAN) / STD).astype(np.float32)
        return self.x.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        name: ``digits``, ``glyphs`` or ``scenes``.
        classes: How many.
        train: To train with.
        pool: What calibration images are drawn from.
        test: To judge with.
        about: A phrase for the table's head.
    """

    name: str
    classes: int
    train: Part
    pool: Part
    test: Part
    about: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, without the batch."""
        return self.test.x.shape[1:]

    @functools.cached_property
    def digest(self) -> str:
        """Of every array."""
        parts = (self.train, self.pool, self.test)
        return digest_json([self.name, *(digest_array(array) for part in parts for array in (part.x, part.y))])

    def calibration(self, count: int, seed: int) -> NDArray[np.float32]:
        """Return inputs to calibrate with, drawn by seed.

        Raises:
            UsageError: There are not that many.
        """
        if count > len(self.pool.x):
            raise UsageError(f"{self.name} has {len(self.pool.x)} images to calibrate with, {count} were asked for")
        index = np.random.default_rng(seed).permutation(len(self.pool.x))[:count]
        return self.pool.take(index).inputs


def load(name: str, folder: Path, counts: Counts | None = None) -> Data:
    """Return a data set, rendered once and then read from ``folder``.

    Args:
        name: ``digits``, ``glyphs`` or ``scenes``.
        folder: Where rendered pictures are kept; it exists.
        counts: Fewer pictures than `COUNTS` says, for tests.

    Raises:
        EnvironmentMissing: There are not enough fonts.
    """
    if name == "digits":
        return digits()
    return _rendered(name, folder, counts or COUNTS[name])


def digits() -> Data:
    """Return scikit-learn's digits as examples/digits sees them, a third of them to test with.

    They are too few to hold back a pool: calibration images are drawn from those that are trained on.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    contract = Preprocessing(size=(28, 28), interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    images = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in found.images]
    whole = Part(np.concatenate([contract.apply(image) for image in images]), found.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(whole.x)), test_size=1 / 3, random_state=0, stratify=found.target)
    part = whole.take(train)
    return Data("digits", 10, part, part, whole.take(test), f"{len(test)} of scikit-learn's digits")


def split(families: Mapping[str, tuple[Path, ...]]) -> tuple[dict[str, tuple[Path, ...]], dict[str, tuple[Path, ...]]]:
    """Return the families to train with, and a quarter of them, at least one, to test with."""
    names = sorted(families)
    held = set(np.random.default_rng(0).permutation(names)[: max(1, len(names) // 4)])
    return (
        {name: families[name] for name in names if name not in held},
        {name: families[name] for name in names if name in held},
    )


def _rendered(name: str, folder: Path, counts: Counts) -> Data:
    train, test = split(find_fonts())
    render, classes = _RENDERERS[name], _CLASSES[name]
    fonts = {path.name: digest_file(path) for family in (*train.values(), *test.values()) for path in family}
    sources = [digest_file(Path(__file__).with_name(file)) for file in ("data.py", "fonts.py", "pictures.py")]
    key = digest_json([sources, fonts, [counts.train, counts.pool, counts.test], PIL.__version__, np.__version__])
    path = folder / f"{name}-{key.rpartition(':')[2][:12]}.npz"
    parts = (("train", train, counts.train), ("pool", train, counts.pool), ("test", test, counts.test))
    if not path.exists():
        made = {which: render(count, families, seed) for seed, (which, families, count) in enumerate(parts)}
        arrays = {f"{which}_{key}": getattr(part, key) for which, part in made.items() for key in ("x", "y")}
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    with np.load(path) as kept:
        found = {which: Part(kept[f"{which}_x"], kept[f"{which}_y"].astype(np.int64)) for which, *_ in parts}
    about = f"{counts.test} {name} in {len(test)} font families, others than the {len(train)} trained on"
    return Data(name, classes, found["train"], found["pool"], found["test"], about)


def _glyphs(count: int, families: Mapping[str, tuple[Path, ...]], seed: int) -> Part:
    """Render every class in turn; families come up equally often, whatever their number of weights."""
    random = np.random.default_rng(seed)
    names = sorted(families)
    y = np.arange(count) % len(CHARACTERS)
    x = np.empty((count, 3, pictures.GLYPH_SIZE, pictures.GLYPH_SIZE), np.uint8)
    for index in range(count):
        family = families[names[int(random.integers(len(names)))]]
        font = family[int(random.integers(len(family)))]
        x[index] = pictures.glyph(CHARACTERS[y[index]], font, random)
    return Part(x, y.astype(np.int64))


def _scenes(count: int, families: Mapping[str, tuple[Path, ...]], seed: int) -> Part:
    random = np.random.default_rng(seed)
    fonts = [path for name in sorted(families) for path in families[name]]
    made = [pictures.scene(fonts, random) for _ in range(count)]
    return Part(np.stack([x for x, _ in made]), np.stack([y for _, y in made]).astype(np.int64))


_RENDERERS: dict[str, Callable[[int, Mapping[str, tuple[Path, ...]], int], Part]] = {
    "glyphs": _glyphs,
    "scenes": _scenes,
}
_CLASSES = {"glyphs": len(CHARACTERS), "scenes": len(pictures.SCENE_CLASSES)}
