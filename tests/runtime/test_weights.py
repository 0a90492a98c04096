"""The file of weights: what is refused before anything is mapped, and whose memory it is."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cnncc_runtime
from cnncc_runtime.bundle import MANIFEST, EngineRecord, read_bundle
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import BundleRefused, RunFailed
from cnncc_runtime.tvm_runtime import ABI
from cnncc_runtime.weights import ALIGNMENT, MappedWeights, WeightRecord, WeightsRecord
from tests.runtime.conftest import WEIGHTY
from tests.runtime.engine_files import (
    ENGINE,
    PARTS,
    ROWS,
    WEIGHTS,
    WEIGHTY_RECORD,
    make_bundle,
    manifest,
    weighty_part,
)
from tests.runtime.test_sessions import FOUR, Make, in_process

X = np.linspace(0, 1, 1024, dtype="f")[None]


def weights_of(record: EngineRecord = WEIGHTY_RECORD) -> WeightsRecord:
    assert record.weights is not None
    return record.weights


def described(**changes: Any) -> EngineRecord:
    """The record of the weighty engine with other weights."""
    return replace(WEIGHTY_RECORD, weights=replace(weights_of(), **changes))


def wanted(parts: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return X + sum(weighty_part(part).sum(0, dtype="d") * X for part in parts)


def test_an_engine_takes_its_weights_from_the_file(bundle: Make) -> None:
    with cnncc_runtime.open(bundle("weighty", *WEIGHTY)) as session:
        for _ in range(2):
            np.testing.assert_allclose(session.run({"x": X})["y"], wanted(list(range(PARTS))), rtol=1e-4)


def test_engines_that_share_a_file_but_not_its_record_are_kept_apart(bundle: Make) -> None:
    first = weights_of().tensors[0]
    other = described(tensors=(first,) * PARTS)
    with (
        cnncc_runtime.open(bundle("weighty", *WEIGHTY)) as one,
        cnncc_runtime.open(bundle("weighty", *WEIGHTY, engine=other)) as two,
    ):
        np.testing.assert_allclose(two.run({"x": X})["y"], wanted([0] * PARTS), rtol=1e-4)
        np.testing.assert_allclose(one.run({"x": X})["y"], wanted(list(range(PARTS))), rtol=1e-4)


def assert_refused(path: Path, title: str, change: Callable[[Any], None]) -> None:
    """Change what a bundle says of its weights; it must not be read."""
    plain = json.loads((path / MANIFEST).read_bytes())
    change(plain["engine"]["weights"])
    (path / MANIFEST).write_bytes(canonical_json(plain))
    with pytest.raises(BundleRefused) as caught:
        read_bundle(path)
    assert caught.value.hint, title


def tensor(**fields: Any) -> Callable[[Any], None]:
    return lambda weights: weights["tensors"][1].update(fields)


@pytest.mark.parametrize(
    ("title", "change"),
    [
        ("begins beyond the file", tensor(offset=1 << 40)),
        ("begins beyond 64 bits", tensor(offset=1 << 70)),
        ("ends one row beyond the file", lambda weights: weights["tensors"][-1].update(shape=[ROWS + 1, 1024])),
        ("ends one step beyond the file", lambda weights: weights["tensors"][-1].update(offset=7 * ROWS * 4096 + 64)),
        ("begins before the file", tensor(offset=-ALIGNMENT)),
        ("misaligned", tensor(offset=32)),
        ("larger than any file", tensor(shape=[1 << 39, 1 << 39])),
        ("a size of zero", tensor(shape=[0, 1024])),
        ("two negative sizes", tensor(shape=[-1, -1])),
        ("absurd rank", tensor(shape=[1] * 99)),
        ("wider elements than there are bytes", lambda weights: weights["tensors"][-1].update(dtype="float64")),
        ("no such dtype", tensor(dtype="float33")),
        ("a dtype that holds pointers", tensor(dtype="object")),
        ("a tensor that is not there", lambda weights: weights["entries"].update({"0": [0, PARTS]})),
        ("a tensor before the first", lambda weights: weights["entries"].update({"0": [-1]})),
        ("a batch size without function", lambda weights: weights["entries"].update({"4": []})),
        ("a function without weights", lambda weights: weights.update(entries={})),
        ("a file that is not listed", lambda weights: weights.update(file="other.bin")),
        ("a file outside", lambda weights: weights.update(file="../weights.bin")),
        ("the engine's own file", lambda weights: weights.update(file=ENGINE)),
        ("a surplus field", lambda weights: weights.update(surplus=1)),
    ],
)
def test_a_hostile_record_is_refused_unread(bundle: Make, title: str, change: Callable[[Any], None]) -> None:
    assert_refused(bundle("weighty", *WEIGHTY), title, change)


def test_weights_that_were_cut_changed_or_lost_are_refused_before_the_engine_is_loaded(bundle: Make) -> None:
    path = bundle("weighty", *WEIGHTY)
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    for damage, message in (
        (lambda: (path / WEIGHTS).write_bytes(content), "'weights.bin' was changed after it was built"),
        (lambda: os.truncate(path / WEIGHTS, 1000), "'weights.bin' has 1000 bytes, the manifest says 50331648"),
        (lambda: (path / WEIGHTS).unlink(), "'weights.bin' cannot be read"),
    ):
        damage()
        with pytest.raises(BundleRefused, match=message):
            cnncc_runtime.open(path)
    assert not mapped(path / ENGINE)


def test_a_file_that_is_too_short_for_its_record_cannot_be_written(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleRefused, match=r"do not lie in 'weights\.bin'"):
        make_bundle(tmp_path / "b.cnncc", manifest(*WEIGHTY, engine=WEIGHTY_RECORD), engines / "weighty.so", b"\0" * 64)


def test_another_number_of_weights_than_the_engine_takes_is_refused(bundle: Make) -> None:
    record = described(entries={0: tuple(range(PARTS - 1))})
    with pytest.raises(BundleRefused, match="'main' takes 9 inputs and weights, the manifest lists 8"):
        cnncc_runtime.open(bundle("weighty", *WEIGHTY, engine=record))


@pytest.mark.parametrize("change", [{"shape": (ROWS // 2, 1024)}, {"dtype": "int32"}])
def test_weights_of_another_shape_or_type_than_the_engine_takes_are_an_error(
    bundle: Make, change: dict[str, Any]
) -> None:
    tensors = tuple(replace(tensor, **change) for tensor in weights_of().tensors)
    with (
        cnncc_runtime.open(bundle("weighty", *WEIGHTY, engine=described(tensors=tensors))) as session,
        pytest.raises(RunFailed),
    ):
        session.run({"x": X})


def test_a_bundle_of_the_former_format_is_refused_with_the_way_out(bundle: Make) -> None:
    path = bundle()
    plain = json.loads((path / MANIFEST).read_bytes())
    plain["schema"] = "cnncc.bundle/1"
    del plain["engine"]["weights"]
    (path / MANIFEST).write_bytes(canonical_json(plain))
    with pytest.raises(BundleRefused, match=r"schema is 'cnncc.bundle/1', this cnncc reads 'cnncc.bundle/5'") as caught:
        read_bundle(path)
    assert "build the bundle again" in caught.value.hint


def test_a_file_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    record = WeightsRecord("empty", (WeightRecord(0, (16,), "float32"),), {0: (0,)})
    with (tmp_path / "empty").open("rb") as file, pytest.raises(BundleRefused, match="'empty' cannot be mapped"):
        MappedWeights(file, record)


def test_a_file_cannot_be_engine_and_weights_at_once(engines: Path, tmp_path: Path) -> None:
    record = EngineRecord(ENGINE, "tvm-vm", ABI, {0: "main"}, WeightsRecord(ENGINE, (), {0: ()}))
    with pytest.raises(BundleRefused, match="which is its weights too"):
        make_bundle(tmp_path / "b.cnncc", manifest(engine=record), engines / "conv.so")


# Whose memory it is


def mapped(path: Path) -> bool:
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


def test_the_map_outlives_the_bundle_and_ends_with_the_last_session(bundle: Make) -> None:
    path = bundle("weighty", *WEIGHTY)
    first, second = cnncc_runtime.open(path), cnncc_runtime.open(path)
    assert mapped(path / WEIGHTS)
    kept = first.run({"x": X})["y"]
    first.close()
    name = str((path / WEIGHTS).resolve())
    shutil.rmtree(path)
    np.testing.assert_array_equal(second.run({"x": X})["y"], kept)
    second.close()
    del first, second
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()


def test_weights_are_the_files_own_pages_and_nothing_more(bundle: Make) -> None:
    code = f"""
import numpy as np
from tests.runtime.test_sessions import pages, rss
import cnncc_runtime
x = np.ones((1, 1024), "f")
small = cnncc_runtime.open({str(bundle("identity", *FOUR))!r})
small.run({{"x": x[0, :4]}})
before = rss("VmHWM")
session = cnncc_runtime.open({str(bundle("weighty", *WEIGHTY))!r})
for _ in range(2):
    session.run({{"x": x}})
peak = rss("VmHWM") - before
kinds = pages("weights.bin")
print(peak, kinds["Rss"] / 1024, kinds["Anonymous"])
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr
    peak, resident, copied = map(float, done.stdout.split())
    assert resident == pytest.approx(48, abs=1)
    assert copied == 0, "other processes cannot share these pages"
    assert peak < 48 * 1.15, "there was a copy"
