"""``cnncc-run`` refuses what does not fit this machine or was damaged, by the exit codes of the command line."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnncc_runtime.bundle import GOLDEN, MANIFEST, EngineRecord, FileRecord, TargetRecord, read_bundle, write_bundle
from cnncc_runtime.cpu import host_cpu, host_machine
from cnncc_runtime.digests import canonical_json, digest_bytes
from cnncc_runtime.errors import BundleRefused
from cnncc_runtime.golden import GoldenLimit, golden_bytes
from cnncc_runtime.specs import TensorSpec
from cnncc_runtime.tvm_runtime import ABI
from cnncc_runtime.weights import Expansion, WeightRecord, WeightsRecord
from tests.runtime.c_runner import Runner
from tests.runtime.engine_files import ENGINE, WEIGHTS, manifest

LOADS = "TVM's runtime"
"""What `sanitized` says where it would load an engine: nothing was refused before."""

JUDGED = ("batches", "engine", "files", "inputs", "outputs", "parity", "schema", "target")
"""Fields of the manifest that the program reads; the others are those of Python alone."""

ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def elf(machine: str) -> bytes:
    """The beginning of a shared library."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, ELF_MACHINES[machine], 1)
    return head.ljust(256, b"\0")


def make(folder: Path, **changes: Any) -> Path:
    """Write a bundle that uses whatever a manifest can say of an engine; it is whole, but for its code."""
    weights = WeightsRecord(
        WEIGHTS,
        (
            WeightRecord(0, (4, 2), "float64"),
            WeightRecord(64, (3, 4, 5), "float32", Expansion(0, 3)),
            WeightRecord(192, (7,), "int8"),
        ),
        {1: (0, 1), 4: (0, 2)},
    )
    features = tuple(sorted(host_cpu().features)[:5])
    described = manifest(
        [TensorSpec("x", ("N", 3, 4)), TensorSpec("z", ("N",), "int64")],
        [TensorSpec("y", ("N", 2)), TensorSpec("ß", ("N",), "int32")],
        engine=EngineRecord(ENGINE, "tvm-vm", ABI, {1: "main_1", 4: "main_4"}, weights),
        target=replace(manifest().target, features=features),
        batches=(1, 4),
        labels=("cat", 'd"ög\n'),
    )
    feeds = {"x": np.zeros((1, 3, 4), "f"), "z": np.zeros(1, np.int64)}
    outputs = {"y": np.ones((1, 2), "f"), "ß": np.zeros(1, np.int32)}
    golden = golden_bytes(feeds, outputs, {"y": GoldenLimit(1e-6, 2.0)})
    files = {
        ENGINE: ("engine", elf(host_machine())),
        WEIGHTS: ("weights", bytes(256)),
        GOLDEN: ("golden", golden),
        "sub/report.json": ("report", b"{}"),
    }
    folder.mkdir(parents=True)
    write_bundle(folder, replace(described, **changes), files)  # type: ignore[arg-type]
    return folder


def rewrite(folder: Path, change: Callable[[Any], object]) -> None:
    plain = json.loads((folder / MANIFEST).read_bytes())
    change(plain)
    (folder / MANIFEST).write_bytes(canonical_json(plain))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make(tmp_path / "whole.cnncc")


def test_a_whole_bundle_is_loaded(sanitized: Runner, whole: Path) -> None:
    assert LOADS in sanitized(whole, "--verify", code=3).stderr


@pytest.mark.parametrize("verdict", ["failed", "pending"])
def test_what_was_not_proven_is_not_run(sanitized: Runner, tmp_path: Path, verdict: str) -> None:
    bundle = make(tmp_path / "b.cnncc", parity=verdict)
    assert "parity" in sanitized(bundle, code=1).stderr
    assert LOADS in sanitized(bundle, "--allow-unverified", code=3).stderr


def test_what_does_not_fit_is_not_loaded(sanitized: Runner, tmp_path: Path) -> None:
    mine = manifest().target
    other = next(machine for machine in ELF_MACHINES if machine != mine.machine)

    def said(name: str, code: int, **changes: Any) -> str:
        return sanitized(make(tmp_path / name, **changes), code=code).stderr

    assert f"built for: {other} (host), found: {mine.machine}" in said("a", 3, target=replace(mine, machine=other))
    lacking = replace(mine, cpu="future", features=("time-travel", "x"))
    assert "built for: future, found: a CPU which lacks time-travel, x" in said("b", 3, target=lacking)
    gpu = TargetRecord("cuda", "a100", "", "", mine.machine, (), "8.0")
    assert "GPU of compute capability 8.0" in said("c", 3, target=gpu)
    bundle = make(tmp_path / "d")
    rewrite(bundle, lambda plain: plain["engine"].update(abi="tvm-ffi 0.2"))
    assert f"built for: tvm-ffi 0.2, found: {ABI}" in sanitized(bundle, code=3).stderr
    rewrite(bundle, lambda plain: plain["engine"].update(format="tensorrt"))
    assert "the engine's format is 'tensorrt'" in sanitized(bundle, code=4).stderr
    for content, code, words in [(elf(other), 3, f"was built for: {other}"), (bytes(256), 4, "not a shared library")]:
        bundle = make(tmp_path / f"e{code}")
        (bundle / ENGINE).write_bytes(content)
        record = FileRecord(digest_bytes(content), len(content), "engine")
        rewrite(bundle, lambda plain, record=record: plain["files"].update({ENGINE: vars(record)}))
        assert words in sanitized(bundle, code=code).stderr


@pytest.mark.parametrize("name", [ENGINE, WEIGHTS, GOLDEN])
def test_a_file_that_is_not_what_was_built_is_refused(
    sanitized: Runner, whole: Path, tmp_path: Path, name: str
) -> None:
    path = whole / name
    content = path.read_bytes()

    def said() -> str:
        return sanitized(whole, "--verify", code=4).stderr

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"'{name}' was changed after it was built" in said()
    path.write_bytes(content[:-1])
    assert f"'{name}' has {len(content) - 1} bytes, the manifest says {len(content)}" in said()
    path.unlink()
    assert f"'{name}' cannot be read: No such file" in said()
    (tmp_path / "elsewhere").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere")
    assert f"'{name}' is not a plain file" in said()
    path.unlink()
    path.mkdir()
    assert f"'{name}' is not a plain file" in said()
    path.rmdir()
    os.mkfifo(path)
    assert f"'{name}' is not a plain file" in said()


def test_a_folder_of_the_bundle_is_no_link(sanitized: Runner, whole: Path, tmp_path: Path) -> None:
    content = (whole / ENGINE).read_bytes()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "engine.so").write_bytes(content)
    (whole / "inside").symlink_to(tmp_path / "elsewhere")

    def move(plain: Any) -> None:
        plain["files"]["inside/engine.so"] = plain["files"].pop(ENGINE)
        plain["engine"]["file"] = "inside/engine.so"

    rewrite(whole, move)
    assert "'inside' is not a plain folder of the bundle" in sanitized(whole, code=4).stderr
    (whole / "inside").unlink()
    (tmp_path / "elsewhere").rename(whole / "inside")
    assert LOADS in sanitized(whole, code=3).stderr


def test_a_manifest_is_a_plain_file_of_a_folder(sanitized: Runner, whole: Path, tmp_path: Path) -> None:
    assert "is not a bundle folder" in sanitized(tmp_path / "none", code=4).stderr
    assert "is not a bundle folder" in sanitized(whole / MANIFEST, code=4).stderr
    (tmp_path / "empty").mkdir()
    assert "No such file" in sanitized(tmp_path / "empty", code=4).stderr
    (tmp_path / "empty" / MANIFEST).symlink_to(whole / MANIFEST)
    assert "not a plain file" in sanitized(tmp_path / "empty", code=4).stderr
    with (whole / MANIFEST).open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert "more than the 16777216 that it may have" in sanitized(whole, code=4).stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON value"),
        (b"[" * 100_000, "too many values, or too many within each other"),
        (b"[" + b"0," * 3_000_000 + b"0]\n", "too many values"),
        (b'{"a":' * 1000, "too many within each other"),
        (b'{"schema":"cnncc.bundle/4"}\n', "this cnncc-run reads 'cnncc.bundle/5'"),
        (b'{"schema":5}\n', "schema is a whole number, not a text"),
        (b'{"schema":"cnncc.bundle/5"}\n', "it has 1 fields, not 16"),
        (b'{"a":1,"a":1}\n', "repeated or out of order"),
        (b'{"b":1,"a":1}\n', "repeated or out of order"),
        (b'{"a":"\\u0000"}\n', "escape"),
        (b'{"a":"\xff"}\n', "UTF-8"),
        (b'{"a":"\xed\xa0\x80"}\n', "UTF-8"),
        (b'{"a":"', "does not end"),
        (b'{"a":1e999}\n', "too large"),
        (b'{"a":123456789012345678901234567890}\n', "too large"),
        (b'{"a": 1}\n', "no JSON value"),
        (b'{"a":1}', "one newline"),
        (b'{"a":1}\n\n', "one newline"),
        (b'{"a":1}\n\0', "one newline"),
        (b"0x10\n", "one newline"),
    ],
)
def test_what_is_no_canonical_json_is_refused(sanitized: Runner, whole: Path, content: bytes, words: str) -> None:
    (whole / MANIFEST).write_bytes(content)
    assert words in sanitized(whole, code=4).stderr


def weight(plain: Any, position: int) -> Any:
    return plain["engine"]["weights"]["tensors"][position]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: weight(plain, 1)["expansion"].update(parts=0), "an expansion of 0 parts"),
        (lambda plain: weight(plain, 1)["expansion"].update(parts=-1), "an expansion of -1 parts"),
        (lambda plain: weight(plain, 1)["expansion"].update(parts=4), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1)["expansion"].update(matrix=3), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1)["expansion"].update(matrix=-1), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1)["expansion"].update(matrix=1 << 40), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1)["expansion"].update(matrix=1), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1)["expansion"].update(matrix=2), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1).update(dtype="int32"), "cannot be made of what the file holds"),
        (lambda plain: weight(plain, 1).update(offset=65), "does not lie in 'weights.bin'"),
        (lambda plain: weight(plain, 1).update(offset=192), "does not lie in 'weights.bin'"),
        (lambda plain: weight(plain, 1).update(offset=-64), "does not lie in 'weights.bin'"),
        (lambda plain: weight(plain, 2).update(shape=[65]), "does not lie in 'weights.bin'"),
        (lambda plain: weight(plain, 2).update(shape=[1] * 33), "a tensor of 33 axes"),
        (lambda plain: weight(plain, 2).update(shape=[0]), "a tensor of size 0"),
        (lambda plain: weight(plain, 2).update(shape=[1 << 40]), "a tensor of size 1099511627776"),
        (lambda plain: weight(plain, 2).update(shape=[1 << 39] * 32), "larger than any memory"),
        (lambda plain: weight(plain, 2).update(shape=["N"]), "a size is a text, not a whole number"),
        (lambda plain: weight(plain, 2).update(dtype="float8"), "the element type 'float8'"),
        (lambda plain: weight(plain, 2).update(extra=1), "a weight has 5 fields, not 4"),
        (lambda plain: plain["engine"]["weights"]["entries"]["1"].append(3), "the weight 3 of 3"),
        (lambda plain: plain["engine"]["weights"]["entries"]["1"].append(-1), "the weight -1 of 3"),
        (lambda plain: plain["engine"]["weights"]["entries"].pop("4"), "the weights' entries has 1 fields, not 2"),
        (lambda plain: plain["engine"]["entries"].pop("4"), "entries has 1 fields, not 2"),
        (lambda plain: plain.update(batches=[1, 2]), "the batch size 4, which was not built"),
        (lambda plain: plain.update(batches=[]), "entries has 2 fields, not 1"),
        (lambda plain: plain["engine"].update(file="absent.so"), "the engine 'absent.so' is not among the files"),
        (lambda plain: plain["engine"].update(file=WEIGHTS), "the engine 'weights.bin' is its weights too"),
        (lambda plain: plain["engine"]["weights"].update(file="absent"), "the weights 'absent' are not among"),
        (lambda plain: plain["inputs"].append(plain["inputs"][0]), "inputs of the same name"),
        (lambda plain: plain["outputs"][0].update(shape=[1] * 33), "a tensor of 33 axes"),
        (lambda plain: plain["files"].update({"../x": plain["files"][ENGINE]}), "the file '../x'"),
        (lambda plain: plain["files"].update({"/etc/x": plain["files"][ENGINE]}), "the file '/etc/x'"),
        (lambda plain: plain["files"].update({"a//x": plain["files"][ENGINE]}), "the file 'a//x'"),
        (lambda plain: plain["files"].update({"": plain["files"][ENGINE]}), "the file ''"),
        (lambda plain: plain["files"][ENGINE].update(size=-1), "the file 'engine.so'"),
        (lambda plain: plain["files"][ENGINE].update(sha256="sha256:" + "A" * 64), "the file 'engine.so'"),
        (lambda plain: plain.update(parity="perhaps"), "the parity 'perhaps'"),
        (lambda plain: plain.update(label=plain.pop("labels")), "'labels' is missing"),
        (lambda plain: plain["target"].update(features="avx2"), "features is a text, not a list"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    sanitized: Runner, whole: Path, change: Callable[[Any], object], words: str
) -> None:
    rewrite(whole, change)
    assert words in sanitized(whole, code=4).stderr
    with pytest.raises(BundleRefused):
        read_bundle(whole)


def places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every list or object below a value, with each of its keys."""
    for at, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        yield holder, at
        if isinstance(value, (dict, list)):
            yield from places(value)


def mutated(plain: Any, rng: random.Random) -> None:
    """Change one thing of what the program reads of a manifest."""
    judged = {key: plain[key] for key in JUDGED if key in plain}
    found = [(plain if holder is judged else holder, at) for holder, at in places(judged)]
    holder, at = rng.choice(found)
    value = holder[at]
    odd = [None, True, 0, 1, -1, 63, 64, 1 << 31, 1 << 40, 1 << 62, 1 << 70, 1.5, 1e300, "", "x", "../x", "a/./b", "N"]
    odd += [
        [],
        {},
        [0],
        {"0": []},
        {"0": "main"},
        "sha256:" + "0" * 64,
        "float16",
        "float64",
        "passed",
        ENGINE,
        WEIGHTS,
    ]
    kind = rng.random()
    if kind < 0.2:
        del holder[at]
    elif kind < 0.3 and isinstance(holder, dict):
        holder[rng.choice(["0", "1", "4", "zz", "file", "a\x01", "é"])] = value
    elif kind < 0.3:
        holder.insert(0, value)
    elif kind < 0.4 and isinstance(value, list):
        holder[at] = value * rng.choice([2, 40])
    elif kind < 0.5 and isinstance(value, int):
        holder[at] = value + rng.choice([-64, -1, 1, 64])
    else:
        holder[at] = rng.choice(odd)


def fuzz(sanitized: Runner, folder: Path, cases: int, seed: int) -> None:
    """Mutate a manifest, as data and as bytes: the program never crashes, and loads nothing that Python refuses."""
    whole = make(folder / "fuzz.cnncc")
    original = (whole / MANIFEST).read_bytes()
    loaded = 0
    for case in range(cases):
        rng = random.Random(f"{seed}/{case}")
        if rng.random() < 0.7:
            plain = json.loads(original)
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                mutated(plain, rng)
            data = canonical_json(plain)
        else:
            raw = bytearray(original)
            for _ in range(rng.choice([1, 2, 8])):
                start = rng.randrange(len(raw))
                raw[start : start + rng.choice([0, 1, 1, 8, 200])] = rng.randbytes(rng.choice([0, 1, 1, 3]))
            data = bytes(raw)
        (whole / MANIFEST).write_bytes(data)
        outcome = sanitized(whole, "--verify", "--json", code=None)
        assert outcome.document["exit_code"] == outcome.code, (case, data)
        if LOADS in outcome.stderr:
            loaded += 1
            try:
                read_bundle(whole)
            except BundleRefused as exc:
                if not _only_python_reads(data, original):
                    raise AssertionError(f"case {case} was loaded, Python says: {exc}") from exc
    assert loaded < cases / 2
    assert loaded or cases < 100, "cases that nothing is wrong with must be among them"


def _only_python_reads(data: bytes, original: bytes) -> bool:
    """Whether a manifest differs from the original one only where the program does not look."""
    changed, before = json.loads(data), json.loads(original)
    return all(changed[key] == before[key] for key in JUDGED)


def test_no_manifest_breaks_it(sanitized: Runner, tmp_path: Path) -> None:
    fuzz(sanitized, tmp_path, 150, seed=0)


@pytest.mark.slow
def test_no_manifest_of_thousands_breaks_it(sanitized: Runner, tmp_path: Path) -> None:
    fuzz(sanitized, tmp_path, 5000, seed=1)


def fuzz_file(sanitized: Runner, folder: Path, cases: int, change: Callable[[bytearray, random.Random], None]) -> None:
    """Mutate golden data whose digest is right: they come from whoever wrote the manifest."""
    whole = make(folder / "golden.cnncc")
    original = (whole / GOLDEN).read_bytes()
    for case in range(cases):
        raw = bytearray(original)
        change(raw, random.Random(case))
        (whole / GOLDEN).write_bytes(raw)
        record = {"role": "golden", "sha256": digest_bytes(bytes(raw)), "size": len(raw)}
        rewrite(whole, lambda plain, record=record: plain["files"].update({GOLDEN: record}))
        assert sanitized(whole, "--verify", code=None).code in (3, 4)


def scatter(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 4])):
        raw[rng.randrange(len(raw))] = rng.choice([0, 1, 255, rng.randrange(256)])
    if rng.random() < 0.2:
        del raw[rng.randrange(len(raw)) :]


def test_no_golden_data_breaks_it(sanitized: Runner, tmp_path: Path) -> None:
    fuzz_file(sanitized, tmp_path, 100, scatter)


@pytest.mark.slow
def test_no_golden_data_of_thousands_breaks_it(sanitized: Runner, tmp_path: Path) -> None:
    fuzz_file(sanitized, tmp_path, 2000, scatter)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: np.save(path, np.zeros((1, 3, 4))), "is float64[1, 3, 4], the model takes float32[N, 3, 4]"),
        (lambda path: np.save(path, np.zeros((1, 3, 5), "f")), "is float32[1, 3, 5]"),
        (lambda path: np.save(path, np.zeros((1, 12), "f")), "is float32[1, 12]"),
        (lambda path: np.save(path, np.zeros((2, 3, 4), "f")), "batch size 2 was not built"),
        (lambda path: np.save(path, np.zeros((1, 3, 4), ">f4")), "of no type that engines take"),
        (lambda path: np.save(path, np.zeros((1, 3, 4), "f").T), "column-major"),
        (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "of no type that engines take"),
        (lambda path: path.write_bytes(b""), "does not begin as a .npy file"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{  "), "cut short"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x03\x00\x01\x00\x00\x00\n"), "version"),
        (lambda path: path.mkdir(), "not a plain file"),
        (lambda path: None, "No such file"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(
    sanitized: Runner, whole: Path, tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    write(tmp_path / "x.npy")
    np.save(tmp_path / "z.npy", np.zeros(2 if "size 2" in words else 1, np.int64))
    said = sanitized(whole, "--input", tmp_path / "x.npy", "--input", tmp_path / "z.npy", code=4)
    assert words in said.stderr


def test_npy_headers_that_lie_are_refused(sanitized: Runner, whole: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.zeros(1, np.int64))
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4), "f"))
    original = (tmp_path / "x.npy").read_bytes()
    assert LOADS in sanitized(whole, "--input", tmp_path / "x.npy", "--input", tmp_path / "z.npy", code=3).stderr
    huge = (str(1 << 62), str(1 << 70), "99999999", "-1")
    for shape in [*(f"({size}, 3, 4)" for size in huge), "(" + "1," * 60 + ")", "(3)", "(1 3,)", "((1,),)"]:
        text = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape.encode() + b", }"
        header = text.ljust(245) + b"\n"
        lie = original[:8] + struct.pack("<H", len(header)) + header + original[128:]
        (tmp_path / "x.npy").write_bytes(lie)
        sanitized(whole, "--input", tmp_path / "x.npy", "--input", tmp_path / "z.npy", code=4)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b"],
        ["--nonsense"],
        ["b", "--threads", "0"],
        ["b", "--threads", "1.5"],
        ["b", "--threads", "nan"],
        ["b", "--threads"],
        ["b", "--bench", "-1"],
        ["b", "--bench", "1e9"],
        ["b", "--batch", "x"],
        ["b", "--raw"],
        ["b", "--output", "d"],
    ],
)
def test_usage(sanitized: Runner, arguments: list[str]) -> None:
    outcome = sanitized(*arguments, "--json", code=2)
    assert "try: " in outcome.stderr
    assert outcome.document["error"] == "UsageError"


def test_help_lists_every_flag_and_exit_code(sanitized: Runner) -> None:
    from cnncc.cli.main import EXIT_CODES

    told = sanitized("--help").stdout
    for code in range(6):
        assert f"  {code}    " in told
        assert f"  {code}    " in EXIT_CODES


def test_hostile_names_do_not_reach_the_terminal(sanitized: Runner, whole: Path) -> None:
    rewrite(whole, lambda plain: plain["target"].update(machine="\x1b[31m", device="\x9b1m"))
    said = sanitized(whole, "--json", code=3)
    assert "\x1b" not in said.stderr + said.stdout
    assert "\x9b" not in said.stderr
