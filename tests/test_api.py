"""The Python API: compile a model, load the bundle, call it; the errors are those of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cnncc_runtime
from cnncc.compiler import compile
from cnncc.compiler.cache import Cache
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.pipeline import CompileRequest
from cnncc.compiler.reporting import Silent
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.errors import CnnccError, ModelRefused, UsageError, WeightsRefused

MODEL = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image):
        return torch.relu(self.norm(self.conv(image))).mean((2, 3))


def example_inputs():
    return torch.zeros(1, 2, 6, 6)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(MODEL, encoding="utf-8")
    return path


def request(model: Path, output: Path, **fields: object) -> CompileRequest:
    asked = ModelRequest(f"{model}:Small", **fields)  # type: ignore[arg-type]
    return CompileRequest(model=asked, profile=resolve_profile("host"), output=output)


def small(path: Path) -> torch.nn.Module:
    scope: dict[str, object] = {}
    exec(path.read_text(encoding="utf-8"), scope)
    torch.manual_seed(5)
    network = scope["Small"]()  # type: ignore[operator]
    assert isinstance(network, torch.nn.Module)
    return network.eval()


def test_compile_and_load_compute_what_pytorch_computes(model: Path, tmp_path: Path) -> None:
    network = small(model)
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    reporter = Silent()
    compiled = compile(
        request(model, tmp_path / "small.cnncc", weights=tmp_path / "small.safetensors"), reporter=reporter
    )
    assert (compiled.parity, compiled.failures, compiled.unchanged) == ("passed", (), False)
    assert reporter.notes == []
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 6), dtype=np.float32)
    with torch.no_grad():
        expected = network(torch.tensor(x)).numpy()
    with cnncc_runtime.load(compiled.bundle.path) as engine:
        assert np.allclose(engine(x), expected, rtol=1e-4, atol=1e-6)
        assert np.allclose(engine({"image": x})["output"], expected, rtol=1e-4, atol=1e-6)


def test_a_second_compile_with_the_same_cache_is_unchanged(model: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = compile(request(model, tmp_path / "small.cnncc"), cache=cache)
    second = compile(request(model, tmp_path / "small.cnncc"), cache=cache)
    assert second.unchanged
    assert second.bundle.digest == first.bundle.digest


def test_notes_reach_the_caller(model: Path, tmp_path: Path) -> None:
    reporter = Silent()
    compile(request(model, tmp_path / "small.cnncc"), reporter=reporter)
    assert any("no weights were given" in note for note in reporter.notes)


def test_errors_are_typed_and_say_what_to_do(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a bundle"):
        compile(request(model, tmp_path / "mine.txt"))
    with pytest.raises(WeightsRefused, match="does not exist"):
        compile(request(model, tmp_path / "s.cnncc", weights=tmp_path / "gone.safetensors"))
    with pytest.raises(ModelRefused) as caught:
        compile(CompileRequest(ModelRequest("gone.onnx"), resolve_profile("host"), tmp_path / "s.cnncc"))
    assert "try:" in str(caught.value)
    assert isinstance(caught.value, CnnccError)
    assert not list(tmp_path.glob("*.cnncc"))


def run(script: str, *arguments: Path) -> str:
    """Run a program of a user in a process of its own; warnings are errors there too."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_api_is_light() -> None:
    loaded = run("import sys, cnncc, cnncc.compiler, cnncc_runtime\nprint(*sys.modules)").split()
    assert not {"torch", "tvm", "onnx", "onnxruntime", "numpy"} & set(loaded)


def test_one_process_may_run_engines_before_and_after_it_compiles(model: Path, tmp_path: Path) -> None:
    first = compile(request(model, tmp_path / "small.cnncc"))
    script = """
        import json, sys
        from pathlib import Path
        import numpy as np
        import cnncc_runtime
        x = np.ones((1, 2, 6, 6), np.float32)
        before = cnncc_runtime.load(sys.argv[1])(x)
        from cnncc.compiler import compile
        from cnncc.compiler.cache import Cache
        from cnncc.compiler.model_reference import ModelRequest
        from cnncc.compiler.pipeline import CompileRequest
        from cnncc.targets.devices import resolve_profile
        asked = CompileRequest(ModelRequest(sys.argv[2] + ":Small"), resolve_profile("host"), Path(sys.argv[3]))
        compile(asked, cache=Cache(Path(sys.argv[4])))
        after = cnncc_runtime.load(sys.argv[3])(x)
        print(json.dumps([before.tolist(), after.tolist()]))
    """
    output = run(script, first.bundle.path, model, tmp_path / "again.cnncc", tmp_path / "cache")
    before, after = json.loads(output)
    assert before == after


@pytest.mark.slow
def test_the_calling_program_is_no_part_of_the_model(model: Path, tmp_path: Path) -> None:
    script = """
        # {comment}
        import sys
        from pathlib import Path
        from cnncc.compiler import compile
        from cnncc.compiler.cache import Cache
        from cnncc.compiler.model_reference import ModelRequest
        from cnncc.compiler.pipeline import CompileRequest
        from cnncc.targets.devices import resolve_profile
        asked = CompileRequest(ModelRequest(sys.argv[1] + ":Small"), resolve_profile("host"), Path(sys.argv[2]))
        print(compile(asked, cache=Cache(Path(sys.argv[3]))).bundle.digest)
    """
    digests = []
    for comment in ("one program", "another one"):
        program = tmp_path / "program.py"
        program.write_text(textwrap.dedent(script.format(comment=comment)), encoding="utf-8")
        place = tmp_path / comment.replace(" ", "_")
        place.mkdir()
        command = [sys.executable, program, model, place / "small.cnncc", place / "cache"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        digests.append(done.stdout.strip())
    assert digests[0] == digests[1]
