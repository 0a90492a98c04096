"""The function that the layout pass writes, and what it knows of the variables so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import ir, relax

from cnncc.targets.llvm.blocked.channels import gather
from cnncc.targets.llvm.blocked.image import NCHW, Channels, Dims, Image, Steps, Value, dims_of
from cnncc.targets.llvm.blocked.integers import Pairs, dequantized
from cnncc.targets.llvm.blocked.transform import pack, unpack
from cnncc.targets.llvm.expansions import Expansions
from cnncc.targets.llvm.importer import node_index
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.winograd_rules import WinogradPlan


class Context:
    """Writes the new function; copies between layouts are made on demand and once a variable.

    Attributes:
        builder: Relax block builder.
        plans: Knobs of kernels.
        machine: What the function is for.
        methods: Call of the graph → how its convolution uses Winograd's method.
        values: Variable of the graph → what it became.
        constants: Variable of the graph → the constant it is bound to.
        expansions: Which constants are made when the engine first runs.
        pairs: Which Q/DQ pairs become tensors of steps.

    Args:
        builder: Relax block builder.
        plans: Knobs of kernels.
        methods: Call of the graph → how its convolution uses Winograd's method.
        names: Variable of the graph → the name of its node; see `names_of`.
        expansions: Where such constants are noted.
        pairs: Which Q/DQ pairs become tensors of steps.
    """

    def __init__(
        self,
        builder: Any,
        plans: Plans,
        methods: Mapping[Any, WinogradPlan],
        names: Mapping[Any, str],
        expansions: Expansions,
        pairs: Pairs,
    ) -> None:
        self.builder = builder
        self.plans = plans
        self.machine = plans.machine
        self.methods = methods
        self.values: dict[Any, Value] = {}
        self.constants: dict[Any, Any] = {}
        self.expansions = expansions
        self.pairs = pairs
        self._moving = False
        self._names = names

    @property
    def block(self) -> int:
        """Channels of a block."""
        return self.machine.block

    def emit(self, expr: Any, name: str | None) -> Any:
        """Bind an expression; variables that are named after a node of the graph keep that name."""
        return self.builder.emit(expr, name_hint=name) if name else self.builder.emit(expr)

    def name(self, expr: Any) -> str | None:
        """Return what variables are called that are made for the node of a variable of the graph."""
        return self._names.get(expr) if isinstance(expr, relax.Var) else None

    def value(self, expr: Any) -> Value:
        """Return what a variable or a constant became."""
        if not isinstance(expr, relax.Var):
            return Value(plain=expr)
        found = self.values[expr]
        if self._moving and found.steps is not None:
            return found.steps.moved()
        if found.plain is None and found.image is None and found.base is None:
            if found.steps is not None:
                self._dequantize(found, found.steps, self.name(expr))
            elif expr in self.pairs.weights:
                found.plain = relax.const(self.pairs.weights[expr].floats)
        return found

    def steps(self, expr: Any) -> Steps | None:
        """Return the steps that a tensor was dequantized from, or None where it was not."""
        return self.values[expr].steps if isinstance(expr, relax.Var) else None

    @contextmanager
    def moving_steps(self) -> Iterator[None]:
        """Let dequantized tensors be seen as their steps, by operators that move elements and compute nothing."""
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def common_scale(self, exprs: Iterable[Any]) -> float | None:
        """Return the scale that dequantized tensors share; None where one is no blocked tensor of steps.

        None also where they are held as different element types.
        """
        found = [self.steps(expr) for expr in exprs]
        images = [steps.image for steps in found if steps is not None and steps.image is not None]
        scales = {steps.scale for steps in found if steps is not None}
        held = {str(source.ty.dtype) for image in images for source, _ in image.channels.sources}
        return scales.pop() if len(images) == len(found) and len(scales) == len(held) == 1 else None

    def blocked_steps(self, steps: Steps, dims: Dims, name: str | None) -> Steps:
        """Return plain steps blocked."""
        made = pack(self.builder, steps.plain, dims, NCHW, self.block)
        return Steps(steps.scale, image=self.result(made, dims, NCHW, name))

    def _dequantize(self, value: Value, steps: Steps, name: str | None) -> None:
        if steps.image is not None:
            made = dequantized(self.builder, self.whole(steps.image), steps.scale)
            image = self.result(made, steps.image.dims, steps.image.order, name)
            value.image, value.base = (None, image) if steps.reshaped else (image, None)
            value.grid = steps.grid
        else:
            value.plain = self.emit(dequantized(self.builder, steps.plain, steps.scale), name)

    def constant(self, expr: Any) -> NDArray[Any] | None:
        """Return a constant's numbers, or None where the expression is none."""
        if expr in self.pairs.weights:
            return self.pairs.weights[expr].floats
        found = self.constants.get(expr, expr) if isinstance(expr, relax.Var) else expr
        return np.asarray(found.value.numpy()) if isinstance(found, ir.GenericConst) else None

    def image(self, expr: Any) -> Image | None:
        """Return the blocked form that a tensor has already."""
        return self.value(expr).image if isinstance(expr, relax.Var) else None

    def plain(self, expr: Any) -> Any:
        """Return an expression with every tensor as the graph has it."""
        if isinstance(expr, relax.Var):
            return self._plain_variable(expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.plain(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.plain(expr.tuple_value), expr.index)
        if isinstance(expr, ir.Call):
            return ir.Call(expr.op, [self.plain(arg) for arg in expr.args], expr.attrs, expr.ty_args)
        return expr

    def _plain_variable(self, var: Any) -> Any:
        return self.materialised(self.value(var), var.ty)

    def materialised(self, value: Value, type_: Any) -> Any:
        """Return a tensor as the graph has it, unpacked if it is only blocked.

        Args:
            value: What became of it.
            type_: Its type in the graph.
        """
        if value.plain is None:
            image = value.image or value.base
            assert image is not None, "a value is plain or blocked"
            made = unpack(self.builder, self.whole(image), image.dims, image.order, self.block)
            if value.image is None:
                made = relax.op.reshape(self.emit(made, image.name), [int(size) for size in type_.shape])
            value.plain = self.emit(made, image.name)
        return value.plain

    def blocked(self, expr: Any, order: str) -> Image:
        """Return a tensor blocked, packed if it is not yet.

        Args:
            expr: A variable of the graph of as many axes as the order.
            order: How its axes are to be understood.
        """
        found = self.image(expr)
        if found is not None and found.order == order:
            return found
        name = self.name(expr)
        shape = [int(size) for size in expr.ty.shape]
        dims = dims_of(shape, order)
        var = self.emit(pack(self.builder, self.plain(expr), dims, order, self.block), name)
        image = Image(Channels.of(var, dims), order, name)
        if found is None:
            self.value(expr).image = image
        return image

    def whole(self, image: Image) -> Any:
        """Return the variable that holds an image's channels in order, gathered if they are not yet."""
        channels = image.channels
        if channels.whole is None:
            if channels.ordered:
                channels.whole = channels.sources[0][0]
            else:
                channels.whole = self.emit(gather(self.builder, channels, self.block), image.name)
        return channels.whole

    def result(self, expr: Any, dims: tuple[int, int, int, int], order: str, name: str | None) -> Image:
        """Bind an expression of a blocked tensor and return its image."""
        return Image(Channels.of(self.emit(expr, name), dims), order, name)

    def image_of(self, var: Any, dims: tuple[int, int, int, int], order: str, name: str | None) -> Image:
        """Return the image that a blocked variable holds."""
        return Image(Channels.of(var, dims), order, name)


def names_of(bindings: Sequence[Any]) -> dict[Any, str]:
    """Return the name of the node that computes each variable.

    A converter may emit several operations for a node; only the last is named after it.
    """
    found: dict[Any, str] = {}
    name = None
    for binding in reversed(bindings):
        index = node_index(binding.var)
        name = name if index is None else f"node{index}_"
        if name is not None:
            found[binding.var] = name
    return found
