"""The GPU, and engines that are built for it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file as save_arrays

from cnncc_runtime.gpu import HostGpu, host_gpus
from tests.cli.conftest import digits_network
from tests.cli.harness import DIGITS, call

Compile = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpu(pytestconfig: pytest.Config) -> HostGpu:
    """The GPU; without one the test fails where such tests were asked for (``-m gpu``), and is skipped elsewhere."""
    found = host_gpus()
    if not found:
        asked = pytestconfig.option.markexpr == "gpu"
        pytest.fail("this machine has no NVIDIA GPU") if asked else pytest.skip("no NVIDIA GPU")
    return found[0]


@pytest.fixture(scope="session")
def digits_flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """MODEL and flags that compile the digits CNN with seeded weights; int8 is calibrated on seeded data."""
    folder = tmp_path_factory.mktemp("digits")
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(1)
        arrays = {name: value.numpy() for name, value in digits_network().state_dict().items()}
    save_arrays(arrays, folder / "weights.safetensors")
    data = np.random.default_rng(0).random((64, 3, 28, 28), np.float32)
    np.savez(folder / "data.npz", x=data)
    return (f"{DIGITS}:build", "--weights", folder / "weights.safetensors")


@pytest.fixture(scope="session")
def compiled(gpu: HostGpu, digits_flags: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile the digits CNN for this GPU: ``compiled("int8", "--batch", "1")``; equal flags give the same bundle."""
    made: dict[tuple[str, ...], Path] = {}

    def compile_(precision: str, *flags: str) -> Path:
        key = (precision, *flags)
        if key not in made:
            bundle = tmp_path_factory.mktemp("bundle") / f"{precision}.cnncc"
            data = Path(digits_flags[-1]).with_name("data.npz")
            calibrated = ("--data", data, "--allow-slow") if precision == "int8" else ()
            arguments = ("--target", "cuda", "--precision", precision, "-o", bundle, *calibrated, *flags)
            call("compile", *digits_flags, *arguments)
            made[key] = bundle
        return made[key]

    return compile_
