"""AdamW on a GPU: state that torch keeps there, and an EMA on either side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_optim import SETTINGS, gradients, network
from torch import nn

from ebdiff.optim import AdamW

pytestmark = pytest.mark.gpu


def walk(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = gradient.to(p.device)
        optimizer.step()


@pytest.mark.parametrize("kind", ["foreach", "fused", "capturable"])
def test_state_whose_step_lies_on_the_device_is_taken_and_given_back(kind: str) -> None:
    straight, mixed = network()[0].cuda(), network()[0].cuda()
    reference = torch.optim.AdamW(straight.parameters(), **SETTINGS, **{kind: True})
    theirs = torch.optim.AdamW(mixed.parameters(), **SETTINGS, **{kind: True})
    walk(straight, reference, 0, 6)
    walk(mixed, theirs, 0, 2)
    ours = AdamW(mixed.parameters())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    walk(mixed, ours, 2, 4)
    assert {(s["step"].device.type, float(s["step"])) for s in ours.state.values()} == {("cpu", 4.0)}
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    walk(mixed, theirs, 4, 6)
    for p, q in zip(mixed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_ema_moves_wherever_it_lies(device: str) -> None:
    found = []
    for where in ("cpu", "cuda"):
        model, mask = network()
        ema = {
            name: p.detach().clone().to(device if where == "cuda" else "cpu") for name, p in model.named_parameters()
        }
        model.to(where)
        optimizer = AdamW(model.named_parameters(), **SETTINGS, mask=mask, ema=ema, ema_decay=0.5)
        walk(model, optimizer, 0, 3)
        assert {tensor.device.type for tensor in ema.values()} == {device if where == "cuda" else "cpu"}
        found.append([tensor.cpu() for tensor in ema.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
