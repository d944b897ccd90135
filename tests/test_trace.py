"""The tracer: which axes are one space, what is frozen and why."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from unets import inputs, scatter, unet

import ebdiff
from ebdiff.pruning.plan import ChannelSpace

CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "attention_head_dim": None,
}


def sizes(plan: ebdiff.ChannelPlan) -> dict[str, int]:
    return {space.name: space.size for space in plan}


# Spaces ---------------------------------------------------------------------------------------------------------------


def test_spaces_of_a_small_unet_by_hand() -> None:
    model = unet("AttnDownBlock2D", "UpBlock2D", widths=(16,), add_attention=False)
    plan = ebdiff.trace(model, *inputs(model)[0])
    assert sizes(plan) == {
        "conv_in": 16,
        "time_embedding.linear_1": 64,
        "time_embedding.linear_2": 64,
        "down_blocks.0.resnets.0.conv1": 16,
        "down_blocks.0.attentions.0.to_q.head": 2,
        "down_blocks.0.attentions.0.to_q.head_dim": 8,
        "down_blocks.0.attentions.0.to_v.head_dim": 8,
        **{f"up_blocks.0.resnets.{i}.conv{j}": 16 for i in (0, 1) for j in (1, 2)},
        **{f"mid_block.resnets.{i}.conv1": 16 for i in (0, 1)},
    }
    skip = [
        (m.parameter, m.dim, m.offset)
        for m in plan["conv_in"].members
        if m.parameter.startswith("up_blocks.0.resnets.1.")
    ]
    assert ("up_blocks.0.resnets.1.conv1.weight", 1, 16) in skip, "conv_in is the second half of the last skip-concat"
    assert {axis.name for axis in plan.frozen} == {
        "conv_in.weight[1]",
        "time_embedding.linear_1.weight[1]",
        "conv_out.weight[0]",
    }


def test_time_scale_shift_follows_its_channels_twice() -> None:
    model = unet(resnet_time_scale_shift="scale_shift")
    plan = ebdiff.trace(model, *inputs(model)[0])
    members = plan["down_blocks.0.resnets.0.conv1"].members
    halves = [m.offset for m in members if m.parameter == "down_blocks.0.resnets.0.time_emb_proj.weight"]
    assert halves == [0, 16]


def test_one_head_prunes_head_dim_and_the_old_processor_too() -> None:
    model = unet("AttnDownBlock2D", "AttnUpBlock2D", attention_head_dim=None)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    args = inputs(model)[0]
    plan = ebdiff.trace(model, *args)
    q, v = plan["down_blocks.0.attentions.0.to_q"], plan["down_blocks.0.attentions.0.to_v"]
    assert q.unit == v.unit == "channel"
    assert {m.parameter.split(".")[4] for m in q.members} == {"to_q", "to_k"}
    assert {m.parameter.split(".")[4] for m in v.members} == {"to_v", "to_out"}
    mask = ebdiff.ChannelMask(plan, {q.name: torch.arange(16) < 5, v.name: torch.arange(16) < 9})
    ours, theirs = ebdiff.shrink(model, mask)(*args).sample, ebdiff.masked(model, mask)(*args).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_macs_are_counted_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.avg_pool2d(self.b(self.a(x)), 2).flatten(1))

    plan = ebdiff.trace(Net(), torch.randn(2, 3, 4, 4))
    assert plan.macs() == 16 * 3 * 8 * 9 + 16 * 8 * 6 + 24 * 5
    half = ebdiff.ChannelMask(plan, {"a": torch.arange(8) < 3})
    assert plan.macs(half) == 16 * 3 * 3 * 9 + 16 * 3 * 6 + 24 * 5


def test_macs_of_ddpm_cifar_agree_with_the_paper() -> None:
    model = UNet2DModel(**CIFAR)
    plan = ebdiff.trace(model, torch.randn(2, 3, 32, 32), torch.tensor([5, 9]))
    assert plan.parameters() == sum(p.numel() for p in model.parameters()) == 35_746_307
    attention = 2 * (5 * 256**2 * 256 + 1 * 16**2 * 256)  # 5 at 16x16, one at 4x4; Torch-Pruning leaves these out
    assert abs((plan.macs() - attention) / 1e9 - 6.06) < 0.01
    balanced = ebdiff.ChannelMask.draw(ebdiff.importance(model, plan), plan=plan, ratio=0.5, norm="balanced")
    assert abs(plan.parameters(balanced) / 1e6 - 8.97) < 0.01


Slices = frozenset[tuple[str, int, int]]  # (module, dim, position)


def test_groups_agree_with_torch_pruning_but_for_attention() -> None:
    """Index for index; Torch-Pruning ties q/k to v/out, the tracer keeps them apart."""
    tp = pytest.importorskip("torch_pruning")
    model = UNet2DModel(**CIFAR)
    args = (torch.randn(1, 3, 32, 32), torch.tensor([5]))
    plan = ebdiff.trace(model, *args)
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, args, output_transform=lambda out: out.sample)

    def of_group(group: Any) -> Slices:
        return frozenset(
            (names[d.target.module], 0 if graph.is_out_channel_pruning_fn(d.handler) else 1, index)
            for d, indices in group
            for index in indices
            if isinstance(d.target.module, nn.Conv2d | nn.Linear)
        )

    def of_space(space: ChannelSpace, channel: int) -> Slices:
        return frozenset(
            (member.parameter.removesuffix(".weight"), member.dim, int(position))
            for member in space.members
            if len(plan.shapes[member.parameter]) > 1
            for position in member.positions(space.size)[:, channel].flatten()
        )

    groups = list(graph.get_all_groups(ignored_layers=[model.conv_out], root_module_types=[nn.Conv2d, nn.Linear]))
    for channel in (0, 5, 127):
        theirs = {of_group(graph.get_pruning_group(g[0][0].target.module, g[0][0].handler, [channel])) for g in groups}
        ours = {of_space(space, channel) for space in plan}
        same = ours & theirs
        tied = {frozenset(chain.from_iterable(o for o in ours - same if o < t)) for t in theirs - same}
        assert (len(theirs), len(same), len(theirs - same), len(ours - same)) == (50, 44, 6, 12)
        assert tied == theirs - same, "each of the six others is one attention, q/k and v/out together"


# Frozen, by name and with the reason ----------------------------------------------------------------------------------


class _Table(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.a, self.b = what, nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.what == "arange":
            h = h + torch.arange(6.0)[:, None, None]
        elif self.what == "softmax":
            h = h.softmax(1)
        elif self.what == "mean":
            h = h * h.mean(1, keepdim=True)
        elif self.what == "strided slice":
            h = h[:, ::2].repeat_interleave(2, 1)
        elif self.what == "view":
            h = h.view(len(x), 2, 3, *h.shape[2:]).flip(1).flatten(1, 2)
        elif self.what == "sort":
            h = h.sort(1).values
        elif self.what == "fft":
            h = torch.fft.fft(h, dim=1).real
        return self.b(h)


@pytest.mark.parametrize("what", ["arange", "softmax", "mean", "strided slice", "view", "sort", "fft"])
def test_what_cannot_be_followed_is_frozen_with_a_reason(what: str) -> None:
    plan = ebdiff.trace(_Table(what), torch.randn(2, 2, 4, 4))
    assert len(plan) == 0
    reasons = {axis.name: axis.reason for axis in plan.frozen}
    assert (
        what.split()[0] in reasons["a.weight[0]"]
        or "viewed" in reasons["a.weight[0]"]
        or "integers" in reasons["a.weight[0]"]
    )


def test_depthwise_convolutions_follow_and_grouped_ones_keep_their_groups() -> None:
    depthwise = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    plan = ebdiff.trace(depthwise, torch.randn(2, 2, 8, 8))
    assert sizes(plan) == {"0": 6}
    mask = ebdiff.ChannelMask(plan, {"0": torch.tensor([1, 0, 1, 1, 0, 0]).bool()})
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(ebdiff.shrink(depthwise, mask)(x), ebdiff.masked(depthwise, mask)(x))
    grouped = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 2, 1))
    plan = ebdiff.trace(grouped, x)
    assert sorted(space.size for space in plan) == [4, 6]
    mask = ebdiff.ChannelMask(plan, {s.name: torch.arange(s.size) < 3 for s in plan})
    torch.testing.assert_close(ebdiff.shrink(grouped, mask)(x), ebdiff.masked(grouped, mask)(x))


def test_tied_parameters_are_one_space() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x).relu() + self.b(x).relu())

    model, x = Tied(), torch.randn(3, 4)
    plan = ebdiff.trace(model, x)
    mask = ebdiff.ChannelMask(plan, {"a": torch.tensor([1, 0, 1, 1, 0, 1]).bool()})
    small = ebdiff.shrink(model, mask)
    assert small.a.weight is small.b.weight
    torch.testing.assert_close(small(x), ebdiff.masked(model, mask)(x))


def test_unused_parameters_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_module("spare", nn.Identity())
    model.spare.extra = nn.Parameter(torch.randn(5, 6))
    plan = ebdiff.trace(model, torch.randn(2, 3))
    assert {axis.name: axis.reason for axis in plan.frozen}["spare.extra[0]"] == "not used in this forward pass"


class _Foreign(nn.Module):
    """One forward per trap that a reviewer found; every one once gave a plan that was wrong."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.a, self.b = what, nn.Linear(6, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(1, 9, 16))
        self.conv, self.shared = nn.Conv1d(5, 5, 3, padding=1), nn.GroupNorm(4, 16)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)  # [2, 5, 16]
        if self.what == "cropped table":
            h = h + self.table[:, : x.shape[1]]
        elif self.what == "conv over features":
            return self.conv(h).mean(-1)
        elif self.what == "pool over features":
            return F.adaptive_avg_pool1d(h, 4)
        elif self.what == "interpolate over features":
            return F.interpolate(h, size=8)
        elif self.what == "roll":
            h = torch.roll(h, 3)
        elif self.what == "one norm, two places":
            h = self.shared(F.silu(self.shared(h.transpose(1, 2)))).transpose(1, 2)
        elif self.what == "head bias":
            q = h.view(2, 5, 2, 8).transpose(1, 2)
            h = F.scaled_dot_product_attention(q, q, q, attn_mask=self.bias, scale=1.0).transpose(1, 2).flatten(2)
        elif self.what == "stable sort":
            h = h.sort(stable=True, dim=-1).values
        return self.b(h)


FOREIGN = ["cropped table", "conv over features", "pool over features", "interpolate over features", "roll",
           "one norm, two places", "head bias", "stable sort"]  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_law_on_forwards_that_once_broke_it(what: str) -> None:
    model, x = scatter(_Foreign(what)).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    plan = ebdiff.trace(model, x)
    generator = torch.Generator().manual_seed(0)
    scores = {space.name: torch.rand(space.size, generator=generator) for space in plan}
    mask = ebdiff.ChannelMask.draw(scores, plan=plan, ratio=0.5, head_dim=True)
    torch.testing.assert_close(ebdiff.shrink(model, mask)(x), ebdiff.masked(model, mask)(x))
    if what == "cropped table":
        longer = torch.randn(2, 8, 6, dtype=torch.float64)
        torch.testing.assert_close(ebdiff.shrink(model, mask)(longer), ebdiff.masked(model, mask)(longer))


def test_what_a_forward_hook_of_the_user_touches_stays_whole() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1))
    model[0].register_forward_hook(lambda module, args, output: output.flip(1))
    plan = ebdiff.trace(model, torch.randn(1, 2, 4, 4))
    assert sizes(plan) == {"1": 6}
    assert any("forward hook on 0" in axis.reason for axis in plan.frozen)
