"""Structured pruning: what is tied goes together, what is worth nothing goes without a trace, and weights come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cnncc.compiler.pruned import fit_channels
from cnncc.compiler.zoo import define_torchvision_schemas
from cnncc.compression.channels import Bundle, Channels
from cnncc_runtime.errors import ModelRefused, WeightsRefused
from tests.compression.blocks import NETWORKS, Bottleneck, Dense, Grouped, Residual, Segmenter, build

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def by_magnitude(group: Any) -> torch.Tensor | None:
    """What `torch_pruning` says by the norms of a group's weights."""
    import torch_pruning

    found: torch.Tensor | None = torch_pruning.importance.GroupMagnitudeImportance()(group)
    return found


def marked(channels: dict[nn.Module, list[int]]) -> Callable[[Any], torch.Tensor | None]:
    """Return what finds channels of some layers worth nothing, and all others something."""

    def importance(group: Any) -> torch.Tensor | None:
        root = group[0].dep.target.module
        worth = torch.ones(len(group[0].idxs))
        worth[channels.get(root, [])] = 0.0
        return worth

    return importance


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_pruned_network_runs_and_its_weights_fit_the_factorys(kind: type[nn.Module], share: float) -> None:
    network = build(kind)
    before = sum(parameter.numel() for parameter in network.parameters())
    channels = Channels(network, (X,))
    gone = channels.prune(share, by_magnitude, multiple=4)
    assert gone
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    expected = network.eval()(X)
    assert expected.shape == build(kind)(X).shape

    again = build(kind, seed=3)
    changed = fit_channels(again, network.state_dict())
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(X), expected)
    assert gone.keys() <= changed.keys()
    for layer, count in gone.items():
        assert changed[layer][0] - changed[layer][1] == count


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_left_is_a_multiple_of_what_kernels_like(kind: type[nn.Module]) -> None:
    network = build(kind)
    channels = Channels(network, (X,))
    gone = channels.prune(0.45, by_magnitude, multiple=8)
    for bundle in channels.bundles():
        if bundle.layer in gone:
            assert bundle.units % 8 == 0


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (Residual, "first.0.0"),
        (Bottleneck, "expand.0"),
        (Dense, "second.0"),
        (Grouped, "stem.0"),
        (Segmenter, "down.1.0"),
    ],
)
def test_channels_that_are_always_zero_go_without_a_trace(kind: type[nn.Module], layer: str) -> None:
    network = build(kind)
    conv, norm = network.get_submodule(layer), network.get_submodule(f"{layer[:-1]}1")
    count = conv.out_channels
    units = count // 4 if kind is Grouped else count
    dead = [unit + group * units for group in range(count // units) for unit in range(0, units, 2)]
    with torch.no_grad():
        for module in (norm, *([network.depthwise[1]] if isinstance(network, Bottleneck) else [])):
            module.weight[dead] = 0.0
            module.bias[dead] = -1.0  # ReLU makes zeros of it
    expected = network(X)
    channels = Channels(network, (X,))
    roots = {module: dead for module in network.modules() if getattr(module, "out_channels", None) == count}
    total = sum(bundle.units for bundle in channels.bundles())
    share = len(dead) // (count // units) / total
    gone = channels.prune(share, marked({conv: dead} if kind is not Bottleneck else roots), multiple=1)
    assert sum(gone.values()) == len(dead)
    assert torch.allclose(network(X), expected, atol=1e-5)


def test_tied_channels_are_one_bundle_and_outputs_are_none() -> None:
    found = {bundle.layer: bundle for bundle in Channels(build(Residual), (X,)).bundles()}
    tied = next(bundle for bundle in found.values() if "stem.0" in bundle.layers)
    assert {name for name, makes in tied.layers.items() if makes} == {"stem.0", "first.1.0"}
    assert {name for name, makes in tied.layers.items() if not makes} == {"first.0.0", "second.0.0", "project"}
    assert "head" not in {name for bundle in found.values() for name, makes in bundle.layers.items() if makes}
    assert not any("classes" in bundle.layer for bundle in Channels(build(Segmenter), (X,)).bundles())


def test_what_costs_more_goes_first_where_all_is_worth_the_same() -> None:
    network = build(Residual)
    channels = Channels(network, (X,))
    dear = "second.0.0"

    def cost(bundle: Bundle) -> float:
        return 10.0 if bundle.layer == dear else 1.0

    gone = channels.prune(8 / channels.total, marked({}), cost=cost, multiple=1)
    assert gone == {dear: 8}


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_steps_add_up_to_the_share_that_is_asked_for(multiple: int) -> None:
    network = build(Residual)
    channels = Channels(network, (X,))
    total = channels.total
    for share in (0.1, 0.25, 0.5):
        channels.prune(share, by_magnitude, multiple=multiple)
        left = sum(bundle.units for bundle in channels.bundles())
        assert abs(total - left - round(share * total)) <= multiple // 2


def test_a_bundle_is_never_pruned_away() -> None:
    network = build(Residual)
    Channels(network, (X,)).prune(1.0, by_magnitude, multiple=4, most=0.9)
    assert all(module.out_channels >= 4 for module in network.modules() if isinstance(module, nn.Conv2d))
    network(X)


def test_code_that_counts_on_its_channels_is_refused_with_the_layers() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).view(2, 16, -1).mean(2))  # type: ignore[no-any-return]

    with pytest.raises(ModelRefused, match="does not run with fewer channels") as caught:
        Channels(Fixed().eval(), (X,)).prune(0.5, by_magnitude, multiple=4)
    assert caught.value.where == ("conv: 8 channels fewer",)


def test_a_model_whose_code_fails_is_refused_with_the_module() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.first(x)
            raise ValueError("not today")

    with pytest.raises(ModelRefused, match="cannot be traced for pruning: ValueError: not today") as caught:
        Channels(nn.Sequential(nn.ReLU(), Broken()), (X,))
    assert caught.value.where == ("1",)
    with pytest.raises(ModelRefused) as caught:
        Channels(Broken(), (X,))
    assert caught.value.where == ("forward of Broken",)


def test_a_model_that_the_tracer_cannot_follow_is_refused_with_the_layer() -> None:
    """ShuffleNet's channels change places in a view of five dimensions."""
    define_torchvision_schemas()
    from torchvision.models import shufflenet_v2_x0_5

    with pytest.raises(ModelRefused, match="cannot be traced for pruning: ") as caught:
        Channels(shufflenet_v2_x0_5().eval(), (torch.randn(1, 3, 64, 64),))
    assert caught.value.where == ("what comes after stage4.1.branch2.6",)


def test_weights_of_another_network_are_refused_by_module() -> None:
    state = build(Residual).state_dict()
    state["stem.0.weight"] = torch.zeros(99, 3, 3, 3)
    with pytest.raises(WeightsRefused, match=r"do not fit stem\.0, a Conv2d"):
        fit_channels(build(Residual), state)
