"""The layout pass: which tensors are blocked, and where they change between layouts.

Convolutions and pools compute on blocked tensors, what stands between them follows, and everything else sees tensors as
the graph has them. Copies between the layouts are made where a reader needs one and once a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import ir, relax, tirx

from cnncc.targets.llvm.blocked.context import Context, names_of
from cnncc.targets.llvm.blocked.convolutions import convolution, product
from cnncc.targets.llvm.blocked.elements import ELEMENTWISE, elementwise
from cnncc.targets.llvm.blocked.image import Image, Steps, Value
from cnncc.targets.llvm.blocked.integers import find_pairs
from cnncc.targets.llvm.blocked.methods import KernelPolicy, choose_methods
from cnncc.targets.llvm.blocked.normalize import layer_norm
from cnncc.targets.llvm.blocked.pixels import pad, resize
from cnncc.targets.llvm.blocked.quantize import dequantize, quantize
from cnncc.targets.llvm.blocked.selections import concat, split, strided_slice, take
from cnncc.targets.llvm.blocked.shapes import permute, reshape
from cnncc.targets.llvm.blocked.transposed import transposed_convolution
from cnncc.targets.llvm.blocked.wants import variables, wanted_blocked
from cnncc.targets.llvm.blocked.windows import pool, reduce_pixels
from cnncc.targets.llvm.expansions import Expansions
from cnncc.targets.llvm.layers import bindings_of
from cnncc.targets.llvm.plans import Plans

Rule = Callable[[Context, Any, str | None], Image | Value | None]
"""Takes the function that is written, the call and the name of its result; None leaves the call plain."""

COMPUTES: dict[str, Rule] = {
    "relax.nn.conv1d": convolution,
    "relax.nn.conv2d": convolution,
    "relax.nn.conv2d_transpose": transposed_convolution,
    "relax.nn.max_pool2d": pool,
    "relax.nn.avg_pool2d": pool,
}
"""Operators that pack their operand if it is plain."""

FOLLOWS: dict[str, Rule] = {
    "relax.expand_dims": reshape,
    "relax.flatten": reshape,
    "relax.image.resize2d": resize,
    "relax.matmul": product,
    "relax.max": reduce_pixels,
    "relax.mean": reduce_pixels,
    "relax.min": reduce_pixels,
    "relax.nn.layer_norm": layer_norm,
    "relax.nn.pad": pad,
    "relax.permute_dims": permute,
    "relax.prod": reduce_pixels,
    "relax.reshape": reshape,
    "relax.squeeze": reshape,
    "relax.strided_slice": strided_slice,
    "relax.sum": reduce_pixels,
    "relax.take": take,
    "relax.variance": reduce_pixels,
}
"""Operators that compute on a blocked tensor where they are given one."""

MOVES = frozenset(
    {
        *("relax.concat", "relax.split", "relax.strided_slice", "relax.take", "relax.reshape", "relax.flatten"),
        *("relax.squeeze", "relax.expand_dims", "relax.permute_dims"),
    }
)
"""Operators that move elements: of dequantized tensors, they move the steps."""

_PASS_ON = frozenset({"relax.concat", "relax.split", "relax.quantize", "relax.dequantize"})
"""Operators besides that do so by rules of other forms."""


@tvm.transform.module_pass(opt_level=0, name="BlockChannels")
class BlockChannels:
    """Rewrites every Relax function for blocked tensors.

    Args:
        plans: Knobs of kernels; their machine's `block` is the number of channels that lie side by side.
        policies: Function's name → what its kernels must heed; nothing where it is missing.
        expansions: Takes the constants that are made when the engine first runs.
    """

    def __init__(self, plans: Plans, policies: Mapping[str, KernelPolicy], expansions: Expansions) -> None:
        self._plans = plans
        self._policies = policies
        self._expansions = expansions

    def transform_module(self, module: Any, _context: Any) -> Any:
        """Rewrite the functions of one data-flow block each, of static shapes; others stay as they are."""
        builder = relax.BlockBuilder(module)
        for var, function in module.functions_items():
            if isinstance(function, relax.Function) and _is_plain_flow(function):
                policy = self._policies.get(str(var.name_hint), KernelPolicy())
                methods = choose_methods(function, self._plans, policy)
                names = names_of(list(bindings_of(function)))
                pairs = find_pairs(bindings_of(function))
                context = Context(builder, self._plans, methods, names, self._expansions, pairs)
                builder.update_func(var, _Rewriter(context).rewrite(function))
        return builder.get()


def _is_plain_flow(function: Any) -> bool:
    blocks = list(function.body.blocks)
    return (
        len(blocks) == 1
        and isinstance(blocks[0], relax.DataflowBlock)
        and all(isinstance(binding, relax.VarBinding) for binding in blocks[0].bindings)
    )


class _Rewriter:
    """Writes one function anew."""

    def __init__(self, context: Context) -> None:
        self._builder = context.builder
        self._context = context
        self._tuples: dict[Any, list[Value]] = {}
        self._wanted: set[Any] = set()

    def rewrite(self, function: Any) -> Any:
        """Return the function with blocked tensors inside; its parameters and results stay plain."""
        context, builder = self._context, self._builder
        bindings = list(bindings_of(function))
        self._wanted = wanted_blocked(bindings, lambda call: _op(call) in COMPUTES, _follows)
        for param in function.params:
            context.values[param] = Value(plain=param)
        builder.begin_scope(list(function.params))
        builder._begin_dataflow_block()
        for binding in bindings:
            self._bind(binding.var, binding.value)
        blocks = [builder._end_block()]
        body = builder.normalize(relax.SeqExpr(blocks, context.plain(function.body.body)))
        builder.end_scope()
        return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)

    def _bind(self, var: Any, expr: Any) -> None:
        context = self._context
        value = self._value(var, expr)
        if isinstance(value, list):
            self._tuples[var] = value
            value = Value()
        context.values[var] = value
        if not isinstance(var, relax.DataflowVar):
            plain = self._plain_tuple(var) if var in self._tuples else context.plain(var)
            value.plain = self._builder.emit_output(plain, name_hint=str(var.name))

    def _value(self, var: Any, expr: Any) -> Value | list[Value]:
        context = self._context
        if isinstance(expr, relax.Var) and expr not in self._tuples:
            return context.values[expr]
        if isinstance(expr, relax.TupleGetItem) and expr.tuple_value in self._tuples:
            field: Value = self._tuples[expr.tuple_value][expr.index]
            return field
        if isinstance(expr, ir.GenericConst):
            context.constants[var] = expr
            return Value(plain=expr)
        if isinstance(expr, ir.Call):
            value = self._call(var, expr)
            if value is not None:
                return value
        for read in variables(expr):
            if read in self._tuples and context.values[read].plain is None:
                context.values[read].plain = context.emit(self._plain_tuple(read), context.name(read))
        return Value(plain=context.emit(context.plain(expr), context.name(var)))

    def _plain_tuple(self, var: Any) -> Any:
        fields = self._tuples[var]
        types = var.ty.fields
        return relax.Tuple(
            [self._context.materialised(value, type_) for value, type_ in zip(fields, types, strict=True)]
        )

    def _call(self, var: Any, call: Any) -> Value | list[Value] | None:
        if not _is_static(call):
            return None
        context, op, name = self._context, _op(call), self._context.name(var)
        wanted = var in self._wanted
        if var in context.pairs.weights:
            return Value()  # made when it is read
        if var in context.pairs.scales:
            return (quantize if op == "relax.quantize" else dequantize)(context, call, context.pairs.scales[var], name)
        moved = self._moved(call, op, name) if op in MOVES else None
        if moved is not None:
            return moved
        if op in ELEMENTWISE:
            return _as_value(elementwise(context, call, name, wanted=wanted))
        if op == "relax.concat":
            return _as_value(concat(context, call, name, wanted=wanted))
        if op == "relax.split":
            return split(context, call, name)
        rule = COMPUTES.get(op) or FOLLOWS.get(op)
        return None if rule is None else _as_value(rule(context, call, name))

    def _moved(self, call: Any, op: str, name: str | None) -> Value | list[Value] | None:
        """Return what an operator moves as steps, where all that it reads are steps of one scale."""
        context = self._context
        read = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else call.args[:1]
        scale = context.common_scale(read)
        if scale is None:
            return None
        with context.moving_steps():
            if op == "relax.concat":
                found: Any = concat(context, call, name, wanted=True)
            else:
                found = split(context, call, name) if op == "relax.split" else FOLLOWS[op](context, call, name)
        moved = [_as_steps(_as_value(each), scale) for each in (found if isinstance(found, list) else [found])]
        values = [value for value in moved if value is not None]
        if len(values) < len(moved):
            return None
        return values if isinstance(found, list) else values[0]


def _as_steps(value: Value | None, scale: float) -> Value | None:
    """Return what was moved as steps; None where it is no image, nor one that was reshaped."""
    if value is None or (value.image is None and value.base is None):
        return None
    reshaped = value.image is None
    return Value(steps=Steps(scale, image=value.image or value.base, reshaped=reshaped, grid=value.grid))


def _as_value(found: Image | Value | None) -> Value | None:
    return Value(image=found) if isinstance(found, Image) else found


def _op(call: Any) -> str:
    return str(getattr(call.op, "name", ""))


def _follows(call: Any) -> bool:
    return (
        _op(call) in FOLLOWS
        or _op(call) in ("relax.quantize", "relax.dequantize")
        or _op(call) in ELEMENTWISE
        or _op(call) in ("relax.concat", "relax.split")
    )


def _is_static(call: Any) -> bool:
    """Whether every tensor that a call reads or makes has a known shape."""
    types = [call.ty, *(arg.ty for arg in call.args)]
    while types:
        found = types.pop()
        if isinstance(found, relax.TupleType):
            types.extend(found.fields)
        elif isinstance(found, relax.TensorType) and not _is_static_shape(found.shape):
            return False
    return True


def _is_static_shape(shape: Any) -> bool:
    return (
        shape is not None and hasattr(shape, "values") and all(isinstance(size, tirx.IntImm) for size in shape.values)
    )
