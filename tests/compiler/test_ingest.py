"""MODEL in every form: taken, or refused with what, where and what next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cnncc.compiler.dependencies import record_dependencies
from cnncc.compiler.ingest import Model, ingest
from cnncc.compiler.model_reference import ModelRequest, parse_reference, parse_shapes
from cnncc_runtime.errors import CnnccError, DependencyMissing, ModelRefused, UsageError, WeightsRefused
from cnncc_runtime.specs import TensorSpec

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
    def forward(self, image):
        return self.head(self.norm(self.conv(image)).mean((2, 3)))

def build():
    return Net()
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def take(reference: str | Path, *shapes: str, **more: Any) -> Model:
    return ingest(ModelRequest(str(reference), input_shapes=shapes, **more))


def refused(kind: type[CnnccError], what: str, reference: str | Path, *shapes: str, **more: Any) -> CnnccError:
    with pytest.raises(kind, match=what or None) as caught:
        take(reference, *shapes, **more)
    assert type(caught.value) is kind
    return caught.value


# ---- factories


def test_a_factory_gives_a_module_in_eval_mode_with_reproducible_weights(net: Path) -> None:
    first, second = take(f"{net}:build", "1,3,8,8"), take(f"{net}:build", "1,3,8,8")
    assert first.module is not None and not first.module.training
    assert first.inputs == (TensorSpec("image", (1, 3, 8, 8)),)
    assert (first.name, first.source) == ("build", "net.py:build")
    assert first.digest == second.digest
    assert first.dependencies == (net,)
    assert any("no weights" in note for note in first.notes)
    assert take(f"{net}:build", "2,3,8,8").digest != first.digest


def test_a_class_and_an_instance_serve_as_factories(net: Path) -> None:
    net.write_text(NET + "model = Net()\n")
    assert take(f"{net}:Net", "1,3,8,8").name == "Net"
    assert take(f"{net}:model", "N,3,8,8").inputs[0].shape == ("N", 3, 8, 8)


def test_what_stands_beside_the_factory_is_taken(net: Path) -> None:
    net.write_text(
        NET
        + "labels = ['a', 'b']\npreprocessing = {'size': [8, 8]}\ndef example_inputs(): return torch.zeros(2, 3, 8, 8)"
    )
    model = take(f"{net}:build")
    assert model.labels == ("a", "b")
    assert model.preprocessing is not None and model.preprocessing.size == (8, 8)
    assert model.inputs == (TensorSpec("image", (2, 3, 8, 8)),)
    assert take(f"{net}:build", "image=5,3,8,8").inputs[0].shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("labels = 'abc'", "labels"),
        ("preprocessing = {'size': [8, 8], 'sharpen': 1}", "preprocessing"),
        ("preprocessing = {'size': [0, 8]}", "preprocessing"),
        ("def example_inputs(): return [1, 2]", "example_inputs"),
        ("def example_inputs(): return {'picture': torch.zeros(1, 3, 8, 8)}", "picture"),
        ("def example_inputs(): return torch.zeros(1, 3, 8, 8), torch.zeros(1)", "forward takes"),
        ("def example_inputs(): return torch.zeros(1, 3, 8, 8, dtype=torch.complex64)", "complex64"),
    ],
)
def test_neighbours_of_the_wrong_kind_are_refused(net: Path, extra: str, what: str) -> None:
    net.write_text(NET + extra + "\n")
    assert what in str(refused(ModelRefused, "", f"{net}:build"))


@pytest.mark.parametrize(
    ("body", "kind", "what"),
    [
        ("def build(): raise KeyError('lost')", ModelRefused, "KeyError: 'lost'"),
        ("def build(): import sys; sys.exit(3)", ModelRefused, "SystemExit"),
        ("def build(): return 3", ModelRefused, "a int, not a torch.nn.Module"),
        ("def build(): pass", ModelRefused, "return` missing"),
        ("def build(): return nn.ReLU", ModelRefused, "the class ReLU"),
        ("def build(width): return nn.ReLU()", UsageError, "needs arguments: width"),
        ("build = 3", UsageError, "not a callable"),
        ("def builds(): return nn.ReLU()", UsageError, "did you mean builds"),
        ("import nothing_of_that_name", ModelRefused, "nothing_of_that_name"),
        ("def build(:", ModelRefused, "SyntaxError"),
        ("raise ValueError('at import')", ModelRefused, "ValueError: at import"),
        ("def build(): return nn.LazyLinear(3)", ModelRefused, "holds no data"),
        ("def build(): return nn.Linear(3, 3, device='meta')", ModelRefused, "holds no data"),
    ],
)
def test_factories_that_fail_say_why_and_where(tmp_path: Path, body: str, kind: type[CnnccError], what: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text("from torch import nn\n" + body + "\n")
    error = refused(kind, "", f"{path}:build", "1,3")
    assert what in str(error)
    if "raise" in body or ":" in body[-2:]:
        assert f"{path}:2" in error.where[0]


def test_the_users_line_is_shown_even_below_library_frames(net: Path) -> None:
    net.write_text("import torch\nfrom torch import nn\ndef build():\n    return nn.Conv2d(3, 4, 'wide', groups=2)\n")
    error = refused(ModelRefused, "", f"{net}:build", "1,3")
    assert f"{net}:4, in build" in error.where[0]
    assert "torch/nn" not in str(error.where)


def test_siblings_are_found_forgotten_and_recorded(tmp_path: Path) -> None:
    for folder, channels in (("a", 4), ("b", 7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "blocks.py").write_text(f"CHANNELS = {channels}\n")
        (tmp_path / folder / "values.txt").write_text("1")
        (tmp_path / folder / "net.py").write_text(
            "from pathlib import Path\nfrom torch import nn\nimport blocks\n"
            "def build():\n    Path(__file__).with_name('values.txt').read_text()\n"
            "    return nn.Conv2d(3, blocks.CHANNELS, 1)\n"
        )
    path, modules = list(sys.path), set(sys.modules)
    for folder, channels in (("a", 4), ("b", 7)):
        model = take(f"{tmp_path / folder}/net.py:build", "1,3,4,4")
        assert model.module is not None and model.module.weight.shape[0] == channels
        names = [file.name for file in model.dependencies]
        assert names == ["blocks.py", "net.py", "values.txt"]
    assert sys.path == path
    assert "blocks" not in sys.modules
    assert not {name for name in set(sys.modules) - modules if name.startswith("_cnncc_model")}


def test_a_users_module_shadows_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "calibration.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "cnncc.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "net.py").write_text(NET)
    take(f"{tmp_path}/net.py:build", "1,3,8,8")


def test_a_dotted_module_is_imported_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "zoo_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    model = take("zoo_of_mine.nets:build", "1,3,8,8")
    assert model.source == "zoo_of_mine.nets:build"
    assert [file.name for file in model.dependencies] == ["__init__.py", "nets.py"]
    assert take("zoo_of_mine.nets:build", "1,3,8,8").dependencies == model.dependencies


def test_what_a_factory_prints_does_not_reach_stdout(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net.write_text("print('importing')\n" + NET + "    print('unreached')\n")
    take(f"{net}:build", "1,3,8,8")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "importing" in captured.err


def test_random_generators_are_given_back(net: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    take(f"{net}:build", "1,3,8,8")
    assert torch.equal(torch.rand(3), wanted)


# ---- references and flags


@pytest.mark.parametrize(
    ("reference", "kind", "what"),
    [
        ("", UsageError, "no model"),
        ("nothing", UsageError, "not a model"),
        ("missing.py:build", ModelRefused, "does not exist"),
        ("missing.onnx", ModelRefused, "does not exist"),
        ("missing.pt2", ModelRefused, "does not exist"),
        ("weights.pth", UsageError, "holds weights"),
        ("timm:", UsageError, "names no model"),
        ("a" * 5000 + ".onnx", ModelRefused, "cannot be used"),
        ("no.such.package_of_mine:build", ModelRefused, "No module named"),
    ],
)
def test_references_that_are_wrong_are_refused(reference: str, kind: type[CnnccError], what: str) -> None:
    refused(kind, what, reference)


def test_references_to_files_of_the_wrong_kind(net: Path, tmp_path: Path) -> None:
    assert "net.py:build" in refused(UsageError, "which callable", net).hint
    refused(UsageError, "which callable", f"{net}:")
    refused(UsageError, "not the name", f"{net}:1+1")
    refused(ModelRefused, "not a model that cnncc reads", tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    refused(ModelRefused, "is a folder", tmp_path / "folder.onnx")


def test_the_source_holds_no_folders(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert parse_reference(str(tmp_path / "m.onnx")).label == "m.onnx"
    assert parse_reference("timm:resnet18").label == "timm:resnet18"
    assert parse_reference("a.b:c").label == "a.b:c"


@pytest.mark.parametrize(
    "text", ["", "1,,3", "1,3,x", "1,N,3", "0,3", "-1,3", "1.5", "1 3", "1x3", "=1,3", "99999999999", "65536,65536,9"]
)
def test_shapes_that_cannot_be_read_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shapes((text,))
    assert caught.value.exit_code == 2


def test_shapes_go_by_position_and_by_name() -> None:
    assert parse_shapes(("N,3,8", "b=1,2")) == {0: ("N", 3, 8), "b": (1, 2)}
    with pytest.raises(UsageError, match="twice"):
        parse_shapes(("b=1", "b=2"))


def test_flags_that_name_no_input_are_usage_errors(net: Path) -> None:
    assert "image" in refused(UsageError, "no input 'imgae'", f"{net}:build", "imgae=1,3,8,8").hint
    refused(UsageError, "the model takes 1", f"{net}:build", "1,3,8,8", "1,3,8,8")
    refused(UsageError, "twice", f"{net}:build", "1,3,8,8", "image=1,3,8,8")
    refused(UsageError, "not a dtype", f"{net}:build", "1,3,8,8", input_dtypes=("float99",))
    assert "--input-shape" in refused(UsageError, "not known", f"{net}:build").hint


def test_dtypes_are_taken(net: Path) -> None:
    assert take(f"{net}:build", "1,3,8,8", input_dtypes=("image=float64",)).inputs[0].dtype == "float64"


# ---- weights


@pytest.fixture
def state(net: Path) -> dict[str, torch.Tensor]:
    module = take(f"{net}:build", "1,3,8,8").module
    assert module is not None
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


def loaded(net: Path, weights: Path) -> Model:
    return take(f"{net}:build", "1,3,8,8", weights=weights)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_weights_are_loaded(net: Path, tmp_path: Path, state: dict[str, torch.Tensor], suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = loaded(net, path)
    assert model.module is not None
    assert torch.equal(model.module.state_dict()["conv.weight"], state["conv.weight"])
    assert model.notes == ()
    assert path in model.dependencies
    assert model.digest != take(f"{net}:build", "1,3,8,8").digest


def test_old_style_files_are_loaded(net: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loaded(net, tmp_path / "old.pt")


def test_wrappers_and_prefixes_are_taken_off_with_a_note(
    net: Path, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / "w.pt")
    notes = loaded(net, tmp_path / "w.pt").notes
    assert any("'state_dict'" in note and "epoch" in note for note in notes)
    assert any("DataParallel" in note for note in notes)


def test_casts_are_noted(net: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pt")
    assert any("float16 → float32" in note for note in loaded(net, tmp_path / "w.pt").notes)


def weights_refused(net: Path, path: Path, what: str) -> CnnccError:
    return refused(WeightsRefused, what, f"{net}:build", "1,3,8,8", weights=path)


def test_keys_that_do_not_fit_are_listed(net: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    del state["head.bias"]
    state["extra"] = torch.zeros(1)
    state["conv.weight"] = torch.zeros(1)
    state.update({f"more.{index}": torch.zeros(1) for index in range(20)})
    torch.save(state, tmp_path / "w.pt")
    error = weights_refused(net, tmp_path / "w.pt", "1 missing, 21 unexpected, 1 of another shape")
    text = str(error)
    assert "head.bias" in text and "conv.weight: the file has [1], the model [4, 3, 3, 3]" in text
    assert "… and 11 more" in text


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused_and_never_run(net: Path, tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "executed"
    torch.save({"a": Payload(f"touch {trace}")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    error = weights_refused(net, tmp_path / "evil.pt", "cannot be loaded safely")
    assert "state_dict()" in error.hint
    assert "weights_only=False" not in str(error)
    assert not trace.exists()


def test_a_pickled_module_is_refused_with_the_way_out(net: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    assert "state_dict()" in weights_refused(net, tmp_path / "module.pt", "cannot be loaded safely").hint


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95])
def test_truncated_weights_are_refused(
    net: Path, tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, keep: float
) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    weights_refused(net, path, "")


def test_other_contents_are_refused(net: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    weights_refused(net, tmp_path / "none.pt", "does not exist")
    weights_refused(net, tmp_path, "is a folder")
    torch.save([1, 2], tmp_path / "list.pt")
    weights_refused(net, tmp_path / "list.pt", "holds a list")
    torch.save({"a": 1, **state}, tmp_path / "mixed.pt")
    weights_refused(net, tmp_path / "mixed.pt", "not tensors")
    torch.save({}, tmp_path / "empty.pt")
    weights_refused(net, tmp_path / "empty.pt", "no tensors")
    (tmp_path / "w.txt").write_text("x")
    weights_refused(net, tmp_path / "w.txt", "suffix")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(
    net: Path, tmp_path: Path, state: dict[str, torch.Tensor], value: float
) -> None:
    state["conv.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "w.pt")
    assert "conv.weight" in weights_refused(net, tmp_path / "w.pt", "NaN or Inf").where[0]


def test_infinite_masks_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.register_buffer('mask', torch.tensor([0.0, float('-inf')]))\n"
        "    def forward(self, x): return x + self.mask\n"
    )
    take(f"{path}:Net", "1,2")


def test_weights_do_not_go_with_files_that_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    refused(UsageError, "does not go with", tmp_path / "m.onnx", weights=tmp_path / "w.pt")


def test_tied_weights_stored_once_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = nn.Linear(3, 3, bias=False)\n        self.b = nn.Linear(3, 3, bias=False)\n"
        "        self.b.weight = self.a.weight\n    def forward(self, x): return self.b(self.a(x))\n"
    )
    save_file({"a.weight": torch.ones(3, 3)}, tmp_path / "w.safetensors")
    model = take(f"{path}:Net", "1,3", weights=tmp_path / "w.safetensors")
    assert model.module is not None and bool((model.module.b.weight == 1).all())


# ---- zoos


def test_torchvision_gives_shape_preprocessing_and_labels() -> None:
    model = take("torchvision:squeezenet1_1")
    assert model.inputs == (TensorSpec("x", (1, 3, 224, 224)),)
    assert model.preprocessing is not None and model.preprocessing.resize == 256
    assert len(model.labels) == 1000
    small = take("torchvision:squeezenet1_1", "N,3,64,64")
    assert small.preprocessing is None
    assert take("torchvision:squeezenet1_1").digest == model.digest


def test_timm_gives_shape_and_preprocessing() -> None:
    model = take("timm:resnet10t")
    assert model.inputs[0].shape == (1, 3, 176, 176)
    assert model.preprocessing is not None and model.preprocessing.size == (176, 176)


def test_unknown_names_suggest_near_ones() -> None:
    assert "resnet50" in refused(UsageError, "no model", "torchvision:resent50").hint
    assert "resnet50" in refused(UsageError, "no model", "timm:resnet_50").hint


def test_a_zoo_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "cnncc[zoo]" in refused(DependencyMissing, "timm", "timm:resnet50").hint


# ---- dependencies


def test_writing_and_installed_files_are_no_dependencies(tmp_path: Path) -> None:
    (tmp_path / "read.txt").write_text("1")
    with record_dependencies() as record:
        (tmp_path / "read.txt").read_text()
        (tmp_path / "written.txt").write_text("2")
        Path(np.__file__).read_bytes()
        Path(os.__file__).read_bytes()
    (tmp_path / "written.txt").read_text()
    assert record.paths() == (tmp_path / "read.txt",)


def test_references_are_parsed_without_torch() -> None:
    code = (
        "import sys, cnncc.compiler.model_reference as m; m.ModelRequest('a.py:b'); "
        "assert not {'torch', 'onnx', 'numpy.random'} & set(sys.modules) - {'numpy.random'}, 'torch came along'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


@pytest.mark.slow
@pytest.mark.parametrize("model", ["timm:test_resnet", "torchvision:squeezenet1_1"])
def test_a_zoo_is_imported_in_a_fresh_process(model: str) -> None:
    """In this process another test may have imported torchvision already, with its operators declared."""
    script = (
        "from cnncc.compiler.ingest import ingest\n"
        "from cnncc.compiler.model_reference import ModelRequest\n"
        f"print(ingest(ModelRequest({model!r})).inputs[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 3, ")
