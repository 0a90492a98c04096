"""Small engines for the tests of the runtime: TVM's own kernels, with our code generation and threads."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.bundle import SCHEMA, EngineRecord, Manifest, TargetRecord, write_bundle
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.specs import DTYPES, TensorSpec
from cnncc_runtime.tvm_runtime import ABI
from cnncc_runtime.weights import WeightRecord, WeightsRecord

ENGINE = "engine.so"
WEIGHTS = "weights.bin"
TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def manifest(
    inputs: Sequence[TensorSpec] = (TensorSpec("x", (1, 3, 16, 16)),),
    outputs: Sequence[TensorSpec] = (TensorSpec("y", (1, 8, 16, 16)),),
    **changes: Any,
) -> Manifest:
    """A manifest of this machine's engine; fields by keyword."""
    machine = host_machine()
    made = Manifest(
        schema=SCHEMA,
        name="test",
        model={"source": "tests"},
        target=TargetRecord("llvm", "host", TRIPLES.get(machine, ""), "generic", machine, ()),
        engine=EngineRecord(ENGINE, "tvm-vm", ABI, {0: "main"}),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batches=(),
        preprocessing=None,
        labels=(),
        precision="fp32",
        layers=(),
        parity="passed",
        toolchain={},
        reproducible=True,
        files={},
    )
    return replace(made, **changes)


def make_bundle(folder: Path, described: Manifest, engine: bytes | Path, weights: bytes | Path | None = None) -> Path:
    """Write a bundle; return its folder."""
    folder.mkdir(parents=True)
    files: dict[str, tuple[str, bytes | Path]] = {ENGINE: ("engine", engine)}
    if weights is not None:
        files[WEIGHTS] = ("weights", weights)
    write_bundle(folder, described, files)
    return folder


def build(module: Any, path: Path, *, threads: bool = True) -> Path:
    """Build a Relax module for this machine's baseline; without ``threads``, as TVM alone would."""
    import tempfile

    import tvm
    from tvm import relax

    from cnncc.targets.llvm.codegen import write_objects
    from cnncc.targets.llvm.link import find_linker, link

    machine = host_machine()
    target = tvm.target.Target({"kind": "llvm", "mtriple": TRIPLES[machine], "num-cores": 2, "opt-level": 3})
    with target:
        module = relax.get_pipeline("default_build")(relax.get_pipeline("zero")(module))
    with tempfile.TemporaryDirectory() as folder:
        objects = write_objects(module, target, Path(folder))
        made = Path(folder) / path.name
        link(find_linker(machine, machine), machine, objects if threads else objects[:-1], made)
        shutil.move(made, path)
    return path


def from_onnx(graph: Any) -> Any:
    """Import an ONNX graph, parameters inside."""
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    return from_onnx(model, keep_params_in_input=False)


@functools.cache
def conv_weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(7)
    return random.standard_normal((8, 3, 3, 3)).astype("f"), random.standard_normal(8).astype("f")


def conv_reference(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `conv` computes: relu(conv2d(x) + bias), padding 1."""
    weights, bias = conv_weights()
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwij,ocij->nohw", windows, weights) + bias[:, None, None], 0).astype("f")


def conv(path: Path, batches: Sequence[int] = ()) -> Path:
    """A convolution with bias and ReLU; a function per batch size, or ``main`` for one."""
    import tvm
    from onnx import TensorProto, helper, numpy_helper

    weights, bias = conv_weights()
    module = tvm.IRModule()
    for batch in batches or (0,):
        graph = helper.make_graph(
            [helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["y"])],
            "conv",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or 1, 3, 16, 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch or 1, 8, 16, 16])],
            [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
        )
        name = f"main_{batch}" if batch else "main"
        module[name] = from_onnx(graph)["main"].with_attr("global_symbol", name)
    return build(module, path)


def relax_engine(
    path: Path,
    shapes: Sequence[Sequence[int]],
    body: Callable[..., Any],
    dtype: str = "float32",
    *,
    threads: bool = True,
) -> Path:
    """An engine whose ``main`` takes ``shapes`` and returns what ``body(builder, *inputs)`` makes."""
    from tvm import relax

    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(list(shape), dtype)) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            made = builder.emit_output(body(builder, *inputs))
        builder.emit_func_output(made)
    return build(builder.finalize(), path, threads=threads)


def heavy(path: Path, rows: int = 512, rounds: int = 64) -> Path:
    """A matmul-like engine whose rows are shared among the pool's threads (``T.parallel``)."""
    from tvm import relax
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def work(X: T.Buffer((rows, 64), "float32"), Y: T.Buffer((rows, 64), "float32")):  # type: ignore[valid-type]
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        for i in T.parallel(rows):
            for j in range(64):
                with T.sblock("init"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = T.float32(0)
            for r in range(rounds):
                for j in range(64):
                    for k in range(64):
                        with T.sblock("mac"):
                            vi, vr, vj, vk = T.axis.remap("SRSR", [i, r, j, k])
                            Y[vi, vj] = Y[vi, vj] + X[vi, vk] * X[vi, (vj + vk + vr) % 64]

    def body(builder: Any, x: Any) -> Any:
        return builder.emit(
            relax.call_tir(builder.add_func(work, "work"), [x], relax.TensorType([rows, 64], "float32"))
        )

    return relax_engine(path, [(rows, 64)], body)


PARTS, ROWS = 8, 1536

WEIGHTY_RECORD = EngineRecord(
    ENGINE,
    "tvm-vm",
    ABI,
    {0: "main"},
    WeightsRecord(
        WEIGHTS,
        tuple(WeightRecord(part * ROWS * 1024 * 4, (ROWS, 1024), "float32") for part in range(PARTS)),
        {0: tuple(range(PARTS))},
    ),
)
"""Of `weighty`: 48 MiB in several tensors, as a real network has."""


def weighty_part(part: int) -> NDArray[np.float32]:
    return np.full((ROWS, 1024), part + 1, "f") + np.arange(1024, dtype="f")


def weighty(folder: Path) -> None:
    """An engine with much weight, in a file beside it, and little work: it adds up ``weight * x`` by column."""
    from tvm import relax

    def body(builder: Any, x: Any, *parts: Any) -> Any:
        total = x
        for part in parts:
            scaled = builder.emit(relax.op.multiply(part, x))
            total = builder.emit(relax.op.add(total, relax.op.sum(scaled, axis=[0], keepdims=True)))
        return total

    with (folder / "weighty.bin").open("wb") as file:
        for part in range(PARTS):
            file.write(weighty_part(part).data)
    relax_engine(folder / "weighty.so", [(1, 1024), *[(ROWS, 1024)] * PARTS], body)


def odd(folder: Path) -> None:
    """Engines whose outputs are easy to get wrong, and engines that fail."""
    from tvm import relax

    def two(builder: Any, x: Any) -> Any:
        return relax.Tuple([builder.emit(relax.op.add(x, x)), builder.emit(relax.op.multiply(x, x))])

    def absent(builder: Any, x: Any) -> Any:
        return builder.emit(relax.call_pure_packed("no.such.function", x, ty_args=[relax.TensorType([4], "float32")]))

    relax_engine(folder / "two.so", [(4,)], two)
    relax_engine(folder / "identity.so", [(4,)], lambda _, x: x)
    relax_engine(folder / "constant.so", [(4,)], lambda _, x: relax.const(np.arange(4, dtype="f")))
    relax_engine(folder / "minus.so", [(4,), (4,)], lambda builder, a, b: builder.emit(relax.op.subtract(a, b)))
    for dtype in DTYPES:
        relax_engine(folder / f"same-{dtype}.so", [(2, 3)], lambda builder, x: builder.emit(relax.op.flip(x, 0)), dtype)
    relax_engine(folder / "absent.so", [(4,)], absent)
    relax_engine(folder / "threadless.so", [(4,)], lambda _, x: x, threads=False)


def main(folder: Path) -> None:
    conv(folder / "conv.so")
    conv(folder / "batches.so", (1, 4))
    heavy(folder / "heavy.so")
    weighty(folder)
    odd(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
