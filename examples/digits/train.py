"""Train the seed CNN on scikit-learn's digits (1797 images, shipped with scikit-learn, nothing is downloaded).

Writes ``digits.safetensors``, the training images as ``train.npz``, 512 of them as ``calibration.npz``, the held-out
images as ``heldout.npz`` and one of them as ``seven.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from model import build, preprocessing
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from cnncc_runtime.preprocess import Preprocessing


def picture(digit: np.ndarray) -> Image.Image:
    """Return one of scikit-learn's 8×8 digits (0 to 16) as an 8-bit picture."""
    return Image.fromarray((digit * 255 / 16).round().astype(np.uint8))


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_digits()
    contract = Preprocessing(**preprocessing)
    x = np.concatenate([contract.apply(picture(digit)) for digit in data.images])
    indices = np.arange(len(x))
    train, held = train_test_split(indices, test_size=0.2, random_state=0, stratify=data.target)

    torch.manual_seed(0)
    network = build()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loss = nn.CrossEntropyLoss()
    images, targets = torch.from_numpy(x), torch.from_numpy(data.target.astype(np.int64))
    for epoch in range(args.epochs):
        network.train()
        total = 0.0
        for batch in torch.from_numpy(train)[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            value = loss(network(images[batch]), targets[batch])
            value.backward()
            optimizer.step()
            total += value.item() * len(batch)
        decay.step()
        print(f"epoch {epoch + 1:2}  loss {total / len(train):.4f}")

    network.eval()
    with torch.no_grad():
        accuracy = (network(images[held]).argmax(1) == targets[held]).float().mean().item()
    print(f"held-out accuracy {accuracy:.2%} of {len(held)} images")

    save_file(network.state_dict(), args.out / "digits.safetensors")
    np.savez(args.out / "train.npz", x=x[train], y=data.target[train])
    np.savez(args.out / "calibration.npz", x=x[train[:512]])
    np.savez(args.out / "heldout.npz", x=x[held], y=data.target[held])
    seven = next(index for index in held if data.target[index] == 7)
    picture(data.images[seven]).save(args.out / "seven.png")


if __name__ == "__main__":
    main()
