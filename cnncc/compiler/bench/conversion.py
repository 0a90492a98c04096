"""Models in the form that a peer's library reads, made once, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cnncc.compiler.bench.process import WorkerProcess
from cnncc.compiler.bench.protocol import Convert, Converted
from cnncc.compiler.bench.referee import Referee
from cnncc.compiler.bench.subjects import Subject, find_kind


def convert_subjects(
    subjects: Sequence[Subject], folder: Path, referee: Referee, *, timeout: float = 600.0
) -> tuple[Subject, ...]:
    """Convert the models of those that need it, each in a process of its own.

    A process of its own, because a converter may crash, and because an engine's memory is not that of its converter.

    Args:
        subjects: With the models as `cnncc.compiler.bench.subjects.make_subjects` names them.
        folder: An existing folder, where converted models stay until the benchmark is done.
        referee: Says whether to go on without peers whose conversion fails.
        timeout: Seconds that one conversion may take.

    Returns:
        The subjects with what they are to open; those that could not be converted are missing.

    Raises:
        CnnccError: A conversion failed, and ``referee`` does not go on without it.
    """
    converted = []
    for subject in subjects:
        with referee.watch(subject.name):
            converted.append(_convert(subject, folder / subject.name, timeout))
    return tuple(converted)


def _convert(subject: Subject, folder: Path, timeout: float) -> Subject:
    kind = find_kind(subject.kind)
    if not kind.converts:
        return subject
    made, home = folder / "made", folder / "home"
    made.mkdir(parents=True)
    home.mkdir()
    with WorkerProcess(subject.name, home, threads=1, timeout=timeout, python=kind.python) as worker:
        command = Convert(kind.adapter, kind.options, str(subject.path.resolve()), str(made))
        return replace(subject, path=Path(worker.ask(command, Converted).path))
