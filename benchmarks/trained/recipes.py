"""Which network is trained on what, and what was trained: kept by the digest of its recipe, exported by cnncc.

A folder (``build/accuracy`` by default) holds for each network and seed ``NET-SEED.safetensors``, ``NET-SEED.onnx``
(cleaned, fp32, batch N), ``NET-SEED-calib.npz`` (``x``) and ``NET-SEED-test.npz`` (``x``, ``y``), all ready for
`cnncc calibrate` and `cnncc quantize`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.trained import nets
from benchmarks.trained.data import Data, load
from benchmarks.trained.training import folded, train, uneven
from cnncc.compiler.cache import Cache
from cnncc.compiler.factory import build
from cnncc.compiler.model_reference import ModelRequest, parse_reference
from cnncc.compiler.pipeline import export
from cnncc_runtime.digests import digest_json
from cnncc_runtime.files import atomic_file

ROOT = Path(__file__).resolve().parents[2]
NETS = Path(nets.__file__).resolve()

REVISION = 1
"""Of the way of training: raised, everything is trained again."""


@dataclass(frozen=True)
class Recipe:
    """How one network comes to be.

    Attributes:
        name: As tables show it.
        factory: The function of ``nets.py`` (or of ``file``) that builds it.
        data: Name of the data set.
        epochs: Passes over the training images.
        rate: Largest learning rate.
        batch: Images of a step.
        start: The recipe whose weights it starts from; empty for fresh ones.
        uneven: Whether BatchNorm is folded and the channels made uneven after training, for ``factory``.
        trains: The factory of what is trained, where that is not ``factory``.
        file: Where the factories are.
    """

    name: str
    factory: str
    data: str
    epochs: int
    rate: float
    batch: int = 128
    start: str = ""
    uneven: bool = False
    trains: str = ""
    file: Path = NETS

    @property
    def model(self) -> str:
        """The MODEL argument."""
        return f"{self.file}:{self.factory}"

    @property
    def metric(self) -> str:
        """``top-1`` or ``mIoU``."""
        return "mIoU" if self.data == "scenes" else "top-1"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("seed", "build", "digits", 20, 1e-3, batch=32, file=ROOT / "examples" / "digits" / "model.py"),
        Recipe("resnet", "resnet", "glyphs", 8, 4e-3),
        Recipe("mbv2", "mbv2", "glyphs", 12, 4e-3),
        Recipe("mbv2h", "mbv2h", "glyphs", 3, 1e-3, start="mbv2", uneven=True, trains="mbv2_relu"),
        Recipe("effnet", "effnet", "glyphs", 8, 4e-3),
        Recipe("unet", "unet", "scenes", 14, 4e-3, batch=16),
    )
}
"""By name, in the table's order."""

RESNET20 = Recipe("resnet20", "resnet20", "glyphs", 10, 4e-3)
"""What benchmarks/pruning.py takes channels out of, beside MobileNetV2-like ``mbv2``."""


@dataclass(frozen=True)
class Trained:
    """One trained network, its files and what it was trained on.

    Attributes:
        recipe: How it came to be.
        seed: Of its weights, the order of its images, and its calibration images.
        onnx: The cleaned fp32 graph.
        calibration: ``.npz`` with ``x``.
        test: ``.npz`` with ``x`` and ``y``.
        data: The data set.
    """

    recipe: Recipe
    seed: int
    onnx: Path
    calibration: Path
    test: Path
    data: Data

    @property
    def shape(self) -> str:
        """Of the graph's input, as `--input-shape` takes it: ``N,3,32,32``."""
        return ",".join(("N", *map(str, self.data.shape)))


def trained(
    recipe: Recipe, seed: int, folder: Path, *, calibration_images: int, tell: Callable[[str], None] = lambda _: None
) -> Trained:
    """Return a trained network, out of ``folder`` where its recipe was followed before.

    Args:
        recipe: Which.
        seed: Of its weights, the order of its images, and its calibration images.
        folder: Where files are kept.
        calibration_images: How many to draw.
        tell: Told what is done.

    Raises:
        EnvironmentMissing: There are not enough fonts.
        UsageError: There are not that many images to calibrate with.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data = load(recipe.data, folder / "data")
    stem = f"{recipe.name}-{seed}"
    weights = _weights(recipe, seed, folder, data, tell)
    graph, calibration, test = (folder / (stem + end) for end in (".onnx", "-calib.npz", "-test.npz"))
    found = Trained(recipe, seed, graph, calibration, test, data)
    export(ModelRequest(recipe.model, weights, (found.shape,)), graph, cache=Cache(folder / "cache"))
    with atomic_file(calibration) as partial, partial.open("wb") as file:
        np.savez(file, x=data.calibration(calibration_images, seed))
    shared = folder / "data" / f"{data.name}-{data.digest.rpartition(':')[2][:12]}-test.npz"
    if not shared.exists():
        with atomic_file(shared) as partial, partial.open("wb") as file:
            np.savez(file, x=data.test.inputs, y=data.test.y)
    test.unlink(missing_ok=True)
    os.link(shared, test)
    return found


def _weights(recipe: Recipe, seed: int, folder: Path, data: Data, tell: Callable[[str], None]) -> Path:
    """Return the weights' file, trained now unless it was trained by this very recipe."""
    path, record = folder / f"{recipe.name}-{seed}.safetensors", folder / f"{recipe.name}-{seed}.json"
    start = _weights(RECIPES[recipe.start], seed, folder, data, tell) if recipe.start else None
    network = _fresh(recipe, seed)
    key = _key(recipe, seed, data)
    if path.exists() and record.exists() and json.loads(record.read_bytes()).get("key") == key:
        return path
    if start is not None:
        network.load_state_dict(load_file(start))
    train(
        network,
        data.train,
        epochs=recipe.epochs,
        rate=recipe.rate,
        batch=recipe.batch,
        seed=seed,
        tell=lambda line: tell(f"{recipe.name}, seed {seed}: {line}"),
    )
    if recipe.uneven:
        assert isinstance(network, nets.MobileNet)
        network = folded(network)
        uneven(network, seed=seed)
    record.unlink(missing_ok=True)
    with atomic_file(path) as partial:
        save_file(network.state_dict(), partial)
    with atomic_file(record) as partial:
        partial.write_text(json.dumps({"key": key}))
    return path


def _fresh(recipe: Recipe, seed: int) -> nn.Module:
    """Return what is trained, with the random weights of a seed (cnncc builds a factory's with seed 0, always)."""
    if recipe.file == NETS:
        torch.manual_seed(seed)
        network: nn.Module = getattr(nets, recipe.trains or recipe.factory)()
        return network
    network = build(parse_reference(recipe.model)).module
    torch.manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def _key(recipe: Recipe, seed: int, data: Data) -> str:
    fields = {**asdict(recipe), "file": recipe.file.name}
    start = _key(RECIPES[recipe.start], seed, data) if recipe.start else ""
    return digest_json([REVISION, seed, fields, start, repr(_fresh(recipe, seed)), data.digest])
