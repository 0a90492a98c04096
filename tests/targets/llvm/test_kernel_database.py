"""The kernel database's file: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.kernel_database import (
    Conditions,
    KernelDatabase,
    Measurement,
    MethodTimes,
    Section,
    Timed,
)
from cnncc.targets.llvm.knobs import METHODS
from cnncc.targets.llvm.machine import machine_of
from cnncc.targets.llvm.rules import ConvShape
from cnncc_runtime.errors import DataRefused

pair = st.tuples(st.integers(1, 300), st.integers(1, 300))
SHAPES = st.builds(
    ConvShape,
    batch=st.integers(1, 8),
    groups=st.integers(1, 64),
    inputs=st.integers(1, 2048),
    outputs=st.integers(1, 2048),
    image=pair,
    kernel=pair,
    stride=pair,
    padding=st.tuples(*[st.integers(0, 5)] * 4),
    dilation=pair,
    output=pair,
    blocked=st.booleans(),
)
TIMED = st.builds(Timed, st.lists(st.integers(0, 4000), max_size=7).map(tuple), st.floats(1e-9, 3000))
METHOD = st.builds(MethodTimes, st.sampled_from(METHODS), TIMED, TIMED)
MEASUREMENTS = st.builds(Measurement, SHAPES, st.lists(METHOD, max_size=3).map(tuple))
HERE = named(resolve_profile())
CONDITIONS = Conditions.of(HERE, machine_of(HERE))


def database(*measurements: Measurement, conditions: Conditions = CONDITIONS) -> KernelDatabase:
    made = KernelDatabase()
    for measurement in measurements:
        made.put(conditions, measurement)
    return made


@given(st.lists(MEASUREMENTS, max_size=5), st.randoms())
def test_what_is_written_is_read_again_whatever_the_order(measurements: list[Measurement], order: Any) -> None:
    unique = list({measurement.shape: measurement for measurement in measurements}.values())
    text = database(*unique).text()
    read = KernelDatabase.parse(text, "db")
    assert read.of(CONDITIONS) == {measurement.shape: measurement for measurement in unique}
    assert read.text() == text
    order.shuffle(unique)
    assert database(*unique).text() == text


@given(st.lists(MEASUREMENTS, min_size=2, max_size=5, unique_by=lambda m: m.shape))
def test_the_file_has_a_line_for_each_convolution(measurements: list[Measurement]) -> None:
    lines = database(*measurements).text().decode().splitlines()
    assert sum(line.startswith('{"methods"') for line in lines) == len(measurements)
    one_less = database(*measurements[1:]).text().decode().splitlines()
    changed = {line.rstrip(",") for line in lines} ^ {line.rstrip(",") for line in one_less}
    assert len(changed) == 1


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=10,
)


@given(ANY_JSON)
def test_foreign_json_is_refused_with_a_way_out(document: Any) -> None:
    with pytest.raises(DataRefused) as caught:
        KernelDatabase.parse(json.dumps(document).encode(), "db.json")
    assert "db.json" in caught.value.message
    assert caught.value.hint


SMALL = ConvShape(1, 1, 32, 32, (8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (8, 8))
ONE = Measurement(SMALL, (MethodTimes("direct", Timed((8, 1, 1, 8, 0), 1e-5), Timed((8, 1, 2, 8, 0), 9e-6)),))
TEXT = database(ONE).text()


@given(st.integers(0, len(TEXT) - 2))
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(DataRefused):
        KernelDatabase.parse(TEXT[:length], "db")


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, child in items for deeper in _paths(child, (*path, key)))]


HOSTILE = [None, -1, 1.5, "x", [], {}, [1, 2], True, 2**40, 1e300]


@given(st.sampled_from(_paths(json.loads(TEXT))), st.sampled_from(HOSTILE))
def test_a_file_with_one_value_changed_is_refused_or_read_as_it_says(path: tuple[Any, ...], value: Any) -> None:
    document = [json.loads(TEXT)]
    place: Any = document
    for key in (0, *path)[:-1]:
        place = place[key]
    place[(0, *path)[-1]] = value
    text = json.dumps(document[0]).encode()
    try:
        read = KernelDatabase.parse(text, "db")
    except DataRefused:
        return
    again = json.loads(read.text())
    assert again == msgspec.json.decode(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        TEXT.replace(b"/1", b"/2"),
        TEXT.replace(b'"seconds":', b'"extra":1,"seconds":'),
        TEXT.replace(b"1e-05", b"1e999"),
        TEXT.replace(b"1e-05", b"0"),
        b" " * ((64 << 20) + 1),
    ],
    ids=["empty", "no text", "deep", "another schema", "unknown field", "infinite", "no time", "huge"],
)
def test_a_damaged_file_is_refused(text: bytes) -> None:
    with pytest.raises(DataRefused):
        KernelDatabase.parse(text, "db")


def test_a_convolution_that_is_listed_twice_is_refused() -> None:
    line = next(line for line in TEXT.decode().splitlines() if line.startswith('{"methods"'))
    with pytest.raises(DataRefused, match="twice"):
        KernelDatabase.parse(TEXT.replace(line.encode(), f"{line},\n{line}".encode()), "db")


@pytest.mark.parametrize("changed", [{"tvm": "0.26.0"}, {"kernels": "sha256:0"}])
def test_measurements_of_other_versions_stay_and_are_not_used(changed: dict[str, Any]) -> None:
    old = msgspec.structs.replace(CONDITIONS, **changed)
    mixed = database(ONE, conditions=old)
    assert mixed.of(CONDITIONS) == {}
    assert mixed.older(CONDITIONS) == 1
    mixed.put(CONDITIONS, ONE)
    assert mixed.of(CONDITIONS) == mixed.of(old) == {SMALL: ONE}


def test_measurements_of_another_processor_are_not_older_ones() -> None:
    other = msgspec.structs.replace(CONDITIONS, cpu="znver1")
    found = database(ONE, conditions=other)
    assert found.of(CONDITIONS) == {}
    assert found.older(CONDITIONS) == 0
    assert any(text.startswith("znver1") for text in found.machines())


def test_measurements_hold_whatever_features_a_kernel_has_no_use_for() -> None:
    more = replace(HERE, features=tuple(sorted({*HERE.features, "rdrnd", "sha"})))
    assert Conditions.of(more, machine_of(more)) == CONDITIONS
    fewer = replace(HERE, features=tuple(f for f in HERE.features if f != "fma"))
    assert Conditions.of(fewer, machine_of(fewer)) != CONDITIONS or "fma" not in HERE.features


def test_a_section_of_one_network_is_a_database_too() -> None:
    part = KernelDatabase([Section(CONDITIONS, (ONE,))])
    assert part.text() == TEXT
