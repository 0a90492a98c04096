"""``make chain-demo`` as a whole: from training to the engine that a device runs; and that nothing stays behind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cnncc_runtime
from cnncc_runtime.bundle import read_bundle
from tests.examples.demos import processes_in, start
from tests.oci import registries

pytestmark = pytest.mark.slow

SIZE = r"^([✓·]?) +(whole|\d+% gone) +(fp32|int8) +top-1 ([\d.]+) % +[\d.]+ ms +([\d.]+) ×"


@pytest.mark.timeout(1800)
def test_a_network_is_trained_shrunk_published_and_run_by_a_device(tmp_path: Path) -> None:
    registries.require()
    with start("chain", tmp_path) as process:
        said, _ = process.communicate(timeout=1700)
    assert process.returncode == 0, said
    out = tmp_path / "build/chain-demo"

    first, other = (found for found in np.array_split(re.findall(SIZE, said, re.MULTILINE), 2))
    assert [tuple(row[1:3]) for row in first] == [
        (share, precision) for share in ("whole", "40% gone", "60% gone") for precision in ("fp32", "int8")
    ]
    assert first[:, 1:].tolist() == other[:, 1:].tolist(), "another budget measures nothing anew"
    [taken] = (row for row in first.tolist() if row[0] == "✓")
    assert taken[1] != "whole"
    assert float(taken[4]) > 1
    assert float(taken[3]) >= float(first[0][3]) - 1.01
    assert re.findall(r"^\(exit code (\d+)\)$", said, re.MULTILINE) == ["130"]
    assert said.count("parity passed") == 1
    assert "✓ runs release 1.0.0" in said

    current = out / "device/state/current/bundle.cnncc"
    assert read_bundle(current).manifest.precision == taken[2]
    with np.load(out / "heldout.npz") as held, cnncc_runtime.load(current) as engine:
        right = np.mean([np.asarray(engine(x[None])).argmax() == y for x, y in zip(held["x"], held["y"], strict=True)])
    assert right >= 0.96
    assert re.search(rf"^{taken[1]}, {taken[2]} .* {right:.2%} ", said, re.MULTILINE), said
    assert processes_in(tmp_path) == []
