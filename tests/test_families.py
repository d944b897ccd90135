"""Every diffusers family: the law with random masks, saving, training after the cut, and that something is free."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BUILDERS, build
from laws import (
    assert_changes_the_output,
    assert_comes_back,
    assert_law,
    assert_trains,
    random_keep,
    thinnest,
)
from test_law import error_of, random_mask
from torch import Tensor, nn

import ebdiff
from ebdiff.pruning.plan import ChannelPlan

UNITS = ("channel", "head", "head_dim", "residual")
# At least so many spaces of each unit: an attention has heads, and head_dim once for q and k, where no rotary positions
# turn them, and once for v and out;
# and at least this share of the parameters goes where one index of every space is kept. Freezing everything would
# satisfy the law.
FREE: dict[str, tuple[dict[str, int], float]] = {
    "SD1.5 UNet": ({"channel": 22, "head": 8, "head_dim": 16, "residual": 4}, 0.99),
    "SDXL UNet": ({"channel": 27, "head": 16, "head_dim": 32, "residual": 4}, 0.99),
    "text-to-video UNet": ({"channel": 51, "head": 18, "head_dim": 36, "residual": 9}, 0.99),
    "SD VAE": ({"channel": 23}, 0.99),
    "DiT": ({"channel": 6, "head": 2, "head_dim": 4, "residual": 1}, 0.98),
    "PixArt": ({"channel": 4, "head": 4, "head_dim": 8, "residual": 1}, 0.98),
    "SD3": ({"channel": 6, "head": 2, "head_dim": 4, "residual": 2}, 0.98),
    "SD3.5": ({"channel": 8, "head": 5, "head_dim": 10, "residual": 2}, 0.98),
    "Flux": ({"channel": 10, "head": 4, "head_dim": 4, "residual": 1}, 0.98),
    "Wan": ({"channel": 5, "head": 4, "head_dim": 6, "residual": 1}, 0.98),
    "CogVideoX-2b": ({"channel": 4, "head": 2, "head_dim": 4, "residual": 1}, 0.98),
    "CogVideoX-5b": ({"channel": 4, "head": 2, "head_dim": 2, "residual": 1}, 0.98),
    "LTX": ({"channel": 4, "head": 2, "head_dim": 6, "residual": 1}, 0.95),
    "Lumina": ({"channel": 4, "head": 2, "residual": 1}, 0.95),
    "AuraFlow": ({"channel": 5, "head": 2, "residual": 1}, 0.95),
    "Sana": ({"channel": 4, "head": 4, "head_dim": 4, "residual": 1}, 0.98),
}
WITH_GROUP_NORMS = ("SD1.5 UNet", "SDXL UNet", "text-to-video UNet", "SD VAE")


@pytest.fixture(autouse=True)
def _rotary_positions_at_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most forwards turn q and k in float32, which rounds away what the law is about."""
    plain = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else plain(x))


@cache
def traced(name: str) -> tuple[nn.Module, dict[str, Any], ChannelPlan]:
    model, arguments = build(name)
    return model, arguments, ebdiff.trace(model, **arguments)


@pytest.mark.parametrize("name", FREE)
def test_what_must_be_free_is_free(name: str) -> None:
    _, _, plan = traced(name)
    spaces, share = FREE[name]
    found = Counter(space.unit for space in plan)
    assert {unit: min(found[unit], least) for unit, least in spaces.items()} == spaces, str(plan)
    removed = 1 - plan.parameters(thinnest(plan, UNITS)) / plan.parameters()
    assert removed >= share, f"{removed:.3f} of the parameters can go; {plan}"
    assert all(axis.reason for axis in plan.frozen)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FREE)
def test_law_with_random_masks_over_every_unit(name: str, seed: int) -> None:
    model, arguments, plan = traced(name)
    mask = random_keep(plan, seed)
    assert_changes_the_output(model, arguments, mask)
    assert_law(model, arguments, mask)


@pytest.mark.parametrize("name", FREE)
def test_law_where_one_index_of_every_space_is_left(name: str) -> None:
    model, arguments, plan = traced(name)
    assert_law(model, arguments, thinnest(plan, UNITS))


@pytest.mark.parametrize("name", FREE)
def test_whole_heads_go_and_what_is_left_is_saved(name: str, tmp_path: Path) -> None:
    model, arguments, plan = traced(name)
    mask = random_mask(plan, seed=4, head_dim=False)
    assert_comes_back(assert_law(model, arguments, mask), arguments, tmp_path)


@pytest.mark.parametrize("name", ["SD1.5 UNet", "PixArt"])
def test_a_mask_of_the_text_leaves_the_heads_free(name: str) -> None:
    model, arguments, plan = traced(name)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0] * 5], dtype=torch.float64)
    arguments = {**arguments, "encoder_attention_mask": mask}
    again = ebdiff.trace(model, **arguments)
    assert again.spaces == plan.spaces
    assert_law(model, arguments, random_keep(again, 9))


@pytest.mark.parametrize("name", WITH_GROUP_NORMS)
def test_law_with_balanced_norms(name: str) -> None:
    model, arguments, plan = traced(name)
    assert_law(model, arguments, random_mask(plan, seed=5, norm="balanced"))


@pytest.mark.parametrize("name", FREE)
def test_what_is_left_trains(name: str) -> None:
    model, arguments, plan = traced(name)
    assert_trains(copy.deepcopy(model), arguments, random_mask(plan, seed=6, head_dim=False))


@pytest.mark.parametrize("name", ["SD1.5 UNet", "Flux"])
def test_law_in_half_precision(name: str) -> None:
    model, arguments = build(name, torch.bfloat16)
    mask = random_mask(ebdiff.trace(model, **arguments), seed=7)
    small, dense = ebdiff.shrink(model, mask), ebdiff.masked(model, mask)
    difference, allowed = error_of(torch.bfloat16, small, dense, ((), arguments))
    assert difference <= allowed


@pytest.mark.parametrize("name", WITH_GROUP_NORMS)
def test_an_accelerated_model_is_traced_and_shrunken_alike(name: str) -> None:
    model, arguments, plan = traced(name)
    fast = copy.deepcopy(model)
    ebdiff.accelerate(fast)
    assert ebdiff.trace(fast, **arguments).spaces == plan.spaces
    assert_law(fast, arguments, random_keep(plan, seed=8))


def test_every_family_is_held_to_it() -> None:
    assert set(FREE) == set(BUILDERS)
