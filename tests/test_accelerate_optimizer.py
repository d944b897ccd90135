"""accelerate's optimizer: the same object, the same steps, and back again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import ebdiff


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))


def steps(model: nn.Module, optimizer: Any, count: int, scheduler: Any = None, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


OPTIONS: list[dict[str, Any]] = [{}, {"fused": True}, {"foreach": True}, {"maximize": True, "lr": torch.tensor(1e-2)}]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_steps_there_and_five_back_are_ten_of_torchs(options: dict[str, Any], scheduled: bool) -> None:
    model, reference = network(), network()
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    theirs = torch.optim.AdamW(reference.parameters(), **copy.deepcopy(options))
    scheduler, their_scheduler = (cosine(o) if scheduled else None for o in (optimizer, theirs))
    steps(model, optimizer, 2, scheduler)
    steps(reference, theirs, 2, their_scheduler)
    before = dict(vars(optimizer))
    report = ebdiff.accelerate(model, optimizer, verbose=False)
    assert "became ebdiff.optim.AdamW" in report.optimizer
    assert type(optimizer) is ebdiff.optim.AdamW
    for seed in (1, 2):
        steps(model, optimizer, 5, scheduler, seed)
        steps(reference, theirs, 5, their_scheduler, seed)
        for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
        ebdiff.restore(model, optimizer)
        assert type(optimizer) is torch.optim.AdamW
    assert vars(optimizer).keys() == before.keys()
    assert optimizer.param_groups[0]["fused"] == options.get("fused")
    theirs.load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("error")
def test_schedulers_see_the_steps_and_hooks_run() -> None:
    model, seen = network(), []
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = cosine(optimizer)  # warns when it is stepped before the optimizer
    ebdiff.accelerate(model, optimizer, verbose=False)
    steps(model, optimizer, 2, scheduler)
    assert seen == ["after", "after"]
    assert scheduler.last_epoch == 2


def test_a_gradient_scaler_unscales_for_us() -> None:
    model, reference = network(), network()
    results = []
    for net, ours in ((model, True), (reference, False)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        if ours:
            ebdiff.accelerate(net, optimizer, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(net(torch.ones(4, 3)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append([state["exp_avg"] for state in optimizer.state.values()])
    torch.testing.assert_close(results[0], results[1])


def test_inside_of_accelerates_wrapper() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, inner)
    ebdiff.accelerate(prepared, optimizer, verbose=False)
    assert type(inner) is ebdiff.optim.AdamW
    before = [p.detach().clone() for p in model.parameters()]
    steps(prepared, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    ebdiff.restore(prepared, optimizer)
    assert type(inner) is torch.optim.AdamW


LEFT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Adam": (lambda p: torch.optim.Adam(p), "Adam left as it was: only torch.optim.AdamW"),
    "SGD": (lambda p: torch.optim.SGD(p, 0.1), "SGD left as it was"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
    "capturable": (lambda p: torch.optim.AdamW([{"params": p, "differentiable": True}]), "differentiable"),
    "own": (lambda p: ebdiff.optim.AdamW(p), "already ebdiff.optim.AdamW"),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_optimizers_are_left_with_a_reason(case: str) -> None:
    make, reason = LEFT[case]
    model = network()
    optimizer = make(list(model.parameters()))
    kind = type(optimizer)
    assert reason in ebdiff.accelerate(model, optimizer, verbose=False).optimizer
    assert type(optimizer) is kind
    ebdiff.restore(model, optimizer)
    assert type(optimizer) is kind


def test_a_step_that_somebody_replaced_is_left() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    assert "replaced on the instance" in ebdiff.accelerate(model, optimizer, verbose=False).optimizer
    assert type(optimizer) is torch.optim.AdamW
