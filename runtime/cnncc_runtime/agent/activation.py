"""Which engine a device runs: tried before it is trusted, and left for the last good one where it fails.

    state/state.json   good, previous and tried slots; what was released last; what is known to be bad
    state/current      a link to the slot that applications load

The order of writes is what makes it safe to lose power anywhere (see `docs/fleet.md`); every start of the agent begins
with `settle`, which finishes or undoes what was under way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from cnncc_runtime.agent import slots
from cnncc_runtime.agent.disk import Disk
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import VerificationFailed

TRIES = 2
"""How often a new engine is tried: a power cut in the middle of a trial is not its fault."""
_MOST_BAD = 64

_STATE = "state/state.json"
_CURRENT = "state/current"
_SLOTS = "../slots"
"""Seen from the folder that `_CURRENT` is in."""
_NEW = ".new"
_SLOT = re.compile(r"[0-9a-f]{64}")
_AGAIN = "the engine in state/current goes on; enroll the device again"

Healthy = Callable[[str], bool]
"""Tells of a slot whether its engine computes what it should; it may take long, but not for ever."""


@dataclass(frozen=True)
class Trial:
    """A slot that is being tried.

    Attributes:
        slot: Which.
        sequence: Of the release that brought it.
        tries: How often it may still be tried.
    """

    slot: str
    sequence: int
    tries: int = TRIES


@dataclass(frozen=True)
class State:
    """What a device runs, ran and will not run.

    Attributes:
        good: The slot that is trusted; empty before there is one.
        previous: The one that was trusted before; empty where there is none.
        sequence: Of the release that is trusted or was refused last; older ones are not taken.
        trial: What is being tried.
        bad: Slots that failed, the latest last.
    """

    good: str = ""
    previous: str = ""
    sequence: int = 0
    trial: Trial | None = None
    bad: tuple[str, ...] = ()

    @property
    def needed(self) -> set[str]:
        """Slots that must stay."""
        return {slot for slot in (self.good, self.previous, self.trial.slot if self.trial else "") if slot}


def read_state(disk: Disk) -> State:
    """Return a device's state.

    Raises:
        VerificationFailed: It is damaged.
    """
    data = disk.read(_STATE)
    if data is None:
        return State()
    try:
        state = msgspec.json.decode(data, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise VerificationFailed(f"{_STATE} is damaged: {exc}", hint=_AGAIN) from exc
    if wrong := [slot for slot in state.needed if not _SLOT.fullmatch(slot)]:
        raise VerificationFailed(f"{_STATE} is damaged: {wrong[0][:80]!r} is no slot", hint=_AGAIN)
    return state


def current(disk: Disk) -> str:
    """Return the slot that applications load; empty where there is none, or they are led elsewhere."""
    folder, _, slot = (disk.target(_CURRENT) or "").rpartition("/")
    return slot if folder == _SLOTS else ""


def begin(disk: Disk, slot: str, sequence: int) -> None:
    """Put a staged slot on trial; `settle` tries it.

    Args:
        disk: The agent's.
        slot: It is whole.
        sequence: Of its release.

    Raises:
        VerificationFailed: The release is older than one that the device has seen.
        StorageFailed: The disk is full or broken.
    """
    state = read_state(disk)
    if sequence <= state.sequence:
        raise VerificationFailed(f"release {sequence} is not newer than {state.sequence}, which this device has had")
    _keep(disk, replace(state, trial=Trial(slot, sequence)))


def back(disk: Disk) -> bool:
    """Put the engine that was trusted before in the place of the present one; False where there is none.

    Raises:
        StorageFailed: The disk is full or broken.
    """
    state = read_state(disk)
    if not state.previous or not slots.is_whole(disk, state.previous):
        return False
    bad = (*(slot for slot in state.bad if slot != state.good), state.good)[-_MOST_BAD:]
    _keep(disk, replace(state, good=state.previous, previous="", trial=None, bad=bad))
    _show(disk, state.previous)
    return True


def settle(disk: Disk, healthy: Healthy) -> State:
    """Finish what is under way: try what is on trial, and see that applications load what is trusted.

    Args:
        disk: The agent's.
        healthy: Tries an engine. A power cut while it runs counts as a try.

    Raises:
        VerificationFailed: The state is damaged.
        StorageFailed: The disk is full or broken.
    """
    state = read_state(disk)
    if state.trial is not None:
        state = _tried(disk, state, state.trial, healthy)
        _keep(disk, state)
    if state.good and current(disk) != state.good:
        _show(disk, state.good)
    return state


def _tried(disk: Disk, state: State, trial: Trial, healthy: Healthy) -> State:
    if trial.tries < 1 or not slots.is_whole(disk, trial.slot):
        return _refused(state, trial)
    # counted before, not after: an engine that takes the machine down is tried so often and no more
    _keep(disk, replace(state, trial=replace(trial, tries=trial.tries - 1)))
    return _trusted(state, trial) if healthy(trial.slot) else _refused(state, trial)


def _trusted(state: State, trial: Trial) -> State:
    previous = state.previous if state.good == trial.slot else state.good
    return replace(state, good=trial.slot, previous=previous, sequence=trial.sequence, trial=None)


def _refused(state: State, trial: Trial) -> State:
    bad = state.bad if trial.slot == state.good else (*state.bad, trial.slot)[-_MOST_BAD:]
    return replace(state, sequence=max(state.sequence, trial.sequence), trial=None, bad=bad)


def _keep(disk: Disk, state: State) -> None:
    """Write the state, whole or not at all."""
    disk.write(_STATE + _NEW, canonical_json(msgspec.to_builtins(state)))
    disk.flush(_STATE + _NEW)
    disk.rename(_STATE + _NEW, _STATE)
    disk.flush_folder("state")


def _show(disk: Disk, slot: str) -> None:
    """Have applications load a slot from now on."""
    disk.remove(_CURRENT + _NEW)
    disk.link(f"{_SLOTS}/{slot}", _CURRENT + _NEW)
    disk.rename(_CURRENT + _NEW, _CURRENT)
    disk.flush_folder("state")
