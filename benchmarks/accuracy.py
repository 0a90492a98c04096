"""Quantizes trained networks with cnncc and with others, and prints what is lost: ``python benchmarks/accuracy.py``.

The networks are trained here, on data that is made here (``benchmarks/trained``): a minute or three each, once. Every
quantizer is given the same fp32 graph and the same calibration images; what it wrote is run in ONNX Runtime,
optimizations off, on images of fonts that neither training nor calibration saw. A quantizer that fails stands in the
table with its reason.

`make fonts` installs the fonts that the published figures are for; with others (a machine's DejaVu alone will do) the
networks are other ones, and the table says in how many families the test images are. `make quantizers` makes the
environments of those peers that do not go with cnncc's packages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quantizers.field import HERE, OURS, PEERS, Quantizer, find  # noqa: E402
from benchmarks.quantizers.judge import judge  # noqa: E402
from benchmarks.quantizers.process import run  # noqa: E402
from benchmarks.quantizers.table import Block, Entry, Line, block  # noqa: E402
from benchmarks.trained.recipes import RECIPES, Recipe, Trained, trained  # noqa: E402
from cnncc_runtime.bundle import to_plain  # noqa: E402
from cnncc_runtime.digests import digest_file, digest_json  # noqa: E402
from cnncc_runtime.errors import CnnccError, DependencyMissing, UsageError  # noqa: E402
from cnncc_runtime.files import atomic_file  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """What the command line asks for.

    Attributes:
        quantizers: In the table's order.
        seeds: One network is trained for each.
        calibration_images: For every quantizer.
        folder: Where networks, int8 graphs and peers' verdicts are kept.
        fresh: Whether peers are run again where their verdicts are known.
    """

    quantizers: tuple[Quantizer, ...]
    seeds: tuple[int, ...]
    calibration_images: int
    folder: Path
    fresh: bool


@click.command()
@click.argument("nets", nargs=-1)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Networks of each kind.")
@click.option(
    "--peers",
    help=f"Separated by commas, of {', '.join(peer.name for peer in PEERS)}; '' for none.  [default: all]",
)
@click.option("--ours/--no-ours", default=True, help="Whether cnncc itself is run.  [default: ours]")
@click.option("--calibration-images", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "accuracy",
    help="Where networks, int8 graphs and peers' verdicts are kept.  [default: build/accuracy]",
)
@click.option("--fresh", is_flag=True, help="Run peers again whose verdicts are known.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure to this JSON file.")
def main(
    nets: tuple[str, ...],
    seeds: int,
    peers: str | None,
    ours: bool,
    calibration_images: int,
    folder: Path,
    fresh: bool,
    output: Path | None,
) -> None:
    """Print what quantizers make of NETS (all by default): seed, resnet, mbv2, mbv2h, effnet, unet."""
    try:
        chosen = PEERS if peers is None else find([name for name in peers.split(",") if name])
        recipes = [_recipe(net) for net in nets] or list(RECIPES.values())
        quantizers = (*OURS, *chosen) if ours else chosen
        plan = Plan(quantizers, tuple(range(seeds)), calibration_images, folder.absolute(), fresh)
        found = []
        for recipe in recipes:
            found.append(compare(recipe, plan))
            click.echo("\n".join(block(found[-1])) + "\n")
            if output is not None:  # an interrupted benchmark keeps what it measured
                with atomic_file(output) as partial:
                    partial.write_text(json.dumps([to_plain(each) for each in found], indent=1))
    except UsageError as exc:
        raise click.UsageError(str(exc)) from exc
    except CnnccError as exc:
        raise click.ClickException(str(exc)) from exc
    raise SystemExit(0 if all(line.complete for each in found for line in each.lines) else 1)


def compare(recipe: Recipe, plan: Plan) -> Block:
    """Train a network for each seed, unless that was done, and have every quantizer at it.

    Raises:
        EnvironmentMissing: There are not enough fonts.
        UsageError: There are not that many calibration images.
    """
    entries: dict[str, list[Entry]] = {quantizer.name: [] for quantizer in plan.quantizers}
    about = ""
    for seed in plan.seeds:
        net = trained(recipe, seed, plan.folder, calibration_images=plan.calibration_images, tell=_tell)
        about = net.data.about
        for quantizer, entry in _entries(net, plan):
            entries[quantizer.name].append(entry)
    lines = tuple(Line(each.name, each.about, tuple(entries[each.name])) for each in plan.quantizers)
    return Block(recipe.name, recipe.metric, about, plan.calibration_images, lines)


def _entries(net: Trained, plan: Plan) -> Iterator[tuple[Quantizer, Entry]]:
    """Yield what each quantizer makes of a network; a peer's verdict is kept under the digest of all that led to it."""
    inputs = [digest_file(path) for path in (net.onnx, net.calibration, net.test)]
    judges = [digest_file(HERE / name) for name in ("inspection.py", "judge.py")]
    for quantizer in plan.quantizers:
        try:
            version = quantizer.version()
        except DependencyMissing as exc:
            yield quantizer, Entry(net.seed, failure=f"{exc.message} ({exc.hint})")
            continue
        if quantizer in OURS:
            yield quantizer, _quantize(net, quantizer, plan.folder)
            continue
        worker = digest_file(HERE / quantizer.worker)
        key = digest_json([inputs, judges, worker, asdict(quantizer), version])
        kept = plan.folder / "verdicts" / f"{key.rpartition(':')[2]}.json"
        if kept.exists() and not plan.fresh:
            yield quantizer, msgspec.json.decode(kept.read_bytes(), type=Entry)
            continue
        entry = _quantize(net, quantizer, plan.folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as partial:
            partial.write_bytes(msgspec.json.encode(entry))
        yield quantizer, entry


def _quantize(net: Trained, quantizer: Quantizer, folder: Path) -> Entry:
    int8 = folder / "int8" / f"{net.recipe.name}-{net.seed}-{quantizer.name}.onnx"
    int8.parent.mkdir(parents=True, exist_ok=True)
    int8.unlink(missing_ok=True)
    _tell(f"{net.recipe.name}, seed {net.seed}: {quantizer.name}")
    try:
        cost = run(quantizer.commands(net.onnx, net.shape, net.calibration, int8))
        return Entry(net.seed, cost, judge(net.onnx, int8, net.test, net.recipe.metric))
    except CnnccError as exc:
        return Entry(net.seed, failure=exc.message)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"'{name}' is not a known network", hint=", ".join(RECIPES))
    return RECIPES[name]


def _tell(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
