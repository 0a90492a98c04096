"""Runs the user's factory: `file.py:factory` or `package.module:factory`.

The user's code is trusted to run, and kept from leaking: its folder is on ``sys.path`` only meanwhile, its modules
leave ``sys.modules`` afterwards, what it prints goes to stderr, and its failures are reported by its own frames.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from cnncc.compiler.dependencies import is_users, record_dependencies
from cnncc.compiler.model_reference import ModelReference, parse_reference
from cnncc.compiler.quiet import prints_to_stderr
from cnncc.compiler.weights import check_data
from cnncc_runtime.errors import CnnccError, DataRefused, ModelRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing

_SEED = 0


@dataclass(frozen=True)
class Built:
    """What a factory and its neighbours gave.

    Attributes:
        module: In eval mode, on the CPU.
        examples: ``example_inputs()``: by position (tuple) or by name (dict); None where there are none.
        preprocessing: The contract beside the factory.
        labels: Class names beside the factory.
        dependencies: The user's files that were read or imported.
    """

    module: nn.Module
    examples: tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    dependencies: tuple[Path, ...]


def build(reference: ModelReference) -> Built:
    """Import the user's module and call its factory, with every random generator seeded.

    Raises:
        ModelRefused: The code fails, or returns something that is not a module.
        UsageError: The factory does not exist or needs arguments.
    """
    folder = reference.path.resolve().parent if reference.path else Path.cwd()
    with record_dependencies() as record, _user_code(folder, front=reference.path is not None), seeded():
        home = _import(reference)
        factory = _find(home, reference)
        module = _call_factory(factory, reference)
        examples = _examples(home)
        preprocessing = _preprocessing(home)
        labels = _labels(home)
        record.collect_modules("" if reference.path else reference.target.partition(".")[0])
        return Built(module, examples, preprocessing, labels, record.paths())


def user_function(text: str) -> Callable[..., Any]:
    """Return a function of the user's: ``file.py:name`` or ``package.module:name``. It is not called.

    Raises:
        UsageError: There is none of that name.
        ModelRefused: Its module fails.
    """
    reference = parse_reference(text)
    if reference.kind not in ("file", "module"):
        raise UsageError(f"'{text}' names no function", hint="file.py:name, or package.module:name")
    folder = reference.path.resolve().parent if reference.path else Path.cwd()
    with _user_code(folder, front=reference.path is not None):
        found: Callable[..., Any] = _find(_import(reference), reference)
    if not callable(found):
        raise UsageError(f"{text} is {_describe(found)}, not a function")
    return found


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Seed torch, NumPy and random inside; give the generators back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _user_code(folder: Path, *, front: bool) -> Iterator[None]:
    """Put a folder on the path; afterwards take it off and forget the modules that came from it."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0 if front else len(sys.path), str(folder))
    importlib.invalidate_caches()
    try:
        with prints_to_stderr():
            yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and is_users(Path(file).resolve()):
                del sys.modules[name]


def _import(reference: ModelReference) -> ModuleType:
    with user_errors(f"importing {reference.target}"):
        if reference.path is None:
            return importlib.import_module(reference.target)
        path = reference.path.resolve()
        name = f"_cnncc_model_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ModelRefused(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up
        spec.loader.exec_module(module)
        return module


@contextlib.contextmanager
def user_errors(doing: str) -> Iterator[None]:
    """Turn whatever the user's code raises into `ModelRefused` that points at the user's line.

    Raises:
        ModelRefused: With the exception's type and message, and file and line of the user's frame.
    """
    try:
        yield
    except (CnnccError, KeyboardInterrupt, GeneratorExit):
        raise
    except ModuleNotFoundError as exc:
        hint = f"install the package that provides '{exc.name}' in this environment" if exc.name else ""
        raise ModelRefused(f"{doing} failed: {exc}", where=user_place(exc), hint=hint) from exc
    except BaseException as exc:  # the user's code may raise anything, SystemExit too
        raise ModelRefused(
            f"{doing} failed: {type(exc).__name__}: {exc}",
            where=user_place(exc),
            hint="fix the error in the model's code",
        ) from exc


def user_place(exc: BaseException) -> tuple[str, ...]:
    """Return ``file:line, in function`` of the innermost frame in the user's own code."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return (f"{exc.filename}:{exc.lineno}",)
    for frame in reversed(list(_frames(exc.__traceback__))):
        if is_users(Path(frame.filename).resolve()):
            line = f": {frame.line}" if frame.line else ""
            return (f"{frame.filename}:{frame.lineno}, in {frame.name}{line}",)
    return ()


def _frames(tb: TracebackType | None) -> traceback.StackSummary:
    return traceback.extract_tb(tb)


def _find(home: ModuleType, reference: ModelReference) -> Any:
    value: Any = home
    for part in reference.factory.split("."):
        if not hasattr(value, part):
            names = [name for name in dir(value) if not name.startswith("_")]
            near = difflib.get_close_matches(part, names, 3)
            callables = [n for n in names if getattr(getattr(value, n), "__module__", None) == home.__name__]
            hint = f"did you mean {', '.join(near)}?" if near else f"it defines: {', '.join(callables) or 'nothing'}"
            raise UsageError(f"{reference.target} has no '{reference.factory}'", hint=hint)
        value = getattr(value, part)
    return value


def _call_factory(factory: Any, reference: ModelReference) -> nn.Module:
    made = factory
    if not isinstance(factory, nn.Module):
        made = _call(factory, reference.label)
    if not isinstance(made, nn.Module):
        raise ModelRefused(
            f"{reference.label} returned {_describe(made)}, not a torch.nn.Module",
            hint="the factory returns the module itself: `def build(): return Net()`",
        )
    check_data((*made.named_parameters(), *made.named_buffers()))
    with user_errors(f"preparing {reference.label}"):
        return made.cpu().eval()


def _describe(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None (is a `return` missing?)" if value is None else f"a {type(value).__name__}"


def _call(function: Any, label: str) -> Any:
    if not callable(function):
        raise UsageError(f"{label} is a {type(function).__name__}, not a callable", hint="name a function or a class")
    if needed := _required(function):
        raise UsageError(
            f"{label} needs arguments: {', '.join(needed)}",
            hint="write a factory that takes none: `def build(): return Net(num_classes=10)`",
        )
    with user_errors(f"{label}()"):
        return function()


def _required(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in open_ended]


def _examples(home: ModuleType) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None:
    function = getattr(home, "example_inputs", None)
    if function is None:
        return None
    made = _call(function, "example_inputs")
    if isinstance(made, torch.Tensor):
        made = (made,)
    values = list(made.values()) if isinstance(made, Mapping) else list(made) if isinstance(made, tuple | list) else []
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise ModelRefused(
            f"example_inputs() returned {_describe(made)}",
            hint="return a tuple of tensors in the order of forward's parameters, or a dict by their names",
        )
    return {str(key): value for key, value in made.items()} if isinstance(made, Mapping) else tuple(values)


def _preprocessing(home: ModuleType) -> Preprocessing | None:
    found = getattr(home, "preprocessing", None)
    if found is None or isinstance(found, Preprocessing):
        return found
    if not isinstance(found, Mapping):
        raise ModelRefused(
            f"'preprocessing' beside the factory is {_describe(found)}",
            hint="make it a cnncc_runtime Preprocessing, or a dict of its fields",
        )
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return Preprocessing(**fields)
    except (TypeError, DataRefused) as exc:
        raise ModelRefused(f"'preprocessing' beside the factory is not valid: {exc}") from exc


def _labels(home: ModuleType) -> tuple[str, ...]:
    found = getattr(home, "labels", ())
    if isinstance(found, str) or not isinstance(found, list | tuple) or not all(isinstance(x, str) for x in found):
        raise ModelRefused(f"'labels' beside the factory is {_describe(found)}", hint="make it a list of strings")
    return tuple(found)
