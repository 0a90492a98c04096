"""Reads `.pt2` archives that may be hostile.

`torch.export.load` trusts its input: sample inputs fall back to ``weights_only=False``, weights and constants marked
``use_pickle`` are unpickled, ``custom_obj``/``opaque_obj`` entries too, symbolic expressions go through
``sympy.sympify`` (which evaluates Python), operator names are looked up by ``getattr`` from ``torch``, enums import
modules by name, guards are compiled, AOTInductor entries are native code (all seen in torch 2.13). So an archive is
taken apart here, every entry judged, and only what passed is written to a new archive in memory and loaded.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.export import ExportedProgram

from cnncc.compiler.quiet import quiet
from cnncc_runtime.errors import CnnccError, ModelRefused
from cnncc_runtime.specs import DTYPES, TensorSpec

_HINT = "write it anew with torch.export.save(torch.export.export(model.eval(), example), 'model.pt2')"
_MODEL = "model"
_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
)
_SKIPPED = re.compile(r"\.data/\w+|extra/.*")  # written by the archive writer itself, or the user's own notes

# aten and prims are tensors in, tensors out, save for these, which reach files
_TARGETS = re.compile(r"torch\.ops\.(aten|prims|torchvision|quantized_decomposed|higher_order)\.[a-zA-Z_]\w*(\.\w+)?")
_FORBIDDEN = re.compile(r"__|from_file|\bload|\bsave|print")
_SCALARS = re.compile(r"(_operator|math)\.[a-z]+|torch\.sym_[a-z]+")
_SYMPY = ("Max", "Min", "Mod", "Eq", "Ne", "Gt", "Ge", "Lt", "Le", "And", "Or", "Not", "oo", "True", "False")
_TORCH_DIVISIONS = ("FloorDiv", "ModularIndexing", "CleanDiv", "PythonMod", "IntTrueDiv", "FloatTrueDiv")
_TORCH_ROUNDINGS = ("CeilToInt", "FloorToInt", "TruncToInt", "ToFloat", "int_oo")
_EXPRESSION_NAMES = frozenset((*_SYMPY, *_TORCH_DIVISIONS, *_TORCH_ROUNDINGS))
_PLAIN = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_FROZEN = ("torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict")
_CONTAINERS = (None, *_PLAIN, *_FROZEN)
_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,6}")
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop, ast.Load)


def load_archive(path: Path) -> ExportedProgram:
    """Load an exported program without executing anything that the archive chooses.

    Raises:
        ModelRefused: Missing, damaged, of another version, or holding what would be executed.
    """
    entries = _entries(path)
    clean = io.BytesIO()
    try:
        _rewrite(entries, clean, path)
        clean.seek(0)
        with quiet():
            program = torch.export.load(clean)
    except CnnccError:
        raise
    except Exception as exc:  # torch's readers raise anything on damaged input
        raise _damaged(path, exc) from exc
    if not isinstance(program, ExportedProgram):
        raise ModelRefused(f"{path} holds no exported program", hint=_HINT)
    return program


def load_trusted_program(path: Path) -> ExportedProgram:
    """Load a program that cnncc itself wrote, from its own cache.

    Raises:
        ModelRefused: It cannot be loaded.
    """
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as exc:  # as above
        raise _damaged(path, exc) from exc


def program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """Return the inputs of an exported program, in order; open dimensions keep their symbol's name.

    Raises:
        ModelRefused: An input is not a tensor, or of a dtype that does not cross an engine's boundary.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for name in program.graph_signature.user_inputs:
        value = values.get(name) if isinstance(name, str) else None
        if not isinstance(value, torch.Tensor):
            raise ModelRefused(
                f"input '{name}' of the program is not a tensor", hint="export a module that takes tensors alone"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ModelRefused(f"input '{name}' has dtype {dtype}", hint=f"cnncc takes {', '.join(DTYPES)}")
        shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
        specs.append(TensorSpec(str(name), shape, dtype))
    return tuple(specs)


def _damaged(path: Path, exc: Exception) -> ModelRefused:
    reason = (str(exc).splitlines() or [type(exc).__name__])[0]
    return ModelRefused(f"{path} is damaged, or of a version that this torch does not read: {reason}", hint=_HINT)


def _entries(path: Path) -> dict[str, bytes]:
    """Read the archive's entries, without its top folder."""
    if path.stat().st_size == 0:
        raise ModelRefused(f"{path} is empty", hint=_HINT)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            _check_listing(infos, path)
            return {_inner(info.filename): archive.read(info) for info in infos}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as exc:
        raise ModelRefused(f"{path} is truncated, damaged or not an archive: {exc}", hint=_HINT) from exc


def _check_listing(infos: list[zipfile.ZipInfo], path: Path) -> None:
    names = [info.filename for info in infos]
    if not names:
        raise ModelRefused(f"{path} is an empty archive", hint=_HINT)
    if len({*names}) != len(names):
        raise ModelRefused(f"{path} lists an entry twice", hint=_HINT)
    parts = [PurePosixPath(name).parts for name in names]
    if any(".." in p or name.startswith("/") or "\\" in name for p, name in zip(parts, names, strict=True)):
        raise ModelRefused(
            f"{path} holds entries with unsafe paths", where=[n for n in names if ".." in n or n[0] == "/"]
        )
    if len({p[0] for p in parts}) != 1 or min(map(len, parts)) < 2:
        raise ModelRefused(f"{path} is not a torch.export archive", hint=_HINT)
    if packed := [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]:
        # torch never compresses; a compressed entry may unpack to any size
        raise ModelRefused(f"{path} holds compressed entries", where=packed[:10], hint=_HINT)
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ModelRefused(f"{path} lists more bytes than it has", hint=_HINT)


def _inner(name: str) -> str:
    return name.partition("/")[2]


def _rewrite(entries: dict[str, bytes], target: io.BytesIO, path: Path) -> None:
    """Write a new archive that holds the judged entries alone."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    if "models/model.json" not in entries:
        raise ModelRefused(f"{path} holds no exported program", hint=_HINT)
    foreign = [name for name in entries if not _ENTRIES.fullmatch(name) and not _SKIPPED.fullmatch(name)]
    if foreign:
        raise ModelRefused(
            f"{path} holds entries that could run code or that cnncc does not know", where=foreign[:10], hint=_HINT
        )
    with PT2ArchiveWriter(target) as writer:
        for name, data in entries.items():
            if _SKIPPED.fullmatch(name):
                continue
            if name == "byteorder" and data != b"little":
                raise ModelRefused(f"{path} is not little-endian", hint=_HINT)
            if name != "byteorder":  # the writer adds its own
                writer.write_bytes(name, _judged(name, data, path))


def _judged(name: str, data: bytes, path: Path) -> bytes:
    if name == "models/model.json":
        return _judged_program(data, path)
    if name.endswith("_config.json"):
        _judge_payloads(json.loads(data), path)
    if name.startswith("data/sample_inputs/") and data:
        try:
            with quiet():
                torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as exc:  # refused before torch.export.load would retry it unsafely
            raise ModelRefused(
                f"{path} holds sample inputs that are not plain tensors: unpickling them could run code",
                where=[name],
                hint=_HINT,
            ) from exc
    return data


def _judge_payloads(config: Any, path: Path) -> None:
    payloads = config["config"]
    for name, payload in payloads.items():
        file = payload["path_name"]
        if payload["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", file):
            raise ModelRefused(
                f"{path} holds a pickled object: loading it could run code", where=[f"{name} ({file})"], hint=_HINT
            )


def _judged_program(data: bytes, path: Path) -> bytes:
    program = json.loads(data)
    program["guards_code"] = []  # would be compiled and run; inputs are checked against their specs instead
    for key, value, owner in _walk(program):
        if key == "target" and "inputs" in owner and not _safe_target(value):
            raise _unsafe(path, f"operator '{str(value)[:80]}'")
        if key == "as_operator" and not _safe_target(value):
            raise _unsafe(path, f"operator '{str(value)[:80]}'")
        if key == "expr_str" and not _safe_expression(value):
            raise _unsafe(path, f"expression '{str(value)[:80]}'")
        if key in ("in_spec", "out_spec") and not _safe_tree(value):
            raise _unsafe(path, f"a container of unknown kind in '{key}'")
        if key in ("as_custom_obj", "as_opaque_obj"):
            raise _unsafe(path, f"a custom object in '{key}'")
        if key == "metadata" and "target" in owner:
            owner["metadata"] = _plain_metadata(value)
    return json.dumps(program).encode()


def _plain_metadata(metadata: Any) -> dict[str, str]:
    """Keep the module a node came from; source positions and functions are looked up by name when loaded."""
    stack = metadata.get("nn_module_stack")
    return {"nn_module_stack": stack} if isinstance(stack, str) else {}


def _unsafe(path: Path, what: str) -> ModelRefused:
    return ModelRefused(f"{path} holds {what}, which torch.export.save does not write", hint=_HINT)


def _walk(root: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield key, value and owner of every entry of every JSON object."""
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for key in list(value):
                yield key, value[key], value
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def _safe_target(target: Any) -> bool:
    if not isinstance(target, str) or _FORBIDDEN.search(target):
        return False
    return bool(_TARGETS.fullmatch(target) or _SCALARS.fullmatch(target))


def _safe_tree(text: Any) -> bool:
    """Accept trees of plain containers: other kinds (enum keys, defaultdict) import modules by name."""
    if not isinstance(text, str) or "__enum__" in text:
        return False
    return all(value in _CONTAINERS for key, value, _ in _walk(json.loads(text)) if key == "type")


def _safe_expression(text: Any) -> bool:
    """Accept arithmetic on symbols, as sympy prints it: ``2*Symbol('s7', integer=True)``, ``Max(1, s7 // 4)``.

    No attribute, no call outside sympy's own functions, no tower of powers.
    """
    if not isinstance(text, str) or len(text) > 2000:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _safe_node(tree)


def _safe_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and len(str(node.value)) <= 20
    if isinstance(node, ast.Name):
        return node.id in _EXPRESSION_NAMES or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Call):
        return _safe_call(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _small_power(node):
        return False
    return isinstance(node, _ARITHMETIC) and all(_safe_node(child) for child in ast.iter_child_nodes(node))


def _small_power(node: ast.BinOp) -> bool:
    symbol = isinstance(node.left, ast.Name | ast.Call)
    return symbol and isinstance(node.right, ast.Constant) and node.right.value in (2, 3, 4)


def _safe_call(node: ast.Call) -> bool:
    if not isinstance(node.func, ast.Name):
        return False
    if node.func.id == "Symbol":
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        named = len(node.args) == 1 == len(names) and isinstance(names[0], str) and bool(_SYMBOL.fullmatch(names[0]))
        return named and all(isinstance(kw.value, ast.Constant) and kw.value.value in (0, 1) for kw in node.keywords)
    return node.func.id in _EXPRESSION_NAMES and not node.keywords and all(_safe_node(arg) for arg in node.args)
