"""What other pruning tools were measured to get wrong on diffusion models, each one a law here.

The rest of that list lives where its subject does: integers that forwards assert, statistics of group norms and skip
concatenations in test_law.py, q/k and v/out apart in test_trace.py, optimizer, EMA, requires_grad and memory format in
test_shrink.py, files that come back in test_save.py, budgets in test_masks.py.
"""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from families import build
from laws import assert_law
from torch import nn
from unets import inputs, unet

import ebdiff
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.plan import ChannelPlan

RATIOS = [0.05 * i for i in range(20)]


@cache
def convolutional() -> tuple[nn.Module, ChannelPlan, dict[str, torch.Tensor]]:
    """64 and 128 channels in 32 groups, so that a group has two or four."""
    model = unet("AttnDownBlock2D", "AttnUpBlock2D", widths=(64, 128), norm_num_groups=32, attention_head_dim=8)
    plan = ebdiff.trace(model, *inputs(model)[0])
    return model, plan, ebdiff.importance(model, plan)


def left(**options: Any) -> float:
    _, plan, scores = convolutional()
    return plan.parameters(ChannelMask.draw(scores, plan=plan, **options)) / plan.parameters()


@pytest.mark.parametrize("norm", ["ragged", "balanced"])
def test_rounding_widths_next_to_group_norms_still_prunes(norm: str) -> None:
    """Elsewhere round_to=8 kept 90% of the parameters, without a word."""
    assert abs(left(ratio=0.5, multiple_of=8, norm=norm) - left(ratio=0.5, norm=norm)) < 0.05


@pytest.mark.parametrize("options", [{}, {"norm": "balanced"}, {"scope": "global"}, {"multiple_of": 8}], ids=str)
def test_a_higher_ratio_never_leaves_more(options: dict[str, Any]) -> None:
    """Elsewhere 0.9 left ten times the parameters of 0.8: a space that would have been emptied was skipped."""
    shares = [left(ratio=ratio, **options) for ratio in RATIOS]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1


def test_every_space_loses_the_share_that_was_asked() -> None:
    """Elsewhere 0.1 meant a quarter and 0.3 a half, and one release differed from the next."""
    _, plan, scores = convolutional()
    for ratio in RATIOS:
        mask = ChannelMask.draw(scores, plan=plan, ratio=ratio, head_dim=True)
        for space in plan:
            wanted = max(1.0, space.size * (1 - ratio))
            assert abs(int(mask.keep[space.name].sum()) - wanted) <= 0.5 + 1e-9, (space.name, ratio)


def test_the_head_that_goes_is_a_head() -> None:
    """Elsewhere a forgotten num_heads mixed the rows of several heads, and only the image showed it."""
    model, arguments = build("DiT")
    plan = ebdiff.trace(model, **arguments)
    attention: Any = model.transformer_blocks[0].attn1  # type: ignore[union-attr, index]
    mask = ChannelMask(plan, {"transformer_blocks.0.attn1.to_q.head": torch.tensor([True, False, False, True])})
    small: Any = assert_law(model, arguments, mask).transformer_blocks[0].attn1  # type: ignore[union-attr, index]
    kept = [*range(8), *range(24, 32)]  # four heads of eight
    assert small.heads == 2
    for name in ("to_q", "to_k", "to_v"):
        assert torch.equal(getattr(small, name).weight, getattr(attention, name).weight[kept]), name
    assert torch.equal(small.to_out[0].weight, attention.to_out[0].weight[:, kept])


def test_the_softmax_keeps_its_temperature() -> None:
    """With peaked logits: at random weights attention is near uniform, and a wrong scale hardly shows."""
    model, arguments = build("DiT")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.to_q.weight.mul_(6)
                module.to_k.weight.mul_(6)
    plan = ebdiff.trace(model, **arguments)
    keep = {s.name: torch.arange(s.size) < s.size // 2 for s in plan if s.unit == "head_dim"}
    assert len(keep) == 4, "q/k and v/out of two attentions"
    assert_law(model, arguments, ChannelMask(plan, keep))


def test_nothing_of_one_plan_leaks_into_the_next() -> None:
    """Elsewhere mutable default arguments kept every pruned model alive."""
    model = unet()
    args = inputs(model)[0]
    first = ebdiff.trace(model, *args)
    ebdiff.shrink(model, ChannelMask.draw(ebdiff.importance(model, first), plan=first, ratio=0.5))
    assert ebdiff.trace(unet(), *args).to_json() == first.to_json()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_frozen_model_is_pruned_too_and_stays_frozen() -> None:
    """Elsewhere it was skipped in silence, or came back trainable and in eval mode."""
    model = unet().train()
    plan = ebdiff.trace(model, *inputs(model)[0])
    model.requires_grad_(False)
    assert ebdiff.trace(model, *inputs(model)[0]).spaces == plan.spaces
    small = ebdiff.shrink(model, ChannelMask.draw(ebdiff.importance(model, plan), plan=plan, ratio=0.5))
    assert sum(p.numel() for p in small.parameters()) < 0.3 * plan.parameters()
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert small.training


@pytest.mark.parametrize("method", ["magnitude", "magnitude-l1", "taylor", "diff-pruning", "random"])
def test_every_criterion_scores_every_space(method: str) -> None:
    """Elsewhere one that looks for batch norms pruned nothing of a network without them, in silence."""
    model, plan, _ = convolutional()
    args = inputs(model)[0]
    losses = (model(*args).sample.square().mean() for _ in range(1))
    options: dict[str, Any] = {"losses": losses} if method in ("taylor", "diff-pruning") else {}
    scores = ebdiff.importance(model, plan, method, **options)  # type: ignore[arg-type]
    assert set(scores) == {space.name for space in plan}
    assert all(len(score.unique()) == len(score) for score in scores.values())


def test_fluxs_parallel_mlp_is_a_space_of_its_own() -> None:
    """Elsewhere none of its channels went: it leaves through one concatenation with the attention."""
    model, arguments = build("Flux")
    plan = ebdiff.trace(model, **arguments)
    for i in range(2):
        space = plan[f"single_transformer_blocks.{i}.proj_mlp"]
        out = [m.offset for m in space.members if m.parameter == f"single_transformer_blocks.{i}.proj_out.weight"]
        assert (space.size, out) == (128, [32])
