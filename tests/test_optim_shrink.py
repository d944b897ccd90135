"""Shrinking under an AdamW that masks: masked steps, then shrinking, are shrinking, then steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from test_law import random_mask
from torch import Tensor, nn
from unets import inputs, unet

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.optim import AdamW
from ebdiff.pruning.mask import ChannelMask

STEPS = 4


def begin(
    dtype: torch.dtype = torch.float64, ema: Any = None, **options: Any
) -> tuple[nn.Module, AdamW, Any, Any, ChannelMask]:
    """(model, optimizer, EMA, inputs, a mask that the optimizer knows)."""
    model = unet("AttnDownBlock2D", "AttnUpBlock2D").to(dtype).train()
    args = inputs(model, dtype=dtype)[0]
    mask = random_mask(ebdiff.trace(model, *args), seed=3)
    ema = EMAModel(model.parameters(), decay=0.5) if ema is None else ema(model)
    return model, AdamW(model.named_parameters(), lr=1e-3, mask=mask, ema=ema, **options), ema, args, mask


def step(model: nn.Module, optimizer: AdamW, args: Any) -> None:
    """One step; as long as the optimizer masks, with the gradients of the dense stand-in."""
    stand_in = model if optimizer.mask is None else ebdiff.masked(model, optimizer.mask)
    optimizer.zero_grad()
    (stand_in(*args).sample - args[0]).square().mean().backward()
    for p, q in zip(model.parameters(), stand_in.parameters(), strict=True):
        p.grad = q.grad
    optimizer.step()


def shadows(ema: Any) -> list[Tensor]:
    if isinstance(ema, nn.Module):
        return list(ema.parameters())
    return list(ema.values()) if isinstance(ema, dict) else getattr(ema, "shadow_params", ema)


def results(after: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """STEPS steps, with shrinking after some of them."""
    model, optimizer, ema, args, mask = begin(dtype)
    for n in range(STEPS):
        if n == after:
            ebdiff.shrink_(model, mask, optimizer=optimizer, ema=ema)
            assert optimizer.mask is None
        step(model, optimizer, args)
    if after == STEPS:
        ebdiff.shrink_(model, mask, optimizer=optimizer, ema=ema)
    moments = {key: [optimizer.state[p][key] for p in model.parameters()] for key in ("exp_avg", "exp_avg_sq")}
    return {"p": [p.detach() for p in model.parameters()], **moments, "ema": shadows(ema)}


def apart(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> dict[str, float]:
    """The largest difference, relative to the largest element."""
    flat = {key: [torch.cat([t.double().flatten() for t in x[key]]) for x in (a, b)] for key in a}
    return {key: float((x - y).abs().max() / y.abs().max()) for key, (x, y) in flat.items()}


def test_masked_steps_then_shrinking_are_shrinking_then_steps() -> None:
    """Weights, moments and EMA, wherever shrinking falls, to the error of the dtype.

    In float32 each of the two runs may be as far off from float64 as the worse of two others: shrunken first or last.
    Weights are further off than moments: AdamW moves by lr where a gradient is nothing but rounding, too.
    """
    first = results(0, torch.float64)
    for after in (1, 2, STEPS):
        for key, difference in apart(results(after, torch.float64), first).items():
            assert difference < 1e-10, (after, key)
    others = [apart(results(after, torch.float32), first) for after in (0, STEPS)]
    allowed = {key: max(other[key] for other in others) for key in first}
    for key, difference in apart(results(2, torch.float32), first).items():
        assert difference <= 2 * allowed[key], key


def test_another_mask_is_refused_before_anything_changes() -> None:
    model, optimizer, ema, args, mask = begin()
    step(model, optimizer, args)
    other = random_mask(mask.plan, seed=4)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(EbdiffError, match=r"optimizer has another mask.*optimizer\.mask = None"):
        ebdiff.shrink_(model, other, optimizer=optimizer, ema=ema)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.mask is mask
    equal = ChannelMask(mask.plan, {name: mask[name] for name in mask}, mask.norm)
    ebdiff.shrink_(model, equal, optimizer=optimizer, ema=ema)
    assert optimizer.mask is None


KINDS: dict[str, Any] = {
    "EMAModel": None,
    "list": lambda model: [p.detach().clone() for p in model.parameters()],
    "dict": lambda model: {name: p.detach().clone() for name, p in model.named_parameters()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_ema_that_shrink_was_not_given_is_shrunken_all_the_same(kind: str) -> None:
    found = []
    for given in (True, False):
        model, optimizer, ema, args, mask = begin(ema=KINDS[kind], **({} if kind == "EMAModel" else {"ema_decay": 0.5}))
        step(model, optimizer, args)
        ebdiff.shrink_(model, mask, optimizer=optimizer, **({"ema": ema} if given else {}))
        step(model, optimizer, args)
        found.append(shadows(ema))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_module_that_the_optimizer_moves_is_shrunken_with_the_model() -> None:
    model, optimizer, ema, args, mask = begin(ema=copy.deepcopy, ema_decay=0.5)
    step(model, optimizer, args)
    expected = ebdiff.shrink(ema, mask)
    ebdiff.shrink_(model, mask, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), expected.parameters(), strict=True))
    step(model, optimizer, args)


def test_an_ema_shrunken_behind_the_optimizers_back_is_refused() -> None:
    model, optimizer, ema, args, mask = begin(ema=copy.deepcopy, ema_decay=0.5)
    step(model, optimizer, args)
    ebdiff.shrink_(ema, mask)
    with pytest.raises(EbdiffError, match="EMA does not fit"):
        step(model, optimizer, args)


def test_a_state_without_names_shrinks_where_the_ema_is_given() -> None:
    model, _, _, args, mask = begin()
    ema = EMAModel(model.parameters())
    optimizer = AdamW(model.parameters(), ema=ema)
    step(model, optimizer, args)
    ebdiff.shrink_(model, mask, optimizer=optimizer, ema=ema)
    step(model, optimizer, args)
    assert ema.optimization_step == 2
