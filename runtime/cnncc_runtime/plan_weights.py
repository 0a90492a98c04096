"""Gives a stripped engine the weights that lie beside it."""

from __future__ import annotations

import zipfile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.errors import BundleRefused, RunFailed

_SHOWN = 10
_HINT = "build the bundle again"


def refit(trt: Any, engine: Any, logger: Any, file: BinaryIO) -> None:
    """Set all weights that an engine asks for.

    Args:
        trt: The library's module.
        engine: Built without weights.
        logger: The library's.
        file: A npz by the names that the refitter asks for; types that NumPy lacks are unsigned integers of their bits.

    Raises:
        BundleRefused: The file is damaged, or lacks weights.
        RunFailed: The library does not take them.
    """
    refitter = trt.Refitter(engine, logger)
    kept = []  # the refitter reads them when it works, not when they are set
    asked = refitter.get_all_weights()
    try:
        with np.load(file, allow_pickle=False) as archive:
            if missing := sorted(set(asked) - set(archive.files)):
                raise BundleRefused(
                    f"the engine asks for {len(missing)} weights that its file lacks",
                    where=missing[:_SHOWN],
                    hint=_HINT,
                )
            for name in asked:
                array = np.ascontiguousarray(archive[name])
                kept.append(array)
                if not refitter.set_named_weights(name, _weights(trt, refitter, name, array)):
                    raise BundleRefused(f"the engine does not take its weights '{name}'", hint=_HINT)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as exc:
        raise BundleRefused(f"the engine's weights cannot be read: {exc}", hint=_HINT) from exc
    if not refitter.refit_cuda_engine():
        said = logger.errors[-1].strip() if logger.errors else "it does not say why"
        raise RunFailed(f"the engine's weights cannot be set: {said}", hint=_HINT)


def _weights(trt: Any, refitter: Any, name: str, array: NDArray[Any]) -> Any:
    """Return an array in the element type that the engine has, which NumPy may lack.

    Raises:
        BundleRefused: It has another size, and the library would read beyond it.
    """
    wanted = refitter.get_weights_prototype(name)
    if (wanted.size, wanted.nbytes) != (array.size, array.nbytes):
        raise BundleRefused(
            f"the engine's weights '{name}' have {wanted.nbytes} bytes, its file has {array.nbytes}", hint=_HINT
        )
    return trt.Weights(wanted.dtype, array.ctypes.data, array.size)
