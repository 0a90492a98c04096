"""``cnncc targets``: what engines can be built for."""

from __future__ import annotations

import click
from rich.markup import escape

from cnncc.cli.main import common
from cnncc.cli.render import MARKS, Render


@click.command(name="targets")
@common
def command(render: Render) -> None:
    """List targets, whether this machine can build for them, and the device profiles."""
    from cnncc.targets.devices import profile_names, resolve_profile
    from cnncc.targets.registry import load_target, target_names
    from cnncc_runtime.bundle import to_plain

    devices = [resolve_profile(name) for name in profile_names()]
    found = {name: load_target(name, devices[0]).probe() for name in target_names()}
    document = {"targets": {name: to_plain(a) for name, a in found.items()}, "devices": to_plain(devices)}

    def text() -> None:
        render.table(
            ["", "target", "state", "detail"],
            [
                [
                    MARKS["ok" if a.ready else "failed"],
                    name,
                    a.state,
                    escape(a.detail + (f"\ntry: {a.fix}" if a.fix else "")),
                ]
                for name, a in found.items()
            ],
        )
        render.line()
        render.table(
            ["", "device", "triple", "cpu", "cores", "features"],
            [["", d.name, d.triple, d.cpu, str(d.cores), " ".join(d.features)] for d in devices if not d.gpu],
        )
        render.line()
        gpus = sorted({d.gpu for d in devices if d.gpu}, key=float)
        render.table(
            ["", "compute capability", "devices"],
            [["", gpu, " ".join(d.name for d in devices if d.gpu == gpu)] for gpu in gpus],
        )

    render.result(document, text)
