"""``cnncc targets``: what engines can be built for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from cnncc.cli.main import common
from cnncc.cli.render import MARKS, Render

if TYPE_CHECKING:
    from cnncc.targets.devices import Device


@click.command(name="targets")
@common
def command(render: Render) -> None:
    """List targets, whether this machine can build for them, and the devices that engines are built for.

    A CPU is described by a TOML file: yours lie in ~/.config/cnncc/devices, or in the folder that CNNCC_DEVICES names,
    or `cnncc compile --device FILE.toml` takes one from anywhere.
    """
    from cnncc.targets.devices import file_devices, resolve_profile
    from cnncc.targets.devices.gpus import GPUS
    from cnncc.targets.registry import load_target, target_names
    from cnncc_runtime.bundle import to_plain

    host, files = resolve_profile("host"), file_devices()
    gpus = [resolve_profile(name) for name in GPUS]
    found = {name: load_target(name, host).probe() for name in target_names()}
    document = {
        "targets": {name: to_plain(a) for name, a in found.items()},
        "devices": [to_plain(host), *(_document(device) for device in files), *map(to_plain, gpus)],
    }

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
            [
                "",
                "device",
                "cpu",
                "cores",
                "memory",
                "glibc",
                "emulator",
                "what it is, and what it must have",
            ],
            [
                ["", host.name, host.cpu, str(host.cores), "", "", "", f"this machine: {' '.join(host.features)}"],
                *(_row(device) for device in files),
            ],
            right=(3, 4),
        )
        render.line()
        capabilities = sorted({gpu.gpu for gpu in gpus}, key=float)
        render.table(
            ["", "compute capability", "devices"],
            [["", found, " ".join(gpu.name for gpu in gpus if gpu.gpu == found)] for found in capabilities],
        )

    render.result(document, text)


def _document(device: Device) -> dict[str, Any]:
    from cnncc_runtime.bundle import to_plain

    return {
        **to_plain(device.profile),
        "description": device.description,
        "memory": device.memory,
        "glibc": device.glibc,
        "emulator": to_plain(device.emulator),
        "file": str(device.file),
    }


def _row(device: Device) -> list[str]:
    profile = device.profile
    return [
        "",
        profile.name,
        profile.cpu,
        str(profile.cores),
        f"{device.memory} MiB" if device.memory else "",
        device.glibc,
        device.emulator.binary if device.emulator else "",
        escape(f"{device.description}: {' '.join(profile.features)}"),
    ]
