"""What demos are played with: commands that are shown and checked, a registry, a collector, and devices."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import requests

from cnncc_runtime.cpu import host_machine

REGISTRY = "docker-registry"
DEBIAN = (REGISTRY, "skopeo")
"""Programs that are Debian packages of the same names."""
ARM_DEVICE = Path("build/aarch64/device")
"""Python for AArch64 under qemu, and the agent there: `make arm-device`."""
PATIENCE = 10.0
"""Seconds that a program may take to begin, or to end when it is told to."""


def say(title: str) -> None:
    """Print the title of a step."""
    print(f"\n── {title}", flush=True)


def fail(why: str) -> NoReturn:
    """End the demo: something came out that should not."""
    sys.exit(f"\nthe demo failed: {why}")


def program(name: str, package: str = "") -> str:
    """Return where a program is: of this environment, or of a Debian package."""
    found = shutil.which(name) if package else shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        fail(f"{name} not found: {f'apt-get install {package}' if package else 'make setup'}")
    return found


def run(
    *command: str | Path, code: int = 0, says: str = "", env: Mapping[str, str] | None = None, interrupt_at: str = ""
) -> str:
    """Show a command, run it and show what it says.

    Args:
        command: Its first word is a program of this environment, or a path.
        code: The exit code that it must have.
        says: What it must say.
        env: Variables for it alone.
        interrupt_at: Once it says this, it is interrupted as Ctrl-C does.

    Returns:
        All that it said.
    """
    words = [str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    found = words[0] if "/" in words[0] else program(words[0], words[0] if words[0] in DEBIAN else "")
    process = subprocess.Popen(
        [found, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    try:
        with process.stdout:
            for line in process.stdout:
                print(line, end="", flush=True)
                said += line
                if interrupt_at and interrupt_at in line:
                    print("^C", flush=True)
                    process.send_signal(signal.SIGINT)
                    interrupt_at = ""
        process.wait()
    except BaseException:
        _end(process, signal.SIGINT)
        raise
    if process.returncode != code:
        fail(f"that command should have ended with exit code {code}, not with {process.returncode}")
    if code:
        print(f"(exit code {code})", flush=True)
    if interrupt_at:
        fail(f"that command should have said, and was to be interrupted then: {interrupt_at}")
    if says not in said:
        fail(f"that command should have said: {says}")
    return said


def ask(*command: str | Path) -> Any:
    """Run a command without showing it, and return the JSON document that it says."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        fail(f"{shlex.join(map(str, command))}: {done.stderr.decode('utf-8', 'replace')}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run a registry on a folder; yields its address."""
    serve = program(REGISTRY, REGISTRY)
    folder.mkdir(parents=True)
    port = _free_port()
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder.resolve()}}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}, secret: of-this-demo}}\n"
    )
    url = f"http://localhost:{port}"
    with _serving([serve, "serve", str(config)], f"{url}/v2/", folder / "log"):
        yield url


@contextlib.contextmanager
def collector(database: str, log: Path) -> Iterator[str]:
    """Run the status collector; yields its address."""
    port = _free_port()
    command = [program("cnncc"), "fleet", "serve", "--database", database, "--port", str(port)]
    print(f"$ cnncc {shlex.join(command[1:])} &", flush=True)
    url = f"http://localhost:{port}"
    with _serving(command, f"{url}/healthz", log):
        yield url


@contextlib.contextmanager
def _serving(command: list[str], url: str, log: Path) -> Iterator[None]:
    # a session of its own: what stops the demo at the terminal lets it end its commands before what they talk to
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    try:
        end = time.monotonic() + 3 * PATIENCE
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                fail(f"{shlex.join(command)} does not answer: {log.read_text('utf-8', 'replace')[-500:]}")
            time.sleep(0.1)
        yield
    finally:
        _end(process, signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=PATIENCE).ok
    except requests.ConnectionError:
        return False


def _end(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """End a process: let it end by itself, where the terminal told it too; then tell it; then make it."""
    waits = [PATIENCE / 5, PATIENCE] if number == signal.SIGINT else [0, PATIENCE]
    for wait in waits:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait)
            return
        process.send_signal(number)
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@dataclass(frozen=True)
class Device:
    """A simulated device: a folder, and the real agent.

    Attributes:
        name: In the fleet.
        machine: ELF machine: one that is not this machine's runs under qemu, and is AArch64.
        channel: Which it follows.
        folder: The agent's.
    """

    name: str
    machine: str
    channel: str
    folder: Path

    @property
    def emulated(self) -> bool:
        """Whether it runs under qemu."""
        return self.machine != host_machine()

    @property
    def python(self) -> str:
        """Its Python."""
        return str(ARM_DEVICE / "python") if self.emulated else sys.executable

    @property
    def current(self) -> Path:
        """The bundle that its applications load."""
        return self.folder / "state/current/bundle.cnncc"

    def agent(self, *arguments: str | Path, code: int = 0, says: str = "") -> str:
        """Show, run and check its agent; see `run`."""
        shown = ARM_DEVICE / "cnncc-agent" if self.emulated else "cnncc-agent"
        return run(shown, "--folder", self.folder, *arguments, code=code, says=says)

    def status(self) -> Any:
        """Return what its agent says of it."""
        agent = str(ARM_DEVICE / "cnncc-agent") if self.emulated else program("cnncc-agent")
        return ask(agent, "--folder", self.folder, "status", "--json")

    def ask(self, program: Path, *arguments: str | Path) -> Any:
        """Run a Python program on it, and return the JSON document that it says."""
        return ask(self.python, program, *arguments)
