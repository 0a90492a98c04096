"""The user's code as DATA."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cnncc.calibration.data import open_data
from cnncc.calibration.stream import DataStream
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import TensorSpec

SPEC = (TensorSpec("image", ("N", 3, 8, 8)),)
TWO = (TensorSpec("a", ("N", 2)), TensorSpec("b", ("N",), "int64"))


def opened(path: Path, code: str, specs: tuple[TensorSpec, ...] = SPEC, **options: object) -> DataStream:
    """Open ``rows`` of a file of code."""
    (path / "m.py").write_text("import numpy as np\nz = lambda n, v=0: np.full((n, 3, 8, 8), v, np.float32)\n" + code)
    return open_data(f"{path / 'm.py'}:rows", specs, None, **{"limit": None, **options})


def test_batches_become_rows_up_to_the_limit(tmp_path: Path) -> None:
    code = "def rows():\n    for n in range(4):\n        yield z(3, n), np.arange(3) + 10 * n\n"
    samples = list(opened(tmp_path, code, limit=7))
    assert [sample.label for sample in samples] == [0, 1, 2, 10, 11, 12, 20]
    assert [sample.name for sample in samples][3:5] == ["batch 1 x[0]", "batch 1 x[1]"]
    assert [int(sample.feeds["image"][0, 0, 0, 0]) for sample in samples] == [0, 0, 0, 1, 1, 1, 2]
    assert len(list(opened(tmp_path, code))) == 12


def test_the_factory_is_asked_for_no_more_than_is_wanted(tmp_path: Path) -> None:
    code = "def rows():\n    yield z(2)\n    yield z(2)\n    raise RuntimeError('too far')\n"
    assert len(list(opened(tmp_path, code, limit=4))) == 4
    with pytest.raises(DataRefused, match="too far"):
        list(opened(tmp_path, code, limit=5))


def test_dicts_feed_several_inputs(tmp_path: Path) -> None:
    code = "def rows():\n    yield {'a': np.ones((2, 2), 'f'), 'b': np.array([7, 8])}, np.array([0, 1])\n"
    samples = list(opened(tmp_path, code, TWO))
    assert [(sample.feeds["b"].tolist(), sample.label) for sample in samples] == [([7], 0), ([8], 1)]


def test_maps_are_labels(tmp_path: Path) -> None:
    [sample] = opened(tmp_path, "def rows():\n    yield z(1), np.array([[[1, 2], [3, 255]]], np.uint8)\n")
    np.testing.assert_array_equal(sample.label, [[1, 2], [3, 255]])


def test_a_buffer_that_is_filled_again_does_not_change_what_was_given(tmp_path: Path) -> None:
    code = "def rows():\n    x, y = z(1), np.zeros((1, 2, 2), int)\n    for n in range(3):\n"
    code += "        x[...] = n\n        y[...] = n\n        yield x, y\n"
    samples = list(opened(tmp_path, code))
    assert [int(sample.feeds["image"].max()) for sample in samples] == [0, 1, 2]
    assert [sample.label.max() for sample in samples] == [0, 1, 2]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def rows():\n    yield np.float32(3)\n", "image is a single float32"),
        ("def rows():\n    yield None\n", "single object"),
        ("def rows():\n    yield z(2), np.zeros(3)\n", "2 inputs and 3 labels"),
        ("def rows():\n    yield z(2), np.array(['a', 'b'])\n", "not a class index per input"),
        ("def rows():\n    yield z(1), np.array([0.5])\n", r"batch 0 x\[0\]: its label 0.5"),
        ("def rows():\n    yield z(1)\n    yield z(1, np.nan)\n", r"batch 1 x\[0\] holds NaN or Inf"),
        ("def rows():\n    yield z(1).astype('f8')\n", r"batch 0 x\[0\].*float64"),
        ("def rows():\n    yield {'picture': z(1)}\n", r"batch 0 x\[0\].*missing: image"),
        ("def rows():\n    yield {'image': z(1), 'more': z(1)}\n", "unknown inputs: more"),
        ("def rows():\n    yield {'image': z(1), 'more': z(2)}\n", "1 of image, 2 of more"),
        ("def rows():\n    yield {}\n", "it holds none"),
        ("def rows():\n    yield [[1, 2], [3]], None\n", "ValueError"),
        ("def rows():\n    return\n    yield\n", "holds no samples"),
        ("def rows():\n    return 3\n", "not iterable"),
        ("def rows(path):\n    yield z(1)\n", "path"),
        ("def rows():\n    raise SystemExit(3)\n    yield\n", "SystemExit"),
    ],
)
def test_what_is_yielded_must_be_samples(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(DataRefused, match=words):
        list(opened(tmp_path, code))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("rows = 3\n", "int, not a function"),
        ("row = 3\n", "no attribute 'rows'"),
        ("import no_such_package\n", "no_such_package"),
        ("def rows(:\n", "SyntaxError"),
    ],
)
def test_a_module_that_holds_no_factory_is_refused_at_once(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(DataRefused, match=f"cannot be called.*{words}"):
        opened(tmp_path, code)


def test_several_inputs_need_a_dict(tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match="takes 2 inputs") as error:
        list(opened(tmp_path, "def rows():\n    yield z(1)\n", TWO))
    assert "a, b" in error.value.hint


def test_the_line_that_failed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataRefused) as error:
        list(opened(tmp_path, "def rows():\n    yield z(1)\n    int('no number')\n"))
    assert error.value.where == (f"{tmp_path / 'm.py'}:5, in rows",)


def test_ctrl_c_in_the_users_code_stays_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(opened(tmp_path, "def rows():\n    raise KeyboardInterrupt\n    yield\n"))


def test_what_the_code_prints_stays_off_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list(opened(tmp_path, "print('import')\ndef rows():\n    print('call')\n    yield z(1)\n"))
    assert capsys.readouterr() == ("", "import\ncall\n")


def test_code_finds_what_lies_beside_it_and_leaves_the_path_alone(tmp_path: Path) -> None:
    (tmp_path / "beside_the_data.py").write_text("value = 5\n")
    (tmp_path / "later_beside_the_data.py").write_text("value = 6\n")
    before = list(sys.path)
    code = "import beside_the_data as b\ndef rows():\n    import later_beside_the_data as l\n"
    code += "    yield z(1, b.value + l.value)\n"
    try:
        [sample] = opened(tmp_path, code)
        assert sample.feeds["image"].max() == 11
        assert sys.path == before
    finally:
        for name in ("beside_the_data", "later_beside_the_data"):
            sys.modules.pop(name, None)


def test_what_lies_beside_a_file_comes_before_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "this.py").write_text("value = 5\n")  # Python has a module of that name
    before = sys.modules.pop("this", None)
    try:
        [sample] = opened(tmp_path, "import this\ndef rows():\n    yield z(1, this.value)\n")
        assert sample.feeds["image"].max() == 5
    finally:
        sys.modules.pop("this", None)
        if before:
            sys.modules["this"] = before


def test_a_module_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_of_here.py").write_text(
        "import numpy as np\ndef rows():\n    yield np.zeros((2, 3, 8, 8), 'f')\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        assert len(list(open_data("rows_of_here:rows", SPEC, None, limit=None))) == 2
    finally:
        sys.modules.pop("rows_of_here", None)
