"""Weights from a file into a module: nothing in the file is executed, nothing is dropped silently."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cnncc.compiler.pruned import HEADER, fit_channels
from cnncc.compiler.quiet import quiet
from cnncc_runtime.errors import ModelRefused, WeightsRefused

SAVE_HINT = (
    "save the state dict alone: torch.save(model.state_dict(), 'weights.pt'), "
    "or safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)

_SHOWN = 10
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PARALLEL = "module."  # torch.nn.DataParallel and DistributedDataParallel
_COUNTER = "num_batches_tracked"  # of BatchNorm; inference does not read it

StateDict = dict[str, torch.Tensor]


def load_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a state dict into a module, all of it or nothing.

    Args:
        module: Changed in place. Where the file says that channels were pruned, it gets as many as the file has.
        path: ``.safetensors``, or a ``torch.save`` file read with ``weights_only=True``.

    Returns:
        Notes for the user: a wrapper or prefix that was taken off, dtypes that were cast.

    Raises:
        WeightsRefused: Unsafe, unreadable, or keys and shapes do not fit; lists them.
    """
    state, notes = read_state_dict(path)
    state, more = _without_prefix(state, module)
    notes += more
    if HEADER in read_header(path):
        pruned = fit_channels(module, state)
        gone = sum(before - after for before, after in pruned.values())
        notes.append(f"{path.name} is pruned: {gone} channels fewer in {len(pruned)} layers")
    own = module.state_dict(keep_vars=True)
    _check_keys(state, own, module, path)
    notes += _casts(state, own)
    with quiet(), torch.no_grad():
        module.load_state_dict(state, strict=False)
    return tuple(notes)


def read_state_dict(path: Path) -> tuple[StateDict, list[str]]:
    """Read a state dict without executing anything.

    Returns:
        The tensors by name, and notes.

    Raises:
        WeightsRefused: Missing, damaged, a pickled module, or not a state dict.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsRefused(f"the weights file {path} {what}")
    if path.stat().st_size == 0:
        raise WeightsRefused(f"the weights file {path} is empty")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), []
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise WeightsRefused(f"{path.name} has no suffix of a weights file", hint="use .safetensors, .pt, .pth or .bin")
    return _unwrap(_read_torch(path), path)


def read_header(path: Path) -> dict[str, str]:
    """Return what stands in a safetensors file's header beside the tensors; nothing for other files.

    Raises:
        WeightsRefused: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, str] = file.metadata() or {}
            return found
    except (SafetensorError, OSError, ValueError) as exc:
        raise WeightsRefused(f"{path} is not a safetensors file that can be read: {exc}") from exc


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as exc:
        raise WeightsRefused(f"{path} is not a safetensors file that can be read: {exc}") from exc


def _read_torch(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _refuse_compressed(path)
    try:
        with quiet():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as exc:
        raise WeightsRefused(
            f"{path} cannot be loaded safely: {_reason(exc)}",
            where=["loading it would run code that the file chooses; cnncc loads tensors only"],
            hint=SAVE_HINT,
        ) from exc
    except Exception as exc:  # a damaged file fails in many ways: RuntimeError, EOFError, KeyError, UnicodeError, …
        if "TorchScript" in str(exc):
            raise WeightsRefused(f"{path} is a TorchScript program, not weights", hint=SAVE_HINT) from exc
        raise WeightsRefused(f"{path} is damaged or not a weights file: {_reason(exc)}", hint=SAVE_HINT) from exc


def _refuse_compressed(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError) as exc:
        raise WeightsRefused(f"{path} is damaged: {exc}") from exc
    if packed:  # torch.save never compresses; a compressed entry may unpack to any size
        raise WeightsRefused(f"{path} holds compressed entries, which torch.save does not write", where=packed[:_SHOWN])


def _reason(exc: Exception) -> str:
    """Return the part of torch's message that says what was found, without its advice to be unsafe."""
    text = str(exc)
    for line in text.splitlines():
        if "WeightsUnpickler error:" in line:
            return line.partition("WeightsUnpickler error:")[2].strip().rstrip(".")
    return (text.splitlines() or [type(exc).__name__])[0].strip()


def _unwrap(loaded: Any, path: Path) -> tuple[StateDict, list[str]]:
    notes: list[str] = []
    if isinstance(loaded, Mapping):
        for key in _WRAPPERS:
            inner = loaded.get(key)
            if isinstance(inner, Mapping):
                others = [str(name) for name in loaded if name != key]
                rest = f"; not used: {', '.join(others[:_SHOWN])}" if others else ""
                notes.append(f"{path.name}: the weights are under '{key}'{rest}")
                loaded = inner
                break
    if not isinstance(loaded, Mapping):
        raise WeightsRefused(f"{path} holds a {type(loaded).__name__}, not a state dict", hint=SAVE_HINT)
    if not loaded:
        raise WeightsRefused(f"{path} holds no tensors", hint=SAVE_HINT)
    wrong = [f"{key}: {type(value).__name__}" for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise WeightsRefused(
            f"{path} holds {len(wrong)} entries that are not tensors", where=_first(wrong), hint=SAVE_HINT
        )
    return {str(key): value for key, value in loaded.items()}, notes


def _without_prefix(state: StateDict, module: nn.Module) -> tuple[StateDict, list[str]]:
    prefixed = all(key.startswith(_PARALLEL) for key in state)
    if not prefixed or any(key.startswith(_PARALLEL) for key in module.state_dict()):
        return state, []
    return (
        {key.removeprefix(_PARALLEL): value for key, value in state.items()},
        [f"the weights were saved from DataParallel: the prefix '{_PARALLEL}' was taken off every name"],
    )


def _check_keys(state: StateDict, own: Mapping[str, torch.Tensor], module: nn.Module, path: Path) -> None:
    given = {tensor.data_ptr() for name, tensor in own.items() if name in state and tensor.numel()}
    missing = [
        name
        for name, tensor in own.items()
        # safetensors keeps one name of tied weights; the other is loaded through it
        if name not in state and not name.endswith(_COUNTER) and tensor.data_ptr() not in given
    ]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name}: the file has {list(state[name].shape)}, the model {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if not (missing or unexpected or shapes):
        return
    where = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        if names:
            where += [f"{what} ({len(names)}):", *(f"  {name}" for name in _first(names))]
    raise WeightsRefused(
        f"{path.name} does not fit {type(module).__name__}: {len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(shapes)} of another shape",
        where=where,
        hint="check that the factory builds the architecture that the weights were trained with",
    )


def _casts(state: StateDict, own: Mapping[str, torch.Tensor]) -> list[str]:
    casts: dict[str, int] = {}
    for name, tensor in own.items():
        if name in state and state[name].dtype != tensor.dtype:
            change = f"{state[name].dtype} → {tensor.dtype}".replace("torch.", "")
            casts[change] = casts.get(change, 0) + 1
    return [f"{count} tensors were cast {change} to fit the model" for change, count in sorted(casts.items())]


def check_data(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse tensors that hold no data.

    Raises:
        ModelRefused: Lazy, or on the 'meta' device; names the first.
    """
    for name, tensor in tensors:
        if is_lazy(tensor) or tensor.is_meta:
            raise ModelRefused(
                f"'{name}' holds no data: it is lazy or on the 'meta' device",
                hint="let the factory return a module whose parameters exist (run it once on an example)",
            )


def check_finite(parameters: Iterable[tuple[str, torch.Tensor]], buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse NaN anywhere, and Inf in parameters and running statistics.

    Other buffers may hold infinities on purpose (attention masks).

    Raises:
        WeightsRefused: Names the tensors.
    """
    bad = []
    tensors = [(name, tensor, True) for name, tensor in parameters]
    tensors += [(name, tensor, name.rpartition(".")[2].startswith("running_")) for name, tensor in buffers]
    for name, tensor, strict in tensors:
        if (found := _nonfinite(tensor, strict)) is not None:
            bad.append(f"{name}: {found}")
    if bad:
        raise WeightsRefused(
            f"{len(bad)} weight tensors hold NaN or Inf",
            where=_first(bad),
            hint="the training diverged, or the file is damaged: take an earlier checkpoint",
        )


def _nonfinite(tensor: torch.Tensor, strict: bool) -> str | None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    # one pass: a sum is finite unless an element is not, or it overflows; only then look closer
    if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float64))):
        return None
    nans = int(torch.isnan(tensor).sum())
    infs = int(torch.isinf(tensor).sum())
    if nans or (infs and strict):
        return f"{nans} NaN, {infs} Inf of {tensor.numel()}"
    return None


def _first(items: list[str]) -> list[str]:
    return items[:_SHOWN] + ([f"… and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else [])
