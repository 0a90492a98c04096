"""Kernels and program to object files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes

from cnncc.targets.llvm.stack import keep_on_stack, share_buffers
from cnncc.targets.llvm.threads.pool import write_object
from cnncc.targets.llvm.threads.regions import announce_regions
from cnncc.targets.llvm.wide import wide

_PIPELINE, _PLAIN = "cnncc", "cnncc-plain"


def kernel_passes() -> list[tuple[str, Any]]:
    """Scheduled kernels to flat code.

    These are the passes of TVM's own pipeline that mean something on a CPU. Those for GPUs cost half of the compile
    time, and so do hoisting of conditions and elimination of common subexpressions, which LLVM does as well. Buffers
    stay where the schedules allocate them: moved into a vector loop they would hold one lane.
    """
    return [
        # Blocks to plain loops.
        ("canonical-loops", s_tir.transform.CanonicalizeLoop()),
        ("initial-values", s_tir.transform.LowerInitBlock()),
        ("opaque-blocks", s_tir.transform.ConvertBlocksToOpaque()),
        ("shrink-buffers", s_tir.transform.CompactBufferAllocation()),
        ("match-buffers", s_tir.transform.LowerMatchBuffer()),
        ("leave-blocks", s_tir.transform.LowerOpaqueBlock()),
        # Memory and vectors.
        ("flatten", tirx.transform.FlattenBuffer()),
        ("legalize-bf16", tirx.transform.BF16ComputeLegalize()),
        ("narrow-indices", tirx.transform.NarrowDataType(32)),
        ("vectorize", tirx.transform.VectorizeLoop(True)),
        ("share-buffers", share_buffers()),
        ("keep-on-stack", keep_on_stack()),
        ("unroll", tirx.transform.UnrollLoop()),
        ("simplify", tirx.transform.StmtSimplify()),
        ("remove-nothing", tirx.transform.RemoveNoOp()),
        ("safe-selects", s_tir.transform.RewriteUnsafeSelect()),
        # The runtime's calling convention.
        ("legalize-fp8", tirx.transform.FP8ComputeLegalize()),
        ("verify", tirx.transform.VerifyMemory()),
        ("entry", tirx.transform.AnnotateEntryFunc()),
        ("split-host", tirx.transform.SplitHostDevice()),
        ("packed-calls", tirx.transform.MakePackedAPI()),
        ("store-fp8", tirx.transform.FP8StorageLegalize()),
        ("store-bf16", tirx.transform.BF16StorageLegalize()),
        ("announce-regions", announce_regions()),
    ]


def _pipeline() -> tuple[Any, Any, Any]:
    passes = tvm.ir.transform.Sequential([step for _name, step in kernel_passes()])
    return passes, finalize_host_passes, finalize_device_passes


def write_objects(module: Any, target: Any, folder: Path) -> list[Path]:
    """Generate machine code.

    Args:
        module: The lowered module.
        target: TVM's target.
        folder: Where the objects go.

    Returns:
        The object files, in the order in which they must be linked; the last are the engine's threads.
    """
    tirx.register_tir_pipeline(_PIPELINE, _pipeline)
    return _exported(relax.build(module, target=target, relax_pipeline=None, tir_pipeline=_PIPELINE), target, folder)


def write_kernels(module: Any, target: Any, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Generate machine code for the kernels of a module alone, as `write_objects` would.

    Args:
        module: Scheduled kernels; Relax functions beside them are left out.
        target: TVM's target.
        folder: Where the objects go.

    Returns:
        Kernel → its function before code generation, and the object files.
    """
    tirx.register_tir_pipeline(_PIPELINE, _pipeline)
    module = relax.transform.AttachGlobalSymbol()(module)
    kernels = {
        str(var.name_hint): function
        for var, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    return kernels, _exported(tirx.build(tvm.IRModule(kernels), target, pipeline=_PIPELINE), target, folder)


def write_module(module: Any, passes: Sequence[Any], target: Any, path: Path) -> Path:
    """Generate machine code for functions that need none of the runtime, by passes of their own.

    Args:
        module: Scheduled kernels.
        passes: From those to what LLVM takes.
        target: TVM's target.
        path: The object file to write.

    Returns:
        The path.
    """
    tirx.register_tir_pipeline(
        _PLAIN, lambda: (tvm.ir.transform.Sequential(list(passes)), finalize_host_passes, finalize_device_passes)
    )
    tirx.build(module, target, pipeline=_PLAIN).write_to_file(str(path), "o")
    return path


def _exported(built: Any, target: Any, folder: Path) -> list[Path]:
    """Write what was built, and the threads it runs on, to object files."""
    objects: list[Path] = []

    def collect(_output: str, files: list[str], **_options: Any) -> None:
        objects.extend(Path(file) for file in files)

    collect.object_format = "o"  # type: ignore[attr-defined]
    # Without a kernel (a graph that only reshapes) there is no object to take the triple from, and TVM would write C.
    collect.get_target_triple = lambda: str(target.attrs["mtriple"])  # type: ignore[attr-defined]
    built.export_library(str(folder / "engine.so"), fcompile=collect, workspace_dir=str(folder))
    return [*objects, *wide.write_objects(target, folder), write_object(target, folder / "threads.o")]
