"""Forwards that none of us wrote: whatever they do with their integers, the law holds and what is known is free."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import foreign_attention as attention
import foreign_layers as layers
import foreign_nets as nets
import foreign_widths as widths
import pytest
import torch
from foreign import foreign_unet, karras_unet
from laws import assert_comes_back, assert_law, assert_trains, random_keep, thinnest
from test_law import random_mask
from torch import nn
from unets import scatter

import ebdiff

BLOCK = {"embed.residual": 16, "qkv.head": 4, "fc1": 24}
# The spaces that must at least be there, by name and size. Nothing else may break the law.
FREE: dict[type[nn.Module], dict[str, int]] = {
    attention.Projections: {"embed": 16, "q.head": 4},
    attention.ByHeadCount: {"embed": 16, "q.head": 4, "v.head_dim": 4},
    attention.Explicit: {"embed": 16, "q.head": 4},
    attention.GroupedQuery: {"embed": 16, "q.head": 2},
    attention.GroupedQueryInSDPA: {"embed": 16, "q.head": 2},
    attention.NormedQueryKey: {"embed": 16, "q.head": 4},
    attention.Rotary: {"embed": 16, "q.head": 4},
    attention.ComplexRotary: {"embed": 16, "q.head": 4},
    attention.HeadByHead: {"embed": 16},
    attention.Fused: BLOCK | {"qkv.head_dim": 4},
    attention.FusedHeadsFirst: BLOCK,
    attention.FusedHeadsMiddle: BLOCK,
    attention.FusedSplit: BLOCK,
    attention.Einops: {"embed": 16, "qkv.head": 4},
    attention.Linear: {"embed": 16, "qkv.head": 4},
    attention.Joint: {"embed": 16, "q.head": 4, "text[in 2]": 16},
    attention.Parallel: {"embed": 16, "both.head": 4, "both[from 48]": 24},
    attention.Modulated: BLOCK,
    attention.Checkpointed: BLOCK,
    attention.MultiHead: {"embed": 16, "attention.in_proj_weight.head": 4},
    attention.MultiHeadWithWeights: {"embed": 16},
    attention.EncoderLayers: {
        "embed.residual": 16,
        "layers.0.self_attn.in_proj_weight.head": 4,
        "layers.1.linear1": 24,
    },
    nets.OneHalfUsed: {"first": 6},
    nets.UnequalChunks: {},
    nets.SplitByAttribute: {"first": 8, "first[from 8]": 4},
    nets.HalvesBySlicing: {"first": 6},
    nets.IndependentHalves: {"a": 6},
    nets.LiteralSlice: {},
    nets.WrittenInPlace: {},
    nets.Gated: {"first": 12, "fused": 16},
    nets.Modulated: {"first": 12},
    nets.ModulatedBySlices: {"first": 12},
    widths.ScaledByWidth: {},
    widths.MagnitudePreservingCat: {},
    widths.PixelNorm: {},
    widths.Equalised: {"first": 12, "a": 8, "b": 12},
    widths.WeightNormed: {"first": 12, "a.parametrizations.weight.original0": 8},
    widths.Standardised: {"first": 12, "a": 8, "b": 12},
    nets.SpaceToDepth: {"first": 12, "a": 8},
    nets.ChannelShuffle: {},
    nets.ConvNeXt: {"first.residual": 12, "a": 20},
    nets.SqueezeExcite: {"a": 5},
    nets.Repeated: {"first": 12},
    nets.Gathered: {},
    nets.Transposed: {"first": 12, "down": 10},
    nets.Recurrent: {},
    nets.Shared: {"first": 12},
    nets.LongSkips: {"first": 12, "down.0": 12, "down.1": 12, "up.stage 0": 12, "up.stage 1": 12},
    nets.Recomputed: {"first": 12, "down.0": 12, "down.1": 12, "up.stage 0": 12, "up.stage 1": 12},
    nets.Returning: {"first": 12},
    layers.Slopes: {"first": 12},
    layers.GatedHalves: {"first": 6, "a": 10},
    layers.InstanceNormed: {"first": 12, "a": 12},
    layers.InstanceNormedAffine: {"first": 12, "a": 12},
    layers.InstanceNormedRunning: {"first": 12, "a": 12},
    layers.InstanceNormedRunningOnly: {"first": 12, "a": 12},
    layers.PixelShuffled: {"first": 12, "a": 8, "b": 12},
    layers.PixelShuffledAtOnce: {"first": 3},
    layers.ShuffledChannels: {"first": 4},
    layers.BilinearPooled: {"first": 12, "p": 7},
    layers.Maxout: {"a": 8, "b": 12},
    layers.MaxoutByLiteral: {"first": 12},
    layers.AcrossChannels: {},
    layers.PickedRows: {"first": 12},
    layers.ExpandedByWidth: {"first": 12, "scale": 12},
    layers.ExpandedIntoProducts: {"first": 12},
}
# It holds weak references to its own weights; `save` says so.
NOT_SAVED = (nets.Recurrent,)


def made(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Any], ebdiff.ChannelPlan]:
    torch.manual_seed(0)
    model = scatter(kind()).double().eval()
    shape = (2, 6, 5) if issubclass(kind, attention.Tokens) else (2, 3, 6, 6)
    x = torch.randn(shape, dtype=torch.float64)
    return model, {"x": x}, ebdiff.trace(model, x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", FREE, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_law_and_what_is_free(kind: type[nn.Module], tmp_path: Path) -> None:
    model, arguments, plan = made(kind)
    sizes = {space.name: space.size for space in plan}
    assert sizes | FREE[kind] == sizes, str(plan)
    small = model
    for seed in range(4):
        small = assert_law(model, arguments, random_keep(plan, seed))
    if issubclass(kind, NOT_SAVED):
        with pytest.raises(ebdiff.EbdiffError, match="cannot save"):
            ebdiff.save(small, tmp_path)
    else:
        assert_comes_back(small, arguments, tmp_path)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [attention.Checkpointed, nets.Recomputed])
def test_what_recomputes_its_activations_trains_after_the_cut(kind: type[nn.Module]) -> None:
    """The trace is of the forward that trains; without a gradient, a re-entrant checkpoint is a plain call."""
    model, arguments, _ = made(kind)
    plan = ebdiff.trace(model.train(), **arguments)
    assert plan.spaces == ebdiff.trace(copy.deepcopy(model).eval(), **arguments).spaces
    arguments["x"].requires_grad_()
    assert_law(model, arguments, random_keep(plan, 5))
    assert_trains(model, arguments, random_mask(plan, 6))


@pytest.mark.parametrize("kind", [layers.InstanceNormed, layers.InstanceNormedRunning])
def test_instance_norms_know_their_width(kind: type[nn.Module], recwarn: pytest.WarningsRecorder) -> None:
    model, arguments, _ = made(kind)
    plan = ebdiff.trace(model.train(), **arguments)
    small: Any = assert_law(model, arguments, random_mask(plan, 1))
    assert small.norm.num_features == small.first.out_channels < 12
    assert not [warning for warning in recwarn if "num_features" in str(warning.message)]


def test_slopes_and_bilinear_layers_know_their_widths() -> None:
    for kind in (layers.Slopes, layers.BilinearPooled):
        model, _, plan = made(kind)
        small: Any = ebdiff.shrink(model, random_mask(plan, 1))
        if kind is layers.Slopes:
            assert small.each.num_parameters == small.first.out_channels < 12
        else:
            both = small.both
            assert [both.in1_features, both.in2_features] == [small.p.out_features, small.q.out_features]
            assert both.out_features == small.first.out_channels < 12


def test_what_a_hidden_layer_returns_stays_whole() -> None:
    _, _, plan = made(nets.Returning)
    assert {axis.name: axis.reason for axis in plan.frozen}["a.weight[0]"] == "an output of the model"


def test_denoising_diffusion_pytorch() -> None:
    model = scatter(foreign_unet(dim=8, dim_mults=(1, 2), resnet_block_groups=4)).double().eval()
    time = torch.tensor([3.0, 7.0], dtype=torch.float64)
    arguments = {"x": torch.randn(2, 3, 8, 8, dtype=torch.float64), "time": time}
    plan = ebdiff.trace(model, **arguments)
    assert_removable(plan, 0.95)
    for seed in range(2):
        assert_law(model, arguments, random_keep(plan, seed))
    assert_law(model, arguments, random_mask(plan, 4, norm="balanced"))
    assert_trains(model, arguments, random_mask(plan, 5))


@pytest.mark.parametrize(("kind", "shape"), [("", (2, 4, 8, 8)), ("3D", (2, 4, 2, 8, 8))])
def test_magnitude_preserving_unets(kind: str, shape: tuple[int, ...]) -> None:
    """EDM2's: the convolutions normalise their weights, and concatenations are weighed by their widths, which stay."""
    size: dict[str, Any] = {"frames": 2} if kind else {}
    small = {
        "image_size": 8,
        "dim": 8,
        "dim_max": 16,
        "num_downsamples": 1,
        "num_blocks_per_stage": 1,
        "fourier_dim": 4,
    }
    model = karras_unet(kind, **size, **small, attn_res=(4,), attn_dim_head=4)
    model = scatter(model).double().eval()
    time = torch.tensor([3.0, 7.0], dtype=torch.float64)
    arguments = {"x": torch.randn(shape, dtype=torch.float64), "time": time}
    plan = ebdiff.trace(model, **arguments)
    assert_removable(plan, 0.85)
    assert any("MPCat" in axis.reason for axis in plan.frozen)
    for seed in range(2):
        assert_law(model, arguments, random_keep(plan, seed))


def assert_removable(plan: ebdiff.ChannelPlan, share: float) -> None:
    """At least this share of the parameters goes where one index of every space is kept."""
    least = thinnest(plan, ("channel", "head", "head_dim", "residual"))
    assert 1 - plan.parameters(least) / plan.parameters() >= share, str(plan)
