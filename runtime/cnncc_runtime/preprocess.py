"""The preprocessing contract: how an image becomes a model's input.

It is stored in the bundle and used by train, calibrate, verify, bench, run and the device, so that they all feed
the model the same numbers. Decoding needs Pillow (extra ``cnncc-runtime[image]``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnncc_runtime.errors import DataRefused, DependencyMissing

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

MAX_PIXELS = 89_478_485
"""Pillow's own bound, at which it warns of a decompression bomb (``Image.MAX_IMAGE_PIXELS``)."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, scale, normalize, lay out: in this order.

    The geometry is torchvision's (``Resize``, ``CenterCrop``: torchvision/transforms/functional.py), so that a model
    trained with it sees the same pixels. As there, EXIF orientation is not applied: photos are taken as they are
    stored, which is how an image folder was read in training. An alpha channel is dropped; of an animation the first
    frame counts; 16-bit grey is brought to 8 bits.

    Attributes:
        size: Height and width of the input.
        resize: Length of the image's shorter side before the centre crop; 0 resizes straight to ``size``.
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``.
        channels: ``RGB`` or ``L``.
        scale: Factor on the 8-bit values.
        mean: Subtracted per channel after scaling.
        std: Divides per channel.
        layout: ``NCHW`` or ``NHWC``.
        dtype: Of the input.
    """

    size: tuple[int, int]
    resize: int = 0
    interpolation: str = "bilinear"
    channels: str = "RGB"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    layout: str = "NCHW"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse a contract that cannot be carried out.

        Raises:
            DataRefused: Names the field.
        """
        count = {"RGB": 3, "L": 1}.get(self.channels)
        problems = {
            "size": len(self.size) == 2 and min(self.size) > 0 and self.size[0] * self.size[1] <= MAX_PIXELS,
            "resize": self.resize == 0 or self.resize >= max(self.size),
            "interpolation": self.interpolation in ("bilinear", "bicubic", "nearest"),
            "channels": count is not None,
            "scale": math.isfinite(self.scale) and self.scale > 0,
            "mean": len(self.mean) == count and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == count and all(math.isfinite(value) and value > 0 for value in self.std),
            "layout": self.layout in ("NCHW", "NHWC"),
            "dtype": self.dtype in ("float32", "float16", "uint8"),
        }
        if bad := [name for name, good in problems.items() if not good]:
            raise DataRefused(
                "the preprocessing is not valid: " + ", ".join(f"{name}={getattr(self, name)!r}" for name in bad),
                hint="see `cnncc compile --help` for the fields of --preprocess",
            )

    def apply(self, image: Image.Image) -> NDArray[Any]:
        """Return a batch of one for an image.

        Returns:
            ``[1, C, H, W]`` or ``[1, H, W, C]`` of ``dtype``; ``uint8`` is rounded and clipped.

        Raises:
            DataRefused: The image is too large or too slim to be resized, or of a mode without 8-bit values.
        """
        import numpy as np

        pixels = np.asarray(self._fit(_eight_bits(image, self.channels)), dtype=np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (pixels.reshape(*self.size, -1) * np.float32(self.scale) - mean) / std
        if self.layout == "NCHW":
            values = values.transpose(2, 0, 1)
        if self.dtype == "uint8":
            values = np.clip(np.rint(values), 0, 255)
        return np.ascontiguousarray(values[None].astype(self.dtype))

    def _fit(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        resample = filters.get(self.interpolation, Image.Resampling.NEAREST)
        height, width = self.size
        if not self.resize:
            return image.resize((width, height), resample)
        short, long = min(image.size), max(image.size)
        length = int(self.resize * long / short)
        if length * self.resize > MAX_PIXELS:
            raise DataRefused(
                f"an image of {image.width}×{image.height} is too slim: resized it has {length * self.resize} pixels"
            )
        image = image.resize((self.resize, length) if image.width <= image.height else (length, self.resize), resample)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _eight_bits(image: Image.Image, channels: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataRefused(
            f"an image of mode '{image.mode}' has no 8-bit values", hint="give an 8-bit or 16-bit image, or an array"
        )
    if "transparency" in image.info:  # Pillow warns when it drops this kind
        image = image.convert("RGBA")
    return image.convert(channels)


IMAGENET = Preprocessing(size=(224, 224), resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What torchvision's classification weights were trained with (torchvision.transforms._presets)."""

PRESETS = {"imagenet": IMAGENET}


def open_image(path: Path) -> Image.Image:
    """Decode an image file.

    Raises:
        DataRefused: Missing, damaged, of an unknown format, or absurdly large.
        DependencyMissing: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as exc:
        raise DependencyMissing("reading images needs Pillow", hint="pip install 'cnncc-runtime[image]'") from exc
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            if image.width * image.height > MAX_PIXELS:
                raise DataRefused(
                    f"{path} has {image.width}×{image.height} pixels, more than cnncc reads ({MAX_PIXELS})",
                    hint="scale the image down",
                )
            image.load()
    except DataRefused:
        raise
    except Exception as exc:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataRefused(f"{path} is not an image that can be read: {exc}", hint="give a PNG or JPEG file") from exc
    return image
