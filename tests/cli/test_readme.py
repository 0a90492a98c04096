"""The README is held to the code: its command lines parse, its flags and exit codes are real, its Python runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from cnncc.cli.main import COMMANDS, EXIT_CODES, cli
from cnncc.targets.devices import resolve_profile
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
    """Return every ``cnncc …`` line of the README, alternatives (``a|b``) spelled out."""
    lines = [line.strip().removeprefix("$ ") for _, block in BLOCKS for line in block.splitlines()]
    found = [line for line in (*lines, *INLINE) if re.match(r"cnncc [a-z]", line)]
    expanded = []
    for line in dict.fromkeys(line.replace("\\|", "|").replace("[", "").replace("]", "") for line in found):
        word = re.search(r"(\w+)\|(\w+)", line)
        expanded += [line.replace(word[0], word[1]), line.replace(word[0], word[2])] if word else [line]
    return expanded


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[1] for line in command_lines()}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_readme_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, line
    if not arguments and any(isinstance(parameter, click.Argument) for parameter in command.params):
        return  # the command's bare name in a sentence
    with command.make_context(name, list(arguments)):  # unknown flags and wrong values raise UsageError
        pass


def test_every_flag_that_the_readme_names_exists() -> None:
    commands = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    known = (
        {option for command in commands if command for p in command.params for option in (*p.opts, *p.secondary_opts)}
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
