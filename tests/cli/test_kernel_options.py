"""``--no-winograd`` and ``--direct``: what they change, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnncc.compiler.bench.subjects import peers
from cnncc.compiler.proof import kernels_of
from cnncc.graph.reader import load_trusted
from cnncc.targets.base import KernelOptions
from cnncc_runtime.bundle import REFERENCE, read_bundle
from tests.cli.conftest import WriteModule
from tests.cli.harness import call

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 32, 3, padding=1)
            self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
            self.head = nn.Linear(32, 5000)

        def forward(self, x):
            return self.head(self.body(self.first(x)).mean((2, 3)))

    def build():
        torch.manual_seed(0)
        return Net().eval()
"""


def kernels(bundle: Path) -> dict[str, str]:
    """Return PyTorch module → name of the rule that made the kernel of its convolution."""
    layers = read_bundle(bundle).manifest.layers
    return {layer.modules[0]: layer.schedule.split(",")[0] for layer in layers if "Conv" in layer.ops}


@pytest.mark.parametrize(
    ("flags", "first", "second", "again"),
    [
        ((), "winograd", "winograd", KernelOptions(True, ("first",))),
        (("--no-winograd",), "conv2d", "conv2d", KernelOptions(False, ("body.0", "body.2", "first"))),
        (("--direct", "body.0"), "conv2d", "winograd", KernelOptions(True, ("body.0", "first"))),
        (("--direct", "body.*"), "conv2d", "conv2d", KernelOptions(False, ("body.0", "body.2", "first"))),
    ],
)
def test_winograd_is_used_where_it_may_be_and_so_it_is_when_layers_are_verified(
    flags: tuple[str, ...], first: str, second: str, again: KernelOptions, write_module: WriteModule, tmp_path: Path
) -> None:
    model, bundle = write_module(MODEL), tmp_path / "net.cnncc"
    call("compile", f"{model}:build", "--input-shape", "1,3,64,64", "-o", bundle, *flags)
    assert kernels(bundle) == {"first": "conv2d", "body.0": first, "body.2": second}
    made = read_bundle(bundle)
    assert kernels_of(made.manifest.layers, load_trusted(made.file(REFERENCE))) == again


def test_a_pattern_that_matches_no_module_is_refused(write_module: WriteModule, tmp_path: Path) -> None:
    model, bundle = write_module(MODEL), tmp_path / "net.cnncc"
    outcome = call(
        "compile", f"{model}:build", "--input-shape", "1,3,64,64", "-o", bundle, "--direct", "layer4.*", code=2
    )
    assert "no convolution lies in a module called 'layer4.*'" in outcome.stderr
    assert "body.0" in outcome.stderr
    assert not bundle.exists()


def test_the_help_of_bench_names_every_peer() -> None:
    text = "".join(call("bench", "--help").stdout.split())  # names are broken at their hyphens
    for peer in peers():
        assert peer in text


def test_weights_grow_as_far_as_they_may(write_module: WriteModule, tmp_path: Path) -> None:
    model, sizes, files = write_module(MODEL), {}, {}
    for growth in ("0", "0.05", "10"):
        bundle = tmp_path / f"net-{growth}.cnncc"
        call(
            *("compile", f"{model}:build", "--input-shape", "1,3,64,64", "-o", bundle),
            *("--winograd-growth", growth),
        )
        record = read_bundle(bundle).manifest.engine.weights
        assert record is not None
        sizes[growth] = sum(record.tensors[position].nbytes for position in record.entries[0])
        files[growth] = (bundle / record.file).stat().st_size
        assert ("winograd" in kernels(bundle).values()) == (growth != "0")
    assert sizes["0"] < sizes["0.05"] <= 1.05 * sizes["0"] + 64 < sizes["10"]
    assert max(files.values()) < 1.02 * files["0"], "transformed weights do not travel"


def test_a_share_of_memory_for_what_is_not_used_is_refused(write_module: WriteModule, tmp_path: Path) -> None:
    model, bundle = write_module(MODEL), tmp_path / "net.cnncc"
    flags = ("--no-winograd", "--winograd-growth", "1")
    outcome = call("compile", f"{model}:build", "--input-shape", "1,3,64,64", "-o", bundle, *flags, code=2)
    assert "--winograd-growth says nothing with --no-winograd" in outcome.stderr
    assert not bundle.exists()
