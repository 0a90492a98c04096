"""``cnncc bench``: a bundle beside what its user would pick instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import board_address, open_cache, remote_options, usable_threads
from cnncc.cli.render import MARKS, Render, size_text, time_text

if TYPE_CHECKING:
    from cnncc.compiler.bench.gpu import Gpu, GpuState
    from cnncc.compiler.bench.prediction import LayerPrediction, Prediction
    from cnncc.compiler.bench.remote import RemoteBenchmark
    from cnncc.compiler.bench.report import BenchmarkReport, Interval, Ratio, SubjectResult
    from cnncc.compiler.remote.address import BoardAddress


@click.command(name="bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    help="Peers: ort, openvino, mnn, ncnn, executorch, torch, torch-channels-last, torch-compile; ort-int8 and "
    "executorch-int8, quantized by their own tools. On GPUs: ort-cuda, torch-cuda, torch-compile-cuda, trtexec.  "
    "[default: ort; on GPUs ort-cuda]",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of every engine.  [default: usable cores]")
@click.option("--rounds", type=click.IntRange(2, 10_000), default=12, show_default=True, help="Interleaved rounds.")
@click.option("--min-time", type=click.FloatRange(0.01), default=3.0, show_default=True, help="Seconds per engine.")
@click.option("--batch", type=click.IntRange(1), help="Batch size, where several were built.  [default: the smallest]")
@click.option("--cuda-graph", is_flag=True, help="Launch our engine on a GPU as one CUDA graph.")
@click.option(
    "--max-latency-ratio",
    "budgets",
    multiple=True,
    metavar="PEER=RATIO",
    help="Exit with 1 when our latency exceeds RATIO times the peer's; repeatable.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the report to this JSON file too.")
@click.option(
    "--predict",
    is_flag=True,
    help="Measure nothing: say how near inner loops come to a CPU's peak, by LLVM's model of it, be it here or not.",
)
@click.option(
    "--cpu",
    "cpus",
    multiple=True,
    metavar="NAME",
    help="CPU to --predict for, by LLVM's name; repeatable.  [default: the engine's own; on AArch64 also cortex-a72, "
    "cortex-a76 and neoverse-v1]",
)
@remote_options
@cache_option
@common
@click.pass_context
def command(
    ctx: click.Context,
    render: Render,
    *,
    bundle: Path,
    against: str | None,
    threads: int | None,
    rounds: int,
    min_time: float,
    batch: int | None,
    cuda_graph: bool,
    budgets: tuple[str, ...],
    output: Path | None,
    predict: bool,
    cpus: tuple[str, ...],
    remote: str | None,
    key: str | None,
    timeout: float | None,
    cache_dir: Path | None,
) -> None:
    """Measure BUNDLE and its peers in interleaved rounds, each engine in a process of its own.

    With --remote, the engine alone is measured, on a board. With --predict, nothing is.
    """
    from cnncc.compiler.bench.bundle import bench_bundle
    from cnncc.compiler.bench.report import check_budget, parse_budgets
    from cnncc_runtime.bundle import to_plain
    from cnncc_runtime.errors import UsageError

    if predict:
        _check_alone(ctx)
        _predict(render, bundle, cpus, output)
        return
    if cpus:
        raise UsageError("--cpu names what --predict is for; engines are measured on the CPU that runs them",
                         hint="add --predict, or leave --cpu out")  # fmt: skip
    limits = parse_budgets(budgets)
    board = board_address(remote, key, timeout)
    if board is not None:
        if against is not None or limits or cuda_graph:
            raise UsageError(
                "--against, --max-latency-ratio and --cuda-graph are of this machine: peers are not on the board",
                hint="leave them out, or --remote",
            )
        _bench_remote(render, bundle, board, threads, rounds, min_time, batch or 0, output)
        return
    names = None if against is None else [name for name in against.split(",") if name]
    report = bench_bundle(
        bundle,
        names,
        threads=usable_threads(threads),
        rounds=rounds,
        min_time=min_time,
        batch=batch or 0,
        cache=open_cache(cache_dir, render),
        reporter=render,
        also=tuple(limits),
        cuda_graph=cuda_graph,
    )
    _write(output, report)
    render.result(to_plain(report), lambda: _text(render, report))
    check_budget(report, limits)


def _bench_remote(
    render: Render,
    bundle: Path,
    board: BoardAddress,
    threads: int | None,
    rounds: int,
    min_time: float,
    batch: int,
    output: Path | None,
) -> None:
    from cnncc.compiler.bench.remote import bench_remote
    from cnncc_runtime.bundle import to_plain

    render.stage("bench")
    report = bench_remote(
        bundle, board, threads=threads, rounds=rounds, min_time=min_time, batch=batch, progress=render.progress
    )
    _write(output, report)
    render.result(to_plain(report), lambda: _remote_text(render, report))


_PREDICTING = frozenset({"bundle", "predict", "cpus", "output", "cache_dir", "as_json", "quiet", "verbose"})
"""Parameters of the command that mean something where nothing is measured."""


def _check_alone(ctx: click.Context) -> None:
    """Refuse options of measurements that were given beside --predict.

    Raises:
        UsageError: Names them.
    """
    from cnncc_runtime.errors import UsageError

    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in ctx.params
        and parameter.name not in _PREDICTING
        and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)}: for measurements, and --predict measures nothing", hint="leave them out, or --predict"
        )


def _predict(render: Render, bundle: Path, cpus: tuple[str, ...], output: Path | None) -> None:
    from cnncc.compiler.bench.prediction import predict_bundle
    from cnncc_runtime.bundle import to_plain

    render.stage("predict")
    report = predict_bundle(bundle, cpus, render.progress)
    _write(output, report)
    render.result(to_plain(report), lambda: _prediction_text(render, report))


def _prediction_text(render: Render, report: Prediction) -> None:
    for cpu in report.cpus:
        model = "" if cpu.by == cpu.name else f", by the model of {cpu.by}"
        peaks = ", ".join(f"{rate:.3g} {kind}" for kind, rate in cpu.peaks.items())
        render.line(f"[bold]{cpu.name}[/]{model}  [dim]peak of products a cycle: {peaks or 'none asked for'}[/]")
        heads = ["modules", "schedule", "multiplies by", "cycles", "products", "a cycle", "% of peak"]
        rows = [_prediction_row(layer, cpu.name) for layer in report.layers]
        render.table(heads, rows, right=[3, 4, 5, 6])
        for layer in report.layers:
            if cpu.name in layer.problems:
                render.line(f"{MARKS['note']} {layer.kernel}: {layer.problems[cpu.name]}")
        render.line()
    render.line(f"{report.analyzer}, an engine for {report.built_for}, one iteration of each kernel's inner loop")
    for note in report.notes:
        render.line(f"{MARKS['note']} {note}")


def _prediction_row(layer: LayerPrediction, cpu: str) -> list[str]:
    row = [", ".join(layer.modules), layer.schedule]
    if layer.loop is None:
        return [*row, "nothing, in loops", "", "", "", ""]
    mix = ", ".join(f"{count} {name}" for name, count in layer.loop.mix.items())
    found = layer.cpus.get(cpu)
    if found is None:
        return [*row, mix, "–", str(layer.loop.products), "–", "–"]
    return [*row, mix, f"{found.cycles:.1f}", str(layer.loop.products), f"{found.rate:.3g}", f"{100 * found.share:.0f}"]


def _write(output: Path | None, report: BenchmarkReport | RemoteBenchmark | Prediction) -> None:
    from cnncc_runtime.bundle import to_plain
    from cnncc_runtime.digests import canonical_json
    from cnncc_runtime.files import atomic_file

    if output is not None:
        with atomic_file(output) as partial:
            partial.write_bytes(canonical_json(to_plain(report)))


def _remote_text(render: Render, report: RemoteBenchmark) -> None:
    engine, board = report.engine, report.board
    figures = [_time_text(seconds) for seconds in (engine.p50, engine.p90, engine.p99, engine.minimum)]
    row = [
        "cnncc",
        report.precision,
        *figures,
        _rate_text(report.throughput),
        f"{board.upload_s + report.first_run_s:.2f} s",
    ]
    heads = ["engine alone", "computes", "p50", "p90", "p99", "fastest", "per second", "sent in", "file"]
    render.table(heads, [[*row, size_text(report.size)]], right=list(range(2, len(heads))))
    render.line()
    render.line(f"{board}, batch {report.batch}, {report.rounds} rounds, {report.runs} runs")
    for note in report.notes:
        render.line(f"{MARKS['note']} {note}")
    for reason in report.noise.reasons:
        render.line(f"{MARKS['note']} noisy board: {reason}")


def _text(render: Render, report: BenchmarkReport) -> None:
    for ratio in report.ratios:
        found = ratio.trusted
        render.line(
            f"[bold]{_verdict(found)} {_title(report, ratio)}[/]  [dim]latency ratio {_interval_text(found)}, "
            f"{_BASES[ratio.basis]}[/]"
        )
        if ratio.device is not None and ratio.basis != "device":
            render.line(f"    [dim]engines alone: {_interval_text(ratio.device)}[/]")
    render.line()
    alone = ["engine alone", "around it"] if report.gpu else []
    heads = ["engine", "version", "computes", "p50", "p90", "p99", *alone, "per second", "open", "peak RSS", "file"]
    rows = [_row(subject, alone=bool(alone)) for subject in report.subjects]
    render.table(heads, rows, right=list(range(3, len(heads))))
    machine = report.machine
    render.line()
    governor = f", governor {machine.governor}" if machine.governor else ""
    clock = f", {machine.mhz:.0f} MHz" if machine.mhz else ""
    render.line(f"{machine.model}, {report.threads} of {machine.cores} cores{clock}{governor}, {report.rounds} rounds")
    if report.gpu is not None:
        _gpu_text(render, report, report.gpu)
    for reason in report.noise.reasons:
        render.line(f"{MARKS['note']} noisy machine: {reason}")


_BASES = {"wall": "wall time", "cpu": "cpu time", "device": "time of the engines alone"}


def _interval_text(found: Interval) -> str:
    return f"{found.value:.3g}, 95 % interval {found.low:.3g}–{found.high:.3g}"


def _gpu_text(render: Render, report: BenchmarkReport, gpu: Gpu) -> None:
    facts = [f"compute capability {gpu.capability}"]
    facts += [f"driver {gpu.driver}"] if gpu.driver else []
    facts += [f"{gpu.power_limit:.0f} W at most"] if gpu.power_limit else []
    render.line(f"{gpu.name}, {', '.join(facts)}")
    for subject in report.subjects:
        if (turns := subject.gpu) is not None:
            render.line(
                f"  [dim]{subject.title}: {_state_text(turns.before)} before, {_state_text(turns.after)} after[/]"
            )
    if gpu.problem:
        render.line(f"{MARKS['note']} {gpu.problem}")
    for subject in report.subjects:
        if subject.device is not None and subject.clock != "CUDA events":
            render.line(f"{MARKS['note']} {subject.title} is timed alone by {subject.clock}")


def _state_text(state: GpuState) -> str:
    facts = ((state.sm_mhz, "MHz"), (state.memory_mhz, "MHz memory"), (state.celsius, "°C"), (state.watts, "W"))
    return ", ".join(f"{value:.0f} {unit}" for value, unit in facts if value is not None) or "nothing known"


def _title(report: BenchmarkReport, ratio: Ratio) -> str:
    """Return a peer's title; where it computes otherwise than we do, in what."""
    ours, peer = report.subject(ratio.subject), report.subject(ratio.peer)
    if ours is None or peer is None:
        return ratio.peer
    return peer.title if peer.precision == ours.precision else f"{peer.title} ({peer.precision})"


def _verdict(found: Interval) -> str:
    if found.high < 1:
        return f"{1 / found.value:.2f} × faster than"
    if found.low > 1:
        return f"{found.value:.2f} × slower than"
    return "a tie with"


def _row(subject: SubjectResult, *, alone: bool) -> list[str]:
    wall, device = subject.wall, subject.device
    return [
        f"{subject.title} ({subject.note})" if subject.note else subject.title,
        subject.version,
        subject.precision,
        *map(_time_text, (wall.p50, wall.p90, wall.p99)),
        *(map(_time_text, (device.p50 if device else None, subject.overhead)) if alone else ()),
        _rate_text(subject.throughput),
        f"{subject.open_s:.2f} s",
        size_text(subject.peak_resident),
        size_text(subject.size),
    ]


def _time_text(seconds: float | None) -> str:
    return "–" if seconds is None else time_text(seconds * 1e3)


def _rate_text(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"
