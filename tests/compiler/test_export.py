"""`Model` → ONNX: names, privacy, determinism, numerics, and failures in the user's terms."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnncc.compiler.archive import load_archive, load_trusted_program
from cnncc.compiler.export import OPSET, export
from cnncc.compiler.ingest import ingest
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.passes.pipeline import clean
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import bind_batch
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import CnnccError, ExportFailed, ModelRefused, UnsupportedGraph

HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"

BLOCKS = (
    HEADER
    + """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
    def forward(self, x):
        return self.act(self.norm(self.conv(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(Block(), Block())
        self.parts = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout()
        self.stages[1].norm.running_mean.fill_(0.3)
        self.stages[1].norm.running_var.fill_(2.0)
    def forward(self, image):
        x = self.stages(image)
        x = self.stages[0](x)
        for part in self.parts:
            x = part(x)
        return self.head(self.drop(x.mean((2, 3))))
"""
)


def write(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "net.py"
    path.write_text(body)
    return path


def exported(reference: str, *shapes: str) -> OnnxGraph:
    return export(ingest(ModelRequest(reference, input_shapes=shapes))).graph


def forward(tmp_path: Path, body: str, *shapes: str) -> OnnxGraph:
    """Export a module whose forward is given."""
    lines = "\n".join("        " + line for line in body.splitlines())
    head, _, rest = lines.partition("\n")
    path = write(tmp_path, f"{HEADER}class Net(nn.Module):\n    def forward(self, {head.strip()}):\n{rest}\n")
    return exported(f"{path}:Net", *shapes)


def failed(tmp_path: Path, body: str, *shapes: str, kind: type[CnnccError] = ExportFailed) -> CnnccError:
    with pytest.raises(kind) as caught:
        forward(tmp_path, body, *shapes)
    return caught.value


# ---- names


def test_every_node_names_its_module(tmp_path: Path) -> None:
    graph = exported(f"{write(tmp_path, BLOCKS)}:Net", "1,4,8,8")
    assert graph.opset == OPSET
    paths = [path for node, path in graph.places() if node.op_type in ("Conv", "BatchNormalization", "Relu", "Gemm")]
    once = ["stages.0.conv", "stages.0.norm", "stages.0.act"]
    assert paths == [*once, "stages.1.conv", "stages.1.norm", "stages.1.act", *once, "parts.0", "head"]
    assert all({entry.key for entry in node.metadata_props} == {"cnncc.module"} for node in graph.nodes)
    names = [node.name for node in graph.nodes]
    assert len({*names}) == len(names)
    cleaned, _ = clean(graph)
    assert [path for _, path in cleaned.places()][:4] == [
        "stages.0.conv",
        "stages.0.act",
        "stages.1.conv",
        "stages.1.act",
    ]


def test_nothing_private_and_nothing_of_the_moment_is_inside(tmp_path: Path) -> None:
    data = exported(f"{write(tmp_path, BLOCKS)}:Net", "1,4,8,8").serialized
    for secret in (str(tmp_path), "net.py", "site-packages", "pkg.torch", "stack_trace", "_cnncc_model"):
        assert secret.encode() not in data


def test_separate_processes_give_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, BLOCKS)
    code = (
        "from cnncc.compiler.export import export; from cnncc.compiler.ingest import ingest; "
        "from cnncc.compiler.model_reference import ModelRequest; from cnncc.compiler.passes.pipeline import clean; "
        f"m = ingest(ModelRequest({str(path) + ':Net'!r}, input_shapes=('N,4,8,8',))); g = export(m).graph; "
        "print(m.digest, g.digest, clean(g, prove=False)[0].digest)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != ""
    assert runs[0].stderr == runs[1].stderr == ""


def test_no_warning_and_no_word_escapes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported(f"{write(tmp_path, BLOCKS)}:Net", "N,4,8,8")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


OUTPUTS = [
    ("return x + 1", ["output"]),
    ("return x + 1, x + 2", ["output_0", "output_1"]),
    ("return [x + 1]", ["output_0"]),
    ("return {'boxes': x + 1, 'scores': x + 2}", ["boxes", "scores"]),
    ("return {'a': [x + 1, x + 2], 'b': (x,)}", ["a_0", "a_1", "b_0"]),
    ("return x, x, x + 1", ["output_0", "output_1", "output_2"]),
    ("return x + 1, None", ["output_0"]),
    ("y = x + 1\nreturn y, y", ["output_0", "output_1"]),
    ("return {'x': x + 1}", ["x_output"]),
]


@pytest.mark.parametrize(("body", "names"), OUTPUTS, ids=[body.replace("\n", "; ") for body, _ in OUTPUTS])
def test_outputs_bear_readable_names(tmp_path: Path, body: str, names: list[str]) -> None:
    graph = forward(tmp_path, "x\n" + body, "2,3")
    assert [spec.name for spec in graph.outputs] == names
    assert [spec.name for spec in graph.inputs] == ["x"]
    feeds = random_feeds(graph.inputs)
    cleaned, _ = clean(graph)
    for name, value in Reference(cleaned).run(feeds).items():
        np.testing.assert_array_equal(value, Reference(graph).run(feeds)[name])


def test_a_parameter_may_be_an_output(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER + "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.p = nn.Parameter(torch.ones(2))\n    def forward(self, x): return x * self.p, self.p\n",
    )
    graph = exported(f"{path}:Net", "3,2")
    np.testing.assert_array_equal(Reference(graph).run(random_feeds(graph.inputs))["output_1"], [1, 1])


@pytest.mark.parametrize("body", ["return x, 3", "return x, x.shape[0]", "return None", "return x, 'text'"])
def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path, body: str) -> None:
    error = failed(tmp_path, "x\n" + body, "N,3", kind=CnnccError)
    assert isinstance(error, ModelRefused | ExportFailed)
    assert "tensor" in str(error)


def test_several_inputs_keep_their_names_and_order(tmp_path: Path) -> None:
    graph = forward(
        tmp_path, "input, output=None, *, conv2d\nreturn input + output * conv2d", "2,3", "output=2,3", "conv2d=3"
    )
    assert [str(spec) for spec in graph.inputs] == [
        "input: float32[2, 3]",
        "output: float32[2, 3]",
        "conv2d: float32[3]",
    ]
    assert [spec.name for spec in graph.outputs] == ["output_output"]
    feeds = random_feeds(graph.inputs)
    [result] = Reference(graph).run(feeds).values()
    np.testing.assert_array_equal(result, feeds["input"] + feeds["output"] * feeds["conv2d"])


def test_inputs_without_names_are_numbered(tmp_path: Path) -> None:
    graph = forward(tmp_path, "*xs\nreturn xs[0] - xs[1]", "2,3", "2,3")
    assert [spec.name for spec in graph.inputs] == ["input_0", "input_1"]


# ---- numerics and shapes


@pytest.mark.parametrize("shape", ["2,4,8,8", "N,4,8,8"])
def test_the_graph_computes_what_the_module_computes(tmp_path: Path, shape: str) -> None:
    model = ingest(ModelRequest(f"{write(tmp_path, BLOCKS)}:Net", input_shapes=(shape,)))
    graph, _ = clean(export(model).graph)
    assert model.module is not None
    for batch in (1, 2, 5) if shape.startswith("N") else (2,):
        feeds = random_feeds(graph.inputs, batch=batch)
        with torch.no_grad():
            wanted = model.module(torch.from_numpy(feeds["image"])).numpy()
        np.testing.assert_allclose(Reference(graph).run(feeds)["output"], wanted, rtol=1e-4, atol=1e-5)


def test_a_symbolic_batch_is_called_n_and_can_be_bound(tmp_path: Path) -> None:
    graph = exported(f"{write(tmp_path, BLOCKS)}:Net", "N,4,8,8")
    assert graph.inputs[0].shape == ("N", 4, 8, 8)
    assert graph.outputs[0].shape == ("N", 3)
    static, _ = clean(bind_batch(graph, 4))
    assert static.outputs[0].shape == (4, 3)
    assert all(dim.HasField("dim_value") for v in static.proto.graph.value_info for dim in v.type.tensor_type.shape.dim)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_real_architectures_are_exported_cleaned_and_right(name: str) -> None:
    model = ingest(ModelRequest(f"torchvision:{name}", input_shapes=("N,3,64,64",)))
    graph, report = clean(export(model).graph)
    assert report.proof in ("bit-exact", "rounding", "noise")
    kinds = {node.op_type for node in graph.nodes}
    assert not kinds & {"BatchNormalization", "Identity", "Constant", "Shape", "SplitToSequence", "Expand", "CastLike"}
    assert model.module is not None
    feeds = random_feeds(graph.inputs, batch=3)
    with torch.no_grad():
        wanted = model.module(torch.from_numpy(feeds["x"])).numpy()
    found = Reference(graph).run(feeds)["output"]
    np.testing.assert_allclose(found / np.abs(wanted).max(), wanted / np.abs(wanted).max(), atol=1e-5)


# ---- failures


def test_data_dependent_control_flow_is_named(tmp_path: Path) -> None:
    body = HEADER + (
        "class Gate(nn.Module):\n    def forward(self, x):\n        if x.sum() > 0:\n            return x\n"
        "        return -x\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.gate = Gate()\n"
        "    def forward(self, x): return self.gate(x)\n"
    )
    path = write(tmp_path, body)
    with pytest.raises(ExportFailed, match="branches on the values") as caught:
        exported(f"{path}:Net", "2,3")
    assert caught.value.where[0] == "gate (Gate)"
    assert f"{path}:6" in caught.value.where[1]
    assert "torch.where" in caught.value.hint


def test_a_module_that_fixes_the_batch_is_named(tmp_path: Path) -> None:
    error = failed(tmp_path, "x\nreturn x.reshape(2, 12)", "N,4,3")
    assert "batch" in error.message
    assert "instead of N" in error.hint


def test_a_wrong_shape_is_told_with_module_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, BLOCKS)
    with pytest.raises(ExportFailed) as caught:
        exported(f"{path}:Net", "1,5,8,8")
    assert "image: float32[1, 5, 8, 8]" in caught.value.message
    assert caught.value.where[0] == "stages.0.conv (Conv2d)"
    assert "--input-shape" in caught.value.hint


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    error = failed(tmp_path, "x\nreturn torch.linalg.eigvals(x).real", "3,3")
    assert "linalg_eig" in str(error)
    assert error.exit_code == 5


def test_bfloat16_is_refused_by_module(tmp_path: Path) -> None:
    body = (
        "x\nwith torch.autocast('cpu', dtype=torch.bfloat16):\n    return F.conv2d(x, torch.ones(1, 1, 1, 1)).float()"
    )
    error = failed(tmp_path, body, "1,1,4,4", kind=UnsupportedGraph)
    assert error.exit_code == 4 and "bfloat16" in error.message
    assert "(model)" in error.where[0]


# ---- .pt2 archives


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    model = ingest(ModelRequest(f"{write(folder, BLOCKS)}:Net", input_shapes=("N,4,8,8",)))
    path = folder / "model.pt2"
    export(model).save_program(path)
    return path


def test_an_archive_gives_the_same_graph_as_its_module(archive: Path) -> None:
    from_module = exported(f"{archive.with_name('net.py')}:Net", "N,4,8,8")
    from_archive = exported(str(archive), "N,4,8,8")
    feeds = random_feeds(from_module.inputs, batch=3)
    np.testing.assert_array_equal(
        Reference(from_archive).run(feeds)["output"], Reference(from_module).run(feeds)["output"]
    )
    modules = [path for node, path in from_archive.places() if node.op_type == "Conv"]
    assert modules == ["stages.0.conv", "stages.1.conv", "stages.0.conv", "parts.0"]
    assert exported(str(archive), "5,4,8,8").inputs[0].shape == (5, 4, 8, 8)
    assert load_trusted_program(archive) is not None


def test_open_sizes_must_be_given_and_fixed_ones_hold(archive: Path) -> None:
    with pytest.raises(ModelRefused, match="left open") as caught:
        ingest(ModelRequest(str(archive)))
    assert "--input-shape image=1,4,8,8" in caught.value.hint
    with pytest.raises(ModelRefused, match="fixed size 8"):
        ingest(ModelRequest(str(archive), input_shapes=("1,4,9,8",)))


def entries_of(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as source:
        return {info.filename: source.read(info) for info in source.infolist()}


def written(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, data in entries.items():
            target.writestr(name, data)
    return path


def refused(path: Path, what: str = "") -> CnnccError:
    with pytest.raises(ModelRefused, match=what or None) as caught:
        load_archive(path)
    return caught.value


def test_a_rewritten_archive_is_still_read(archive: Path, tmp_path: Path) -> None:
    """The attacks below are refused for what they hold, not for having been rewritten."""
    load_archive(written(tmp_path / "same.pt2", entries_of(archive)))


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def pickled(command: str) -> bytes:
    buffer = io.BytesIO()
    torch.save((Payload(command),), buffer)
    return buffer.getvalue()


def attack_sample_inputs(entries: dict[str, bytes], command: str) -> None:
    [name] = [name for name in entries if "/sample_inputs/" in name]
    entries[name] = pickled(command)


def attack_weights(entries: dict[str, bytes], command: str) -> None:
    [name] = [name for name in entries if name.endswith("model_weights_config.json")]
    config = json.loads(entries[name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    entries[name] = json.dumps(config).encode()
    entries[name.replace("model_weights_config.json", first["path_name"])] = pickled(command)


def attack_constants(entries: dict[str, bytes], command: str) -> None:
    [name] = [name for name in entries if name.endswith("model_constants_config.json")]
    payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    entries[name] = json.dumps({"config": {"evil": payload}}).encode()
    entries[name.replace("model_constants_config.json", "opaque_obj_0")] = pickled(command)


def attack_legacy_weights(entries: dict[str, bytes], command: str) -> None:
    [name] = [name for name in entries if name.endswith("model_weights_config.json")]
    entries[name.replace("model_weights_config.json", "model.pt")] = pickled(command)


def attack_native_code(entries: dict[str, bytes], command: str) -> None:
    top = next(iter(entries)).partition("/")[0]
    entries[f"{top}/data/aotinductor/model/evil.so"] = b"\x7fELF"


def attack_second_model(entries: dict[str, bytes], command: str) -> None:
    [name] = [name for name in entries if name.endswith("models/model.json")]
    entries[name.replace("model.json", "other.json")] = entries[name]


def change_program(entries: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> None:
    [name] = [name for name in entries if name.endswith("models/model.json")]
    program = json.loads(entries[name])
    change(program)
    entries[name] = json.dumps(program).encode()


def attack_expression(entries: dict[str, bytes], command: str) -> None:
    def change(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        sizes = values["image"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = f"__import__('os').system('{command}')"

    change_program(entries, change)


def attack_tower_of_powers(entries: dict[str, bytes], command: str) -> None:
    def change(program: dict[str, Any]) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["image"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = "9**9**9**9"

    change_program(entries, change)


def attack_operator(entries: dict[str, bytes], command: str) -> None:
    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.serialization.os.system"

    change_program(entries, change)


def attack_file_operator(entries: dict[str, bytes], command: str) -> None:
    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    change_program(entries, change)


def attack_enum(entries: dict[str, bytes], command: str) -> None:
    def change(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
        signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])

    change_program(entries, change)


ATTACKS = [
    attack_sample_inputs, attack_weights, attack_constants, attack_legacy_weights, attack_native_code,
    attack_second_model, attack_expression, attack_tower_of_powers, attack_operator, attack_file_operator, attack_enum,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_archives_that_would_run_code_are_refused_and_run_none(
    archive: Path, tmp_path: Path, attack: Callable[[dict[str, bytes], str], None]
) -> None:
    trace = tmp_path / "executed"
    entries = entries_of(archive)
    attack(entries, f"touch {trace}")
    error = refused(written(tmp_path / "evil.pt2", entries))
    assert error.exit_code == 4 and error.hint
    assert not trace.exists()


def test_guards_are_not_compiled(archive: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    entries = entries_of(archive)
    code = f"__import__('os').system('touch {trace}') == 0"
    change_program(entries, lambda program: program.update(guards_code=[code]))
    program = load_archive(written(tmp_path / "guards.pt2", entries))
    program.module()(torch.zeros(2, 4, 8, 8))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "model/../../evil"])
def test_unsafe_paths_are_refused_and_nothing_is_written(archive: Path, tmp_path: Path, name: str) -> None:
    before = {*tmp_path.rglob("*")}
    path = written(tmp_path / "paths.pt2", {**entries_of(archive), name: b"x"})
    refused(path, "unsafe paths")
    assert {*tmp_path.rglob("*")} == before | {path}


def test_compressed_entries_are_refused_unread(archive: Path, tmp_path: Path) -> None:
    entries = entries_of(archive)
    top = next(iter(entries)).partition("/")[0]
    entries[f"{top}/data/weights/weight_99"] = bytes(50_000_000)
    path = written(tmp_path / "bomb.pt2", entries, zipfile.ZIP_DEFLATED)
    refused(path, "compressed")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + bytes(18)])
def test_files_that_are_no_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("keep", [0.2, 0.7, 0.98])
def test_truncated_archives_are_refused(archive: Path, tmp_path: Path, keep: float) -> None:
    data = archive.read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(data[: int(keep * len(data))])
    refused(path)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_are_refused_or_read_but_never_crash(archive: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "flipped.pt2"
    path.write_bytes(bytes(content))
    try:
        load_archive(path)
    except CnnccError as exc:
        assert exc.exit_code == 4


def test_an_onnx_file_is_taken_as_it_is(tmp_path: Path) -> None:
    graph = exported(f"{write(tmp_path, BLOCKS)}:Net", "N,4,8,8")
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.serialized)
    with pytest.raises(ModelRefused, match="left open"):
        ingest(ModelRequest(str(path)))
    bound = ingest(ModelRequest(str(path), input_shapes=("3,4,8,8",))).graph
    assert bound is not None
    assert bound.inputs[0].shape == (3, 4, 8, 8)
    onnx.checker.check_model(bound.proto, full_check=True)


def test_an_onnx_file_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(exported(f"{write(tmp_path, BLOCKS)}:Net", "N,4,8,8").serialized)
    np.savez(tmp_path / "x.npz", image=np.random.default_rng(0).standard_normal((4, 4, 8, 8), np.float32))
    code = (
        "import sys; from cnncc.cli.main import cli; "
        f"cli(['calibrate', {str(path)!r}, '--input-shape', 'N,4,8,8', '--data', {str(tmp_path / 'x.npz')!r}, "
        f"'-o', {str(tmp_path / 'table.json')!r}], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "CNNCC_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.stdout.splitlines()[-1] == "False"
