"""What the runner and its workers say to each other: one JSON object per line, over the worker's stdin and stdout."""

from __future__ import annotations

import msgspec


class Convert(msgspec.Struct, frozen=True, tag="convert"):
    """Make a library's own form of a model.

    Attributes:
        adapter: ``module:Class`` of the adapter, which has `cnncc.compiler.bench.adapters.Converter.convert`.
        options: Passed to the adapter.
        source: The model.
        folder: An existing folder for what is made.
    """

    adapter: str
    options: dict[str, str]
    source: str
    folder: str


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Import the library, open the engine and take the inputs.

    Attributes:
        adapter: ``module:Class`` of the adapter.
        options: Passed to the adapter.
        path: The engine's file or folder.
        threads: Threads to compute with.
        feeds: An ``.npz`` whose arrays are called ``0``, ``1``, …
        names: The inputs' names, in that order.
    """

    adapter: str
    options: dict[str, str]
    path: str
    threads: int
    feeds: str
    names: tuple[str, ...]


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """Run until the latency has settled, or for ``seconds``."""

    seconds: float


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Time ``runs`` runs after ``unmeasured`` ones."""

    runs: int
    unmeasured: int


class Save(msgspec.Struct, frozen=True, tag="save"):
    """Run once and write the outputs to an ``.npz``, as arrays called ``0``, ``1`` and so on."""

    path: str


class Profile(msgspec.Struct, frozen=True, tag="profile"):
    """Run ``runs`` times with a clock around each kernel."""

    runs: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Say how much memory was used, and end."""


class Converted(msgspec.Struct, frozen=True, tag="converted"):
    """The library's own form lies at ``path``."""

    path: str


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The engine is open.

    Attributes:
        version: Of the library.
        import_s: Seconds to import it.
        open_s: Seconds to open the engine.
        resident_before: Resident bytes before the library was imported.
        clock: By what the engine is timed alone, on the device that computes it; empty where it is not.
        note: What was chosen meanwhile.
    """

    version: str
    import_s: float
    open_s: float
    resident_before: int
    clock: str = ""
    note: str = ""


class Timed(msgspec.Struct, frozen=True, tag="timed"):
    """Runs were timed.

    Attributes:
        wall: Seconds of wall time of each run.
        cpu: Seconds of the whole process's CPU time of each run.
        settled: Whether the latency had settled by the end (see `cnncc.compiler.bench.statistics.settled`).
        switches: Involuntary context switches meanwhile.
        device: Seconds of the engine alone, in as many further runs; empty where it is not timed alone.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    settled: bool
    switches: int
    device: tuple[float, ...] = ()


class Profiled(msgspec.Struct, frozen=True, tag="profiled"):
    """Kernels were timed.

    Attributes:
        kernels: Calls in order of execution: the kernel's name, and its seconds.
    """

    kernels: tuple[tuple[str, float], ...]


class Saved(msgspec.Struct, frozen=True, tag="saved"):
    """The outputs are written: ``count`` arrays."""

    count: int


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """The worker ends.

    Attributes:
        peak_resident: Largest resident set, bytes.
    """

    peak_resident: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A command failed; the worker ends.

    Attributes:
        error: Class in `cnncc_runtime.errors`.
        message: As that class takes it.
        where: As that class takes it.
        hint: As that class takes it.
    """

    error: str
    message: str
    where: tuple[str, ...] = ()
    hint: str = ""


Command = Convert | Open | Warm | Measure | Profile | Save | Stop
Reply = Converted | Opened | Timed | Profiled | Saved | Stopped | Failed
