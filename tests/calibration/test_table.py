"""The calibration table: it comes back as it was, names what it is for, and refuses damage by the file's name."""

from __future__ import annotations

import base64
import copy
import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cnncc.calibration.calibrate import Job, calibrate
from cnncc.calibration.histogram import BINS, Histogram
from cnncc.calibration.quantize import quantize
from cnncc.calibration.table import (
    SCHEMA,
    CalibrationTable,
    GroupRecord,
    check_model,
    counts_text,
    digests_of,
    floats_of,
    floats_text,
    histogram_of,
    read_table,
    table_from_bytes,
    write_table,
)
from cnncc.calibration.thresholds import METHODS
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import CnnccError, DataRefused, StorageFailed
from tests.calibration.graphs import check, classifier, images, stream_of


@pytest.fixture(scope="module")
def table() -> CalibrationTable:
    return calibrate(Job(classifier(), "net", "0.0", stream_of(images(12))))


def refused(data: bytes) -> str:
    with pytest.raises(DataRefused) as caught:
        table_from_bytes(data, "model.calib.json")
    assert caught.value.message.startswith("model.calib.json ")
    assert "calibrate" in caught.value.hint
    return caught.value.message


# ---- the round trip


def test_a_table_comes_back_as_it_was(table: CalibrationTable, tmp_path: Path) -> None:
    path = tmp_path / "model.calib.json"
    write_table(table, path)
    found = read_table(path)
    assert found == table
    assert found.to_bytes() == table.to_bytes() == path.read_bytes()
    assert found.digest == table.digest


def test_a_table_is_json_that_a_person_can_read(table: CalibrationTable) -> None:
    lines = table.to_bytes().decode().splitlines()
    assert len(lines) > 100
    plain = json.loads(table.to_bytes())
    assert (plain["schema"], plain["model"]["name"], plain["data"]["source"]) == (SCHEMA, "net", "memory")
    assert [layer["node"] for layer in plain["layers"]] == ["first", "second", "third", "head"]


def test_a_table_holds_what_the_tensors_held(table: CalibrationTable) -> None:
    """Switching the method costs no new pass."""
    for group in table.groups:
        histogram = histogram_of(group)
        assert (histogram.largest, histogram.lowest) == (group.largest, group.lowest)
        assert {name: find(histogram) for name, find in METHODS.items()} == group.thresholds
        assert group.thresholds[group.method] == group.threshold


def test_a_table_says_what_is_kept_and_every_tensor_s_scale(table: CalibrationTable) -> None:
    assert table.kept == ()
    assert table.scales.keys() == {name for group in table.groups for name in group.tensors}
    kept = msgspec.structs.replace(table.layers[0], precision="fp32", why="asked")
    assert msgspec.structs.replace(table, layers=(kept, *table.layers[1:])).kept == (kept,)


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_arrays_come_back_bit_for_bit(values: list[float]) -> None:
    array = np.array(values, np.float32)
    np.testing.assert_array_equal(floats_of(floats_text(array)), array)
    assert floats_of(floats_text(array)).dtype == np.float32


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_histograms_come_back_count_for_count(values: list[float]) -> None:
    histogram = Histogram.of(np.array([values], np.float32))
    found = histogram_of(group_of(histogram))
    np.testing.assert_array_equal(found.counts, histogram.counts)
    assert (found.exponent, found.largest) == (histogram.exponent, histogram.largest)


def group_of(histogram: Histogram, **changes: Any) -> GroupRecord:
    values: dict[str, Any] = {
        "tensors": ("t",),
        "read": ("t",),
        "module": "",
        "exponent": histogram.exponent,
        "counts": counts_text(histogram),
        "largest": histogram.largest,
        "lowest": 0.0,
        "channels": 1,
        "dead": 0,
        "thresholds": {},
        "method": "max",
        "threshold": histogram.largest,
        "scale": 1.0,
    }
    return GroupRecord(**{**values, **changes})


# ---- which model it is for


def other_structure() -> OnnxGraph:
    return classifier(classes=5)


def other_batch() -> OnnxGraph:
    return classifier(2)


def other_attribute() -> OnnxGraph:
    proto = classifier().copy_proto()
    [pads] = [entry for entry in proto.graph.node[2].attribute if entry.name == "pads"]
    pads.ints[:] = [2, 0, 1, 1]
    return OnnxGraph(proto)


@pytest.mark.parametrize("make", [other_structure, other_batch, other_attribute])
def test_another_model_is_refused_by_name(make: Callable[[], OnnxGraph], table: CalibrationTable) -> None:
    with pytest.raises(DataRefused, match="calibrated for another model: 'net', and this is 'mine'"):
        check_model(table, digests_of(make(), "mine"))


@pytest.mark.parametrize("place", [0, -1])
def test_other_weights_are_refused_as_such(place: int, table: CalibrationTable) -> None:
    proto = classifier().copy_proto()
    raw = bytearray(proto.graph.initializer[place].raw_data)
    raw[0] ^= 1
    proto.graph.initializer[place].raw_data = bytes(raw)
    with pytest.raises(DataRefused, match="calibrated for other weights of 'net'") as caught:
        check_model(table, digests_of(OnnxGraph(proto), "net"))
    assert "calibrate again" in caught.value.hint


def test_the_same_model_is_taken_whatever_its_name_modules_and_order_of_attributes(table: CalibrationTable) -> None:
    proto = classifier().copy_proto()
    for node in proto.graph.node:
        del node.metadata_props[:]
        entries = list(node.attribute)[::-1]
        del node.attribute[:]
        node.attribute.extend(entries)
    proto.producer_name = "another"
    check_model(table, digests_of(OnnxGraph(proto), "another"))


# ---- damage


def changed(table: CalibrationTable, change: Callable[[Any], None]) -> bytes:
    plain = json.loads(table.to_bytes())
    change(plain)
    return json.dumps(plain).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"{}",
        b"\xff\xfe\x00",
        b'{"schema": 1}',
        b'{"schema": "cnncc.calibration/1"}',
        b"[" * 100_000,
        b'{"schema": ' * 100_000,
    ],
)
def test_what_is_no_table_is_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("schema", ["cnncc.calibration/2", "cnncc.bundle/1", ""])
def test_another_schema_is_refused_before_anything_else_is_read(schema: str, table: CalibrationTable) -> None:
    message = refused(changed(table, lambda plain: plain.update(schema=schema, groups="of another form")))
    assert f"has the schema '{schema}', this cnncc reads '{SCHEMA}'" in message


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataRefused, match="cannot be read"):
            read_table(path)


def test_a_file_too_large_for_a_table_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataRefused, match="too large"):
        read_table(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_read(place: float, value: int, cut: bool, table: CalibrationTable) -> None:
    data = bytearray(table.to_bytes())
    index = int(place * len(data))
    data[index:] = b"" if cut else bytes([value]) + data[index + 1 :]
    try:
        assert isinstance(table_from_bytes(bytes(data), "x"), CalibrationTable)
    except DataRefused as exc:
        assert exc.message.startswith("x ")


hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 10**6, -(10**6), 2**63, 2**64, 10**400, 0.0, -0.0, 1e-45, 1e300, -1.0, "", "x", "x\0"]),
    st.sampled_from(["AAAA", "AAAAAAA=", "int8", "imported"]),
    st.sampled_from([[], {}, [1], ["x"], {"1": 1.0}, [[]]]).map(copy.deepcopy),
)


def places(plain: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in entries:
        found += places(value, (*path, key))
    return found


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_table_of_hostile_values_is_refused_or_usable(data: st.DataObject, table: CalibrationTable) -> None:
    """Whatever is believed must not crash what uses it."""
    plain = json.loads(table.to_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places(plain)))
        holder = plain
        for key in path:
            holder = holder[key]
        value = data.draw(hostile)
        if isinstance(holder, dict) and data.draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = value
    try:
        found = table_from_bytes(json.dumps(plain).encode(), "x")
    except DataRefused:
        return
    for method in ("", "mse", "entropy", "percentile"):
        try:
            quantized = quantize(classifier(), found, name="net", method=method)
        except CnnccError:
            continue
        check(quantized)


def test_unknown_and_missing_fields_are_refused(table: CalibrationTable) -> None:
    assert "unknown field" in refused(changed(table, lambda plain: plain.update(extra=1)))
    assert "missing required field" in refused(changed(table, lambda plain: plain.pop("groups")))
    assert "unknown field" in refused(changed(table, lambda plain: plain["groups"][0].update(zero_point=0)))


def with_counts(counts: str) -> Callable[[Any], None]:
    return lambda plain: plain["groups"][1].update(counts=counts)


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def test_a_bomb_is_not_unpacked(table: CalibrationTable) -> None:
    """A few hundred KB of zlib that hold hundreds of MB."""
    data = changed(table, with_counts(packed(bytes(256 << 20))))
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        message = refused(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "histogram of 'relu_1'" in message
    assert peak < 16 << 20


COUNTS: dict[str, Callable[[NDArray[np.int64]], NDArray[Any]]] = {
    "negative": lambda counts: -counts,
    "none": lambda counts: 0 * counts,
    "absurd": lambda counts: counts * 0 + 2**62,
    "beyond the largest": lambda counts: counts + 1,
    "short": lambda counts: counts[:-1],
    "long": lambda counts: np.append(counts, 0),
    "moved": lambda counts: np.roll(counts, -1),
}


@pytest.mark.parametrize("change", COUNTS.values(), ids=COUNTS)
def test_counts_that_cannot_be_are_refused(
    change: Callable[[NDArray[np.int64]], NDArray[Any]], table: CalibrationTable
) -> None:
    counts = change(histogram_of(table.groups[1]).counts).astype("<i8")
    assert "histogram of 'relu_1'" in refused(changed(table, with_counts(packed(counts.tobytes()))))


@pytest.mark.parametrize("counts", ["!", "AAAA", "x", "ü", packed(bytes(8 * BINS))[:-8], packed(b"")])
def test_a_damaged_histogram_is_refused(counts: str, table: CalibrationTable) -> None:
    refused(changed(table, with_counts(counts)))


@pytest.mark.parametrize(
    "changes",
    [
        {"exponent": None},
        {"exponent": 10**6},
        {"exponent": -(10**6)},
        {"exponent": 0},
        {"largest": 0.0},
        {"largest": -1.0},
        {"largest": 1e300},
        {"largest": 1e-300},
        {"largest": 0.0, "exponent": None},
    ],
)
def test_a_histogram_that_contradicts_its_largest_value_is_refused(
    changes: dict[str, Any], table: CalibrationTable
) -> None:
    refused(changed(table, lambda plain: plain["groups"][1].update(changes)))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, 1e39, -0.0])
def test_a_scale_that_is_no_positive_normal_float32_is_refused(scale: float, table: CalibrationTable) -> None:
    assert "relu_1" in refused(changed(table, lambda plain: plain["groups"][1].update(scale=scale)))


@pytest.mark.parametrize(
    "shift",
    [
        {"amount": 1e39, "scale": 1.0},
        {"amount": -1e39, "scale": 1.0},
        {"amount": 1.0, "scale": 0.0},
        {"amount": 1.0},
        5,
    ],
)
def test_a_shift_that_float32_cannot_hold_is_refused(shift: Any, table: CalibrationTable) -> None:
    refused(changed(table, lambda plain: plain["groups"][1].update(shift=shift)))
    refused(changed(table, lambda plain: plain["groups"][1].update(shift={"amount": 1.0, "scale": -1.0})))
    good = changed(table, lambda plain: plain["groups"][1].update(shift={"amount": 0.5, "scale": 0.25}))
    assert table_from_bytes(good, "x").shifts.keys() == set(table.groups[1].tensors)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_numbers_that_json_has_not_are_refused(number: str, table: CalibrationTable) -> None:
    plain = json.loads(table.to_bytes())
    plain["groups"][1]["scale"] = 12345.5
    refused(json.dumps(plain).replace("12345.5", number).encode())


def test_a_tensor_or_a_layer_that_is_there_twice_is_refused(table: CalibrationTable) -> None:
    assert "a tensor is there twice" in refused(
        changed(table, lambda plain: plain["groups"].append(plain["groups"][0]))
    )
    assert "a layer is there twice" in refused(changed(table, lambda plain: plain["layers"].append(plain["layers"][0])))


def test_a_group_without_tensors_and_an_unknown_precision_are_refused(table: CalibrationTable) -> None:
    assert "no tensors" in refused(changed(table, lambda plain: plain["groups"][0].update(tensors=[])))
    assert "precision" in refused(changed(table, lambda plain: plain["layers"][0].update(precision="int4")))


@pytest.mark.parametrize("bias", ["!", "AAAA", base64.b64encode(np.float32([np.nan]).tobytes()).decode(), "ü"])
def test_a_damaged_array_is_refused(bias: str, table: CalibrationTable) -> None:
    refused(changed(table, lambda plain: plain["layers"][0].update(bias=bias)))


def test_nan_cannot_be_written(table: CalibrationTable) -> None:
    with pytest.raises(ValueError, match="JSON"):
        msgspec.structs.replace(table, sqnr_db=float("nan")).to_bytes()


def test_a_place_that_cannot_be_written_to_is_said(table: CalibrationTable, tmp_path: Path) -> None:
    with pytest.raises(StorageFailed):
        write_table(table, tmp_path / "missing" / "model.calib.json")
