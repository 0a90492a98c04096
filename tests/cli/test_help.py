"""`--help` is quick, complete, and true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from cnncc.cli.main import COMMANDS, EXIT_CODES, cli
from cnncc_runtime import errors
from cnncc_runtime.agent.cli import EXIT_CODES as AGENTS
from cnncc_runtime.agent.cli import NOTHING
from cnncc_runtime.errors import CnnccError

SAY_ALL = ("precision", "channel", "host", "port")
"""Options whose name, default and choices say all."""
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
    for path, each in _commands(name, command):
        for parameter in each.params:
            if isinstance(parameter, click.Option) and parameter.name not in SAY_ALL:
                assert parameter.help, f"{path} {parameter.opts} has no help"
        assert {"--json", "--quiet", "--verbose"} <= {opt for p in each.params for opt in p.opts}, path


def _commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield what can be run: a command, or those below a group."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name in command.list_commands(click.Context(command)):
        below = command.get_command(click.Context(command), name)
        assert below is not None
        assert below.help, f"{path} {name}"
        yield from _commands(f"{path} {name}", below)


def _kinds(kind: type[CnnccError] = CnnccError) -> list[type[CnnccError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _kinds(child))]


def test_the_documented_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^  (\d+) ", EXIT_CODES + AGENTS, re.MULTILINE)}
    assert documented == {0, NOTHING, *(kind.exit_code for kind in _kinds())}


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
