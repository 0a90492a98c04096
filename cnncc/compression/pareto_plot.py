"""The picture of a run of `cnncc shrink`: what variants reach, over what they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cnncc.compression.task import Task
from cnncc_runtime.errors import DependencyMissing
from cnncc_runtime.files import atomic_file

if TYPE_CHECKING:
    from cnncc.compression.shrink import Point

_COLOURS = {"fp32": "#4269d0", "int8": "#efb118", "int8 qat": "#ff725c"}


def plot(points: Sequence[Point], front: Sequence[Point], task: Task, path: Path) -> None:
    """Draw points, by what their engines compute in, and the front through the best of them.

    Args:
        points: All.
        front: Those that no other beats.
        task: What they are judged by.
        path: The file, an SVG.

    Raises:
        DependencyMissing: matplotlib is not installed.
        StorageFailed: It cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise DependencyMissing("the plot needs matplotlib", hint="pip install 'cnncc[train]'") from exc
    scale = 100 if task.percent else 1
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [each.seconds * 1e3 for each in front], [each.metric * scale for each in front], color="#999999", zorder=1,
        drawstyle="steps-post", label="best so far",
    )  # fmt: skip
    for form in dict.fromkeys(point.form for point in points):
        those = [point for point in points if point.form == form]
        axes.scatter(
            [each.seconds * 1e3 for each in those],
            [each.metric * scale for each in those],
            color=_COLOURS.get(form),
            label=form,
            zorder=2,
        )
    for point in points:
        label = f"−{point.share:.0%}" if point.share else "whole"
        axes.annotate(
            label, (point.seconds * 1e3, point.metric * scale), textcoords="offset points", xytext=(5, -10), fontsize=8
        )
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("latency, ms")
    axes.set_ylabel(f"{task.metric}{', %' if task.percent else ''}")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
