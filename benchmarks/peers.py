"""Compiles networks for this machine and prints our latency relative to peers: ``python benchmarks/peers.py [MODEL…]``.

Every figure comes from the library that `cnncc bench` uses: a process per engine, interleaved rounds, outputs
compared before anything is timed. A peer that is not installed, cannot convert a network or computes something else
is named with its reason. A noisy machine is said so, and a ratio whose interval holds 1 is called a tie.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.models import NETWORKS, Network, find  # noqa: E402
from benchmarks.peak import measure_peak  # noqa: E402
from benchmarks.table import Runs, block, summary  # noqa: E402
from cnncc.compiler import compile  # noqa: E402
from cnncc.compiler.bench.bundle import open_field  # noqa: E402
from cnncc.compiler.bench.subjects import KINDS, OURS, Subject, check_names, peers  # noqa: E402
from cnncc.compiler.cache import Cache, default_cache_folder  # noqa: E402
from cnncc.compiler.calibration import Calibration  # noqa: E402
from cnncc.compiler.inspection import summarize  # noqa: E402
from cnncc.compiler.pipeline import FP32, INT8, CompileRequest  # noqa: E402
from cnncc.compiler.reporting import Silent  # noqa: E402
from cnncc.graph.reader import read_onnx  # noqa: E402
from cnncc.targets.base import KernelOptions  # noqa: E402
from cnncc.targets.devices import resolve_profile  # noqa: E402
from cnncc_runtime.bundle import REFERENCE, read_bundle, to_plain  # noqa: E402
from cnncc_runtime.errors import CnnccError, UsageError  # noqa: E402
from cnncc_runtime.files import atomic_file  # noqa: E402

SLOWER_ELSEWHERE = ("torch",)
"""Peers that are left out unless asked for: PyTorch is measured in its faster layout."""


HERE = tuple(name for name in peers() if not KINDS[name].gpu)
"""Peers that compute on the CPU, as everything here does."""


def usual_peers(precision: str) -> tuple[str, ...]:
    """Return the peers that are measured unless others are asked for: in int8, those that read Q/DQ or quantize."""
    if precision == INT8:
        return tuple(name for name in HERE if KINDS[name].qdq or KINDS[name].quantizes)
    return tuple(name for name in HERE if name not in SLOWER_ELSEWHERE and not KINDS[name].quantizes)


AGREEMENT = 1e-3
"""Largest relative L2 distance to the first peer. Winograd's rounding stays below 1e-4 in the deepest of these
networks; arithmetic in bfloat16 or float16, which no peer may use here, shows from about 2e-3."""

INT8_AGREEMENT = 0.05
"""The same for int8: steps that are rounded next to a half differ from one library to the next."""

DIRECT = "fp32-direct"
"""Our own engine in float32 without Winograd's method, as a peer of int8."""


@dataclass(frozen=True)
class Plan:
    """What the command line asks for.

    Attributes:
        against: Peers.
        threads: Numbers of threads.
        rounds: Interleaved rounds of a run.
        min_time: Seconds per engine and run.
        repeat: Runs.
        precision: ``fp32`` or ``int8``, calibrated on random numbers: it computes as much as any other.
    """

    against: tuple[str, ...]
    threads: tuple[int, ...]
    rounds: int
    min_time: float
    repeat: int
    precision: str = FP32


def parse_threads(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    """Read numbers of threads: an option's values, each of which may hold several, separated by commas."""
    pieces = [piece for value in values for piece in value.split(",")]
    if not all(piece.isdigit() and int(piece) > 0 for piece in pieces):
        raise click.BadParameter("give positive numbers, separated by commas or one by one")
    return tuple(dict.fromkeys(int(piece) for piece in pieces))


@click.command()
@click.argument("models", nargs=-1)
@click.option(
    "--against",
    help=f"Peers, separated by commas, of {', '.join(HERE)}.  [default: all but torch and int8; in int8 "
    f"{', '.join(usual_peers(INT8))}]",
)
@click.option(
    "--threads", multiple=True, default=("1", "2"), callback=parse_threads, help="Repeatable.  [default: 1,2]"
)
@click.option("--rounds", type=click.IntRange(2), default=12, show_default=True)
@click.option("--min-time", type=click.FloatRange(0.01), default=3.0, show_default=True, help="Seconds per engine.")
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Whole runs of each network.")
@click.option("--precision", type=click.Choice([FP32, INT8]), default=FP32, show_default=True, help="Of everybody.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write every report to this JSON file.")
def main(
    models: tuple[str, ...],
    against: str | None,
    threads: tuple[int, ...],
    rounds: int,
    min_time: float,
    repeat: int,
    precision: str,
    output: Path | None,
) -> None:
    """Print our latency relative to peers on MODELS: names of the built-in networks, or what `cnncc compile` takes."""
    chosen = against.split(",") if against is not None else usual_peers(precision)
    plan = Plan(tuple(name for name in chosen if name), threads, rounds, min_time, repeat, precision)
    try:
        check_names(plan.against)
    except UsageError as exc:
        raise click.UsageError(str(exc)) from exc
    networks = find(models)
    found: list[Runs] = []
    failed: list[str] = []
    for network in networks:
        try:
            for runs in measure(network, plan):
                found.append(runs)
                click.echo("\n".join(block(runs)) + "\n")
                _write(output, found)
        except CnnccError as exc:
            failed.append(f"{network.name} was not measured: {exc.message}")
            click.echo(f"{network.name}: {exc}\n")
    for count in threads:
        if rows := [runs for runs in found if runs.threads == count]:
            click.echo("\n".join(summary(rows)) + "\n")
    for line in failed:
        click.echo(line)
    raise SystemExit(1 if failed else 0)


def measure(network: Network, plan: Plan) -> Iterator[Runs]:
    """Compile a network for this machine and measure it beside its peers, one number of threads after the other.

    Raises:
        CnnccError: It could not be compiled, verified or measured.
    """
    cache = Cache(default_cache_folder())
    with tempfile.TemporaryDirectory(prefix="cnncc-peers-") as folder:
        bundle = Path(folder) / "model.cnncc"
        request = CompileRequest(network.request, resolve_profile("host"), bundle)
        others: tuple[Subject, ...] = ()
        if plan.precision == INT8:
            direct = replace(request, output=Path(folder) / "direct.cnncc", kernels=KernelOptions(winograd=False))
            compile(direct, cache=cache)
            others = (Subject(DIRECT, OURS, direct.output, FP32, approximate=True),)
            request = quantized(request)
        compile(request, cache=cache)
        operations = 2 * summarize(read_onnx(read_bundle(bundle).file(REFERENCE))).macs
        with open_field(bundle, plan.against, batch=0, cache=cache, lenient=True) as field:
            field = replace(field, subjects=(*field.subjects, *others))
            for threads in plan.threads:
                reports = tuple(
                    field.measure(
                        threads=threads,
                        rounds=plan.rounds,
                        min_time=plan.min_time,
                        agreement=AGREEMENT if plan.precision == FP32 else INT8_AGREEMENT,
                        reporter=Silent(),
                    )
                    for _ in range(plan.repeat)
                )
                yield Runs(network.name, operations, measure_peak(threads, plan.precision), reports, plan.precision)


def quantized(request: CompileRequest) -> CompileRequest:
    """Return the request in int8, calibrated on random numbers: what is computed does not depend on the scales."""
    calibration = Calibration("random", samples=8, equalize=False)
    return replace(request, precision=INT8, calibration=calibration, allow_slow=True)


def _write(output: Path | None, found: list[Runs]) -> None:
    """Write what was measured so far: an interrupted benchmark keeps it."""
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(json.dumps([_plain(runs) for runs in found], indent=1))


def _plain(runs: Runs) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(runs)
    peer = runs.fastest
    return plain | {"threads": runs.threads, "fastest": peer, "ratio": to_plain(runs.versus(peer)) if peer else None}


__all__ = ["NETWORKS", "Plan", "main", "measure"]

if __name__ == "__main__":
    main()
