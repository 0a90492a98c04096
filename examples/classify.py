"""An application on a device: loads the engine that the agent trusts, and says how many pictures it gets right.

It needs `cnncc-runtime` alone. Writes a JSON document: ``{"right": 354, "of": 360}``.
"""

from __future__ import annotations

import json
import sys

import numpy as np

import cnncc_runtime


def main(bundle: str, pictures: str) -> None:
    """Classify pictures (``x``: float32 [N, C, H, W], ``y``: classes [N])."""
    with np.load(pictures) as held:
        x, y = held["x"], held["y"]
    with cnncc_runtime.load(bundle) as engine:
        found = [int(np.asarray(engine(image[None])).argmax()) for image in x]
    print(json.dumps({"right": int((np.array(found) == y).sum()), "of": len(y)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
