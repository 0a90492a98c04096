"""What this machine has of what cnncc needs. Looks, changes nothing, never raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.cycles.analyzer import find_tools
from cnncc.targets.registry import load_target, target_names
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.errors import CnnccError
from cnncc_runtime.gpu import driver_cuda, gpus_text, host_gpus

_PINNED = {"torch": "2.13", "apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
_REQUIRED = ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "apache-tvm", "apache-tvm-ffi")
_EXTRAS = {"zoo": ("torchvision", "timm"), "cross": ("ziglang",), "cuda": ("tensorrt-rtx-cu13", "cuda-bindings")}
_OPTIONAL = {name: extra for extra, names in _EXTRAS.items() for name in names}
_ROOM = 2 << 30
"""Bytes that compiling a ResNet-50 with an empty cache takes, rounded up."""

_RPC_PORTS = range(9090, 9200)
"""Where TVM's servers (from 9090 on) and trackers (from 9190 on) listen unless they are told otherwise."""
_LISTENING = "0A"  # include/net/tcp_states.h: TCP_LISTEN
_LOOPBACK = re.compile(r"(0{16}FFFF0000)?[0-9A-F]{6}7F|0{24}01000000")
"""127.0.0.0/8, in IPv6 too, and ::1, as tables of the kernel have them: in little-endian words."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: What.
        state: ``ready``, ``missing`` or ``optional`` (missing, and needed for some models only).
        detail: What was found.
        fix: What would mend it; empty when it is ready.
        required: Whether every compile needs it.
    """

    name: str
    state: str
    detail: str
    fix: str = ""
    required: bool = False


def examine(cache: Path) -> tuple[Finding, ...]:
    """Look at the machine.

    Args:
        cache: The cache folder that would be used.
    """
    return (_cpu(), _gpu(), *_packages(), *_targets(), _analyzer(), _cache(cache), *_rpc())


def _cpu() -> Finding:
    cpu = host_cpu()
    return Finding("machine", "ready", f"{cpu.model}, {cpu.cores} cores, Python {platform.python_version()}")


def _gpu() -> Finding:
    cuda = driver_cuda()
    if not host_gpus() or cuda is None:
        return Finding("gpu", "optional", "no NVIDIA GPU: engines for GPUs are built here, and executed elsewhere")
    return Finding("gpu", "ready", f"{gpus_text()}, driver for CUDA {cuda[0]}.{cuda[1]}")


def _packages() -> list[Finding]:
    return [_package(name, None) for name in _REQUIRED] + [_package(n, extra) for n, extra in _OPTIONAL.items()]


def _package(name: str, extra: str | None) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extra is not None:
            return Finding(name, "optional", "not installed", f"pip install 'cnncc[{extra}]'")
        return Finding(name, "missing", "not installed", "pip install cnncc", required=True)
    wanted = _PINNED.get(name)
    if wanted is not None and not version.startswith(wanted):
        return Finding(name, "missing", f"{version}, cnncc needs {wanted}", f"pip install '{name}=={wanted}.*'", True)
    return Finding(name, "ready", version, required=extra is None)


def _targets() -> list[Finding]:
    found = []
    for name in target_names():
        try:
            availability = load_target(name, resolve_profile("host")).probe()
        except CnnccError as exc:  # a third party's target that does not load
            found.append(Finding(f"target {name}", "missing", exc.message, exc.hint))
            continue
        state = "ready" if availability.ready else "optional" if name == "cuda" else "missing"
        found.append(Finding(f"target {name}", state, availability.detail, availability.fix, name == "llvm"))
    return found


def _analyzer() -> Finding:
    try:
        return Finding("llvm-mca", "ready", f"{find_tools()}: predicts the cycles of inner loops")
    except CnnccError as exc:
        return Finding("llvm-mca", "optional", exc.message, exc.hint)


def _rpc() -> list[Finding]:
    """Look for TVM RPC servers and trackers of this user that others can reach; by their ports, so it is a guess."""
    ports = sorted(
        {port for name in ("tcp", "tcp6") for port in open_ports(_read(Path("/proc/net", name)), os.getuid())}
    )
    return [
        Finding(
            "rpc",
            "optional",
            f"port {port} is open to other machines; by its number it may be TVM's RPC, which runs what anybody sends",
            "start it with --host 127.0.0.1, and tunnel by SSH",
        )
        for port in ports
    ]


def open_ports(table: str, user: int) -> list[int]:
    """Return the ports of TVM's RPC that a user's processes listen on for other machines.

    Args:
        table: Content of ``/proc/net/tcp`` or ``/proc/net/tcp6``.
        user: Id of the user.
    """
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[3] != _LISTENING or fields[7] != str(user):
            continue
        address, _, port = fields[1].partition(":")
        if int(port, 16) in _RPC_PORTS and not _LOOPBACK.fullmatch(address):
            found.append(int(port, 16))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cache(folder: Path) -> Finding:
    existing = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {free / 1e9:.1f} GB free"
    if not os.access(existing, os.W_OK):
        return Finding("cache", "missing", f"{folder} cannot be written", "--cache-dir, or $CNNCC_CACHE_DIR", True)
    if free < _ROOM:
        return Finding("cache", "missing", detail, "free some space, or use --cache-dir on another disk", True)
    return Finding("cache", "ready", detail, required=True)
