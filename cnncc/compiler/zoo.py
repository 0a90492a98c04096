"""Architectures of timm and torchvision, untrained: `timm:NAME`, `torchvision:NAME`. Nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnncc.compiler.factory import seeded
from cnncc.compiler.quiet import quiet
from cnncc_runtime.errors import DependencyMissing, ModelRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing


@dataclass(frozen=True)
class ZooModel:
    """An architecture with what its zoo knows of it.

    Attributes:
        module: In eval mode, with random weights from a fixed seed.
        shape: Of its one input, batch 1; None where the zoo does not say.
        preprocessing: What the zoo's own weights were trained with.
        labels: Class names of those weights.
    """

    module: nn.Module
    shape: tuple[int, ...] | None
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]


def build(zoo: str, name: str) -> ZooModel:
    """Build an architecture.

    Raises:
        UsageError: The zoo has no such model; names the nearest.
        DependencyMissing: The zoo is not installed.
    """
    with quiet():
        define_torchvision_schemas()  # timm imports torchvision too
        try:
            library = importlib.import_module("torchvision.models" if zoo == "torchvision" else "timm")
        except (ImportError, RuntimeError) as exc:  # RuntimeError: built for another torch
            raise DependencyMissing(f"{zoo} cannot be imported: {exc}", hint="pip install 'cnncc[zoo]'") from exc
        names: list[str] = library.list_models()
        if name not in names:
            near = difflib.get_close_matches(name, names, 3, 0.5)
            hint = (
                f"did you mean {', '.join(near)}?" if near else f"{zoo} has {len(names)} models; see its documentation"
            )
            raise UsageError(f"{zoo} has no model '{name}'", hint=hint)
        try:
            with seeded():
                return _torchvision(library, name) if zoo == "torchvision" else _timm(library, name)
        except (TypeError, ValueError, RuntimeError, OSError) as exc:
            raise ModelRefused(f"{zoo} cannot build '{name}': {exc}") from exc


def define_torchvision_schemas() -> None:
    """Declare the two operators that torchvision registers fakes for, where its native library does not load.

    A torchvision built for CUDA beside a CPU torch fails to import without them.
    """
    importlib.import_module("torch.library")
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        if not _has_operator(f"torchvision::{name}") and not _native_library_loads():
            torch.library.define(f"torchvision::{name}", signature)


def _has_operator(name: str) -> bool:
    namespace, _, operator = name.partition("::")
    return hasattr(getattr(torch.ops, namespace), operator)


def _native_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # not installed: the import says so
    from pathlib import Path

    for folder in spec.submodule_search_locations:
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            except (OSError, RuntimeError):
                return False
            return True
    return False


def _timm(library: Any, name: str) -> ZooModel:
    module: nn.Module = library.create_model(name, pretrained=False).eval()
    config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    if not size:
        return ZooModel(module, None, None, ())
    shape = (1, *(int(n) for n in size))
    height, width = shape[-2:]
    preprocessing = None
    if shape[1] == 3 and config.get("interpolation", "bilinear") in ("bilinear", "bicubic"):
        preprocessing = Preprocessing(
            size=(height, width),
            resize=max(math.floor(min(height, width) / config.get("crop_pct", 1.0)), height, width),
            interpolation=config.get("interpolation", "bilinear"),
            mean=tuple(float(x) for x in config.get("mean", (0.0, 0.0, 0.0))),
            std=tuple(float(x) for x in config.get("std", (1.0, 1.0, 1.0))),
        )
    return ZooModel(module, shape, preprocessing, ())


def _torchvision(library: Any, name: str) -> ZooModel:
    builder = library.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # its default would be downloaded
    if "init_weights" in inspect.signature(builder).parameters:
        options["init_weights"] = True
    module: nn.Module = builder(**options).eval()
    weights = library.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    crop, resize = getattr(transform, "crop_size", None), getattr(transform, "resize_size", None)
    if not crop:
        return ZooModel(module, None, None, ())
    preprocessing = Preprocessing(
        size=(crop[0], crop[0]),
        resize=resize[0] if resize else 0,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    return ZooModel(module, (1, 3, crop[0], crop[0]), preprocessing, tuple(weights.meta.get("categories", ())))
