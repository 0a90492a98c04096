"""The error tree: its docstring is the documentation, so the docstring is what is tested."""

from __future__ import annotations

import pickle
import re

import pytest

from cnncc_runtime import errors
from cnncc_runtime.errors import CnnccError, EngineMismatch


def drawn() -> list[tuple[str, int, int | None]]:
    """Name, depth and exit code of every line of the docstring's tree."""
    found = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)([A-Z]\w+)(?:\s+exit (\d+))?", line):
            found.append((match[2], len(match[1]) // 4, int(match[3]) if match[3] else None))
    return found


def all_errors() -> set[type[CnnccError]]:
    found, waiting = set(), [CnnccError]
    while waiting:
        found.add(waiting[-1])
        waiting += waiting.pop().__subclasses__()
    return {error for error in found if error.__module__ == errors.__name__}


def test_the_docstring_draws_every_error_and_no_other() -> None:
    assert {name for name, _, _ in drawn()} == {error.__name__ for error in all_errors()}


def test_the_docstring_draws_the_real_parents_and_exit_codes() -> None:
    path: list[str] = []
    code: dict[str, int] = {"CnnccError": 5}
    for name, depth, given in drawn():
        del path[depth:]
        error = getattr(errors, name)
        if path:
            assert error.__bases__ == (getattr(errors, path[-1]),), name
            code[name] = given if given is not None else code[path[-1]]
        assert error.exit_code == code[name], name
        path.append(name)


@pytest.mark.parametrize("error", sorted(all_errors(), key=lambda error: error.__name__))
def test_an_error_survives_a_process_boundary(error: type[CnnccError]) -> None:
    sent = error("what", where=["a", "b"], hint="do")
    got = pickle.loads(pickle.dumps(sent))
    assert (type(got), got.message, got.where, got.hint, str(got)) == (error, "what", ("a", "b"), "do", str(sent))


def test_the_text_has_the_message_the_places_and_the_hint() -> None:
    text = str(EngineMismatch("built for: a, found: b", where=["engine.so"], hint="compile"))
    assert text == "built for: a, found: b\n  at engine.so\n  try: compile"
