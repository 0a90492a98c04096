"""``cnncc-agent``: the command line of a device's update agent."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from datetime import time as DayTime
from pathlib import Path
from typing import Any

import click
import msgspec

from cnncc_runtime import __version__
from cnncc_runtime.agent import activation, slots
from cnncc_runtime.agent.reports import FAILED, INSTALLED, WENT_BACK, Report, Spool, check_address, of_error
from cnncc_runtime.agent.update import Agent, Enrollment, Outcome
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.errors import CnnccError, HealthCheckFailed, NetworkFailed, UsageError
from cnncc_runtime.files import storage_errors
from cnncc_runtime.oci.transfer import Pace

FOLDER = Path("/var/lib/cnncc-agent")
NOTHING = 10
"""Exit code: the device has what is announced for it."""

EXIT_CODES = """\b
Exit codes:
  0    done: the device runs another engine now
  2    usage: a flag, or a device that is not enrolled
  3    this machine lacks something: disk space, a folder to write in
  10   nothing to do
  20   the registry could not be reached
  30   what came is not to be believed, and was not taken
  40   the release has no engine for this device
  50   the new engine failed; the one before runs
"""


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Group(click.Group):
    """Tells errors of ours as one line, what to do next, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CnnccError as exc:
            _tell(exc)
            raise click.exceptions.Exit(exc.exit_code) from exc


def _tell(exc: CnnccError) -> None:
    click.echo(f"✗ {exc}", err=True)


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cnncc-agent")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=FOLDER, envvar="CNNCC_AGENT_FOLDER", show_default=True,
    help="The agent's own.",
)  # fmt: skip
@click.pass_context
def cli(ctx: click.Context, folder: Path) -> None:
    """Keep this device on the engine that its fleet's publisher signed for it, and on a good one always.

    Applications load FOLDER/state/current/bundle.cnncc.
    """
    ctx.obj = Agent(folder)


def _json(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(function)


@cli.command()
@click.option(
    "--root", "metadata", type=_FILE, required=True,
    help="The fleet's root.json, from somebody whom you trust: all trust begins there.",
)  # fmt: skip
@click.option("--registry", required=True, help="https://HOST[/PREFIX]")
@click.option("--name", required=True, help="Of the model.")
@click.option("--channel", default="stable", show_default=True, help="Which releases to follow.")
@click.option("--device", "device", default="", help="The device's name.  [default: its host name]")
@click.option("--profile", default="", help="The device's profile: raspberry-pi-5, …")
@click.option("--ca", type=_FILE, help="Certificates, PEM.")
@click.option("--report", help="Where outcomes are posted: https://…")
@click.option("--report-token", type=_FILE, help="File of the token for it.")
@click.pass_obj
def enroll(
    agent: Agent,
    /,
    metadata: Path,
    registry: str,
    name: str,
    channel: str,
    device: str,
    profile: str,
    ca: Path | None,
    report: str | None,
    report_token: Path | None,
) -> None:
    """Make this device one of a fleet's."""
    import platform

    if report:
        check_address(report)
        if report_token is None:
            raise UsageError("--report needs --report-token", hint="the fleet's collector gives it")
    with storage_errors(metadata):
        root = metadata.read_bytes()
    files = [str(path.resolve()) if path else "" for path in (ca, report_token)]
    made = Enrollment(registry, name, channel, device or platform.node(), profile, files[0], report or "", files[1])
    agent.enroll(made, root)
    click.echo(f"{made.device} follows {channel}/{name} of {registry}; `cnncc-agent once` fetches it")


@cli.command()
@_json
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="MB a second at most.")
@click.pass_obj
def once(agent: Agent, as_json: bool, rate: float | None) -> None:
    """Ask for news, and bring the device to what is announced for it."""
    agent.pace = Pace(rate=(rate or 0) * 1e6)
    _finish(_poll(agent, agent.once), as_json)


@cli.command()
@_json
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_obj
def install(agent: Agent, as_json: bool, archive: Path) -> None:
    """Install the release in ARCHIVE (`cnncc fleet export`), where there is no network."""
    _finish(_poll(agent, lambda: agent.install(archive)), as_json)


@cli.command()
@click.option(
    "--interval", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="Seconds between polls."
)
@click.option("--window", default="", help="When to download: 02:00-05:00, local time.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="MB a second at most.")
@click.pass_obj
def run(agent: Agent, interval: float, window: str, rate: float | None) -> None:
    """Poll until the service is stopped."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    during = parse_window(window)
    agent.pace = Pace(rate=(rate or 0) * 1e6, wanted=lambda: during() and not stopped.is_set())
    agent.enrollment()
    failures = 0
    while not stopped.is_set():
        try:
            click.echo(_text(_poll(agent, agent.once)), err=True)
            failures = 0
        except NetworkFailed as exc:
            failures += 1
            _tell(exc)
        except CnnccError as exc:
            failures = 0
            _tell(exc)
        # devices that lost the registry together must not come back to it together
        wait = min(interval, 30.0 * 2.0**failures) if failures else interval
        stopped.wait(wait * random.uniform(0.9, 1.1))


@cli.command()
@_json
@click.pass_obj
def status(agent: Agent, as_json: bool) -> None:
    """Say what the device runs, ran, and refuses."""
    enrollment, disk = agent.enrollment(), agent.disk()
    state = activation.read_state(disk)
    whole = bool(state.good) and slots.is_whole(disk, state.good)
    document = {"enrollment": msgspec.to_builtins(enrollment), "state": msgspec.to_builtins(state), "whole": whole}
    if as_json:
        _write(document)
        return
    click.echo(f"{enrollment.device} follows {enrollment.channel}/{enrollment.name} of {enrollment.registry}")
    click.echo(f"runs      {_short(state.good) or 'nothing'}{'' if whole or not state.good else '  DAMAGED'}")
    click.echo(f"before    {_short(state.previous) or 'nothing'}")
    click.echo(f"release   {state.sequence}")
    if state.trial:
        click.echo(f"on trial  {_short(state.trial.slot)}")
    if state.bad:
        click.echo(f"refused   {' '.join(_short(slot) for slot in state.bad)}")


@cli.command()
@click.pass_obj
def rollback(agent: Agent) -> None:
    """Go back to the engine before the present one, and refuse the latter from now on."""
    slot = agent.back()
    _report(agent, Outcome(True, slot), WENT_BACK)
    click.echo(f"✓ runs {_short(slot)}")


@cli.command()
@click.pass_obj
def gc(agent: Agent) -> None:
    """Remove engines and blobs that nothing needs."""
    click.echo(f"✓ {len(agent.collect())} removed")


def parse_window(text: str) -> Callable[[], bool]:
    """Return what tells whether it is time to download.

    Args:
        text: ``02:00-05:00``, over midnight too; empty for always.

    Raises:
        UsageError: It is no window.
    """
    if not text:
        return lambda: True
    try:
        start, end = (DayTime.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError as exc:
        raise UsageError(f"'{text}' is no window of time", hint="as in --window 02:00-05:00") from exc

    def within() -> bool:
        now = datetime.now().time()
        return start <= now < end if start <= end else now >= start or now < end

    return within


def _poll(agent: Agent, work: Callable[[], Outcome]) -> Outcome:
    """Do some work and report what came of it; reports that wait are sent, too."""
    try:
        outcome = work()
        if outcome.changed or outcome.latency:  # after a rollback, the engine that the device never left
            _report(agent, outcome, INSTALLED)
        return outcome
    except HealthCheckFailed as exc:
        state, signed = activation.read_state(agent.disk()), agent.release
        outcome = Outcome(False, state.good, signed.version if signed else "", state.sequence)
        _report(agent, outcome, FAILED, of_error(exc))
        raise
    finally:
        _send(agent)


def _report(agent: Agent, outcome: Outcome, what: str, error: tuple[str, str] = ("", "")) -> None:
    enrollment = agent.enrollment()
    report = Report(
        enrollment.device, enrollment.name, enrollment.channel, what, outcome.version, outcome.sequence, outcome.slot,
        time.time(), outcome.latency, *error, host_machine(),
    )  # fmt: skip
    Spool(agent.root / "reports").add(report)


def _send(agent: Agent) -> None:
    """Send what waits; that nobody hears it does not hold up an update."""
    try:
        enrollment = agent.enrollment()
        if enrollment.report:
            token = Path(enrollment.report_token).read_text("ascii").strip()
            ca = Path(enrollment.ca) if enrollment.ca else None
            Spool(agent.root / "reports").send(enrollment.report, token, ca)
    except (CnnccError, OSError, UnicodeDecodeError) as exc:
        click.echo(f"! reports wait: {exc}", err=True)


def _finish(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        _write(msgspec.to_builtins(outcome))
    else:
        click.echo(_text(outcome))
    if not outcome.changed:
        raise click.exceptions.Exit(NOTHING)


def _text(outcome: Outcome) -> str:
    if not outcome.changed:
        return f"= {outcome.why}{f' (release {outcome.version})' if outcome.version else ''}"
    took = f", {outcome.latency * 1e3:.2f} ms" if outcome.latency else ""
    return f"✓ runs release {outcome.version}, {_short(outcome.slot)}{took}"


def _short(slot: str) -> str:
    return slot[:12]


def _write(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def main() -> None:
    """Entry point."""
    cli()
