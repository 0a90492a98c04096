"""ExecuTorch's int8: PyTorch's quantization of exported programs (PT2E), as XNNPACK wants it."""

from __future__ import annotations

from typing import Any

from cnncc.compiler.bench import requantized
from cnncc_runtime.errors import ModelRefused
from cnncc_runtime.specs import TensorSpec


def quantize(program: Any) -> Any:
    """Return an exported program in int8: weights per channel, activations per tensor.

    Args:
        program: A `torch.export.ExportedProgram` of positional tensors.

    Raises:
        ModelRefused: It does not say what its inputs look like, takes something else than positional tensors or
            any batch size, or what came out computes something else.
    """
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = program.example_inputs or ((), {})
    if not args or kwargs or not all(isinstance(value, torch.Tensor) for value in args):
        raise ModelRefused("only a network of positional tensors can be quantized")
    if _takes_any_batch(program):  # its operators would run outside of XNNPACK, twenty times slower on SqueezeNet
        raise ModelRefused(
            "ExecuTorch's int8 wants one batch size, and the model takes any", hint="compile it without --batch"
        )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    specs = [TensorSpec(str(n), tuple(arg.shape), str(arg.dtype).removeprefix("torch.")) for n, arg in enumerate(args)]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    samples = [tuple(map(torch.from_numpy, feeds.values())) for feeds in requantized.samples(specs)]

    def outputs(module: Any) -> list[Any]:
        return [leaf.numpy() for leaf in pytree.tree_leaves(module(*samples[0]))]

    with torch.no_grad():
        plain = outputs(program.module())
        prepared = prepare_pt2e(program.module(), quantizer)
        for sample in samples:
            prepared(*sample)
        made = convert_pt2e(prepared)
        requantized.check(plain, outputs(made), "PyTorch")
        return torch.export.export(made, tuple(args))


def _takes_any_batch(program: Any) -> bool:
    """Whether the size of a dimension of an input is left open."""
    inputs = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in inputs]
    return any(not isinstance(size, int) for shape in shapes for size in shape)
