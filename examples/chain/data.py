"""Write scikit-learn's digits (1797 handwritten ones, shipped with scikit-learn, nothing is downloaded) in three parts.

``train.npz`` is learnt from, by ``validation.npz`` weights and sizes are chosen, and by ``heldout.npz`` nothing is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from model import preprocessing
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cnncc_runtime.preprocess import Preprocessing


def main() -> None:
    """Split, prepare, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path())
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    data = load_digits()
    contract = Preprocessing(**preprocessing)
    pictures = (Image.fromarray((digit * 255 / 16).round().astype(np.uint8)) for digit in data.images)
    x = np.concatenate([contract.apply(picture) for picture in pictures])
    rest, held = train_test_split(np.arange(len(x)), test_size=400, random_state=0, stratify=data.target)
    train, validation = train_test_split(rest, test_size=400, random_state=0, stratify=data.target[rest])
    for name, part in (("train", train), ("validation", validation), ("heldout", held)):
        np.savez(out / f"{name}.npz", x=x[part], y=data.target[part])
        print(f"{out / name}.npz  {len(part)} images")


if __name__ == "__main__":
    main()
