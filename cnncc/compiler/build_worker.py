"""Builds an engine in a process of its own.

A compiler that crashes must not take the command down with it, Ctrl-C must not wait for it, and its memory should
go back to the machine before the engine is verified. The parent (`build_apart`) sends one JSON request on stdin; the
child answers on stdout with a JSON line per event, the last one the engine or the error. The child's own stdout and
stderr go to a log that is shown when it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from cnncc.compiler.child import die_with, how_it_ended
from cnncc.targets.base import (
    BuildOptions,
    Engine,
    GpuOptions,
    KernelOptions,
    Measured,
    MeasureOptions,
    Measuring,
    Predicting,
    Profile,
    Target,
    budget_spent,
)
from cnncc_runtime import errors
from cnncc_runtime.bundle import to_plain
from cnncc_runtime.errors import BuildFailed, CnnccError, UsageError

if TYPE_CHECKING:
    from cnncc.graph.onnx_graph import OnnxGraph

_LOG = "build.log"

_GRACE = 10.0
"""Seconds that a child may take beyond its budget: to load the library, and to end the step that it is in."""


def build_apart(target: str, graph: Path, options: BuildOptions, workdir: Path) -> Engine:
    """Build an engine in a child process.

    Args:
        target: The target's name.
        graph: The cleaned ONNX file.
        options: As `cnncc.targets.base.Target.build` takes them.
        workdir: A folder that the build may write in.

    Raises:
        UnsupportedGraph: Lists every refused node.
        TargetUnavailable: A compiler or linker is missing.
        BuildFailed: The toolchain broke or crashed.
    """
    answer = _ask(
        {"task": "build", **_request(target, graph, options, workdir)},
        workdir,
        {"progress": options.progress, "note": options.note},
        budget=options.gpu.budget,
    )
    return engine_from_plain(answer, workdir)


def measure_apart(target: str, graph: Path, options: MeasureOptions, workdir: Path) -> Measured:
    """Measure kernels in a child process, where nothing else runs.

    Args:
        target: The target's name.
        graph: The cleaned ONNX file.
        options: As `cnncc.targets.base.Measuring.measure` takes them.
        workdir: A folder that the child may write in.

    Raises:
        UsageError: The target's kernels have no knobs.
        UnsupportedGraph: Lists every refused node.
        DataRefused: The database is damaged or of another kind.
        BuildFailed: The toolchain broke or crashed.
    """
    request = {
        "task": "measure",
        **_request(target, graph, options.build, workdir),
        "database": [options.database, options.name, options.budget],
    }
    hear: dict[str, Callable[..., None]] = {
        "progress": options.build.progress,
        "keep": options.keep,
        "note": options.note,
    }
    return msgspec.convert(_ask(request, workdir, hear), Measured)


def predict_apart(target: str, graph: Path, options: BuildOptions, workdir: Path) -> float:
    """Return what `cnncc.targets.base.Predicting.predict` says, in a child process.

    Args:
        target: The target's name.
        graph: The cleaned ONNX file.
        options: As that takes them.
        workdir: A folder that the child may write in.

    Raises:
        UnsupportedGraph: Lists every refused node.
        TargetUnavailable: A compiler is missing.
        BuildFailed: The toolchain broke or crashed.
    """
    request = {"task": "predict", **_request(target, graph, options, workdir)}
    return float(_ask(request, workdir, {"progress": options.progress}))


def _request(target: str, graph: Path, options: BuildOptions, workdir: Path) -> dict[str, Any]:
    return {
        "target": target,
        "graph": str(graph.resolve()),
        "workdir": str(workdir.resolve()),
        "options": to_plain(
            {
                "profile": options.profile,
                "batches": options.batches,
                "kernels": options.kernels,
                "measured": options.measured,
                "gpu": options.gpu,
                "runtime": options.runtime,
                "name": options.name,
                "timings": str(options.timings.resolve()) if options.timings else "",
            }
        ),
    }


def _ask(
    request: dict[str, Any], workdir: Path, hear: Mapping[str, Callable[..., None]], budget: float | None = None
) -> Any:
    """Return the answer of a child process to a request.

    Args:
        request: Plain data.
        workdir: Where its log goes.
        hear: Event → who is told of it.
        budget: Seconds after which the child ends by itself, or soon after is killed; None to wait.
    """
    with _child(workdir) as child, _killed_after(child, budget) as killed:
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: told below, by its exit code
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.close()
        for line in child.stdout:
            if not line.endswith(b"\n"):  # it died while it wrote
                break
            message = json.loads(line)
            [(event, value)] = message.items()
            if event == "error":
                raise _error_from(value)
            if event == "answer":
                return value
            hear[event](*value)
        child.wait()
        if budget is not None and killed.is_set():
            raise budget_spent(budget)
        raise _crash(request["target"], child.returncode, workdir / _LOG)


@contextlib.contextmanager
def _killed_after(child: subprocess.Popen[bytes], budget: float | None) -> Iterator[threading.Event]:
    """Kill a child that outlives its budget; the event says that it was."""
    killed = threading.Event()

    def kill() -> None:
        if child.poll() is None:
            killed.set()
            os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer((budget or 0.0) + _GRACE, kill)
    timer.daemon = True
    if budget is not None:
        timer.start()
    try:
        yield killed
    finally:
        timer.cancel()


@contextlib.contextmanager
def _child(workdir: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (workdir / _LOG).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "cnncc.compiler.build_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",  # `python -m` imports from the working folder first, and that is the user's
            start_new_session=True,  # a Ctrl-C at the terminal goes to the parent alone, which kills the group
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _crash(target: str, code: int, log: Path) -> BuildFailed:
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
    hint = (
        "the machine may be out of memory: close other programs, or use a larger machine"
        if code == -signal.SIGKILL
        else ("report it with the model; --verbose shows the compiler's own words")
    )
    return BuildFailed(
        f"the {target} compiler {how_it_ended(code)}" + (": " + " | ".join(tail) if tail else ""), hint=hint
    )


def engine_to_plain(engine: Engine) -> dict[str, Any]:
    """Return an engine as plain data; its payload by name, relative to the work folder."""
    plain: dict[str, Any] = to_plain(replace(engine, payload=engine.payload.name))  # type: ignore[arg-type]
    return plain


def engine_from_plain(plain: dict[str, Any], workdir: Path) -> Engine:
    """Return the engine whose payload lies in a folder."""
    return msgspec.convert({**plain, "payload": str(workdir / plain["payload"])}, Engine, dec_hook=_path, strict=False)


def _path(kind: type, value: Any) -> Any:
    return kind(value)


def _error_from(plain: dict[str, Any]) -> CnnccError:
    kind: type[CnnccError] = getattr(errors, plain["type"], BuildFailed)
    return kind(plain["message"], where=plain["where"], hint=plain["hint"])


def _work(request: dict[str, Any], events: IO[bytes]) -> None:
    def send(**message: Any) -> None:
        events.write(json.dumps(message).encode() + b"\n")
        events.flush()

    from cnncc.graph.reader import load_trusted
    from cnncc.targets.registry import load_target

    asked = msgspec.convert(request["options"], _Options)
    options = BuildOptions(
        asked.profile,
        asked.batches,
        asked.kernels,
        asked.measured,
        asked.gpu,
        runtime=asked.runtime,
        name=asked.name,
        timings=Path(asked.timings) if asked.timings else None,
        progress=lambda what, fraction: send(progress=[what, fraction]),
        note=lambda said: send(note=[said]),
        specialize=_specialize,
    )
    try:
        target = load_target(request["target"], options.profile)
        graph = load_trusted(Path(request["graph"]))
        if request["task"] == "build":
            send(answer=engine_to_plain(target.build(graph, options, Path(request["workdir"]))))
        elif request["task"] == "predict":
            assert isinstance(target, Predicting)
            send(answer=target.predict(graph, options))
        else:
            send(answer=to_plain(_measure(target, graph, options, request["database"], send)))
    except CnnccError as exc:
        send(error={"type": type(exc).__name__, "message": exc.message, "where": exc.where, "hint": exc.hint})


def _measure(
    target: Target, graph: OnnxGraph, options: BuildOptions, database: list[Any], send: Callable[..., None]
) -> Measured:
    if not isinstance(target, Measuring):
        raise UsageError(f"the kernels of the {target.name} target have no knobs to measure", hint="--optimize rules")
    text, name, budget = database
    return target.measure(
        graph,
        MeasureOptions(options, text, name, budget, lambda found: send(keep=[found]), lambda said: send(note=[said])),
    )


def _specialize(graph: OnnxGraph, batch: int) -> OnnxGraph:
    """Bind the batch and clean again: shape arithmetic is constant now. The engine's parity proves every size."""
    from cnncc.compiler.passes.pipeline import clean
    from cnncc.graph.reader import bind_batch

    return clean(bind_batch(graph, batch), prove=False)[0]


class _Options(msgspec.Struct, frozen=True):
    profile: Profile
    batches: tuple[int, ...]
    kernels: KernelOptions
    measured: str
    gpu: GpuOptions
    runtime: str
    name: str
    timings: str


def main() -> None:
    """Answer one request; the argument is the parent's process id."""
    die_with(int(sys.argv[1]))
    with os.fdopen(os.dup(1), "wb") as events:
        os.dup2(2, 1)  # whatever a compiler prints goes to the log
        _work(json.loads(sys.stdin.buffer.readline()), events)


if __name__ == "__main__":
    main()
