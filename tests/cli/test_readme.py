"""The README is held to the code: its command lines parse, its flags and exit codes are real, its Python runs."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cnncc.cli.main import COMMANDS, EXIT_CODES, cli
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.agent.cli import cli as agent
from tests.cli.conftest import Digits
from tests.cli.harness import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))
FOREIGN = {"--index-url", "--extra-index-url", "--no-deps", "--bench", "--verify"}
"""Flags of pip, and of the executables that cnncc makes: a README may show them."""
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
RUNNER = (ROOT / "runtime" / "c" / "main.c").read_text(encoding="utf-8").partition("HELP[]")[2].partition('";')[0]
"""What ``cnncc-run --help`` says."""


def command_lines() -> list[str]:
    """Return every ``cnncc …`` and ``cnncc-agent …`` line of the README, alternatives (``a|b``) spelled out."""
    lines = [line.strip().removeprefix("$ ") for _, block in BLOCKS for line in block.splitlines()]
    found = [line for line in (*lines, *INLINE) if re.match(r"cnncc [a-z]|(\S*/)?cnncc-agent (-|[a-z])", line)]
    expanded = []
    for line in dict.fromkeys(line.replace("\\|", "|").replace("[", "").replace("]", "") for line in found):
        word = re.search(r"(\w+)\|(\w+)", line)
        expanded += [line.replace(word[0], word[1]), line.replace(word[0], word[2])] if word else [line]
    return expanded


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[1] for line in command_lines() if line.startswith("cnncc ")}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_readme_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("root.json").touch()
    monkeypatch.setenv("CNNCC_FLEET_TOKEN", "of-a-viewer")
    program, *arguments = shlex.split(line, comments=True)
    parsed: click.Command = cli if program == "cnncc" else agent
    while isinstance(parsed, click.Group) and arguments and arguments[0] != "…":
        context = click.Context(parsed)
        _, (name, *arguments), _ = parsed.make_parser(context).parse_args(list(arguments))
        found = parsed.get_command(context, name)
        assert found is not None, line
        parsed = found
    if not arguments and any(isinstance(parameter, click.Argument) for parameter in parsed.params):
        return  # the command's bare name in a sentence
    if not isinstance(parsed, click.Group):
        with parsed.make_context(parsed.name, list(arguments)):  # unknown flags and wrong values raise UsageError
            pass


def commands_of(command: click.Command) -> Iterator[click.Command]:
    """Yield a command and all below it."""
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from commands_of(found)


def test_every_flag_that_the_readme_names_exists() -> None:
    commands = [*commands_of(cli), *commands_of(agent)]
    known = (
        {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
        | FOREIGN
        | set(re.findall(FLAG, RUNNER))
    )
    text = "\n".join([*(block for _, block in BLOCKS), *INLINE])
    named = set(re.findall(FLAG, text))
    assert named
    assert named <= known


def test_the_command_lines_of_the_c_runtime_name_its_own_flags() -> None:
    lines = [line for _, block in BLOCKS for line in block.splitlines() if "cnncc-run " in line]
    assert lines
    for line in lines:
        assert set(re.findall(FLAG, line)) <= set(re.findall(FLAG, RUNNER)), line


def test_the_exit_codes_of_the_readme_are_those_of_help() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", README, re.MULTILINE))
    told = dict(re.findall(r"^  (\d+) +(.+)$", EXIT_CODES, re.MULTILINE))
    assert table == told


def test_the_files_that_the_readme_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_python_of_the_readme_runs(
    digits: Digits, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits.bundle, "digits.cnncc")
    shutil.copy(image, "seven.png")
    [code] = [block for language, block in BLOCKS if language == "python"]
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert getattr(scope["scores"], "shape", None) == (1, 10)


def test_the_device_of_the_readme_is_one(tmp_path: Path) -> None:
    [text] = [block for kind, block in BLOCKS if kind == "toml" and "triple" in block]
    path = tmp_path / "my-board.toml"
    path.write_text(text, encoding="utf-8")
    assert resolve_profile(str(path)).features == ("dotprod", "fp-armv8", "neon")
