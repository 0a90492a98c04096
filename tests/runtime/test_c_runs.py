"""``cnncc-run`` computes what the session of the Python runtime computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cnncc_runtime
from cnncc_runtime.bundle import GOLDEN, SCHEMA, EngineRecord, write_bundle
from cnncc_runtime.cpu import _X86_IMPLIED, _X86_RENAMED, _X86_SAME, host_cpu, usable_cores
from cnncc_runtime.golden import GoldenLimit, golden_bytes
from cnncc_runtime.specs import DTYPES, TensorSpec
from cnncc_runtime.tvm_runtime import ABI
from tests.runtime.c_runner import SOURCE, Runner
from tests.runtime.conftest import HEAVY, WEIGHTY
from tests.runtime.engine_files import ENGINE, conv_reference, manifest

MakeBundle = Callable[..., Path]
RANDOM = np.random.default_rng(3)


def outputs_of(runner: Runner, bundle: Path, folder: Path, *inputs: NDArray[Any], flags: tuple[str, ...] = ()) -> Any:
    """Run a bundle on arrays; return its outputs by name."""
    folder.mkdir(exist_ok=True)
    arguments: list[str | Path] = []
    for number, array in enumerate(inputs):
        np.save(folder / f"{number}.npy", array)
        arguments += ["--input", folder / f"{number}.npy"]
    found = runner(bundle, *arguments, "--output", folder / "out", "--json", *flags).document
    return {made["name"]: np.load(folder / "out" / made["file"]) for made in found["outputs"]}


def with_golden(bundle: Path, name: str, feeds: Any, outputs: Any, limits: Any) -> Path:
    """Return a copy of a bundle with golden data."""
    read = cnncc_runtime.bundle.read_bundle(bundle)
    made = bundle.with_name(f"{name}.cnncc")
    made.mkdir()
    files: Any = {name: (record.role, bundle / name) for name, record in read.manifest.files.items()}
    write_bundle(made, read.manifest, files | {GOLDEN: ("golden", golden_bytes(feeds, outputs, limits))})
    return made


def test_a_convolution(runner: Runner, bundle: MakeBundle, tmp_path: Path) -> None:
    x = RANDOM.standard_normal((1, 3, 16, 16)).astype("f")
    made = bundle("conv")
    [y] = outputs_of(runner, made, tmp_path / "io", x).values()
    np.testing.assert_allclose(y, conv_reference(x), rtol=1e-5, atol=1e-5)
    with cnncc_runtime.open(made) as session:
        np.testing.assert_array_equal(y, session.run({"x": x})["y"])


def test_the_inputs_say_which_batch_size_runs(runner: Runner, bundle: MakeBundle, tmp_path: Path) -> None:
    specs = [TensorSpec("x", ("N", 3, 16, 16))], [TensorSpec("y", ("N", 8, 16, 16))]
    engine = EngineRecord(ENGINE, "tvm-vm", ABI, {1: "main_1", 4: "main_4"})
    made = bundle("batches", *specs, engine=engine, batches=(1, 4))
    for batch in (1, 4):
        x = RANDOM.standard_normal((batch, 3, 16, 16)).astype("f")
        [y] = outputs_of(runner, made, tmp_path / str(batch), x).values()
        np.testing.assert_allclose(y, conv_reference(x), rtol=1e-5, atol=1e-5)
    np.save(tmp_path / "three.npy", x[:3])
    assert (
        "batch size 3 was not built, the bundle holds 1, 4"
        in runner(made, "--input", tmp_path / "three.npy", code=4).stderr
    )
    assert "batch size 2 was not built" in runner(made, "--batch", "2", code=2).stderr
    assert "float32[4, 3, 16, 16]" in runner(made, "--input", tmp_path / "4" / "0.npy", "--batch", "1", code=4).stderr
    (tmp_path / "x.raw").write_bytes(x.tobytes())
    raw = runner(made, "--input", tmp_path / "x.raw", "--raw", "--batch", "4", "--output", tmp_path / "raw", "--json")
    [told] = raw.document["outputs"]
    np.testing.assert_array_equal(np.load(tmp_path / "raw" / told["file"]), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_type(runner: Runner, bundle: MakeBundle, tmp_path: Path, dtype: str) -> None:
    x = RANDOM.integers(0, 2 if dtype == "bool" else 100, (2, 3)).astype(dtype)
    made = bundle(f"same-{dtype}", [TensorSpec("x", (2, 3), dtype)], [TensorSpec("y", (2, 3), dtype)])
    [y] = outputs_of(runner, made, tmp_path / "io", x).values()
    np.testing.assert_array_equal(y, x[::-1])
    assert y.dtype == x.dtype


def test_inputs_and_outputs_keep_their_order(runner: Runner, bundle: MakeBundle, tmp_path: Path) -> None:
    a, b = np.arange(4, dtype="f"), np.full(4, 10, "f")
    made = bundle("minus", [TensorSpec("b", (4,)), TensorSpec("a", (4,))], [TensorSpec("y", (4,))])
    [y] = outputs_of(runner, made, tmp_path / "minus", a, b).values()
    np.testing.assert_array_equal(y, a - b)
    names = [TensorSpec("../sum", (4,)), TensorSpec("a/b c", (4,))]
    found = outputs_of(runner, bundle("two", [TensorSpec("x", (4,))], names), tmp_path / "two", a)
    np.testing.assert_array_equal(found["../sum"], a + a)
    np.testing.assert_array_equal(found["a/b c"], a * a)
    assert sorted(path.name for path in (tmp_path / "two" / "out").iterdir()) == ["0-.._sum.npy", "1-a_b_c.npy"]


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_loops_are_shared_among_threads(runner: Runner, bundle: MakeBundle, tmp_path: Path, threads: str) -> None:
    x = RANDOM.standard_normal((512, 64)).astype("f")
    made = bundle("heavy", *HEAVY)
    [y] = outputs_of(runner, made, tmp_path / "io", x, flags=("--threads", threads)).values()
    with cnncc_runtime.open(made, threads=1) as session:
        np.testing.assert_array_equal(y, session.run({"x": x})["y"])


def test_weights_are_mapped(runner: Runner, bundle: MakeBundle, tmp_path: Path) -> None:
    x = RANDOM.standard_normal((1, 1024)).astype("f")
    made = bundle("weighty", *WEIGHTY)
    [y] = outputs_of(runner, made, tmp_path / "io", x).values()
    with cnncc_runtime.open(made) as session:
        np.testing.assert_array_equal(y, session.run({"x": x})["y"])


def test_golden_outputs_within_their_tolerance_pass(runner: Runner, bundle: MakeBundle) -> None:
    feeds = {"x": RANDOM.standard_normal((1, 3, 16, 16)).astype("f")}
    exact = conv_reference(feeds["x"])
    limits = {"y": GoldenLimit(1e-5, 1e-5)}
    good = with_golden(bundle("conv"), "good", feeds, {"y": exact}, limits)
    assert runner(good, "--verify", "--json").document["verify"] == {"problems": [], "passed": True}
    wrong = exact.copy()
    wrong[0, 0, 0, 0] += 1
    for number, (golden, words) in enumerate(
        [
            (wrong, "is off by"),
            (np.where(exact == exact.max(), np.nan, exact).astype("f"), "is NaN or Inf where the golden one is not"),
            (exact.astype(np.float64), "is float32[1, 8, 16, 16], not float64[1, 8, 16, 16]"),
        ]
    ):
        bad = with_golden(bundle("conv"), f"bad{number}", feeds, {"y": golden}, limits)
        said = runner(bad, "--verify", "--json", code=1)
        [problem] = said.document["verify"]["problems"]
        assert words in problem
        assert words in said.stderr
        assert said.document["verify"]["passed"] is False
    unlimited = with_golden(bundle("conv"), "unlimited", feeds, {"y": wrong}, {})
    assert "differs from the golden one" in runner(unlimited, "--verify", code=1).stderr
    assert "no golden data" in runner(bundle("conv"), "--verify", code=4).stderr


def test_a_benchmark_gives_percentiles(runner: Runner, bundle: MakeBundle) -> None:
    found = runner(bundle("conv"), "--bench", "0.2", "--threads", "1", "--json").document["bench"]
    assert 0 < found["p50"] <= found["p90"] <= found["p99"]
    assert found["count"] > 1
    assert found["input"] == "zeros"


def test_a_profile_names_the_kernels(runner: Runner, bundle: MakeBundle) -> None:
    made = bundle("heavy", *HEAVY)
    [call] = runner(made, "--profile", "--json").document["profile"]
    assert call["kernel"] == "work"
    assert call["seconds"] > 0
    assert "work" in runner(made, "--profile").stdout


def test_an_engine_that_fails_says_so(runner: Runner, bundle: MakeBundle, tmp_path: Path) -> None:
    specs = [TensorSpec("x", (4,))], [TensorSpec("y", (4,))]
    assert "no.such.function" in runner(bundle("absent", *specs), code=4).stderr
    assert "brings no threads" in runner(bundle("threadless", *specs), code=4).stderr
    assert (
        "takes 1 inputs and weights, the manifest lists 2"
        in runner(bundle("identity", [*specs[0], TensorSpec("z", (4,))], specs[1]), code=4).stderr
    )
    np.save(tmp_path / "x.npy", np.zeros(4, "f"))
    two = bundle("identity", specs[0], [*specs[1], TensorSpec("z", (4,))])
    assert "returned 1 outputs, the manifest lists 2" in runner(two, "--input", tmp_path / "x.npy", code=5).stderr


def test_it_describes_this_machine_as_python_does(runner: Runner) -> None:
    found = runner("--features", "--json").document
    host = host_cpu()
    assert found["machine"] == host.machine
    assert set(found["features"]) == host.features
    assert found["cores"] == usable_cores()


def test_it_knows_the_features_that_python_knows() -> None:
    text = (SOURCE / "cpu.c").read_text(encoding="utf-8")
    body = text[text.index("NAMES[][2]") : text.index("static const char *flags")]
    pairs = set(re.findall(r'{"([^"]+)", "([^"]+)"}', body))
    implied = {(flag, name) for flag, names in _X86_IMPLIED.items() for name in names}
    assert pairs == set(_X86_RENAMED.items()) | {(name, name) for name in _X86_SAME.split()} | implied


def test_it_reads_what_this_cnncc_writes() -> None:
    header = (SOURCE / "manifest.h").read_text(encoding="utf-8")
    assert f'#define SCHEMA "{SCHEMA}"' in header
    assert f'#define ABI "{ABI}"' in header
    assert manifest().engine.format == "tvm-vm"
