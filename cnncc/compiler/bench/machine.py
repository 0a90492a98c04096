"""The machine that a benchmark ran on, and how busy others kept it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from cnncc_runtime.cpu import clock, host_cpu


@dataclass(frozen=True)
class Machine:
    """What figures depend on besides the engine.

    Attributes:
        machine: ELF machine name (``x86_64``).
        model: CPU model.
        cores: Physical cores that this process may use.
        features: ISA features, by LLVM's names.
        governor: Frequency governor; empty where it is hidden (virtual machines).
        mhz: Clock of the fastest core; 0 where it is hidden.
        system: Kernel name and release.
        load_before: Processes running or waiting, averaged over the minute before the benchmark.
        steal: Fraction of CPU time that the hypervisor took during the benchmark.
        others: CPUs' worth of time that other processes used during the benchmark.
    """

    machine: str
    model: str
    cores: int
    features: tuple[str, ...]
    governor: str
    mhz: float
    system: str
    load_before: float
    steal: float
    others: float


@dataclass(frozen=True)
class Clocks:
    """Seconds of CPU time since boot, summed over all CPUs.

    Attributes:
        busy: Spent by anyone.
        steal: Taken by the hypervisor.
        total: Of everything, idle included.
    """

    busy: float
    steal: float
    total: float


def read_clocks() -> Clocks:
    """Read ``/proc/stat``; zeros where there is none."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    except (OSError, ValueError):
        return Clocks(0.0, 0.0, 0.0)
    if len(fields) < 8:
        return Clocks(0.0, 0.0, 0.0)
    # proc_stat(5): user nice system idle iowait irq softirq steal guest guest_nice; guest time is in user already
    user, nice, system, idle, iowait, irq, softirq, steal = fields[:8]
    tick = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq
    return Clocks(busy / tick, steal / tick, (busy + idle + iowait + steal) / tick)


def read_load() -> float:
    """Return the one-minute load average."""
    return os.getloadavg()[0]


def describe_machine(before: Clocks, after: Clocks, *, load_before: float, own_cpu_s: float) -> Machine:
    """Describe this machine after a benchmark.

    Args:
        before: Clocks at its start.
        after: Clocks at its end.
        load_before: From `read_load`, before it started.
        own_cpu_s: CPU seconds that the benchmark itself used in between.
    """
    total = after.total - before.total
    share = (after.busy - before.busy - own_cpu_s) / total if total > 0 else 0.0
    cpu, rate = host_cpu(), clock()
    return Machine(
        machine=cpu.machine,
        model=cpu.model,
        cores=cpu.cores,
        features=tuple(sorted(cpu.features)),
        governor=rate.governor,
        mhz=rate.current_mhz,
        system=f"{platform.system()} {platform.release()}",
        load_before=load_before,
        steal=(after.steal - before.steal) / total if total > 0 else 0.0,
        others=max(0.0, share) * (os.cpu_count() or 1),
    )
