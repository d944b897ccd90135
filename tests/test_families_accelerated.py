"""Families with group norms, as a run uses them: accelerated, trained, cut with optimizer and EMA, saved, loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from laws import tensors_of
from test_families import WITH_GROUP_NORMS, traced
from test_law import random_mask

import ebdiff


@pytest.mark.parametrize("name", WITH_GROUP_NORMS)
def test_cut_in_place_and_loaded_it_is_the_same_network(name: str, tmp_path: Path) -> None:
    dense, arguments, plan = traced(name)
    model = copy.deepcopy(dense).train()
    ema, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    fused = ebdiff.accelerate(model, optimizer, verbose=False).fused

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack([tensor.square().mean() for tensor in tensors_of(model(**arguments))]).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    assert ebdiff.shrink_(model, random_mask(plan, seed=4, head_dim=False), optimizer=optimizer, ema=ema) is model
    shapes = [parameter.shape for parameter in model.parameters()]
    assert [parameter.shape for parameter in ema.parameters()] == shapes
    losses = [step() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(optimizer.state[parameter]["exp_avg"].shape == parameter.shape for parameter in model.parameters())

    ebdiff.save(model.eval(), tmp_path)
    with torch.no_grad():
        ours = list(tensors_of(model(**arguments)))
        loaded = ebdiff.load(tmp_path)
        plain = list(tensors_of(loaded(**arguments)))
        assert ebdiff.accelerate(loaded, verbose=False).fused == fused
        fast = list(tensors_of(loaded(**arguments)))
        ebdiff.restore(model, optimizer)
        restored = list(tensors_of(model(**arguments)))
    assert type(optimizer) is torch.optim.AdamW
    assert all(map(torch.equal, ours, fast))
    assert all(map(torch.equal, plain, restored))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
