"""The name map: which PyTorch module an ONNX node came from.

The dynamo exporter writes each node's module scopes into its metadata; cnncc condenses them to one key and carries
it through every pass, so errors, parity and profiles speak the user's names.
"""

from __future__ import annotations

import ast

import onnx

MODULE_KEY = "cnncc.module"
"""Metadata key of a node: dotted path of the PyTorch module, ``""`` for the root module."""

_EXPORTER_KEY = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch writes for operators that it made up itself, such as reading the size of a symbolic dimension."""


def node_metadata(node: onnx.NodeProto, key: str) -> str | None:
    """Return a node's metadata value, or None."""
    return next((entry.value for entry in node.metadata_props if entry.key == key), None)


def set_module_path(node: onnx.NodeProto, path: str) -> None:
    """Write a node's module path, replacing an older one."""
    for entry in node.metadata_props:
        if entry.key == MODULE_KEY:
            entry.value = path
            return
    node.metadata_props.add(key=MODULE_KEY, value=path)


def module_path(node: onnx.NodeProto) -> str:
    """Return the PyTorch module path of a node, or its own name where the model did not come from PyTorch."""
    path = node_metadata(node, MODULE_KEY)
    if path is None:
        path = exporter_module_path(node)
    return node_label(node) if path is None else (path or "(model)")


def exporter_module_path(node: onnx.NodeProto) -> str | None:
    """Return the module path in the exporter's metadata: the last scope that names a module.

    The exporter lists scopes from the root (``""``) to the operator itself (``['', 'layer1', 'layer1.0.conv1',
    'conv2d_3']``, torch 2.13); module scopes are full paths already, also of modules called twice.
    """
    text = node_metadata(node, _EXPORTER_KEY)
    if text is None:
        return None
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if not isinstance(scopes, list) or not scopes or not all(isinstance(scope, str) for scope in scopes):
        return None
    modules = [scope for scope in scopes[:-1] if scope != _NO_MODULE]
    return modules[-1] if modules else ""


def node_label(node: onnx.NodeProto) -> str:
    """Return the node's name, or a stand-in made of its operator and first output."""
    return node.name or f"{node.op_type}({node.output[0] if node.output else ''})"


def place(node: onnx.NodeProto) -> str:
    """Return one line that names a node to a user: ``layer1.0.conv1 (Conv 'node_conv2d_3')``."""
    return f"{module_path(node)} ({node.op_type} '{node_label(node)}')"
