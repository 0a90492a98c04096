"""`--help` is quick, complete, and true."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from cnncc.cli.main import COMMANDS, EXIT_CODES, cli
from cnncc_runtime import errors
from cnncc_runtime.errors import CnnccError

HEAVY = ("torch", "tvm", "tvm_ffi", "onnx", "onnxruntime", "onnxscript", "numpy", "rich", "torchvision", "timm")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compile", "--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom cnncc.cli.main import cli\n"
        f"try:\n    cli({arguments!r}, prog_name='cnncc')\nexcept SystemExit as exc:\n    assert not exc.code\n"
        "print('LOADED', ' '.join(sorted(name for name in sys.modules if '.' not in name)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    allowed = {"rich"} if len(arguments) == 2 else set()
    assert not loaded & set(HEAVY) - allowed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_flag(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "precision":
            assert parameter.help, f"{name} {parameter.opts} has no help"
    assert {"--json", "--quiet", "--verbose"} <= {opt for p in command.params for opt in p.opts}


def _kinds(kind: type[CnnccError] = CnnccError) -> list[type[CnnccError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _kinds(child))]


def test_the_documented_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)}
    assert documented == {0, *(kind.exit_code for kind in _kinds())}


def test_every_error_stands_in_the_tree_that_the_docstring_draws() -> None:
    assert errors.__doc__ is not None
    for kind in _kinds():
        assert re.search(rf"\b{kind.__name__}\b", errors.__doc__), kind.__name__


@pytest.mark.parametrize(
    "arguments", [["compil"], ["compile"], ["compile", "m.onnx", "--tarrget", "llvm"], ["cache", "drop"], ["bench"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
