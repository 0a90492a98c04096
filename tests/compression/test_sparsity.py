"""Zeros: how many, where, and that fine-tuning leaves them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cnncc.compression.sparsity import apply_masks, two_of_four, unstructured, zeros
from cnncc.targets.cuda.sparse import is_sparse
from cnncc_runtime.errors import ModelRefused
from tests.compression.blocks import Dense, Grouped, build


@given(st.floats(0, 1), st.integers(0, 3))
def test_the_smallest_weights_go_over_all_layers(share: float, seed: int) -> None:
    network = build(Dense, seed)
    masks = unstructured(network, share)
    weights = {name: network.get_parameter(name).detach() for name in masks}
    kept = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
    assert len(gone) == round(share * (len(gone) + len(kept)))
    assert not len(gone) or not len(kept) or gone.max() <= kept.min()
    apply_masks(network, masks)
    assert zeros(network) == pytest.approx(len(gone) / (len(gone) + len(kept)))


def test_of_every_four_input_channels_the_two_largest_stay() -> None:
    network = build(Dense)
    masks, dense = two_of_four(network)
    assert dense == ("first.0",)  # three channels
    before = {name: network.get_parameter(name).detach().clone() for name in masks}
    apply_masks(network, masks)
    for name, old in before.items():
        new = network.get_parameter(name).detach()
        assert is_sparse(new.numpy())  # as TensorRT's definition has it
        groups = old.abs().movedim(1, -1).reshape(-1, 4)
        left = new.abs().movedim(1, -1).reshape(-1, 4)
        assert torch.allclose(left.sum(1), groups.topk(2, dim=1).values.sum(1))


def test_grouped_convolutions_are_grouped_within_their_group() -> None:
    masks, _ = two_of_four(build(Grouped))
    mask = masks["grouped.0.weight"]
    assert mask.shape == (64, 8, 3, 3)
    counts = mask.reshape(64, 2, 4, 3, 3).sum(2)
    assert set(counts.flatten().tolist()) == {2}


def test_ties_leave_two_all_the_same() -> None:
    layer = nn.Sequential(nn.Linear(8, 2))
    nn.init.constant_(layer[0].weight, 1.0)
    masks, _ = two_of_four(layer)
    assert np.array_equal(masks["0.weight"].sum(1), [4, 4])


@pytest.mark.parametrize("prune", [lambda m: unstructured(m, 0.5), two_of_four])
def test_a_model_without_such_layers_is_refused(prune: object) -> None:
    with pytest.raises(ModelRefused):
        prune(nn.Sequential(nn.BatchNorm2d(3)))  # type: ignore[operator]


def test_masks_hold_through_training() -> None:
    network = build(Dense)
    masks = unstructured(network, 0.7)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(3):
        apply_masks(network, masks)
        network(torch.randn(2, 3, 16, 16)).sum().backward()
        optimizer.step()
        apply_masks(network, masks)
    values = [network.get_parameter(name)[~mask] for name, mask in masks.items()]
    assert all(not bool(value) for value in itertools.chain.from_iterable(values))
