"""Shrinking a training state: identities stay, moments and EMA are sliced alike, bad input changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from test_law import random_mask
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from unets import inputs, unet

import ebdiff
from ebdiff.pruning.mask import ChannelMask


def trained(
    steps: int = 3, optimizer: Any = torch.optim.AdamW, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[UNet2DModel, Any, EMAModel, Any, ChannelMask]:
    """(model, optimizer, EMA, inputs, a mask) after a few steps; gradients of the last one are still there."""
    model = unet("AttnDownBlock2D", "AttnUpBlock2D").to(dtype).train()
    args = inputs(model, dtype=dtype)[0]
    trainer, ema = optimizer(model.parameters(), lr=1e-3, **options), EMAModel(model.parameters(), decay=0.5)
    for _ in range(steps):
        step(model, trainer, ema, args)
    return model, trainer, ema, args, random_mask(ebdiff.trace(model, *args), seed=3)


def step(model: nn.Module, optimizer: Any, ema: EMAModel, args: Any) -> Tensor:
    optimizer.zero_grad()
    loss = (model(*args).sample - args[0]).square().mean()
    loss.backward()
    optimizer.step()
    ema.step(model.parameters())
    return loss


def kept_part(tensor: Tensor, mask: ChannelMask, name: str) -> Tensor:
    for dim, kept in mask.plan.kept(mask.keep, name).items():
        tensor = tensor[(slice(None),) * dim + (kept,)]
    return tensor


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_weights_gradients_moments_and_ema_are_sliced_by_the_same_indices(optimizer: Any) -> None:
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    model, trainer, ema, _, mask = trained(optimizer=optimizer, **options)
    before, state, shadow = copy.deepcopy(model), copy.deepcopy(trainer.state_dict()), copy.deepcopy(ema.shadow_params)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    identities = [id(p) for p in model.parameters()]
    ebdiff.shrink_(model, mask, optimizer=trainer, ema=ema)
    assert [id(p) for p in model.parameters()] == identities == [id(p) for p in trainer.param_groups[0]["params"]]
    for i, (name, parameter) in enumerate(model.named_parameters()):
        assert torch.equal(parameter, kept_part(before.get_parameter(name), mask, name))
        assert torch.equal(parameter.grad, kept_part(gradients[name], mask, name))
        assert torch.equal(ema.shadow_params[i], kept_part(shadow[i], mask, name))
        for key, value in state["state"][i].items():
            now = trainer.state[parameter][key]
            whole = isinstance(value, Tensor) and value.shape == before.get_parameter(name).shape
            assert torch.equal(
                torch.as_tensor(now), torch.as_tensor(kept_part(value, mask, name) if whole else value)
            ), key
    assert trainer.param_groups[0]["lr"] == 1e-3


def test_training_goes_on_as_if_the_masked_model_had_been_trained() -> None:
    """AdamW steps of the shrunken state = steps of the masked dense state, sliced."""
    model, trainer, ema, args, mask = trained(dtype=torch.float64)
    dense = ebdiff.masked(model, mask)
    twin = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    twin.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for name, parameter in dense.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            for dim, kept in mask.plan.kept(mask.keep, name).items():
                twin.state[parameter][moment].index_fill_(dim, (~kept).nonzero()[:, 0], 0)
    ebdiff.shrink_(model, mask, optimizer=trainer, ema=ema)
    for _ in range(2):
        step(model, trainer, ema, args)
        twin.zero_grad()
        (dense(*args).sample - args[0]).square().mean().backward()
        twin.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, kept_part(dense.get_parameter(name), mask, name), rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_still_alive_does_not_break_the_next_step() -> None:
    """A live graph holds gradient accumulators of the old shapes; autograd must not reuse them."""
    model, trainer, ema, args, mask = trained(steps=1)
    loss = step(model, trainer, ema, args)
    ebdiff.shrink_(model, mask, optimizer=trainer, ema=ema)
    again = step(model, trainer, ema, args)
    assert loss.grad_fn is not None
    assert torch.isfinite(again)


def test_in_place_equals_the_new_model() -> None:
    model, _, _, args, mask = trained()
    new = ebdiff.shrink(model, mask)
    assert type(model) is UNet2DModel
    ebdiff.shrink_(model, mask)
    assert type(model) is type(new) is ebdiff.ShrunkUNet2DModel  # type: ignore[attr-defined]
    assert isinstance(model, UNet2DModel)
    assert torch.equal(model(*args).sample, new(*args).sample)


def test_flags_and_memory_format_carry_over() -> None:
    model = unet("AttnDownBlock2D", "AttnUpBlock2D").to(memory_format=torch.channels_last).bfloat16().train()
    model.mid_block.requires_grad_(False)
    small = ebdiff.shrink(model, random_mask(ebdiff.trace(model, *inputs(model, dtype=torch.bfloat16)[0]), seed=3))
    assert small.training
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in small.mid_block.parameters())
    assert all(p.requires_grad for p in small.down_blocks.parameters())
    for name, parameter in small.named_parameters():
        if parameter.dim() == 4 and parameter.shape[-1] == 3:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("kind", ["copy", "averaged", "dict", "list"])
def test_every_kind_of_ema(kind: str) -> None:
    model, _, _, _, mask = trained()
    source = copy.deepcopy(model)
    ema: Any = {
        "copy": lambda: copy.deepcopy(model),
        "averaged": lambda: torch.optim.swa_utils.AveragedModel(model),
        "dict": lambda: {name: p.detach().clone() for name, p in model.named_parameters()},
        "list": lambda: [p.detach().clone() for p in model.parameters()],
    }[kind]()
    ebdiff.shrink_(model, mask, ema=ema)
    found = {
        "copy": lambda: dict(ema.named_parameters()),
        "averaged": lambda: dict(ema.module.named_parameters()),
        "dict": lambda: ema,
        "list": lambda: dict(zip(dict(model.named_parameters()), ema, strict=True)),
    }[kind]()
    for name, tensor in found.items():
        assert torch.equal(tensor, kept_part(source.get_parameter(name), mask, name))


def test_learning_rate_schedule_and_clipping_lists_stay_right() -> None:
    model, trainer, ema, args, mask = trained()
    clipped = list(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(trainer, lambda n: 1 / (n + 1))
    ebdiff.shrink_(model, mask, optimizer=trainer, ema=ema)
    step(model, trainer, ema, args)
    norm = nn.utils.clip_grad_norm_(clipped, 1e-3)
    assert norm > 0
    assert all(p.grad.shape == p.shape for p in model.parameters())
    schedule.step()
    assert trainer.param_groups[0]["lr"] == 5e-4


# Bad input: one line, expected, got, remedy; nothing changed ----------------------------------------------------------


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_untouched(model: nn.Module, before: list[Tensor]) -> None:
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_foreign_ticket_optimizer_and_ema_are_refused() -> None:
    model, trainer, ema, args, mask = trained()
    before = snapshot(model)
    other = unet("AttnDownBlock2D", "AttnUpBlock2D", widths=(24, 32))
    foreign = random_mask(ebdiff.trace(other, *args), seed=0)
    with pytest.raises(ebdiff.EbdiffError, match=r"another architecture.*expected.*got.*trace this model"):
        ebdiff.shrink(model, foreign)
    with pytest.raises(ebdiff.EbdiffError, match="does not hold the model's parameters"):
        ebdiff.shrink_(model, mask, optimizer=torch.optim.AdamW(other.parameters()))
    with pytest.raises(ebdiff.EbdiffError, match="EMA does not belong"):
        ebdiff.shrink_(model, mask, optimizer=trainer, ema=EMAModel(other.parameters()))
    with pytest.raises(ebdiff.EbdiffError, match="pass the EMA that follows this model"):
        ebdiff.shrink_(model, mask, ema=other)
    with pytest.raises(ebdiff.EbdiffError, match="EMA is the model itself"):
        ebdiff.shrink_(model, mask, ema=model)
    with pytest.raises(ebdiff.EbdiffError, match="None until it has settled"):
        ebdiff.shrink(model, None)  # type: ignore[type-var]
    with pytest.raises(ebdiff.EbdiffError, match="wrapped in DataParallel"):
        ebdiff.shrink(nn.DataParallel(model), mask)
    assert_untouched(model, before)
    assert_untouched(model, before)
    assert all(
        torch.equal(a.shape and a, b.shape and b) for a, b in zip(ema.shadow_params, ema.shadow_params, strict=True)
    )
    ebdiff.shrink_(model, mask, optimizer=trainer, ema=ema)
    with pytest.raises(ebdiff.EbdiffError, match="another architecture"):
        ebdiff.shrink_(model, mask)


class Diffusion(nn.Module):
    """What is averaged as a whole, where only the network in it is shrunken."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model, self.schedule = network, nn.Parameter(torch.ones(3))


def test_an_average_of_more_than_the_model_is_refused_with_the_part_that_is_meant() -> None:
    model, _, _, _, mask = trained(steps=0)
    before, whole = snapshot(model), Diffusion(model)
    for ema, path in ((copy.deepcopy(whole), "ema.model"), (AveragedModel(whole), "ema.module.model")):
        with pytest.raises(ebdiff.EbdiffError, match=f"UNet2DModel.*of a Diffusion.*at {path}.*pass ema={path}$"):
            ebdiff.shrink_(model, mask, ema=ema)
    assert_untouched(model, before)
    average = copy.deepcopy(whole)
    ebdiff.shrink_(model, mask, ema=average.model)
    assert [p.shape for p in average.model.parameters()] == [p.shape for p in model.parameters()]


def test_factored_optimizer_state_is_refused_before_anything_changes() -> None:
    model, _, _, args, mask = trained(steps=0)
    optimizer = torch.optim.Adafactor(model.parameters())
    (model(*args).sample).square().mean().backward()
    optimizer.step()
    before = snapshot(model)
    with pytest.raises(ebdiff.EbdiffError, match="state of Adafactor"):
        ebdiff.shrink_(model, mask, optimizer=optimizer)
    assert_untouched(model, before)


def test_a_mask_that_empties_a_space_is_refused() -> None:
    _, _, _, _, mask = trained(steps=0)
    name = next(iter(mask))
    with pytest.raises(ebdiff.EbdiffError, match="empties the space"):
        ChannelMask(mask.plan, {name: torch.zeros(mask.plan[name].size, dtype=torch.bool)})


def test_diffusers_ema_is_saved_and_restored_after_a_cut_as_before_it(tmp_path: Any) -> None:
    model, trainer, _, args, mask = trained()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=model.config)
    step(model, trainer, ema, args)
    ema.store(model.parameters())
    ebdiff.shrink_(model, mask, optimizer=trainer, ema=ema)
    before = [parameter.clone() for parameter in model.parameters()]
    step(model, trainer, ema, args)
    ema.restore(model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    ema.save_pretrained(tmp_path)
    saved = ebdiff.load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(ema.shadow_params, saved.parameters(), strict=True))
    again = EMAModel.from_pretrained(tmp_path, type(model))
    assert all(torch.equal(p, q) for p, q in zip(ema.shadow_params, again.shadow_params, strict=True))
    assert again.optimization_step == ema.optimization_step
