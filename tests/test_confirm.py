"""Plans are confirmed by trial: which integers follow an axis, and what is frozen because none does."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import foreign_integers as nets
import pytest
import torch
from laws import assert_comes_back, assert_law, random_keep
from torch import nn
from unets import inputs, scatter, unet

import ebdiff
from ebdiff.pruning.integers import integers, read, write
from ebdiff.pruning.plan import ChannelPlan


def made(*kinds: Any) -> tuple[nn.Module, dict[str, Any], ChannelPlan]:
    torch.manual_seed(0)
    model = scatter(nets.Blocks(*kinds)).double().eval()
    arguments = {"x": torch.randn(2, 6, 5, dtype=torch.float64)}
    return model, arguments, ebdiff.trace(model, **arguments)


def heads(plan: ChannelPlan) -> list[str]:
    return [space.name for space in plan if space.unit == "head"]


@pytest.mark.parametrize("kind", nets.HONEST)
def test_an_integer_that_a_forward_reads_follows_the_heads(kind: type[nn.Module], tmp_path: Path) -> None:
    model, arguments, plan = made(kind, kind)
    assert len(heads(plan)) == 2, str(plan)
    for seed in range(4):
        small = assert_law(model, arguments, random_keep(plan, seed))
    if kind is not nets.OfTheParent:
        assert_comes_back(small, arguments, tmp_path)
    again = copy.deepcopy(model)
    ebdiff.shrink_(again, random_keep(plan, 3))
    assert torch.equal(again(**arguments), small(**arguments))


@pytest.mark.parametrize("kind", nets.LYING)
def test_a_forward_that_reads_what_does_not_follow_is_frozen_and_named(kind: type[nn.Module]) -> None:
    model, arguments, plan = made(kind, nets.Namesakes)
    assert heads(plan) == ["blocks.1.qkv.head"]
    reasons = {axis.name: axis.reason for axis in plan.frozen if axis.size == nets.HEADS}
    assert f"blocks.0 ({kind.__name__}) goes wrong when it shrinks" in reasons["blocks.0.qkv.weight[0]"]
    for seed in range(2):
        assert_law(model, arguments, random_keep(plan, seed))


def test_a_view_that_runs_with_other_factors_is_seen() -> None:
    """Half of the heads, and half of head_dim in their place."""
    plan = ebdiff.trace(nets.Absorbed(), torch.randn(2, 6, nets.WIDTH))
    assert len(plan) == 0, str(plan)


def test_namesakes_of_the_number_that_is_read_keep_theirs() -> None:
    model, _, plan = made(nets.Namesakes)
    assert [(size.module, size.attribute) for size in plan.sizes] == [("blocks.0", "num_heads")]
    block = ebdiff.shrink(model, ebdiff.ChannelMask(plan, {"blocks.0.qkv.head": torch.arange(6) < 2})).blocks[0]
    assert (block.num_heads, block.depth, block.patches) == (2, 6, [6, 6])


def test_an_object_that_others_hold_too_is_left_alone() -> None:
    model, arguments, plan = made(nets.OnObject, nets.OnObject)
    mask = ebdiff.ChannelMask(plan, {"blocks.1.qkv.head": torch.arange(6) < 2})
    ebdiff.shrink_(model, mask)
    assert [block.settings.heads for block in model.blocks] == [6, 2]
    assert nets.SHARED.heads == nets.SHARED.patch == 6
    model(**arguments)


def test_head_dim_is_free_where_the_scale_is_a_constant_and_frozen_where_it_is_not() -> None:
    _, _, plan = made(nets.Both, nets.Namesakes)
    dims = {s.name for s in plan if s.unit == "head_dim"}
    assert "blocks.0.qkv.head_dim" in dims
    frozen = [axis.reason for axis in plan.frozen if axis.name.startswith("blocks.1") and axis.size == nets.HEAD_DIM]
    assert any("softmax scale" in reason for reason in frozen)


def test_one_of_many_blocks_that_lies_does_not_freeze_the_others() -> None:
    """Equal blocks are tried once for all; a flag makes them unequal."""
    honest, lying = partial(nets.Either, True), partial(nets.Either, False)
    model, arguments, plan = made(honest, honest, lying, honest)
    assert heads(plan) == [f"blocks.{i}.qkv.head" for i in (0, 1, 3)]
    assert_law(model, arguments, random_keep(plan, 0))
    _, _, plan = made(lying, lying, honest, lying)
    assert heads(plan) == ["blocks.2.qkv.head"]


def test_a_cut_at_the_wrong_place_is_seen_though_its_length_is_right() -> None:
    model = scatter(nets.LiteralStart()).double()
    arguments = {"x": torch.randn(2, 5, dtype=torch.float64)}
    plan = ebdiff.trace(model, **arguments)
    reasons = {axis.name: axis.reason for axis in plan.frozen}
    assert "a" not in plan
    assert "slice in LiteralStart goes wrong when it shrinks" in reasons["a.weight[0]"]
    assert_law(model, arguments, random_keep(plan, 0))


def test_what_two_dense_passes_do_not_agree_about_is_not_confirmed() -> None:
    random.seed(0)
    plan = ebdiff.trace(nets.Erratic(nets.Namesakes), torch.randn(2, 6, 5))
    assert not heads(plan)
    assert any("whose integers no rule updates" in axis.reason for axis in plan.frozen)


def test_the_dense_model_and_unets_need_no_guesses() -> None:
    """Their integers follow by rules; a trial only confirms them."""
    model = unet("AttnDownBlock2D", "AttnUpBlock2D")
    plan = ebdiff.trace(model, *inputs(model)[0])
    assert not any("goes wrong" in axis.reason for axis in plan.frozen)
    assert {size.attribute for size in plan.sizes} <= {"channels", "in_channels", "out_channels"}


def test_integers_are_found_read_and_written_wherever_they_are() -> None:
    module = nn.Linear(3, 4)
    module.heads, module.flag, module.name = 5, True, "five"
    module.parts, module.config = (1, [2, nets.namespace(n=3)]), {"heads": 5}
    found = dict(integers(module))
    assert found == {"in_features": 3, "out_features": 4, "heads": 5, "parts[0]": 1, "parts[1][0]": 2}
    held = module.parts
    write(module, "parts[1][1].n", 9)
    assert read(module, "parts[1][1].n") == 9
    assert held[1][1].n == 3, "a copy was changed"
    assert read(module, "flag") is None
    assert read(module, "parts[7]") is None
    assert read(module, "absent.n") is None


def test_what_the_first_pass_remembers_is_forgotten_before_a_trial() -> None:
    _, _, plan = made(nets.Lazy)
    assert heads(plan) == ["blocks.0.qkv.head"]
    assert plan.sizes == ()


def test_trials_that_fail_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made(nets.Namesakes, nets.Literal)
    assert not caplog.records
