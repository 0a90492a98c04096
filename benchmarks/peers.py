"""Compiles models for this machine and prints our latency relative to peers: ``python benchmarks/peers.py [MODEL…]``.

Every figure comes from the library that `cnncc bench` uses: a process per engine, interleaved rounds, outputs
compared before anything is timed. A noisy machine is said so, and a ratio whose interval holds 1 is called a tie.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from cnncc.compiler import compile
from cnncc.compiler.bench.bundle import bench_bundle
from cnncc.compiler.bench.report import BenchmarkReport, Ratio
from cnncc.compiler.bench.subjects import peers
from cnncc.compiler.cache import Cache, default_cache_folder
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.pipeline import CompileRequest
from cnncc.compiler.reporting import Silent
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.bundle import to_plain
from cnncc_runtime.errors import CnnccError

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits" / "model.py"

MODELS = (
    f"{DIGITS}:build",
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:squeezenet1_1",
    "torchvision:efficientnet_b0",
)


@click.command()
@click.argument("models", nargs=-1)
@click.option("--against", default="ort", show_default=True, help=f"Of {', '.join(peers())}; separated by commas.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=12, show_default=True)
@click.option("--min-time", type=click.FloatRange(0.01), default=3.0, show_default=True, help="Seconds per engine.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write every report to this JSON file.")
def main(
    models: tuple[str, ...], against: str, threads: int, rounds: int, min_time: float, output: Path | None
) -> None:
    """Print our latency relative to peers on MODELS (by default the digits CNN and five of torchvision's)."""
    names = [name for name in against.split(",") if name]
    reports: dict[str, BenchmarkReport] = {}
    click.echo(f"{'model':28}{'ours, ms':>10}" + "".join(f"{f'ours / {name}':>32}" for name in names))
    for model in models or MODELS:
        try:
            report = measure(model, names, threads, rounds, min_time)
        except CnnccError as exc:
            click.echo(f"{label(model):28}{exc}")
            continue
        reports[model] = report
        click.echo(row(label(model), report))
    noisy = {reason for report in reports.values() for reason in report.noise.reasons}
    click.echo(f"{threads} threads; below 1 we are faster; in brackets the 95 % interval")
    for reason in sorted(noisy):
        click.echo(f"noisy machine: {reason}")
    if output is not None:
        output.write_text(json.dumps({model: to_plain(report) for model, report in reports.items()}, indent=1))
    raise SystemExit(0 if len(reports) == len(models or MODELS) else 1)


def measure(model: str, against: list[str], threads: int, rounds: int, min_time: float) -> BenchmarkReport:
    """Compile a model for this machine and measure it beside its peers.

    Raises:
        CnnccError: It could not be compiled, verified or measured.
    """
    cache = Cache(default_cache_folder())
    with tempfile.TemporaryDirectory(prefix="cnncc-peers-") as folder:
        bundle = Path(folder) / "model.cnncc"
        request = CompileRequest(ModelRequest(model), resolve_profile("host"), bundle)
        compile(request, cache=cache)
        return bench_bundle(
            bundle,
            against,
            threads=threads,
            rounds=rounds,
            min_time=min_time,
            batch=0,
            cache=cache,
            reporter=Silent(),
        )


def row(name: str, report: BenchmarkReport) -> str:
    """Return one line of the table."""
    ours = report.subjects[0]
    basis = report.ratios[0].basis if report.ratios else "wall"
    latency = ours.cpu if basis == "cpu" else ours.wall
    return f"{name:28}{latency.p50 * 1e3:>10.2f}" + "".join(f"{cell(ratio):>32}" for ratio in report.ratios)


def cell(ratio: Ratio) -> str:
    """Return a ratio with its interval, and the word for it."""
    found = ratio.trusted
    word = "tie" if found.low <= 1 <= found.high else "faster" if found.value < 1 else "slower"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] {ratio.basis} {word}"


def label(model: str) -> str:
    """Return a model's name without its folder."""
    return Path(model).name


if __name__ == "__main__":
    main()
