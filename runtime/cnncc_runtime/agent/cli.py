"""``cnncc-agent``: the command line of a device's update agent."""

from __future__ import annotations

import json
import os
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
from cnncc_runtime.agent.hook import tell
from cnncc_runtime.agent.reports import FAILED, INSTALLED, WENT_BACK, Report, Spool, check_address, of_error
from cnncc_runtime.agent.unit import STATE, unit_text
from cnncc_runtime.agent.update import Agent, Enrollment, Outcome
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.errors import CnnccError, HealthCheckFailed, NetworkFailed, Paused, StorageFailed, UsageError
from cnncc_runtime.files import storage_errors
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.transfer import Pace

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

AS_SERVICE = """\b
sudo useradd --system --home-dir /var/lib/cnncc-agent --shell /usr/sbin/nologin cnncc-agent
cnncc-agent unit | sudo tee /etc/systemd/system/cnncc-agent.service
sudo -u cnncc-agent cnncc-agent enroll …
sudo systemctl enable --now cnncc-agent
"""

_READERS = ("status", "unit")
"""Commands that leave nothing in the agent's folder."""

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
    "--folder", type=click.Path(path_type=Path), default=STATE, envvar="CNNCC_AGENT_FOLDER", show_default=True,
    help="The agent's own.",
)  # fmt: skip
@click.pass_context
def cli(ctx: click.Context, folder: Path) -> None:
    """Keep this device on the engine that its fleet's publisher signed for it, and on a good one always.

    Applications load FOLDER/state/current/bundle.cnncc.
    """
    owner = folder.stat().st_uid if folder.is_dir() else os.geteuid()
    if os.geteuid() == 0 and owner != 0 and ctx.invoked_subcommand not in _READERS:
        raise UsageError(
            f"{folder} belongs to another user, whose agent could not change what root leaves in it",
            hint=f"sudo -u '#{owner}' cnncc-agent …",
        )
    ctx.obj = Agent(folder, note=lambda text: click.echo(f"! {text}", err=True))


def _json(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(function)


_RATE = click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="MB a second at most.")
_ON_CHANGE = click.option(
    "--on-change", "command", default="", metavar="COMMAND",
    help="Run once the device loads another engine: $CNNCC_BUNDLE.",
)  # fmt: skip
_INTERVAL = click.option(
    "--interval", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="Seconds between polls."
)
_WINDOW = click.option("--window", default="", help="When to download: 02:00-05:00, local time.")


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
@_RATE
@_ON_CHANGE
@click.pass_obj
def once(agent: Agent, as_json: bool, rate: float | None, command: str) -> None:
    """Ask for news, and bring the device to what is announced for it."""
    agent.pace = Pace(rate=(rate or 0) * 1e6)
    _finish(poll(agent, agent.once, command), as_json)


@cli.command()
@_json
@_ON_CHANGE
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_obj
def install(agent: Agent, as_json: bool, archive: Path, command: str) -> None:
    """Install the release in ARCHIVE (`cnncc fleet export`), where there is no network."""
    _finish(poll(agent, lambda: agent.install(archive), command), as_json)


@cli.command()
@_INTERVAL
@_WINDOW
@_RATE
@_ON_CHANGE
@click.pass_obj
def run(agent: Agent, interval: float, window: str, rate: float | None, command: str) -> None:
    """Poll until the service is stopped."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    during = parse_window(window)

    def rest(seconds: float) -> None:
        if stopped.wait(seconds):
            raise Paused("the service is being stopped; what was fetched so far is kept")

    agent.connect = lambda host, ca: Connection(host, ca, sleep=rest)
    agent.pace = Pace(rate=(rate or 0) * 1e6, sleep=rest, wanted=lambda: during() and not stopped.is_set())
    agent.enrollment()
    failures = 0
    while not stopped.is_set():
        try:
            click.echo(_text(poll(agent, agent.once, command)), err=True)
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


@cli.command(epilog=AS_SERVICE)
@click.option("--user", is_flag=True, help="For a user's own systemd, with a --folder of his.")
@_INTERVAL
@_WINDOW
@_RATE
@_ON_CHANGE
@click.pass_context
def unit(ctx: click.Context, user: bool, interval: float, window: str, rate: float | None, command: str) -> None:
    """Print a systemd unit of `cnncc-agent run`, by the path of this installation."""
    parse_window(window)
    arguments = [f"--interval={interval:g}"]
    arguments += [f"--window={window}"] if window else []
    arguments += [f"--rate={rate:g}"] if rate else []
    arguments += [f"--on-change={command}"] if command else []
    folder: Path = ctx.obj.root
    if user and folder == STATE:
        raise UsageError(
            f"{STATE} is the machine's agent's", hint='cnncc-agent --folder "$HOME/.local/state/…" unit --user'
        )
    click.echo(unit_text(folder, arguments, user=user), nl=False)


@cli.command()
@_ON_CHANGE
@click.pass_obj
def rollback(agent: Agent, command: str) -> None:
    """Go back to the engine before the present one, and refuse the latter from now on."""
    slot = agent.back()
    _report(agent, Outcome(True, slot), WENT_BACK, _tell_application(agent, command))
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


def poll(agent: Agent, work: Callable[[], Outcome], command: str) -> Outcome:
    """Do some work, tell the application, and report what came of it; reports that wait are sent, too."""
    problem = ("", "")
    try:
        try:
            outcome = work()
        finally:  # work that failed may have finished before what a power cut interrupted
            problem = _tell_application(agent, command)
        if outcome.changed or outcome.latency:  # after a rollback, the engine that the device never left
            told = "; ".join(outcome.notes)[:500]
            _report(agent, outcome, INSTALLED, problem if problem[1] else ("", told))
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
        fetched=agent.traffic.fetched, deltas=agent.traffic.deltas,
    )  # fmt: skip
    try:
        Spool(agent.root / "reports").add(report)
    except StorageFailed as exc:  # what the device runs does not depend on it
        click.echo(f"! a report is lost: {exc}", err=True)


def _tell_application(agent: Agent, command: str) -> tuple[str, str]:
    """Run ``--on-change`` where it is due; return what a report says of its failure."""
    try:
        if command:
            tell(agent.root, activation.current(agent.disk()), command)
    except CnnccError as exc:
        click.echo(f"! {exc}", err=True)
        return of_error(exc)
    return "", ""


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
    how = ", with deltas" if outcome.deltas else ""
    came = f", {outcome.fetched / 1e6:.1f} MB fetched{how}" if outcome.fetched else ""
    return f"✓ runs release {outcome.version}, {_short(outcome.slot)}{took}{came}"


def _short(slot: str) -> str:
    return slot[:12]


def _write(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def main() -> None:
    """Entry point."""
    os.umask(0o022)  # applications of other users load what is written here; nothing in it is secret
    cli(prog_name="cnncc-agent")
