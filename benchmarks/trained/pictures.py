"""Renders pictures with Pillow: one character on a plain ground, or shapes and characters on a textured one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.trained.fonts import CHARACTERS, font_at

GLYPH_SIZE = 32
"""Pixels; a character's picture is square."""

SCENE_SIZE = 64
"""Pixels; a scene is square."""

SCENE_CLASSES = ("ground", "disc", "rectangle", "triangle", "character")
"""What a scene's pixels belong to."""

_CONTRAST = 60
"""Least difference of the mean brightness of ink and ground, of 255."""

Colour = tuple[int, int, int]


def glyph(character: str, font: Path, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return a picture of a character, ``uint8[3, 32, 32]``: turned, sheared, moved, perhaps blurred, with noise."""
    size = GLYPH_SIZE
    ground, ink = _colours(random)
    image = Image.new("RGB", (2 * size, 2 * size), ground)
    _write(ImageDraw.Draw(image), (size, size), character, font, int(random.integers(17, 26)), ink)
    image = image.rotate(random.uniform(-18, 18), Image.Resampling.BICUBIC, fillcolor=ground)
    shear = random.uniform(-0.25, 0.25)
    matrix = (1, shear, -shear * size, 0, 1, 0)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=ground)
    left, top = (size // 2 + int(offset) for offset in random.integers(-3, 4, 2))
    image = image.crop((left, top, left + size, top + size))
    if random.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.1)))
    return _noisy(np.asarray(image, np.float32), random.uniform(0, 22), random)


def scene(fonts: list[Path], random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a scene, ``uint8[3, 64, 64]``, and what each pixel belongs to, ``uint8[64, 64]``.

    Two to five things lie on a textured ground, the later ones upon the earlier.
    """
    size = SCENE_SIZE
    image = Image.fromarray(_texture(size, random))
    classes = Image.new("L", (size, size), 0)
    for _ in range(int(random.integers(2, 6))):
        kind = int(random.integers(1, len(SCENE_CLASSES)))
        mask = _thing(SCENE_CLASSES[kind], fonts, random)
        ink = Image.fromarray(_texture(size, random)) if random.random() < 0.3 else _colours(random)[1]
        image.paste(ink, (0, 0, size, size), mask)
        classes.paste(kind, (0, 0, size, size), mask)
    if random.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 0.8)))
    return _noisy(np.asarray(image, np.float32), random.uniform(0, 16), random), np.asarray(classes).copy()


def _thing(kind: str, fonts: list[Path], random: np.random.Generator) -> Image.Image:
    """Return where a thing is: a mask of ones and zeros, so that no pixel belongs to two."""
    mask = Image.new("1", (SCENE_SIZE, SCENE_SIZE), 0)
    draw = ImageDraw.Draw(mask)
    x, y = random.uniform(8, SCENE_SIZE - 8, 2)
    reach = random.uniform(5, 14)
    if kind == "disc":
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=1)
    elif kind == "character":
        character = CHARACTERS[int(random.integers(len(CHARACTERS)))]
        font = fonts[int(random.integers(len(fonts)))]
        _write(draw, (x, y), character, font, int(random.integers(22, 36)), 1)
    else:
        corners = 4 if kind == "rectangle" else 3
        angles = random.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        draw.polygon([(x + reach * np.cos(angle), y + reach * np.sin(angle)) for angle in angles], fill=1)
    return mask


def _write(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], character: str, font: Path, size: int, ink: Colour | int
) -> None:
    """Draw a character so that the middle of its box is at ``centre``."""
    face = font_at(font, size)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=face)
    draw.text((centre[0] - (left + right) / 2, centre[1] - (top + bottom) / 2), character, font=face, fill=ink)


def _texture(size: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return a ground, ``uint8[size, size, 3]``: two colours mixed by waves and by smooth noise."""
    first, second = (np.array(colour, np.float32) for colour in _colours(random, least=0))
    rows, columns = np.mgrid[:size, :size] / size
    angle, waves = random.uniform(0, np.pi), random.uniform(1, 8)
    wave = np.sin(2 * np.pi * waves * (rows * np.cos(angle) + columns * np.sin(angle)) + random.uniform(0, 2 * np.pi))
    coarse = Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    mix = np.clip(0.5 + 0.25 * wave + (np.asarray(coarse, np.float32) / 255 - 0.5) * random.uniform(0, 1), 0, 1)
    return (first + (second - first) * mix[..., None] * random.uniform(0.2, 1)).astype(np.uint8)


def _colours(random: np.random.Generator, least: int = _CONTRAST) -> tuple[Colour, Colour]:
    """Return a ground and an ink whose brightness differs by at least ``least``."""
    ground = random.integers(0, 256, 3)
    ink = random.integers(0, 256, 3)
    while abs(ink.mean() - ground.mean()) < least:
        ink = random.integers(0, 256, 3)
    return (int(ground[0]), int(ground[1]), int(ground[2])), (int(ink[0]), int(ink[1]), int(ink[2]))


def _noisy(image: NDArray[np.float32], strength: float, random: np.random.Generator) -> NDArray[np.uint8]:
    noise = random.normal(0, strength, image.shape).astype(np.float32)
    return np.ascontiguousarray(np.clip(image + noise, 0, 255).astype(np.uint8).transpose(2, 0, 1))
