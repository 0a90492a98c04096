"""Times of kernels, kept: with TensorRT-RTX's own configuration, which still takes caches, and ignores them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cnncc.targets.cuda import timing_cache
from cnncc.targets.cuda.timing_cache import ASIDE, kept_timings, timings_file
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.gpu import HostGpu
from cnncc_runtime.plan_library import logger_of
from tests.calibration.rtx import tensorrt_rtx

TRT10 = Chosen(VENDORS[0], "10.16.1.11")

pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


@pytest.fixture
def config() -> Iterator[Any]:
    trt = tensorrt_rtx()
    builder = trt.Builder(logger_of(trt))
    yield builder.create_builder_config()


@pytest.fixture
def notes() -> list[str]:
    return []


def serialized(config: Any) -> bytes:
    return bytes(config.get_timing_cache().serialize())


def test_a_file_is_for_one_library_and_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (HostGpu("NVIDIA A100-SXM4-40GB", "8.0"), HostGpu("NVIDIA L4", "8.9"))
    monkeypatch.setattr(timing_cache, "host_gpus", lambda: gpus)
    names = {
        timings_file(tmp_path, chosen, gpu)
        for chosen in (TRT10, Chosen(VENDORS[0], "10.16.1.12"), Chosen(VENDORS[1], "11.4.0.106"))
        for gpu in ("8.0", "8.9")
    }
    assert len(names) == 6
    assert timings_file(tmp_path, TRT10, "8.0") == tmp_path / "tensorrt-10.16.1.11-NVIDIA_A100_SXM4_40GB-8.0.timings"
    assert timings_file(None, TRT10, "8.0") is None
    assert timings_file(tmp_path, Chosen(VENDORS[2], "1.7.1.116"), "8.9") is None, "it times nothing"


def test_times_are_written_after_a_build_and_read_before_the_next(
    config: Any, notes: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "timings" / "t.timings"
    with kept_timings(config, file, notes.append):
        assert not file.exists()
    data = serialized(config)
    assert data
    assert file.read_bytes() == f"{digest_bytes(data)}\n".encode() + data
    with kept_timings(config, file, notes.append):
        assert serialized(config) == data
    assert notes == []
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_build_that_fails_leaves_the_file_as_it_was(config: Any, notes: list[str], tmp_path: Path) -> None:
    file = tmp_path / "t.timings"
    with pytest.raises(RuntimeError), kept_timings(config, file, notes.append):
        raise RuntimeError
    assert not file.exists()


@pytest.mark.parametrize("content", [b"", b"sha256:00\nabc", b"no digest at all"])
def test_a_damaged_file_is_set_aside_and_told(config: Any, notes: list[str], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.timings"
    file.write_bytes(content)
    with kept_timings(config, file, notes.append):
        assert file.with_name(file.name + ASIDE).read_bytes() == content
        assert not file.exists()
    assert file.exists()
    [note] = notes
    assert note == (
        f"the timing cache {file} is damaged; it was set aside as {file}{ASIDE}, and all kernels are timed again"
    )


class Foreign:
    """A configuration that takes no cache but an empty one, as TensorRT's does with one of another GPU."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def create_timing_cache(self, data: bytes) -> Any:
        return self.config.create_timing_cache(b""), data

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        real, data = cache
        return not data and self.config.set_timing_cache(real, ignore_mismatch)

    def get_timing_cache(self) -> Any:
        return self.config.get_timing_cache()


def test_a_file_of_another_gpu_is_set_aside_and_told(config: Any, notes: list[str], tmp_path: Path) -> None:
    file = tmp_path / "t.timings"
    file.write_bytes(f"{digest_bytes(b'foreign')}\n".encode() + b"foreign")
    with kept_timings(Foreign(config), file, notes.append):
        pass
    assert "is of another GPU, driver or library" in notes[0]
    assert file.with_name(file.name + ASIDE).read_bytes().endswith(b"foreign")
    assert file.read_bytes().endswith(serialized(config))


def test_a_folder_that_cannot_be_written_costs_no_engine(config: Any, notes: list[str], tmp_path: Path) -> None:
    (tmp_path / "timings").write_text("in the way")
    with kept_timings(config, tmp_path / "timings" / "t.timings", notes.append):
        pass
    assert notes[-1].startswith("the times of kernels are not kept: cannot write")
