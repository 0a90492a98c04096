"""cnncc-runtime: what a device installs to run engines that `cnncc` built.

    import cnncc_runtime

    model = cnncc_runtime.load("resnet18.cnncc")
    scores = model(model.preprocess("cat.jpg"))

`load` gives a `Model` to call, `open` a `Session` of named arrays; errors are in `cnncc_runtime.errors`. Importing the
package loads nothing: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnncc_runtime.bundle import Bundle, read_bundle
    from cnncc_runtime.errors import CnnccError
    from cnncc_runtime.session import Model, Session, load, open
    from cnncc_runtime.specs import TensorSpec

__version__ = "0.1.0"

__all__ = ["Bundle", "CnnccError", "Model", "Session", "TensorSpec", "__version__", "load", "open", "read_bundle"]

_HOME = {
    "Bundle": "cnncc_runtime.bundle",
    "CnnccError": "cnncc_runtime.errors",
    "Model": "cnncc_runtime.session",
    "Session": "cnncc_runtime.session",
    "TensorSpec": "cnncc_runtime.specs",
    "load": "cnncc_runtime.session",
    "open": "cnncc_runtime.session",
    "read_bundle": "cnncc_runtime.bundle",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
