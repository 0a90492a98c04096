"""Measures what a fleet's agents cost: ``python benchmarks/fleet.py [memory|poll|many]``.

memory   what an agent takes while it fetches a large engine; and the engine's trial, which is another process
poll     what a poll without news costs: requests, bytes, CPU; in ``cnncc-agent run``, and as ``once`` from a cold start
many     a fleet that takes a release at once: one registry, one collector, and agents that are real but for the trial,
         whose verdict is made up: so many engines would measure this machine

Everything is on this machine's loopback, Debian's docker-registry and ``cnncc fleet serve`` among it. Seconds are those
of this machine, and of whatever else it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cnncc_runtime.agent.cli import poll  # noqa: E402
from cnncc_runtime.agent.trial import Verdict  # noqa: E402
from cnncc_runtime.agent.update import Agent, Enrollment  # noqa: E402
from cnncc_runtime.cpu import host_cpu  # noqa: E402
from cnncc_runtime.errors import CnnccError, RunFailed  # noqa: E402
from tests.oci.registries import CountingProxy, Registry  # noqa: E402
from tests.oci.registries import registry as run_registry  # noqa: E402

PARTS = ("memory", "poll", "many")
MIB = 1 << 20
_NAME, _OLD, _NEW = "vision", "1.0.0", "1.1.0"

WATCHED = """
import json, resource, sys, time
from cnncc_runtime.agent.cli import cli
try:
    cli(prog_name="cnncc-agent")
except SystemExit as exc:
    code = exc.code
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": code, "peak": int(peak), "trial": children, "cpu": time.process_time()}), file=sys.stderr)
"""
"""An agent's command line, which says at the end what it took: KiB and seconds."""

POLLS = """
import json, sys, time
from pathlib import Path
from cnncc_runtime.agent.cli import poll
from cnncc_runtime.agent.update import Agent
agent = Agent(Path(sys.argv[1]))
times = []
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    poll(agent, agent.once, "")
    times.append(time.process_time() - start)
print(json.dumps(times))
"""
"""What ``cnncc-agent run`` does between its waits, and the CPU seconds of each poll."""


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--megabytes", type=click.IntRange(1), default=500, show_default=True, help="Of the large engine.")
@click.option("--polls", type=click.IntRange(2), default=50, show_default=True)
@click.option("--agents", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--worker", help="For the program's own use: which agents to run, as JSON.", hidden=True)
def main(parts: tuple[str, ...], megabytes: int, polls: int, agents: int, worker: str | None) -> None:
    """Print what agents cost; all PARTS by default."""
    if worker is not None:
        print(json.dumps(run_agents(**json.loads(worker))))
        return
    print(f"{host_cpu().model}, {os.cpu_count()} cores, Python {platform.python_version()}")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="cnncc-fleet-") as folder,
            run_registry(Path(folder) / "registry") as own,
        ):
            fleet = make_fleet(own, Path(folder))
            chosen = parts or PARTS
            if "poll" in chosen:
                _print_polls(fleet, polls)
            if "memory" in chosen:
                _print_memory(fleet, megabytes)
            if "many" in chosen:
                _print_many(fleet, agents)
    except CnnccError as exc:
        raise click.ClickException(str(exc)) from exc


def make_fleet(registry: Registry, folder: Path) -> Any:
    """Return a publisher with a small engine, as the tests have it."""
    from tests.agent.test_update import Fleet
    from tests.runtime.engine_files import ENGINE, conv

    (folder / "engine").mkdir()
    return Fleet(registry, folder, conv(folder / "engine" / ENGINE), _NAME)


def large_bundle(fleet: Any, version: str, megabytes: int) -> Path:
    """Return a small bundle that carries so many megabytes of noise as weights."""
    from cnncc_runtime.bundle import read_bundle, write_bundle

    path: Path = fleet.bundle(version)
    noise = fleet.folder / "noise"
    with noise.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1_000_000))
    made = read_bundle(path)
    files: dict[str, tuple[str, Path | bytes]] = {
        name: (record.role, (path / name).read_bytes()) for name, record in made.manifest.files.items()
    }
    files["weights.bin"] = ("weights", noise)
    for old in path.iterdir():
        old.unlink()
    write_bundle(path, made.manifest, files)
    noise.unlink()
    return path


def memory(fleet: Any, megabytes: int) -> dict[str, float]:
    """Return what an agent and a trial take at most while a device takes a large engine.

    Returns:
        ``peak`` and ``trial``, in KiB; ``cpu``, in seconds.
    """
    fleet.release("500.0.0", large_bundle(fleet, "500.0.0", megabytes))
    agent = fleet.device("memory")
    return _watched(agent, 0)


def _watched(agent: Agent, code: int) -> dict[str, float]:
    command = [sys.executable, "-c", WATCHED, "--folder", str(agent.root), "once"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        said: dict[str, float] = json.loads(done.stderr.splitlines()[-1])
    except (ValueError, IndexError):
        said = {}
    if said.get("code") != code:
        raise RunFailed("an agent failed", where=done.stderr.splitlines()[-3:])
    return said


def polls_without_news(fleet: Any, count: int) -> tuple[list[str], int, int, list[float]]:
    """Return what a device that has everything asks for at each poll.

    Returns:
        Requests of the last poll, bytes sent and received by it, and the CPU seconds of every poll.
    """
    with CountingProxy(fleet.registry.port) as proxy:
        agent = fleet.device("poll", port=proxy.port)
        if fleet_is_empty(agent):
            raise RunFailed("nothing is announced")
        proxy.reset()
        command = [sys.executable, "-c", POLLS, str(agent.root), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        asked, sent, came = proxy.requests, proxy.sent // count, proxy.came // count
        return asked[-(len(asked) // count) :], sent, came, json.loads(done.stdout)


def fleet_is_empty(agent: Agent) -> bool:
    """Bring a device to what is announced; tell whether nothing is."""
    agent.once()
    return not agent.once().slot


def _print_polls(fleet: Any, count: int) -> None:
    fleet.release("0.9.0")
    asked, sent, came, times = polls_without_news(fleet, count)
    print(f"a poll without news, of {count}")
    print(
        f"  requests                        {len(asked):>10}   {', '.join(line.rpartition('/')[2] for line in asked)}"
    )
    print(f"  bytes sent, received            {sent:>10}   {came}")
    print(f"  CPU in `run`, median and worst  {statistics.median(times) * 1e3:>7.1f} ms   {max(times) * 1e3:.1f} ms")
    cold = [_watched(fleet.device("poll-cold"), code)["cpu"] for code in (0, 10, 10, 10)][1:]
    print(f"  CPU of `once`, from its start   {statistics.median(cold) * 1e3:>7.1f} ms")


def _print_memory(fleet: Any, megabytes: int) -> None:
    took = memory(fleet, megabytes)
    print(f"an engine of {megabytes} MB is fetched and tried")
    print(f"  agent, most memory              {took['peak'] / 1024:>7.1f} MiB")
    print(f"  trial, another process          {took['trial'] / 1024:>7.1f} MiB")
    print(f"  CPU of the agent                {took['cpu']:>7.1f} s")


@contextlib.contextmanager
def _collector(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Run ``cnncc fleet serve``; yield its address, the file of a token for any device, and a viewer's token."""
    from cnncc.fleet.collector.store import DEVICE, VIEWER, Store

    address = f"sqlite:///{folder / 'fleet.db'}"
    store = Store(address)
    token = folder / "token"
    token.write_text(store.issue(DEVICE, "*"))
    viewer = store.issue(VIEWER, "benchmark")
    store.close()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from cnncc.cli.main import main; main()", "fleet", "serve"]
    process = subprocess.Popen(
        [*command, "--database", address, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/healthz", timeout=1).ok:
                    break
            time.sleep(0.1)
        yield url, token, viewer
    finally:
        process.terminate()
        process.wait()


def many(fleet: Any, count: int) -> tuple[float, list[str], int, int]:
    """Have so many devices take a release.

    Returns:
        Seconds, what went wrong, devices that run the release, and devices that the collector counts.
    """
    fleet.release(_OLD)
    fleet.release(_NEW)
    root = fleet.folder / "root.json"
    root.write_bytes(fleet.root)
    with _collector(fleet.folder) as (url, token, viewer):
        workers = os.cpu_count() or 1
        start = time.monotonic()
        running = []
        for worker in range(workers):
            request = {
                "folder": str(fleet.folder / "many"), "numbers": list(range(worker, count, workers)), "root": str(root),
                "registry": fleet.registry.url, "report": f"{url}/reports", "token": str(token),
            }  # fmt: skip
            command = [sys.executable, __file__, "--worker", json.dumps(request)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        answers = [json.loads(process.communicate()[0]) for process in running]
        seconds = time.monotonic() - start
        asked = requests.get(f"{url}/status.json", headers={"Authorization": f"Bearer {viewer}"}, timeout=60)
    counted = [release for release in asked.json()["releases"] if release["version"] == _NEW]
    problems = [problem for answer in answers for problem in answer["problems"]]
    return seconds, problems, sum(answer["good"] for answer in answers), sum(each["installed"] for each in counted)


def run_agents(
    folder: str, numbers: Sequence[int], root: str, registry: str, report: str, token: str
) -> dict[str, Any]:
    """Run devices in this process, some at a time.

    Returns:
        ``good``, how many run the release, and ``problems``, what was said by those that do not.
    """
    anchor = Path(root).read_bytes()
    Path(folder).mkdir(exist_ok=True)

    def one(number: int) -> str:
        agent = Agent(Path(folder) / f"{number}", try_engine=lambda _: Verdict((), 0.01, 5))
        made = Enrollment(registry, _NAME, "stable", f"device-{number}", report=report, report_token=token)
        try:
            agent.enroll(made, anchor)
            outcome = poll(agent, agent.once, "")
        except CnnccError as exc:
            return f"device-{number}: {type(exc).__name__}: {exc.message}"
        waiting = len(list((agent.root / "reports").glob("*.json")))
        right = outcome.changed and outcome.version == _NEW and not waiting
        return "" if right else f"device-{number}: {outcome.version} {outcome.why}, {waiting} reports wait"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(one, numbers))
    return {"good": said.count(""), "problems": [text for text in said if text][:20]}


def _print_many(fleet: Any, count: int) -> None:
    seconds, problems, good, counted = many(fleet, count)
    print(f"{count} agents take a release at once; their trial's verdict is made up")
    print(f"  run it                          {good:>10}")
    print(f"  counted by the collector        {counted:>10}")
    print(f"  seconds                         {seconds:>10.1f}   {count / seconds:.1f} agents a second")
    for problem in problems[:5]:
        print(f"  ✗ {problem}")
    if problems or not good == counted == count:
        raise RunFailed(f"{count - good} of {count} agents failed")


if __name__ == "__main__":
    main()
