"""AdamW among the others: schedules, closures, scalers, accelerate; and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from test_optim import averaged, network
from test_optim_state import close, walk
from torch import Tensor, nn

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.optim import AdamW, steps_ema


def test_rates_that_are_tensors_and_schedules() -> None:
    model, twin = network()[0], network()[0]
    rate = torch.tensor(0.1)
    ours, theirs = AdamW(model.parameters(), lr=rate), torch.optim.AdamW(twin.parameters(), lr=0.1)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9) for o in (ours, theirs)]
    for step in range(8):
        walk(model, ours, step, step + 1)
        walk(twin, theirs, step, step + 1)
        for schedule in schedules:
            schedule.step()
    assert isinstance(ours.param_groups[0]["lr"], Tensor)
    assert float(ours.param_groups[0]["lr"]) == pytest.approx(theirs.param_groups[0]["lr"])
    close(model, twin)


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    model, _ = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    x = torch.ones(2, 5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(5)]
    assert None not in losses
    assert losses[-1] < losses[0]  # type: ignore[operator]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step() is None


def test_a_scaler_skips_what_overflowed_and_unscales_the_rest() -> None:
    model, twin = network()[0], network()[0]
    ours, theirs = AdamW(model.parameters(), lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for network_, optimizer in ((model, ours), (twin, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            loss = network_(torch.full((2, 5), float("inf") if step == 1 else 1.0)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    close(model, twin)
    assert {float(s["step"]) for s in ours.state.values()} == {3.0}


def test_accelerate_prepares_it_and_accumulates() -> None:
    model, mask = network()
    ema = averaged(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, AdamW(model.named_parameters(), mask=mask, ema=ema))
    assert steps_ema(optimizer, ema)
    assert not steps_ema(optimizer, averaged(model))
    assert not steps_ema(torch.optim.AdamW(model.parameters()), ema)
    for _ in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.randn(2, 5)).square().mean())
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert ema.optimization_step == 3
    assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}


# Bad input ------------------------------------------------------------------------------------------------------------

FLAT = [("0.weight", nn.Parameter(torch.ones(3)))]
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "amsgrad": ("amsgrad=False", {"amsgrad": True}),
    "rate": ("lr a number of at least 0", {"lr": -1.0}),
    "rates": ("a tensor of one", {"lr": torch.ones(2)}),
    "eps": ("eps of at least 0", {"eps": -1e-8}),
    "beta": ("betas of two", {"betas": (0.9, 1.0)}),
    "decay": ("weight_decay of at least 0", {"weight_decay": -0.1}),
    "complex": ("real parameters", {"params": [nn.Parameter(torch.ones(1, dtype=torch.complex64))]}),
    "names": (r"named parameters.*model\.named_parameters", {"params": [FLAT[0][1]], "mask": network()[1]}),
    "unknown": ("x: no parameter of the plan", {"params": [("x", FLAT[0][1])], "mask": network()[1]}),
    "shape": (r"expected 0\.weight: \[8, 5\], got 0\.weight: \[3\]", {"mask": network()[1]}),
    "mask": ("a ChannelMask or a Ticket, got str", {"mask": "a mask"}),
    "an EMA's shapes": (r"expected 0\.weight: \[3\], got \[2\]", {"ema": EMAModel([nn.Parameter(torch.ones(2))])}),
    "an EMA's length": ("1 tensors.*ema_params", {"ema": [], "ema_decay": 0.9}),
    "an EMA's names": (r"a tensor for 0\.weight, got none", {"ema": {}, "ema_decay": 0.9}),
    "an EMA's kind": ("an EMAModel, a module.*got int", {"ema": 3}),
    "no decay": (r"ema_decay in \[0, 1\]", {"ema": [torch.ones(3)]}),
    "a decay": ("EMAModel has its own", {"ema": EMAModel([FLAT[0][1]]), "ema_decay": 0.9}),
    "nothing to decay": ("an EMA, got none", {"ema_decay": 0.9}),
}


@pytest.mark.parametrize(("message", "options"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_at_once(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(EbdiffError, match=message):
        AdamW(**{"params": FLAT, **options})


def test_what_is_refused_later_changes_nothing() -> None:
    model, mask = network()
    optimizer = AdamW(model.named_parameters(), mask=mask)
    walk(model, optimizer, 0, 1)
    before, state = copy.deepcopy(list(model.parameters())), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(EbdiffError, match="no parameter of the plan"):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(2)))]})
    other = torch.optim.AdamW(network()[0].parameters(), amsgrad=True)
    with pytest.raises(EbdiffError, match="amsgrad=False"):
        optimizer.load_state_dict(other.state_dict())
    model[2].weight.grad = torch.ones(3, 6).to_sparse()  # type: ignore[union-attr]
    with pytest.raises(EbdiffError, match=r"dense ones, got sparse ones.*SparseAdam"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert len(optimizer.param_groups) == 1
    assert all(torch.equal(optimizer.state_dict()["state"][i]["step"], s["step"]) for i, s in state["state"].items())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("wrong", ["freed", "another dtype"])
def test_a_refused_step_is_not_half_done(wrong: str, groups: int) -> None:
    """Parameters of two dtypes, or of two groups, are written in several calls: all are looked at before the first."""
    wide, narrow = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = AdamW([wide, narrow] if groups == 1 else [{"params": [wide]}, {"params": [narrow]}])
    wide.grad = torch.ones(4)
    if wrong == "freed":
        narrow.grad = torch.ones(5, dtype=torch.bfloat16)
        narrow.grad.untyped_storage().resize_(0)
    else:
        narrow.grad_dtype = None  # type: ignore[attr-defined]
        narrow.grad = torch.ones(5)
    with pytest.raises(EbdiffError, match=r"freed\?|grads"):
        optimizer.step()
    assert wide.tolist() == [1] * 4
    assert all(not int(state["step"]) for state in optimizer.state.values())


def test_the_front_door_leads_here() -> None:
    assert ebdiff.optim.AdamW is AdamW
    assert issubclass(AdamW, torch.optim.Optimizer)
