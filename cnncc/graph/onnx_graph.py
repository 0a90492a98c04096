"""`OnnxGraph`: an ONNX model with its specs, its digest and the user's module names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.graph.names import module_path
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import ModelRefused
from cnncc_runtime.specs import DTYPES, TensorSpec


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A checked ONNX model. The protobuf is never changed in place: a pass copies it.

    Attributes:
        proto: The model; weights are inside it.
        known_digest: Its digest, where whoever wrote the model knows it; empty otherwise.
    """

    proto: onnx.ModelProto
    known_digest: str = ""

    @cached_property
    def digest(self) -> str:
        """Digest of the serialized model, weights included."""
        return self.known_digest or digest_bytes(self.serialized)

    @property
    def serialized(self) -> bytes:
        """The model's bytes, deterministic; made anew each time, so that no second copy of the weights stays.

        Raises:
            ModelRefused: The model exceeds protobuf's 2 GiB.
        """
        try:
            return bytes(self.proto.SerializeToString(deterministic=True))
        except (ValueError, RuntimeError) as exc:
            raise ModelRefused("the model is larger than 2 GiB, more than one ONNX file can hold") from exc

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the inputs that a caller feeds (initializers that old models list as inputs are not)."""
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        return tuple(spec_of(value) for value in self.proto.graph.input if value.name not in constants)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the outputs."""
        return tuple(spec_of(value) for value in self.proto.graph.output)

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The top graph's nodes, in topological order."""
        return list(self.proto.graph.node)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next(int(o.version) for o in self.proto.opset_import if o.domain in ("", "ai.onnx"))

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return an initializer as an array, or None where the name is not one."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def copy_proto(self) -> onnx.ModelProto:
        """Return a copy of the protobuf to change."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return proto

    def with_outputs(self, names: Iterable[str]) -> OnnxGraph:
        """Return the graph with these tensors as its outputs (types from shape inference)."""
        proto = self.copy_proto()
        known = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
        wanted = [known[name] for name in names]
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in wanted]
        del proto.graph.output[:]
        proto.graph.output.extend(kept)
        return OnnxGraph(proto)

    def places(self) -> Iterator[tuple[onnx.NodeProto, str]]:
        """Yield each node with the path of the PyTorch module it came from."""
        for node in self.nodes:
            yield node, module_path(node)


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """Return the spec of an ONNX value; an unnamed unknown dimension is called ``"?"``.

    Raises:
        ModelRefused: Not a tensor, or of an element type that cnncc does not pass through engines.
    """
    if not value.type.HasField("tensor_type"):
        raise ModelRefused(f"'{value.name}' is not a tensor", hint="inputs and outputs must be tensors")
    tensor = value.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    except (KeyError, TypeError, ValueError):
        dtype = f"ONNX type {tensor.elem_type}"
    if dtype not in DTYPES:
        raise ModelRefused(f"'{value.name}' has dtype {dtype}", hint=f"cnncc takes {', '.join(DTYPES)}")
    if not tensor.HasField("shape"):
        raise ModelRefused(f"'{value.name}' has no shape", hint="give it with --input-shape")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or "?") for dim in tensor.shape.dim)
    return TensorSpec(value.name, shape, dtype)
