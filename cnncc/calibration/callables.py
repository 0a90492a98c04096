"""DATA that the user's code makes: ``package.module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.calibration.source import FileState, Row, check_batch, label_of
from cnncc_runtime.errors import CnnccError, DataRefused, UsageError
from cnncc_runtime.specs import Tensors, TensorSpec

_END = object()


@dataclass(frozen=True)
class _Home:
    """Where the user's code lives.

    Attributes:
        label: DATA as given.
        folder: On ``sys.path`` while the code runs.
        first: Whether before all else, as Python does for a script, or behind all else.
        file: The module's; None where it is not known.
    """

    label: str
    folder: Path
    first: bool
    file: Path | None

    @contextlib.contextmanager
    def running(self, failure: str) -> Iterator[None]:
        """Let the user's code run: find its modules, keep its prints off stdout, say what failed in which line.

        Raises:
            DataRefused: Whatever the code raised, but for Ctrl-C and the errors of cnncc.
        """
        sys.path.insert(0 if self.first else len(sys.path), str(self.folder))
        importlib.invalidate_caches()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (CnnccError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as exc:  # the user's code may raise anything, SystemExit too
            missing = f"install what provides '{exc.name}'" if isinstance(exc, ModuleNotFoundError) else ""
            raise DataRefused(
                f"{self.label} {failure}: {type(exc).__name__}: {exc}",
                where=self._place(exc),
                hint=missing or "fix the error in the data's code",
            ) from exc
        finally:
            with contextlib.suppress(ValueError):  # the user's code may have taken it off
                sys.path.remove(str(self.folder))

    def _place(self, exc: BaseException) -> tuple[str, ...]:
        frames = traceback.extract_tb(exc.__traceback__)
        own = [frame for frame in frames if self.file and Path(frame.filename) == self.file]
        return tuple(f"{frame.filename}:{frame.lineno}, in {frame.name}" for frame in own[-1:])


@dataclass(frozen=True)
class CallableRows:
    """Rows of the batches that a factory yields; the factory is called for every iteration."""

    home: _Home
    state: FileState | None
    factory: Callable[[], Iterable[Any]]
    specs: tuple[TensorSpec, ...]
    limit: int | None
    values: bool = False

    @property
    def count(self) -> None:
        """Only the end of the iteration tells."""

    @property
    def identity(self) -> Any:
        """The callable's name; size and time of the file it is written in. What that reads is not known."""
        return [self.home.label, [self.state.size, self.state.modified] if self.state else None]

    def rows(self, start: int) -> Iterator[Row]:
        """Read one row after the other; the first ``start`` are made by the factory all the same.

        Raises:
            DataRefused: The user's code fails, or yields what no input can be made of.
        """
        with self.home.running("cannot be called"):
            batches = iter(self.factory())
        number = seen = 0
        while self.limit is None or seen < self.limit:
            where = f"batch {number} of {self.home.label}"
            with self.home.running("failed"):
                batch = next(batches, _END)
                if batch is _END:
                    return
                arrays, labels = self._taken(where, batch)
            count = check_batch(where, arrays, labels, values=self.values)
            wanted = count if self.limit is None else min(count, self.limit - seen)
            for index in range(max(start - seen, 0), wanted):
                yield self._row(f"batch {number} x[{index}]", arrays, labels, index)
            number, seen = number + 1, seen + count

    def _taken(self, where: str, batch: Any) -> tuple[Tensors, NDArray[Any] | None]:
        """Take what was yielded apart: arrays, labels."""
        x, y = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
        labels = None if y is None else np.asarray(y)
        if isinstance(x, Mapping):
            return {str(key): np.asarray(value) for key, value in x.items()}, labels
        if len(self.specs) == 1:
            return {self.specs[0].name: np.asarray(x)}, labels
        raise DataRefused(
            f"{where} is a {type(batch).__name__}, and the model takes {len(self.specs)} inputs",
            hint="yield a dict of arrays by the inputs' names, or (dict, labels): "
            + ", ".join(spec.name for spec in self.specs),
        )

    def _row(self, name: str, arrays: Tensors, labels: NDArray[Any] | None, index: int) -> Row:
        label = None if labels is None else label_of(name, np.asarray(labels[index]), values=self.values)
        # copies: a factory may fill the same buffer again
        feeds = {key: np.array(array[index : index + 1], order="C") for key, array in arrays.items()}
        return Row(name, feeds, label)


def open_callable(
    source: str, specs: tuple[TensorSpec, ...], limit: int | None, *, values: bool = False
) -> CallableRows:
    """Import the user's module and find the factory.

    It is called without arguments, and yields batches: an array, a dict of arrays by input name, or a pair of one
    of these and labels (``[N]``, or ``[N, H, W]``). Its file's folder, or the working folder, is on ``sys.path``
    while the user's code runs, and what it prints goes to stderr.

    Args:
        source: ``package.module:factory`` or ``file.py:factory``.
        specs: The inputs, batch size 1.
        limit: Rows at most: the first ones.
        values: Whether labels are values, for regression.

    Raises:
        DataRefused: The module cannot be imported, or has no such callable.
        UsageError: There is no such file.
    """
    target, _, name = source.rpartition(":")
    path = Path(target).resolve() if target.endswith(".py") else None
    if path and not path.is_file():
        raise UsageError(f"{target} is not a file", hint="give file.py:factory, or package.module:factory")
    home = _Home(source, path.parent if path else Path.cwd(), path is not None, path)
    with home.running("cannot be called"):
        module = _from_file(path) if path else importlib.import_module(target)
        factory = getattr(module, name)
        if not callable(factory):
            raise TypeError(f"'{name}' is a {type(factory).__name__}, not a function that yields batches")
    file = getattr(module, "__file__", None)
    home = dataclasses.replace(home, file=Path(file) if file else None)
    return CallableRows(home, _state(home.file), factory, specs, limit, values)


def _state(path: Path | None) -> FileState | None:
    try:
        return FileState.of(path) if path else None
    except OSError:  # a module out of an archive
        return None


def _from_file(path: Path) -> ModuleType:
    name = f"_cnncc_data_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module
