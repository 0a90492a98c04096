"""The preprocessing contract, against the steps written out, and against images that mean harm."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cnncc_runtime.errors import DataRefused
from cnncc_runtime.preprocess import IMAGENET, MAX_PIXELS, Preprocessing, open_image

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    count = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, count), np.uint8)
    return Image.fromarray(values[..., 0] if count == 1 else values, mode=None).convert(mode)


def reference(contract: Preprocessing, image: Image.Image) -> NDArray[Any]:
    """Resize, crop, scale, normalize, lay out, with torchvision's rounding, one pixel row at a time."""
    image = image.convert(contract.channels)
    height, width = contract.size
    resample = RESAMPLING[contract.interpolation]
    if contract.resize:
        if image.width <= image.height:
            size = (contract.resize, int(contract.resize * image.height / image.width))
        else:
            size = (int(contract.resize * image.width / image.height), contract.resize)
        image = image.resize(size, resample)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    else:
        image = image.resize((width, height), resample)
    planes = []
    for channel, band in enumerate(image.split()):
        plane = np.array(list(band.tobytes()), np.float32).reshape(height, width)
        scaled = plane * np.float32(contract.scale)
        planes.append((scaled - np.float32(contract.mean[channel])) / np.float32(contract.std[channel]))
    values = np.stack(planes, 0 if contract.layout == "NCHW" else -1)[None]
    if contract.dtype == "uint8":
        values = np.clip(np.rint(values), 0, 255)
    return values.astype(contract.dtype)


CONTRACTS = st.builds(
    Preprocessing,
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    resize=st.just(0) | st.integers(9, 13),
    interpolation=st.sampled_from(sorted(RESAMPLING)),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.125, 2)] * 3),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    dtype=st.sampled_from(["float32", "float16"]),
)


@given(CONTRACTS, st.integers(1, 30), st.integers(1, 30))
def test_it_is_the_steps_in_their_order(contract: Preprocessing, width: int, height: int) -> None:
    image = picture(width, height)
    got = contract.apply(image)
    assert got.dtype == contract.dtype
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, reference(contract, image))


def test_bytes_are_rounded_and_clipped() -> None:
    contract = Preprocessing(size=(4, 4), scale=1.0, mean=(100.4,) * 3, std=(0.5,) * 3, dtype="uint8")
    image = picture(4, 4)
    got = contract.apply(image)
    np.testing.assert_array_equal(got, reference(contract, image))
    assert got.min() == 0
    assert got.max() == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("channels", ["RGB", "L"])
def test_every_eight_bit_mode_is_taken(mode: str, channels: str) -> None:
    count = 3 if channels == "RGB" else 1
    contract = Preprocessing(size=(5, 6), channels=channels, mean=(0.0,) * count, std=(1.0,) * count)
    source = picture(9, 8)
    image = source if mode == "RGB" else source.convert("RGBA").convert("RGB").convert(mode if mode != "LAB" else "RGB")
    assert contract.apply(image).shape == (1, count, 5, 6)


def test_transparency_of_a_palette_is_dropped_without_a_warning(tmp_path: Path) -> None:
    image = picture(8, 8).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(8)))
    opened = open_image(tmp_path / "p.png")
    assert opened.mode == "P"
    expected = np.asarray(image.convert("RGB"), np.float32)[None]
    got = Preprocessing(size=(8, 8), scale=1.0, layout="NHWC").apply(opened)
    np.testing.assert_array_equal(got, expected)


def test_sixteen_bit_grey_is_brought_to_eight(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    got = Preprocessing(size=(8, 8), scale=1.0, layout="NHWC").apply(open_image(tmp_path / "deep.png"))
    np.testing.assert_array_equal(got[0, :, :, 0], (values >> 8).astype(np.float32))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_eight_bits_are_refused(mode: str) -> None:
    with pytest.raises(DataRefused, match="no 8-bit values"):
        IMAGENET.apply(Image.new(mode, (300, 300)))


def test_the_orientation_tag_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    image = picture(12, 6)
    image.save(tmp_path / "turned.png", exif=exif)
    contract = Preprocessing(size=(6, 12))
    np.testing.assert_array_equal(contract.apply(open_image(tmp_path / "turned.png")), contract.apply(image))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(30_000, 30_000), (9500, 9500), (1 << 30, 1), (0, 5)])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with pytest.raises(DataRefused):
        open_image(tmp_path / "bomb.png")


def test_a_slim_image_is_refused_rather_than_blown_up() -> None:
    with pytest.raises(DataRefused, match="too slim"):
        IMAGENET.apply(Image.new("RGB", (1, 100_000)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_images_are_refused_or_read_never_worse(tmp_path: Path, form: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    picture(16, 16).save(buffer, form)
    content = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged").write_bytes(content)
    try:
        image = open_image(tmp_path / "damaged")
    except DataRefused:
        return
    assert image.width * image.height <= MAX_PIXELS


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "missing.png", tmp_path):
        with pytest.raises(DataRefused, match="not an image"):
            open_image(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (0, 4)},
        {"size": (1 << 20, 1 << 20)},
        {"resize": 3},
        {"interpolation": "cubic"},
        {"channels": "BGR"},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"mean": (0.0,)},
        {"mean": (float("inf"), 0.0, 0.0)},
        {"std": (1.0, 1.0, 0.0)},
        {"std": (1.0, 1.0, float("nan"))},
        {"layout": "CHW"},
        {"dtype": "int32"},
    ],
    ids=str,
)
def test_a_contract_that_cannot_be_carried_out_names_its_field(fields: dict[str, Any]) -> None:
    with pytest.raises(DataRefused, match=next(iter(fields))):
        Preprocessing(**{"size": (4, 4), **fields})
