"""Trains a network on one core, and makes a hard one of it: the same function with uneven channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.trained.data import MEAN, STD, Part
from benchmarks.trained.nets import InvertedResidual, MobileNet

BATCH = 128
"""Images that a trained network is run on at a time."""

SIGMA = 1.1
"""Standard deviation of the logarithm of `uneven`'s scales: the channels of a tensor then differ a hundredfold."""


def train(
    network: nn.Module, part: Part, *, epochs: int, rate: float, batch: int, seed: int, tell: Callable[[str], None]
) -> None:
    """Train in place with AdamW, one cycle of the learning rate (Smith and Topin 2018) and smoothed labels.

    Args:
        network: Its outputs are logits ``[n, classes, …]``.
        part: What to train on.
        epochs: Passes over it.
        rate: Largest learning rate.
        batch: Images of a step.
        seed: Of the order of the images.
        tell: Told of each epoch's loss.
    """
    count = len(part.x)
    images, targets = torch.from_numpy(part.x), torch.from_numpy(part.y)
    with single_thread():
        network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
        steps = epochs * -(-count // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
        loss = nn.CrossEntropyLoss(label_smoothing=0.05)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            network.train()
            total = 0.0
            for index in torch.randperm(count, generator=generator).split(batch):
                value = loss(network(_normalize(images[index])), targets[index])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                total += value.item() * len(index)
            tell(f"epoch {epoch + 1} of {epochs}, loss {total / count:.4f}")
        network.to(memory_format=torch.contiguous_format).eval()


def outputs(network: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what a network makes of normalized inputs, batch by batch."""
    with single_thread(), torch.no_grad():
        batches = torch.from_numpy(inputs).split(BATCH)
        return np.concatenate([network(batch).numpy() for batch in batches])


def folded(network: MobileNet) -> MobileNet:
    """Return the network with its BatchNorms folded into its convolutions."""
    made = MobileNet(network.stem[0].out_channels, network.head[-1].out_features, act=nn.ReLU, norm=False).eval()
    for source, target in zip(_sequences(network), _sequences(made), strict=True):
        pairs = [
            fuse_conv_bn_eval(first, second)
            for first, second in itertools.pairwise(source)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d)
        ]
        convs = [layer for layer in target if isinstance(layer, nn.Conv2d)]
        for conv, pair in zip(convs, pairs, strict=True):
            conv.load_state_dict(pair.state_dict())
    made.head.load_state_dict(network.head.state_dict())
    return made


def uneven(network: MobileNet, *, seed: int, sigma: float = SIGMA) -> None:
    """Scale each hidden channel by a lognormal factor, and its reader by the inverse: ReLU lets it through.

    A network without BatchNorm computes what it did, and ranges per tensor fit its channels badly. This flatters
    cross-layer equalization (Nagel et al. 2019), which undoes it: a regression test, no proof.

    Args:
        network: Folded, with ReLU; changed in place.
        seed: Of the factors.
        sigma: Standard deviation of their logarithm.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in network.blocks:
            assert isinstance(block, InvertedResidual)
            expand, depthwise, project = (layer for layer in block.layers if isinstance(layer, nn.Conv2d))
            for writer, reader in ((expand, depthwise), (depthwise, project)):
                factors = torch.exp(torch.randn(writer.out_channels, generator=generator) * sigma)
                writer.weight.mul_(factors.view(-1, 1, 1, 1))
                writer.bias.mul_(factors)
                reader.weight.div_(factors.view((-1, 1, 1, 1) if reader.groups > 1 else (1, -1, 1, 1)))


def _sequences(network: MobileNet) -> list[nn.Sequential]:
    return [network.stem, *(block.layers for block in network.blocks), network.last]


def _normalize(images: torch.Tensor) -> torch.Tensor:
    if images.dtype == torch.uint8:
        images = (images.float() / 255 - MEAN) / STD
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread: sums are then taken in one order, and a seed gives the same weights again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
