"""The fonts of this machine, by family: a classifier is tested with glyphs of families that it was not trained on."""

from __future__ import annotations

import functools
import importlib.util
import re
import string
from pathlib import Path

from PIL import ImageFont

from cnncc_runtime.errors import EnvironmentMissing

CHARACTERS = string.digits + string.ascii_uppercase
"""What is rendered, and the classes in their order."""

FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path.home() / ".local" / "share" / "fonts")

_PROBE_SIZE = 24
_LEAST_INK = 30
"""Bytes of a glyph's bitmap at the probe's size: a font that draws less has no such letters."""


@functools.lru_cache(maxsize=4096)
def font_at(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Return a font at a size in pixels."""
    return ImageFont.truetype(str(path), size)


def family_of(path: Path) -> str:
    """Return the family that a font file belongs to: what its name begins with, ``DejaVuSans-Bold`` → ``dejavusans``.

    The name inside the file would make a family of every weight.
    """
    return re.split(r"[-_]", path.stem, maxsplit=1)[0].lower()


def has_letters(path: Path) -> bool:
    """Say whether a file is a font that draws every character, each in its own way (a symbol font does not)."""
    try:
        font = font_at(path, _PROBE_SIZE)
        missing = bytes(font.getmask("\uffff"))
        glyphs = [bytes(font.getmask(character)) for character in CHARACTERS]
    except (OSError, ValueError, UnicodeError):  # Pillow's for broken files and bitmap fonts
        return False
    distinct = len(set(glyphs))  # some draw O and 0, or I and 1, alike
    return (
        missing not in glyphs and distinct >= len(CHARACTERS) - 3 and all(len(glyph) > _LEAST_INK for glyph in glyphs)
    )


@functools.cache
def find_fonts(folders: tuple[Path, ...] = FOLDERS) -> dict[str, tuple[Path, ...]]:
    """Return the families of usable fonts, sorted, each with its files.

    Raises:
        EnvironmentMissing: There are fewer than two families: none would be left to test with.
    """
    places = [*folders, *_matplotlib()]
    files = {path.name: path for folder in places for path in sorted(folder.rglob("*.[ot]tf"))}
    families: dict[str, list[Path]] = {}
    for _, path in sorted(files.items()):
        if has_letters(path):
            families.setdefault(family_of(path), []).append(path)
    if len(families) < 2:
        raise EnvironmentMissing(f"{len(families)} families of fonts were found, two are needed", hint="make fonts")
    return {family: tuple(paths) for family, paths in sorted(families.items())}


def _matplotlib() -> list[Path]:
    """Return the folder of the fonts that matplotlib ships, where it is installed."""
    found = importlib.util.find_spec("matplotlib")
    return [Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"] if found and found.origin else []
