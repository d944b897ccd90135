"""Tracing leaves the user's model, random numbers and logs alone, and says what it cannot trace."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from unets import inputs, unet

import ebdiff


def test_the_model_is_left_alone() -> None:
    model = unet("AttnDownBlock2D", "AttnUpBlock2D").train()
    seen: list[str] = []
    model.conv_in.register_forward_hook(lambda *_: seen.append("hook"))
    model.conv_in.weight.grad = torch.ones_like(model.conv_in.weight)
    model.mid_block.requires_grad_(False)
    before = {name: (id(p), p.data_ptr(), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    rng = torch.get_rng_state()
    ebdiff.trace(model, *inputs(model)[0])
    assert model.training
    assert not seen, "the user's hooks saw fake tensors"
    assert torch.equal(torch.get_rng_state(), rng)
    for name, parameter in model.named_parameters():
        identity, pointer, trained, value = before[name]
        assert (id(parameter), parameter.data_ptr(), parameter.requires_grad) == (identity, pointer, trained)
        assert torch.equal(parameter, value)
    assert torch.equal(model.conv_in.weight.grad, torch.ones_like(model.conv_in.weight))
    assert len(model.conv_in._forward_hooks) == 1


def test_plan_is_the_same_for_every_dtype_mode_and_batch() -> None:
    model = unet("AttnDownBlock2D", "AttnUpBlock2D")
    plan = ebdiff.trace(model, *inputs(model)[0])
    args = inputs(model, batch=4)[0]
    half = ebdiff.trace(copy.deepcopy(model).train().bfloat16(), args[0].bfloat16(), args[1])
    assert half.fingerprint() == plan.fingerprint()
    assert half.spaces == plan.spaces
    assert half.macs() == pytest.approx(plan.macs())


def test_wrapped_and_broken_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ebdiff.EbdiffError, match="_orig_mod"):
        ebdiff.trace(torch.compile(model), torch.randn(2, 3))
    with pytest.raises(ebdiff.EbdiffError, match=r"model\.module"):
        ebdiff.trace(nn.DataParallel(model), torch.randn(2, 3))
    with pytest.raises(ebdiff.EbdiffError, match=r"0 \(Linear\)"):
        ebdiff.trace(model, torch.randn(2, 7))


def test_the_default_device_is_for_the_user_s_tensors() -> None:
    model = unet("AttnDownBlock2D", "AttnUpBlock2D")
    args = inputs(model)[0]
    plan = ebdiff.trace(model, *args)
    scores = {space.name: torch.rand(space.size) for space in plan}
    budgets: list[dict[str, Any]] = [{"ratio": 0.5, "scope": "global"}, {"ratio": 0.5, "norm": "balanced"}]
    with torch.device("meta"):
        assert ebdiff.trace(model, *args).spaces == plan.spaces
        drawn = [ebdiff.ChannelMask.draw(scores, plan=plan, **budget) for budget in budgets]
        small = [ebdiff.shrink(model, mask) for mask in drawn]
    for mask, net, budget in zip(drawn, small, budgets, strict=True):
        assert mask == ebdiff.ChannelMask.draw(scores, plan=plan, **budget)
        torch.testing.assert_close(net(*args).sample, ebdiff.shrink(model, mask)(*args).sample, rtol=0, atol=0)


def test_arguments_that_do_not_fit_are_one_error_without_a_logged_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = unet()
    x = inputs(model)[0][0]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(ebdiff.EbdiffError, match="cannot trace UNet2DModel"):
            ebdiff.trace(model, x, torch.zeros(len(x) + 1, dtype=torch.int64))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
