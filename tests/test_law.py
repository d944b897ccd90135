"""The law: shrink(model, mask)(x) == masked(model, mask)(x), outputs and gradients, to the error of the dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from unets import FAMILIES, inputs, scatter, unet

import ebdiff
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.plan import ChannelPlan

OPTIONS: dict[str, dict[str, Any]] = {
    "one head": {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D", "attention_head_dim": None},
    "four heads": {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D", "attention_head_dim": 4},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "classes": {"num_class_embeds": 4},
    "class timesteps": {"class_embed_type": "timestep"},
    "class vectors": {"class_embed_type": "identity"},
    "fourier time": {"time_embedding_type": "fourier"},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "no mid attention": {"add_attention": False},
    "resnet down, conv up": {"downsample_type": "resnet", "upsample_type": "conv"},
    "conv down, resnet up": {"downsample_type": "conv", "upsample_type": "resnet"},
    "attention with resnet resampling": {
        "down": "AttnDownBlock2D", "up": "AttnUpBlock2D", "downsample_type": "resnet", "upsample_type": "resnet"
    },
    "attention without resampling": {
        "down": "AttnDownBlock2D", "up": "AttnUpBlock2D", "downsample_type": None, "upsample_type": None
    },
    "group norm in attention": {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D", "attn_norm_num_groups": 2},
    "centred input": {"center_input_sample": True},
    "odd widths": {"widths": (20, 28, 36), "norm_num_groups": 4, "layers_per_block": 2},
    "padding 0": {"downsample_padding": 0},
}  # fmt: skip
CASES = {**FAMILIES, **OPTIONS}


def random_mask(
    plan: ChannelPlan, seed: int, norm: str = "ragged", ratio: float = 0.5, head_dim: bool = True
) -> ChannelMask:
    generator = torch.Generator().manual_seed(seed)
    scores = {space.name: torch.rand(space.size, generator=generator) for space in plan}
    return ChannelMask.draw(scores, plan=plan, ratio=ratio, norm=norm, head_dim=head_dim)  # type: ignore[arg-type]


def error_of(dtype: torch.dtype, small: nn.Module, dense: nn.Module, args: Any) -> tuple[float, float]:
    """(largest difference, allowed): a few times what the dtype itself costs against a wider one."""
    positional, keyword = args
    with torch.no_grad():
        ours, theirs = small(*positional, **keyword).sample, dense(*positional, **keyword).sample
        wider = torch.float64 if dtype != torch.bfloat16 else torch.float32
        truth_args = [a.to(wider) if a.is_floating_point() else a for a in positional]
        truth_kw = {k: v.to(wider) if v.is_floating_point() else v for k, v in keyword.items()}
        truth = copy.deepcopy(dense).to(wider)(*truth_args, **truth_kw).sample
    own = float((theirs.to(wider) - truth).abs().max())
    return float((ours - theirs).abs().max()), 4 * own + 1e-14 * float(truth.abs().max())


@pytest.mark.parametrize("norm", ["ragged", "balanced"])
@pytest.mark.parametrize("case", CASES)
def test_shrunken_equals_masked(case: str, norm: str) -> None:
    # diffusers itself cannot embed class timesteps in float64
    dtype, digits = (torch.float32, 5) if case == "class timesteps" else (torch.float64, 9)
    model = unet(**CASES[case]).to(dtype)
    positional, keyword = inputs(model, dtype=dtype)
    plan = ebdiff.trace(model, *positional, **keyword)
    mask = random_mask(plan, seed=3, norm=norm)
    small, dense = ebdiff.shrink(model, mask), ebdiff.masked(model, mask)
    ours, theirs = small(*positional, **keyword).sample, dense(*positional, **keyword).sample
    whole = model(*positional, **keyword).sample
    torch.testing.assert_close(ours, theirs, rtol=10.0**-digits, atol=10.0 ** -(digits + 1))
    assert float((whole - theirs).detach().abs().max()) > 1e-3, "the mask removed nothing that matters"
    (ours.square().sum()).backward()
    (theirs.square().sum()).backward()
    for name, parameter in dense.named_parameters():
        assert_gradient_matches(plan, mask, name, parameter, dict(small.named_parameters())[name], digits)


def assert_gradient_matches(
    plan: ChannelPlan, mask: ChannelMask, name: str, dense: Tensor, small: Tensor, digits: int
) -> None:
    if dense.grad is None:
        assert small.grad is None
        return
    expected, gone = dense.grad, torch.ones_like(dense, dtype=torch.bool)
    for dim, kept in plan.kept(mask.keep, plan.aliases.get(name, name)).items():
        expected = expected.index_select(dim, kept.nonzero()[:, 0])
        gone = gone.index_fill(dim, (~kept).nonzero()[:, 0], False)
    scale = float(dense.grad.abs().max())
    torch.testing.assert_close(small.grad, expected, rtol=10.0 ** (1 - digits), atol=10.0**-digits * max(scale, 1.0))
    assert not dense.grad[~gone].any(), f"{name}: removed, yet trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["attention", "scale and shift", "odd widths"])
def test_law_holds_in_every_dtype(case: str, dtype: torch.dtype) -> None:
    model = unet(**CASES[case]).to(dtype)
    args = inputs(model, dtype=dtype)
    mask = random_mask(ebdiff.trace(model, *args[0], **args[1]), seed=5)
    difference, allowed = error_of(dtype, ebdiff.shrink(model, mask), ebdiff.masked(model, mask), args)
    assert difference <= allowed


# No shrinking: an example takes a second, and the drawn values are printed anyway.
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_law_on_random_configurations_and_masks(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["plain", "attention", "resnet resampling", "attention skip"]), "family")
    groups = data.draw(st.sampled_from([1, 2, 4]), "groups")
    widths = tuple(data.draw(st.lists(st.integers(2, 7).map(lambda n: 4 * n), min_size=1, max_size=3), "widths"))
    model = unet(
        **{**FAMILIES[family], "widths": (32,) * len(widths) if "skip" in family else widths},
        norm_num_groups=groups,
        attention_head_dim=data.draw(st.sampled_from([4, None]), "head_dim"),
        resnet_time_scale_shift=data.draw(st.sampled_from(["default", "scale_shift"]), "time"),
        sample_size=8,
    ).double()
    args = inputs(model, dtype=torch.float64)
    plan = ebdiff.trace(model, *args[0], **args[1])
    bits = data.draw(st.integers(0, 2**31), "mask")
    generator = torch.Generator().manual_seed(bits)
    keep = {s.name: torch.rand(s.size, generator=generator) < torch.rand((), generator=generator) for s in plan}
    for kept in keep.values():
        kept[int(torch.randint(len(kept), (), generator=generator))] = True
    mask = ChannelMask(plan, keep)
    with torch.no_grad():
        ours, theirs = (f(model, mask)(*args[0], **args[1]).sample for f in (ebdiff.shrink, ebdiff.masked))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * max(1.0, float(theirs.abs().max())))


def test_straddling_groups_of_a_skip_concat() -> None:
    """24 + 16 channels in 4 groups of 10: the third group takes 4 channels of one space and 6 of the other."""

    class Straddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 24, 1), nn.Conv2d(2, 16, 1)
            self.norm, self.out = nn.GroupNorm(4, 40), nn.Conv2d(40, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.silu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))

    model, x = scatter(Straddle()).double(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    plan = ebdiff.trace(model, x)
    assert {s.name: s.size for s in plan} == {"a": 24, "b": 16}
    keep = {"a": torch.arange(24) < 3, "b": torch.arange(16) >= 6}  # groups 1 and 2 vanish, group 3 keeps b's only
    mask = ChannelMask(plan, keep)
    small = ebdiff.shrink(model, mask)
    assert small.norm.group_sizes == (3, 10)
    torch.testing.assert_close(small(x), ebdiff.masked(model, mask)(x), rtol=1e-12, atol=1e-12)
    assert mask.regrouped() == []
    balanced = ChannelMask(plan, {"a": torch.arange(24) < 12, "b": torch.arange(16) < 8}, norm="balanced")
    assert isinstance(ebdiff.shrink(model, balanced).norm, nn.GroupNorm)
    assert balanced.regrouped() == ["norm"]
    torch.testing.assert_close(
        ebdiff.shrink(model, balanced)(x), ebdiff.masked(model, balanced)(x), rtol=1e-12, atol=1e-12
    )


def test_law_holds_for_a_network_shrunken_twice() -> None:
    model = unet(**CASES["attention"]).double()
    args = inputs(model, dtype=torch.float64)
    once = ebdiff.shrink(model, random_mask(ebdiff.trace(model, *args[0]), seed=1, ratio=0.3))
    again = random_mask(ebdiff.trace(once, *args[0]), seed=2, ratio=0.3)
    with torch.no_grad():
        ours, theirs = ebdiff.shrink(once, again)(*args[0]).sample, ebdiff.masked(once, again)(*args[0]).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# Freezing everything would satisfy the law, so most parameters must go at ratio 0.8. K blocks have group norms without
# weights and write a C x C resampling kernel in their forward, which freezes the axes they are matched with.
LEAST_REMOVED = {"K": 0.5}


@pytest.mark.parametrize("case", CASES)
def test_most_parameters_go_at_ratio_80(case: str) -> None:
    model = unet(**{"widths": (32, 64), **CASES[case], **({"attention_head_dim": 8} if case == "four heads" else {})})
    args = inputs(model)
    plan = ebdiff.trace(model, *args[0], **args[1])
    mask = ChannelMask.draw(ebdiff.importance(model, plan), plan=plan, ratio=0.8)
    small = ebdiff.shrink(model, mask)
    removed = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert plan.parameters(mask) == sum(p.numel() for p in small.parameters())
    assert removed >= LEAST_REMOVED.get(case, 0.8), f"{removed:.3f}; {plan}"
