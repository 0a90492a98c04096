"""How a worker runs each kind of engine; nothing heavy is imported until an adapter is told to.

An adapter is told four things in order: ``load`` the library, ``open`` an engine, ``bind`` the inputs, then ``run``
any number of times. What a user would do once is done in ``bind``; ``run`` is what is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Adapter(Protocol):
    """One way to run an engine. Made with its options."""

    def load(self) -> str:
        """Import the library and return its version."""
        ...

    def open(self, path: Path, threads: int) -> None:
        """Open an engine that computes with so many threads."""
        ...

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Take the inputs, in the model's order."""
        ...

    def run(self) -> Any:
        """Compute once; wait for the result."""
        ...

    def outputs(self) -> list[Array]:
        """Compute once and return the outputs, in the model's order."""
        ...


class CnnccAdapter:
    """A bundle, through the runtime alone, as on a device."""

    def __init__(self, options: dict[str, str]) -> None:
        del options  # it has none
        self._session: Any = None
        self._feeds: dict[str, Array] = {}

    def load(self) -> str:
        """Import the runtime and return its version."""
        import cnncc_runtime.session

        return cnncc_runtime.__version__

    def open(self, path: Path, threads: int) -> None:
        """Open the bundle."""
        import cnncc_runtime.session

        self._session = cnncc_runtime.session.open(path, threads=threads).__enter__()

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Name the inputs as the bundle does."""
        self._feeds = _named([spec.name for spec in self._session.inputs], names, feeds)

    def run(self) -> Any:
        """Run the engine."""
        return self._session.run(self._feeds)

    def outputs(self) -> list[Array]:
        """Return the outputs in the manifest's order."""
        return list(self.run().values())


class OnnxRuntimeAdapter:
    """ONNX Runtime on the CPU with all its optimizations."""

    def __init__(self, options: dict[str, str]) -> None:
        del options  # it has none
        self._session: Any = None
        self._feeds: dict[str, Array] = {}

    def load(self) -> str:
        """Import ONNX Runtime and return its version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open an ``.onnx`` file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Name the inputs as the graph does."""
        self._feeds = _named([value.name for value in self._session.get_inputs()], names, feeds)

    def run(self) -> Any:
        """Run the session."""
        return self._session.run(None, self._feeds)

    def outputs(self) -> list[Array]:
        """Return the outputs in the graph's order."""
        return list(self.run())


class TorchAdapter:
    """PyTorch, from an exported program.

    Args:
        options: ``layout`` (``channels_last``) and ``compile`` (``inductor``: `torch.compile` with freezing).
    """

    def __init__(self, options: dict[str, str]) -> None:
        self._channels_last = options.get("layout") == "channels_last"
        self._compile = options.get("compile") == "inductor"
        self._module: Any = None
        self._structure: Any = None
        self._feeds: tuple[list[Any], dict[str, Any]] = ([], {})

    def load(self) -> str:
        """Import PyTorch and return its version."""
        import torch

        return str(torch.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open a ``.pt2`` archive."""
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        program = torch.export.load(path)  # cnncc's own, from its cache or this benchmark: nobody else's gets here
        self._structure = program.call_spec.in_spec
        module = program.module()
        if self._channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._compile:
            import torch._inductor.config as inductor

            inductor.freezing = True
            module = torch.compile(module)  # type: ignore[assignment]
        self._module = module

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Turn the inputs into tensors; a user of channels-last would have them in that layout."""
        import torch
        from torch.utils import _pytree as pytree

        del names  # programs take positions
        tensors = [torch.from_numpy(array) for array in feeds]
        if self._channels_last:
            tensors = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
        self._feeds = pytree.tree_unflatten(tensors, self._structure)
        if self._compile:
            self.run()  # torch.compile compiles on the first run: that belongs to opening, not to running

    def run(self) -> Any:
        """Call the module."""
        args, kwargs = self._feeds
        return self._module(*args, **kwargs)

    def outputs(self) -> list[Array]:
        """Return the outputs, flattened."""
        from torch.utils import _pytree as pytree

        leaves = pytree.tree_leaves(self.run())
        return [np.ascontiguousarray(leaf.numpy()) for leaf in leaves]


def _named(wanted: Sequence[str], names: Sequence[str], feeds: Sequence[Array]) -> dict[str, Array]:
    """Name the inputs as an engine does: by name where the names agree, else by position."""
    if set(wanted) == set(names):
        return dict(zip(names, feeds, strict=True))
    return dict(zip(wanted, feeds, strict=True))
