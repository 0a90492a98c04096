"""Updates that lose power at every step: the device runs a good engine before, during and after."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnncc_runtime.agent import slots
from cnncc_runtime.agent.activation import TRIES, State, back, begin, current, read_state, settle
from cnncc_runtime.agent.disk import Disk, RealDisk
from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.oci.formats import EMPTY, EMPTY_BYTES, TITLE, Manifest, describe
from tests.agent.power import PowerCut, SimulatedDisk

FIRST = {"engine.so": b"first engine" * 9, "manifest.json": b"{}", "weights.bin": b"shared weights" * 9}
SECOND = {"engine.so": b"second engine" * 9, "manifest.json": b"{ }", "weights.bin": b"shared weights" * 9}


def made(files: dict[str, bytes]) -> tuple[bytes, str]:
    """Return a manifest of files, and the slot's name."""
    layers = tuple(describe(data, "a/b", annotations={TITLE: name}) for name, data in files.items())
    data = Manifest("application/vnd.cnncc.engine.v1", describe(EMPTY_BYTES, EMPTY), layers).to_bytes()
    return data, hashlib.sha256(data).hexdigest()


def install(disk: Disk, files: dict[str, bytes], sequence: int, healthy: Callable[[str], bool]) -> State:
    """Fetch a release and activate it, as the agent does."""
    manifest, slot = made(files)
    for data in files.values():
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if not slots.has_blob(disk, digest):
            disk.write(slots.part_of(digest), data)
            slots.admit(disk, digest)
    slots.stage(disk, manifest, slot)
    begin(disk, slot, sequence)
    return settle(disk, healthy)


def prepare(disk: Disk) -> None:
    for name in slots.FOLDERS:
        disk.folder(name)
    disk.flush_folder("")


def fresh(*, skipped: str = "") -> SimulatedDisk:
    """Return a disk on which the first release is trusted, and all is durable."""
    disk = SimulatedDisk()
    prepare(disk)
    assert install(disk, FIRST, 1, lambda _: True).good == made(FIRST)[1]
    return SimulatedDisk(disk.copy().root, skipped=skipped)


def yes(_: str) -> bool:
    return True


def no(_: str) -> bool:
    return False


def tells(slot: str, *, disk: Disk) -> bool:
    """Say that an engine is healthy if it is what was released, to the last byte."""
    return slots.is_whole(disk, slot)


def problem(disk: SimulatedDisk, *, second_is_good: bool) -> str:
    """Return what is wrong with a device that was settled, or an empty text."""
    first, second = made(FIRST)[1], made(SECOND)[1]
    state = read_state(disk)
    shown = current(disk)
    if not slots.is_whole(disk, shown):
        return f"applications load {shown[:8]!r}, which is not whole"
    if shown != state.good:
        return "applications load something else than what is trusted"
    if shown == second and not second_is_good:
        return "applications load an engine that failed"
    if shown not in (first, second):
        return "applications load neither"
    if state.trial is not None:
        return "a trial goes on"
    if state.sequence < 1 or (shown == second and state.sequence < 2):
        return "an older release could come back"
    return ""


def settled(disk: SimulatedDisk, healthy: Callable[[str], bool], *, second_is_good: bool) -> str:
    """Settle a disk that lost power and return what is wrong then; whatever fails is wrong."""
    try:
        settle(disk, healthy)
        return problem(disk, second_is_good=second_is_good)
    except (AssertionError, VerificationFailed) as exc:
        return f"{type(exc).__name__}: {exc}"


def cuts(
    work: Callable[[SimulatedDisk], object], start: Callable[[], SimulatedDisk]
) -> Iterator[tuple[SimulatedDisk, bool]]:
    """Yield every disk that some work can leave, with the power cut at each of its steps, and after it was done."""
    for step in range(1, 1000):
        disk = start()
        disk.cut = step
        try:
            work(disk)
        except PowerCut:
            done = False
        else:
            done = True
        yield from ((found, done) for found in disk.after_power_cuts())
        if done:
            return
    raise AssertionError("the work does not end")


def lost(disk: SimulatedDisk, *, second_is_good: bool) -> str:
    """Return what a device forgot that had said it was done, or an empty text."""
    wanted = made(SECOND if second_is_good else FIRST)[1]
    try:
        if read_state(disk).sequence != 2:
            return "the release is forgotten"
    except VerificationFailed as exc:
        return exc.message
    return "" if current(disk) == wanted else "applications load what they loaded before"


def violations(*, second_is_good: bool, skipped: str = "", deep: bool = True) -> tuple[int, list[str]]:
    """Cut the power everywhere during an update, and again everywhere during what follows it.

    Returns:
        How many disks were looked at, and what was wrong with them.
    """
    healthy = yes if second_is_good else no
    start = functools.partial(fresh, skipped=skipped)
    seen = 0
    wrong: list[str] = []
    for disk, done in cuts(lambda disk: install(disk, SECOND, 2, healthy), start):
        if done and (said := lost(disk, second_is_good=second_is_good)):
            wrong.append(said)
        again = cuts(lambda disk: settle(disk, healthy), disk.copy) if deep else [(disk, True)]
        for found, _ in again:
            seen += 1
            if said := settled(found, healthy, second_is_good=second_is_good):
                wrong.append(said)
    return seen, wrong


@pytest.mark.parametrize("second_is_good", [True, False])
def test_no_power_cut_leaves_a_device_without_a_good_engine(second_is_good: bool) -> None:
    seen, wrong = violations(second_is_good=second_is_good)
    assert seen > 1000
    assert wrong == []


def flushes() -> list[str]:
    """Return the names of all flushes that an update makes."""
    disk = fresh()
    install(disk, SECOND, 2, yes)
    return sorted(disk.flushed)


@pytest.mark.parametrize("skipped", flushes())
def test_every_flush_is_needed(skipped: str) -> None:
    found = [violations(second_is_good=good, skipped=skipped, deep=False)[1] for good in (True, False)]
    assert any(found), f"nothing went wrong without the flush of {skipped}"


def test_an_engine_that_takes_the_machine_down_is_tried_so_often_and_no_more(tmp_path: Path) -> None:
    disk = fresh()
    tried = []

    def fatal(slot: str) -> bool:
        tried.append(slot)
        raise PowerCut

    with pytest.raises(PowerCut):
        install(disk, SECOND, 2, fatal)
    for _ in range(5):
        try:
            settle(disk, fatal)
        except PowerCut:
            continue
    assert len(tried) == TRIES
    assert current(disk) == made(FIRST)[1]
    assert read_state(disk).bad == (made(SECOND)[1],)


def test_an_engine_that_fails_is_not_shown_and_is_remembered() -> None:
    disk = fresh()
    seen: list[str] = []

    def looks(slot: str) -> bool:
        seen.append(current(disk))
        return False

    state = install(disk, SECOND, 2, looks)
    assert seen == [made(FIRST)[1]], "applications load the good one while the new one is tried"
    assert (state.good, state.bad, state.sequence) == (made(FIRST)[1], (made(SECOND)[1],), 2)


def test_an_older_release_is_refused_and_changes_nothing() -> None:
    disk = fresh()
    install(disk, SECOND, 5, yes)
    before = read_state(disk)
    for sequence in (4, 5):
        with pytest.raises(VerificationFailed, match="not newer than 5"):
            install(disk, FIRST, sequence, yes)
    assert read_state(disk) == before


def test_a_device_goes_back_to_what_it_ran_before() -> None:
    disk = fresh()
    assert not back(disk), "there was nothing before the first one"
    install(disk, SECOND, 2, yes)
    assert back(disk)
    assert current(disk) == made(FIRST)[1]
    state = read_state(disk)
    assert (state.good, state.bad, state.sequence) == (made(FIRST)[1], (made(SECOND)[1],), 2)
    assert not back(disk), "and not further"


def test_going_back_survives_power_cuts() -> None:
    def start() -> SimulatedDisk:
        disk = fresh()
        install(disk, SECOND, 2, yes)
        return disk.copy()

    seen = 0
    for disk, _ in cuts(back, start):
        seen += 1
        assert settled(disk, yes, second_is_good=True) == ""
    assert seen > 20


def test_what_is_not_needed_is_removed_and_nothing_else() -> None:
    disk = fresh()
    install(disk, SECOND, 2, yes)
    third = {**SECOND, "engine.so": b"third engine" * 9}
    state = install(disk, third, 3, yes)
    disk.write("incoming/" + "a" * 64 + ".part", b"left")
    disk.write("incoming/" + "b" * 64 + ".part", b"being fetched")
    gone = slots.collect(disk, state.needed, wanted=["sha256:" + "b" * 64])
    engine = hashlib.sha256(FIRST["engine.so"]).hexdigest()
    manifest = hashlib.sha256(FIRST["manifest.json"]).hexdigest()
    assert set(gone) == {
        f"slots/{made(FIRST)[1]}",
        f"blobs/{engine}",
        f"blobs/{manifest}",
        "incoming/" + "a" * 64 + ".part",
    }
    for slot in state.needed:
        assert slots.is_whole(disk, slot)
    assert slots.collect(disk, state.needed, wanted=["sha256:" + "b" * 64]) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-rf", "x" * 129, "a\0b", "a\nb", "ä", " x"]
)
def test_names_that_leave_the_slot_are_refused(name: str) -> None:
    with pytest.raises(VerificationFailed, match="which no bundle has"):
        slots.stage(fresh(), *made({name: b"x"}))


def test_two_files_of_one_name_are_refused() -> None:
    layer = describe(b"x", "a/b", annotations={TITLE: "engine.so"})
    data = Manifest("a/b", describe(EMPTY_BYTES, EMPTY), (layer, layer)).to_bytes()
    with pytest.raises(VerificationFailed, match="which no bundle has"):
        slots.stage(fresh(), data, hashlib.sha256(data).hexdigest())


def test_what_was_fetched_wrong_is_gone() -> None:
    disk = fresh()
    digest = "sha256:" + hashlib.sha256(b"right").hexdigest()
    disk.write(slots.part_of(digest), b"wrong")
    with pytest.raises(VerificationFailed, match="what was fetched is not"):
        slots.admit(disk, digest)
    assert disk.list("incoming") == []
    assert not slots.has_blob(disk, digest)


def test_a_damaged_slot_is_made_anew() -> None:
    disk = fresh()
    slot = made(FIRST)[1]
    disk.write(f"slots/{slot}/bundle.cnncc/more", b"surplus")
    assert not slots.is_whole(disk, slot)
    slots.stage(disk, made(FIRST)[0], slot)
    assert slots.is_whole(disk, slot)


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[]", b'{"good": 1}'])
def test_a_damaged_state_is_said_and_leaves_the_engine_alone(content: bytes) -> None:
    disk = fresh()
    disk.write("state/state.json", content)
    with pytest.raises(VerificationFailed, match="is damaged"):
        settle(disk, yes)
    assert current(disk) == made(FIRST)[1]


def test_it_is_the_same_on_a_real_disk(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "agent")
    prepare(disk)
    install(disk, FIRST, 1, functools.partial(tells, disk=disk))
    engine = tmp_path / "agent/state/current/bundle.cnncc/engine.so"
    assert engine.read_bytes() == FIRST["engine.so"]
    install(disk, SECOND, 2, functools.partial(tells, disk=disk))
    assert engine.read_bytes() == SECOND["engine.so"]
    weights = tmp_path / "agent/state/current/bundle.cnncc/weights.bin"
    assert weights.stat().st_nlink == 3, "what two releases share is stored once"
    assert back(disk)
    assert engine.read_bytes() == FIRST["engine.so"]
    state = read_state(disk)
    slots.collect(disk, state.needed)
    assert sorted(disk.list("slots")) == [made(FIRST)[1]]
    assert weights.stat().st_nlink == 2
