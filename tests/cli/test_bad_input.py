"""What is refused, by which exit code and in which words; a refusal leaves nothing behind and runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

from cnncc_runtime.digests import canonical_json
from tests.cli.conftest import Digits, WriteModule
from tests.cli.harness import DIGITS, Outcome, call, leftovers, tree

MODEL = f"{DIGITS}:build"


def refused(*arguments: str | Path, code: int, says: str | list[str], hint: str = "") -> Outcome:
    """Run a command that must be refused: in these words, with this hint, without a traceback."""
    outcome = call(*arguments, code=code)
    for phrase in [says] if isinstance(says, str) else says:
        assert phrase in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "a bug in cnncc" not in outcome.stderr
    assert outcome.stdout == ""
    if hint:
        assert "try:" in outcome.stderr
        assert hint in outcome.stderr.partition("try:")[2], outcome.stderr
    return outcome


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for outputs that must stay empty."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Any:
    """After every refusal: no output, no partial file."""
    yield
    assert not leftovers(tmp_path)
    if (tmp_path / "out").is_dir():
        assert not tree(tmp_path / "out")


# ---- MODEL


def _nothing(_path: Path) -> None:
    return None


def _write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _truncated(path: Path) -> None:
    proto = graph([helper.make_node("Relu", ["x"], ["y"])])
    path.write_bytes(proto.SerializeToString()[:-9])


MODEL_FILES = {
    "a file that is not there": ("gone.onnx", _nothing, 4, "does not exist"),
    "an empty file": ("empty.onnx", _write(b""), 4, "is empty"),
    "a truncated file": ("cut.onnx", _truncated, 4, "truncated, damaged or not an ONNX file"),
    "text": ("text.onnx", _write(b"this is no model\n" * 20), 4, "not an ONNX file"),
    "noise": ("noise.onnx", _write(bytes(range(256)) * 64), 4, "not an ONNX file"),
    "a folder": ("folder.onnx", lambda path: path.mkdir(), 4, "is a folder"),
    "a pipe": ("pipe.onnx", lambda path: os.mkfifo(path), 4, "is not a regular file"),
    "an archive that is none": ("model.pt2", _write(b"PK\x03\x04 not a zip"), 4, "model.pt2"),
    "an empty archive": ("empty.pt2", _write(b""), 4, "empty.pt2"),
    "weights in place of a model": ("weights.pt", _write(b"x"), 2, "holds weights, not a model"),
    "code without a factory": ("model.py", _write(b"def make():\n    return 1\n"), 2, "say which callable"),
    "a format that cnncc does not read": ("model.tflite", _write(b"x"), 4, "not a model that cnncc reads"),
    "no form at all": ("some model", _nothing, 2, "is not a model"),
    "a name that no file system takes": ("x" * 300 + ".onnx", _nothing, 4, "too long"),
}


@pytest.mark.parametrize(("name", "make", "code", "says"), MODEL_FILES.values(), ids=MODEL_FILES)
def test_a_model_that_cannot_be_read_is_refused(
    tmp_path: Path, out: Path, name: str, make: Callable[[Path], object], code: int, says: str
) -> None:
    make(tmp_path / name)
    hint = "" if name.startswith(("empty", "x")) else " "
    refused("compile", tmp_path / name, "-o", out / "m.cnncc", code=code, says=says, hint=hint)


def test_a_socket_in_a_models_place_is_refused(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("model.onnx")
        refused("compile", "model.onnx", "-o", out / "m.cnncc", code=4, says="is not a regular file")


def test_the_factory_of_a_file_is_suggested(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("class Net: ...\ndef build(): ...\n")
    refused("compile", path, code=2, says="say which callable", hint=f"{path}:build")


ZOO = {
    "an unknown torchvision model": ("torchvision:resnet180", 2, "torchvision has no model 'resnet180'", "resnet18"),
    "an unknown timm model": ("timm:resnet_fifty", 2, "timm has no model", "resnet"),
    "a zoo without a name": ("torchvision:", 2, "names no model", "torchvision:resnet50"),
    "a module that is not installed": (
        "no_such_package.models:build",
        4,
        "No module named 'no_such_package'",
        "install",
    ),
}


@pytest.mark.parametrize(("model", "code", "says", "hint"), ZOO.values(), ids=ZOO)
def test_a_name_that_leads_nowhere_is_refused(out: Path, model: str, code: int, says: str, hint: str) -> None:
    refused("compile", model, "-o", out / "m.cnncc", code=code, says=says, hint=hint)


# ---- flags


FLAGS = {
    "a word for a size": (["--input-shape", "1,3,x,28"], 2, "'x' is not a size", "--input-shape 1,3,224,224"),
    "a negative size": (["--input-shape", "1,3,-28,28"], 2, "'-28' is not a size", "1,3,224,224"),
    "no size": (["--input-shape", ""], 2, "is not a size", "1,3,224,224"),
    "zero": (["--input-shape", "0,3,28,28"], 2, "'0' is not a size", "1,3,224,224"),
    "N in the middle": (["--input-shape", "1,N,28,28"], 2, "'N' is not a size", "N,3,224,224"),
    "more than memory holds": (["--input-shape", "1,3,99999,99999"], 2, "more than an engine takes", ""),
    "too many shapes": (["--input-shape", "1,3,28,28", "--input-shape", "1,3"], 2, "the model takes 1", "image"),
    "an input that is not there": (["--input-shape", "imag=1,3,28,28"], 2, "no input 'imag'", "image"),
    "an input named twice": (
        ["--input-shape", "image=1,3,28,28", "--input-shape", "image=1,3,28,28"],
        2,
        "gives 'image' twice",
        "",
    ),
    "an unknown dtype": (["--input-dtype", "float31"], 2, "'float31' is not a dtype", "float32"),
    "an unknown target": (["--target", "lvm"], 2, "unknown target 'lvm'", "llvm"),
    "an unknown device": (["--device", "jetson"], 2, "unknown device 'jetson'", "jetson-orin"),
    "an unknown CPU": (["--mcpu", "znver33"], 2, "znver33", "znver3"),
    "an unknown feature": (["--mattr", "+avx3"], 2, "'avx3'", "avx2"),
    "an unknown triple": (["--mtriple", "pdp11-dec-unix"], 2, "pdp11-dec-unix", "x86_64"),
    "another operating system": (["--mtriple", "x86_64-pc-windows-msvc"], 2, "engines are built for Linux", "x86_64"),
    "a precision that is not there": (["--precision", "int4"], 2, "'int4' is not one of", ""),
    "a batch that is no number": (["--batch", "1,x"], 2, "--batch 1,x", "--batch 1,8"),
    "a batch twice": (["--batch", "4,4"], 2, "--batch 4,4", "--batch 1,8"),
    "a batch of nothing": (["--batch", "0"], 2, "--batch 0", "--batch 1,8"),
    "batches of a fixed shape": (["--batch", "1,8"], 2, "needs a symbolic batch", "--input-shape N,3,224,224"),
    "a symbolic batch without sizes": (["--input-shape", "N,3,28,28"], 2, "symbolic batch", "--batch 1,8"),
    "no samples": (["--samples", "0"], 2, "0 is not in the range", ""),
    "an unknown preprocessing": (["--preprocess", "imagnet"], 2, "'imagnet' is no preprocessing preset", "imagenet"),
    "a preprocessing that is not there": (["--preprocess", "gone.toml"], 4, "gone.toml", "size"),
    "labels that are not there": (["--labels", "gone.txt"], 4, "gone.txt holds no class names", "one name a line"),
    "weights that are not there": (
        ["--weights", "gone.safetensors"],
        4,
        "gone.safetensors does not exist",
        "a .safetensors",
    ),
    "a flag misspelt": (["--wieghts", "w.pt"], 2, "No such option", ""),
}


@pytest.mark.parametrize(("flags", "code", "says", "hint"), FLAGS.values(), ids=FLAGS)
def test_a_wrong_flag_is_refused(out: Path, flags: list[str], code: int, says: str, hint: str) -> None:
    refused("compile", MODEL, *flags, "-o", out / "m.cnncc", code=code, says=says, hint=hint)


def test_a_wrong_rank_or_size_names_the_module_that_fails(out: Path) -> None:
    target = ("-o", out / "m.cnncc")
    refused("compile", MODEL, "--input-shape", "3,28", *target, code=5, says=["fails when traced with", "features.0"])
    refused(
        "compile",
        MODEL,
        *("--input-shape", "1,3,32,32"),
        *target,
        code=5,
        says=["image: float32[1, 3, 32, 32]", "classifier.1 (Linear)"],
        hint="check --input-shape",
    )
    refused("compile", MODEL, "--input-dtype", "int64", *target, code=5, says=["image: int64", "features.0 (Conv2d)"])


def test_a_shape_that_nobody_gave_is_asked_for(write_module: WriteModule, out: Path) -> None:
    model = write_module("def build():\n    return nn.Conv2d(3, 1, 1)\n")
    refused(
        "compile", f"{model}:build", "-o", out / "m.cnncc", code=2, says="'input' is not known", hint="--input-shape"
    )


# ---- factories


FACTORIES = {
    "one that raises": (
        "def build():\n    raise RuntimeError('no weights here')\n",
        4,
        "no weights here",
        "model.py:4",
    ),
    "one that returns nothing": ("def build():\n    nn.Conv2d(1, 1, 1)\n", 4, "returned None", "return"),
    "one that returns the class": ("def build():\n    return nn.Conv2d\n", 4, "the class Conv2d", "return"),
    "one that needs arguments": ("def build(classes):\n    return nn.Linear(4, classes)\n", 2, "classes", "takes none"),
    "one that ends the program": ("import sys\ndef build():\n    sys.exit(0)\n", 4, "SystemExit", "model.py:5"),
    "a module that ends the program": ("raise SystemExit(3)\n", 4, "SystemExit", "model.py:3"),
    "a module that lacks a package": ("import no_such_package\n", 4, "no_such_package", "install the package"),
    "a syntax error": ("def build(:\n", 4, "SyntaxError", "model.py:3"),
    "a number": ("build = 3\n", 2, "is a int, not a callable", "name a function"),
    "a misspelt factory": ("def biuld():\n    return nn.ReLU()\n", 2, "has no 'build'", "did you mean biuld"),
    "an odd preprocessing": (
        "preprocessing = {'sise': (8, 8)}\ndef build():\n    return nn.ReLU()\n",
        4,
        "'preprocessing' beside the factory is not valid",
        "",
    ),
    "odd labels": ("labels = 'abc'\ndef build():\n    return nn.ReLU()\n", 4, "'labels' beside the factory", "a list"),
    "odd example inputs": (
        "def example_inputs():\n    return 3\ndef build():\n    return nn.ReLU()\n",
        4,
        "example_inputs() returned a int",
        "a tuple of tensors",
    ),
    "a lazy module": ("def build():\n    return nn.LazyLinear(3)\n", 4, "holds no data", "parameters exist"),
    "a branch on values": (
        """
        class Net(nn.Module):
            def forward(self, x):
                return x * 2 if x.sum() > 0 else x
        build = Net
        """,
        5,
        "branches on the values of a tensor",
        "torch.where",
    ),
    "an output that is no tensor": (
        """
        class Net(nn.Module):
            def forward(self, x):
                return x + 1, "done"
        build = Net
        """,
        4,
        "output",
        "",
    ),
}


@pytest.mark.parametrize(("source", "code", "says", "place"), FACTORIES.values(), ids=FACTORIES)
def test_a_factory_that_cannot_be_used_is_refused(
    write_module: WriteModule, out: Path, source: str, code: int, says: str, place: str
) -> None:
    model = f"{write_module(source)}:build"
    outcome = refused("compile", model, "--input-shape", "1,4", "-o", out / "m.cnncc", code=code, says=says)
    assert place in outcome.stderr


def test_what_a_factory_prints_does_not_reach_the_json(write_module: WriteModule, tmp_path: Path) -> None:
    model = write_module(
        """
        print("at import")
        def build():
            print("in the factory")
            return nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        """
    )
    outcome = call("export", f"{model}:build", "--input-shape", "1,4", "-o", tmp_path / "m.onnx", "--json")
    assert outcome.document["nodes"] == 2
    assert "in the factory" in outcome.stderr


# ---- weights


class _Hostile:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trap),)


def _state(digits: Digits) -> dict[str, torch.Tensor]:
    return load_file(digits.weights)


@dataclass(frozen=True)
class WeightsCase:
    name: str
    make: Callable[[Path, Digits], object]
    says: str
    hint: str = ""


WEIGHTS = {
    "a pickle that runs code": WeightsCase(
        "w.pt",
        lambda path, _d: torch.save({"a": _Hostile(path.parent / "trap")}, path),
        "cannot be loaded safely",
        "state_dict",
    ),
    "a bare pickle that runs code": WeightsCase(
        "w.pt", lambda path, _d: path.write_bytes(pickle.dumps(_Hostile(path.parent / "trap"))), "w.pt", "state_dict"
    ),
    "a pickled module": WeightsCase(
        "w.pt",
        lambda path, _d: torch.save(nn.Sequential(nn.Linear(2, 2)), path),
        "cannot be loaded safely",
        "model.state_dict()",
    ),
    "an empty file": WeightsCase("w.pt", lambda path, _d: path.write_bytes(b""), "is empty"),
    "a truncated file": WeightsCase(
        "w.safetensors", lambda path, d: path.write_bytes(d.weights.read_bytes()[:-100]), "w.safetensors"
    ),
    "noise": WeightsCase("w.safetensors", lambda path, _d: path.write_bytes(b"\xff" * 64), "not a safetensors file"),
    "a folder": WeightsCase("w.pt", lambda path, _d: path.mkdir(), "is a folder"),
    "another suffix": WeightsCase("w.npz", lambda path, _d: path.write_bytes(b"x"), "no suffix", ".safetensors"),
    "a missing tensor": WeightsCase(
        "w.safetensors",
        lambda path, d: save_file({k: v for k, v in _state(d).items() if k != "classifier.3.bias"}, path),
        "classifier.3.bias",
        "architecture",
    ),
    "a tensor too many": WeightsCase(
        "w.safetensors", lambda path, d: save_file({**_state(d), "extra": torch.ones(3)}, path), "extra", "architecture"
    ),
    "another shape": WeightsCase(
        "w.safetensors",
        lambda path, d: save_file({**_state(d), "classifier.3.bias": torch.ones(11)}, path),
        "the file has [11], the model [10]",
        "architecture",
    ),
    "a NaN": WeightsCase(
        "w.safetensors",
        lambda path, d: save_file({**_state(d), "classifier.3.bias": torch.full((10,), torch.nan)}, path),
        "classifier.3.bias: 10 NaN",
        "earlier checkpoint",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_refused_and_never_run(
    digits: Digits, tmp_path: Path, out: Path, case: WeightsCase
) -> None:
    path = tmp_path / case.name
    case.make(path, digits)
    arguments = ("compile", MODEL, "--weights", path, "-o", out / "m.cnncc")
    refused(*arguments, code=4, says=case.says, hint=case.hint)
    assert not (tmp_path / "trap").exists()


def test_weights_do_not_go_with_an_onnx_model(tmp_path: Path, digits: Digits) -> None:
    path = save(graph([helper.make_node("Relu", ["x"], ["y"])]), tmp_path)
    refused("compile", path, "--weights", digits.weights, code=2, says="--weights does not go with", hint="its own")


# ---- ONNX


def graph(
    nodes: list[onnx.NodeProto],
    *,
    shape: list[int | str] | None = None,
    y_shape: list[int | str] | None = None,
    weights: list[TensorProto] | None = None,
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Return a model of one input ``x`` and one output ``y``."""
    shape = shape or [1, 4]
    x = helper.make_tensor_value_info("x", dtype, shape)
    y = helper.make_tensor_value_info("y", dtype, shape if y_shape is None else y_shape)
    made = helper.make_graph(nodes, "g", [x], [y], initializer=weights or [])
    domains = sorted({node.domain for node in nodes} - {""})
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def save(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def _external(location: str) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return graph([helper.make_node("Add", ["x", "w"], ["y"])], weights=[tensor])


def _weight(values: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.float32), "w")


def _two_foreign() -> onnx.ModelProto:
    first = helper.make_node("Swirl", ["x"], ["a"], "swirl_1", domain="com.vendor")
    second = helper.make_node("Twirl", ["a"], ["y"], "twirl_2", domain="com.vendor")
    return graph([first, second])


def _two_unsupported() -> onnx.ModelProto:
    first = helper.make_node("NonZero", ["x"], ["i"], "find_1")
    second = helper.make_node("Unique", ["x"], ["u"], "unique_2")
    third = helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT)
    fourth = helper.make_node("ReduceSum", ["f"], ["a"], keepdims=0)
    fifth = helper.make_node("ReduceSum", ["u"], ["b"], keepdims=0)
    last = helper.make_node("Add", ["a", "b"], ["y"])
    return graph([first, second, third, fourth, fifth, last], y_shape=[])


GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto], int, list[str], str]] = {
    "operators of a custom domain, all of them": (
        _two_foreign,
        4,
        ["com.vendor::Swirl", "com.vendor::Twirl"],
        "custom operators",
    ),
    "an operator that ONNX does not have": (
        lambda: graph([helper.make_node("Convolve", ["x"], ["y"])]),
        4,
        ["Convolve"],
        "",
    ),
    "operators that the target cannot build, all of them": (_two_unsupported, 4, ["find_1", "unique_2"], ""),
    "a size left open": (
        lambda: graph([helper.make_node("Relu", ["x"], ["y"])], shape=["batch", 4]),
        4,
        ["sizes left open", "'batch'"],
        "--input-shape x=1,4",
    ),
    "data outside the folder": (lambda: _external("../secret.bin"), 4, ["outside the model's folder"], "beside"),
    "data at an absolute path": (lambda: _external("/etc/passwd"), 4, ["outside the model's folder"], "beside"),
    "data that is not there": (lambda: _external("gone.bin"), 4, ["is missing"], "copy the data file"),
    "a NaN weight": (
        lambda: graph([helper.make_node("Mul", ["x", "w"], ["y"], "scale")], weights=[_weight([1, np.nan, 2, 3])]),
        4,
        ["NaN or Inf", "1 NaN"],
        "earlier checkpoint",
    ),
    "a weight of too few bytes": (
        lambda: graph(
            [helper.make_node("Add", ["x", "w"], ["y"])],
            weights=[TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"12345")],
        ),
        4,
        ["'w' has 5 bytes, its shape needs 16"],
        "",
    ),
    "an opset from the future": (
        lambda: graph([helper.make_node("Relu", ["x"], ["y"])], opset=999),
        4,
        ["opset [999]"],
        "",
    ),
    "shapes that contradict": (
        lambda: graph([helper.make_node("Add", ["x", "w"], ["y"])], weights=[_weight([1, 2, 3])]),
        4,
        ["shapes contradict each other", "Add_0"],
        "",
    ),
    "an output that nothing computes": (lambda: graph([helper.make_node("Relu", ["x"], ["z"])]), 4, ["y"], ""),
    "a cycle": (
        lambda: graph([helper.make_node("Add", ["x", "y"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]),
        4,
        ["not valid ONNX"],
        "",
    ),
    "strings": (
        lambda: graph([helper.make_node("Identity", ["x"], ["y"])], dtype=TensorProto.STRING),
        4,
        ["x"],
        "",
    ),
}


@pytest.mark.parametrize(("make", "code", "says", "hint"), GRAPHS.values(), ids=GRAPHS)
def test_an_onnx_graph_that_cannot_be_compiled_is_refused(
    tmp_path: Path, out: Path, make: Callable[[], onnx.ModelProto], code: int, says: list[str], hint: str
) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 16)
    folder = tmp_path / "model"
    folder.mkdir()
    refused("compile", save(make(), folder), "-o", out / "m.cnncc", code=code, says=says, hint=hint)


def test_another_shape_than_the_graphs_own_is_refused(tmp_path: Path, out: Path) -> None:
    path = save(graph([helper.make_node("Relu", ["x"], ["y"])]), tmp_path)
    target = ("-o", out / "m.cnncc")
    refused("compile", path, "--input-shape", "1,5", *target, code=4, says="a fixed size 4 where 5", hint="left open")
    refused("compile", path, "--input-shape", "1,1,4", *target, code=4, says="has 2 dimensions")
    refused("compile", path, "--input-dtype", "int8", *target, code=4, says="is float32 in the model", hint="export")


# ---- output paths


def test_an_output_that_is_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    file, folder = tmp_path / "notes.txt", tmp_path / "home"
    file.write_text("mine")
    folder.mkdir()
    (folder / "letter.txt").write_text("mine too")
    for path in (file, folder):
        refused("compile", MODEL, "-o", path, code=2, says="exists and is not a bundle", hint="choose another -o")
    assert file.read_text() == "mine"
    assert tree(folder) == {"letter.txt": b"mine too"}
    refused("export", MODEL, "-o", folder, code=2, says="is a folder", hint="-o model.onnx")


OUTPUTS = {
    "a folder that is not there": ("gone/m.cnncc", "cannot write", "create the parent folder first"),
    "a parent that is a file": ("file/m.cnncc", "cannot write", "choose another path"),
    "a name too long": ("x" * 300, "cannot write", "choose a shorter name"),
}


@pytest.mark.parametrize(("name", "says", "hint"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, name: str, says: str, hint: str
) -> None:
    (tmp_path / "file").write_text("a file")
    outcome = refused("compile", MODEL, "-o", tmp_path / name, code=3, says=says, hint=hint)
    assert "export" not in outcome.stderr
    refused("export", MODEL, "-o", tmp_path / name, code=3, says=says, hint=hint)


def test_an_output_in_a_folder_that_nobody_can_write_is_refused(digits: Digits, image: Path) -> None:
    compiled = ("compile", digits.model, "--weights", digits.weights)
    refused(*compiled, "-o", "/proc/m.cnncc", code=3, says="cannot write /proc/m.cnncc")
    refused("export", digits.model, "-o", "/proc/m.onnx", code=3, says="cannot write /proc/m.onnx")
    refused("run", digits.bundle, "--input", image, "-o", "/proc/o.npz", code=3, says="cannot write /proc/o.npz")


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file" / "cache", Path("/proc/cnncc-cache")):
        refused("compile", MODEL, "--cache-dir", folder, "-o", out / "m.cnncc", code=3, says="cannot write")
    refused("compile", MODEL, "--cache-dir", tmp_path / "file", "-o", out / "m.cnncc", code=2, says="is a file")


# ---- DATA


def _images(path: Path) -> None:
    path.mkdir()
    (path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


DATA: dict[str, tuple[str, Callable[[Path], object], int, str, str]] = {
    "nothing there": ("gone", _nothing, 2, "is not data that cnncc reads", "folder of images"),
    "an empty folder": ("data", lambda path: path.mkdir(), 4, "holds no samples", "give images"),
    "a broken image": ("data", _images, 4, "a.png", "PNG or JPEG"),
    "an archive without x": ("d.npz", lambda p: np.savez(p, images=np.zeros(3)), 4, "holds images, not 'x'", "'x'"),
    "an archive that is none": ("d.npz", _write(b"not a zip"), 4, "is not a .npz file", ""),
    "another shape": ("d.npz", lambda p: np.savez(p, x=np.zeros((2, 3, 8, 8), "f")), 4, "[1, 3, 8, 8]", "one row"),
    "another dtype": ("d.npz", lambda p: np.savez(p, x=np.zeros((2, 3, 28, 28))), 4, "float64", ""),
    "NaN": ("d.npz", lambda p: np.savez(p, x=np.full((1, 3, 28, 28), np.nan, "f")), 4, "holds NaN or Inf", ""),
    "no rows": ("d.npz", lambda p: np.savez(p, x=np.zeros((0, 3, 28, 28), "f")), 4, "holds no samples", ""),
    "a scalar": ("d.npz", lambda p: np.savez(p, x=np.float32(3)), 4, "x is a single float32", "one row"),
    "labels that are names": (
        "d.npz",
        lambda p: np.savez(p, x=np.zeros((1, 3, 28, 28), "f"), y=np.array(["cat"])),
        4,
        "not a class index per input",
        "",
    ),
    "labels of another length": (
        "d.npz",
        lambda p: np.savez(p, x=np.zeros((2, 3, 28, 28), "f"), y=np.zeros(3)),
        4,
        "2 inputs and 3 labels",
        "",
    ),
    "pickled objects": (
        "d.npz",
        lambda p: np.savez(p, x=np.array([{"a": 1}], dtype=object)),
        4,
        "is not a .npz file that can be read",
        "",
    ),
    "a callable that is not there": ("no_such_package:batches", _nothing, 4, "cannot be called", ""),
}


@pytest.mark.parametrize(("name", "make", "code", "says", "hint"), DATA.values(), ids=DATA)
@pytest.mark.parametrize("command", ["compile", "verify"])
def test_data_that_the_model_does_not_take_is_refused(
    digits: Digits,
    tmp_path: Path,
    out: Path,
    command: str,
    name: str,
    make: Callable[[Path], object],
    code: int,
    says: str,
    hint: str,
) -> None:
    make(tmp_path / name)
    data = name if ":" in name else str(tmp_path / name)
    if command == "verify":
        refused("verify", digits.bundle, "--data", data, code=code, says=says, hint=hint)
        return
    arguments = ("compile", digits.model, "--weights", digits.weights, "-o", out / "m.cnncc")
    refused(*arguments, "--data", data, code=code, says=says, hint=hint)


# ---- run


def _png(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)


INPUTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "a file that is not there": ("gone.png", _nothing, "does not exist", "give an image"),
    "a corrupt image": ("a.png", _png, "is not an image that can be read", "PNG or JPEG"),
    "an empty image": ("a.jpg", _write(b""), "is not an image that can be read", "PNG or JPEG"),
    "a folder": ("folder", lambda path: path.mkdir(), "folder", ""),
    "another shape": ("x.npy", lambda p: np.save(p, np.zeros((1, 3, 8, 8), "f")), "[1, 3, 8, 8]", "--input-shape"),
    "another rank": ("x.npy", lambda p: np.save(p, np.zeros((3, 28, 28), "f")), "[3, 28, 28]", "--input-shape"),
    "another dtype": ("x.npy", lambda p: np.save(p, np.zeros((1, 3, 28, 28))), "float64", "astype('float32')"),
    "a corrupt array": ("x.npy", _write(b"\x93NUMPY broken"), "is not a NumPy file", ""),
    "an empty array": ("x.npy", _write(b""), "is not a NumPy file", ""),
    "a pickled array": (
        "x.npy",
        lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True),
        "is not a NumPy file",
        "",
    ),
    "an unknown input": ("x.npz", lambda p: np.savez(p, a=np.zeros(3), b=np.zeros(3)), "image", "image"),
    "an array under another suffix": ("x.npz", _write(b"PK\x05\x06"), "is not a NumPy file", ""),
}


@pytest.mark.parametrize(("name", "make", "says", "hint"), INPUTS.values(), ids=INPUTS)
def test_an_input_that_the_model_does_not_take_is_refused(
    digits: Digits, tmp_path: Path, out: Path, name: str, make: Callable[[Path], object], says: str, hint: str
) -> None:
    make(tmp_path / name)
    arguments = ("run", digits.bundle, "--input", tmp_path / name, "-o", out / "o.npz")
    refused(*arguments, code=4, says=says, hint=hint)


def test_an_output_of_run_that_cannot_be_written_is_refused(digits: Digits, image: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "o.npz"
    refused("run", digits.bundle, "--input", image, "-o", gone, code=3, says="cannot write", hint="create the parent")


def test_an_image_for_a_bundle_without_preprocessing_is_refused(
    write_module: WriteModule, tmp_path: Path, image: Path
) -> None:
    bundle = tmp_path / "plain.cnncc"
    model = write_module("def build():\n    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())\n")
    call("compile", f"{model}:build", "--input-shape", "1,3,8,8", "-o", bundle)
    refused("run", bundle, "--input", image, code=4, says="stores no preprocessing", hint="--preprocess")
    outcome = refused("verify", bundle, "--data", image.parent, code=4, says="preprocessing")
    assert "--preprocess" in outcome.stderr


# ---- bundles


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return what changes a manifest and keeps it canonical, as an attacker or an old version would."""

    def apply(bundle: Path) -> None:
        path = bundle / "manifest.json"
        document = json.loads(path.read_bytes())
        change(document)
        path.write_bytes(canonical_json(document))

    return apply


def _tampered_engine(bundle: Path) -> None:
    engine = bundle / "engine.so"
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)


def _no_engine(bundle: Path) -> None:
    (bundle / "engine.so").unlink()


def _tampered_weights(bundle: Path) -> None:
    weights = bundle / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x7f" * 4)


def _cut_weights(bundle: Path) -> None:
    os.truncate(bundle / "weights.bin", 64)


def _far_weights(document: dict[str, Any]) -> None:
    document["engine"]["weights"]["tensors"][0]["offset"] = 1 << 40


def _linked_engine(bundle: Path) -> None:
    (bundle / "engine.so").rename(bundle.parent / "elsewhere.so")
    (bundle / "engine.so").symlink_to(bundle.parent / "elsewhere.so")


def _cut_manifest(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])


def _spaced_manifest(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(json.dumps(json.loads(path.read_bytes()), indent=1).encode())


def _no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def _features(document: dict[str, Any]) -> None:
    document["target"]["features"] = sorted([*document["target"]["features"], "amx-of-tomorrow"])


def _other_machine(document: dict[str, Any]) -> None:
    document["target"]["machine"] = "s390x"


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


ALL = ("run", "verify", "inspect", "bench")
OPENING = ("run", "verify", "bench")

BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], int, str]] = {
    "nothing there": (lambda path: shutil.rmtree(path), ALL, 4, "is not a bundle folder"),
    "a file": (lambda path: (shutil.rmtree(path), path.write_bytes(b"x")), ALL, 4, "is not a bundle folder"),
    "a folder of other things": (_no_manifest, ALL, 4, "holds no manifest.json"),
    "a tampered engine": (_tampered_engine, ALL, 4, "'engine.so' was changed after it was built"),
    "a missing engine": (_no_engine, ALL, 4, "'engine.so' cannot be read"),
    "tampered weights": (_tampered_weights, ALL, 4, "'weights.bin' was changed after it was built"),
    "truncated weights": (_cut_weights, ALL, 4, "'weights.bin' has 64 bytes"),
    "missing weights": (lambda path: (path / "weights.bin").unlink(), ALL, 4, "'weights.bin' cannot be read"),
    "weights beyond their file": (_edit(_far_weights), ALL, 4, "do not lie in 'weights.bin'"),
    "an engine behind a link": (_linked_engine, ALL, 4, "is not a plain file of the bundle"),
    "a truncated manifest": (_cut_manifest, ALL, 4, "the manifest is not valid"),
    "a manifest in another spelling": (_spaced_manifest, ALL, 4, "not what cnncc writes"),
    "a bundle of the former format": (_edit(_set("schema", value="cnncc.bundle/1")), ALL, 4, "build the bundle again"),
    "an unknown schema": (_edit(_set("schema", value="cnncc.bundle/9")), ALL, 4, "'cnncc.bundle/9'"),
    "a field that is not ours": (_edit(_set("extra", value=1)), ALL, 4, "surplus or repeated fields"),
    "a file outside": (
        _edit(_set("files", "../x", value={"sha256": "sha256:" + "0" * 64, "size": 1, "role": "engine"})),
        ALL,
        4,
        "../x",
    ),
    "features that no machine has": (_edit(_features), OPENING, 3, "which lacks amx-of-tomorrow"),
    "another machine": (_edit(_other_machine), OPENING, 3, "built for: s390x"),
    "another engine format": (_edit(_set("engine", "format", value="trt-11")), OPENING, 4, "'trt-11'"),
    "a parity that was never checked": (_edit(_set("parity", value="pending")), ("run",), 1, "'pending'"),
    "a parity that failed": (_edit(_set("parity", value="failed")), ("run",), 1, "its results are wrong"),
}


@pytest.mark.parametrize(("damage", "commands", "code", "says"), BUNDLES.values(), ids=BUNDLES)
def test_a_bundle_that_is_not_what_it_says_is_refused(
    digits: Digits,
    tmp_path: Path,
    image: Path,
    damage: Callable[[Path], object],
    commands: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    bundle = Path(shutil.copytree(digits.bundle, tmp_path / "b.cnncc"))
    damage(bundle)
    flags: dict[str, tuple[str | Path, ...]] = {
        "run": ("--input", image),
        "bench": ("--rounds", "2", "--min-time", "0.01", "--threads", "1"),
    }
    for command in commands:
        refused(command, bundle, *flags.get(command, ()), code=code, says=says, hint=" ")


def test_a_tampered_reference_is_noticed_by_whoever_reads_it(digits: Digits, tmp_path: Path, image: Path) -> None:
    bundle = Path(shutil.copytree(digits.bundle, tmp_path / "b.cnncc"))
    with (bundle / "reference.onnx").open("ab") as file:
        file.write(b"\0")
    for command in ("verify", "inspect", "bench"):
        refused(command, bundle, code=4, says="'reference.onnx' has")
    call("run", bundle, "--input", image)  # a device has no reference


# ---- bench


BENCH = {
    "an unknown peer": (["--against", "orrt"], 2, "'orrt' is not a known peer", "ort, ort-int8, torch"),
    "a peer twice": (["--against", "ort,ort"], 2, "named twice: ort", ""),
    "a peer that computes elsewhere": (
        ["--against", "torch-cuda"],
        2,
        "'torch-cuda' computes on a GPU, the bundle's engine on the CPU",
        "its peers are ort, ",
    ),
    "a budget that is no number": (["--max-latency-ratio", "ort=fast"], 2, "not a latency budget", "ort=1.0"),
    "a budget without a peer": (["--max-latency-ratio", "1.5"], 2, "not a latency budget", "ort=1.0"),
    "a budget for an unknown peer": (["--max-latency-ratio", "tflite=1"], 2, "'tflite' is not a known peer", "ort"),
    "a batch that was not built": (["--batch", "8"], 2, "was not built for batch 8", ""),
    "no rounds": (["--rounds", "0"], 2, "0 is not in the range", ""),
    "a report in a folder that is not there": (
        ["-o", "/no/such/folder/r.json", "--rounds", "2", "--min-time", "0.01"],
        3,
        "cannot write",
        "create the parent",
    ),
}


@pytest.mark.parametrize(("flags", "code", "says", "hint"), BENCH.values(), ids=BENCH)
def test_a_benchmark_that_makes_no_sense_is_refused(
    digits: Digits, flags: list[str], code: int, says: str, hint: str
) -> None:
    refused("bench", digits.bundle, *flags, code=code, says=says, hint=hint)


@pytest.mark.parametrize("arguments", [["compile", "gone.onnx"], ["run", "gone.cnncc", "--input", "x.npy"]])
def test_a_refusal_is_a_json_document_too(arguments: list[str]) -> None:
    outcome = call(*arguments, "--json", code=4)
    assert outcome.document["exit_code"] == 4
    assert outcome.document["error"] in ("ModelRefused", "BundleRefused")
    assert outcome.document["message"] in outcome.stderr
    assert outcome.document["hint"]


def test_a_module_that_is_no_module_shows_no_traceback_unless_asked(write_module: WriteModule) -> None:
    path = write_module("def build():\n    raise KeyError(3)\n")
    model = f"{path}:build"
    assert "Traceback" not in call("export", model, code=4).stderr
    assert "Traceback" in call("export", model, "--verbose", code=4).stderr


def test_random_weights_are_said_to_be_random(tmp_path: Path) -> None:
    assert "no weights were given" in call("export", MODEL, "-o", tmp_path / "m.onnx").stderr
