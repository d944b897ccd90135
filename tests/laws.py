"""The law and its neighbours for any model: what every family and every forward that is not ours is held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from test_law import assert_gradient_matches
from torch import Tensor, nn

import ebdiff
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.plan import ChannelPlan

DIGITS = 9


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in what a model returns: nested tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield from (value,) if value.is_floating_point() else ()
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in tensors_of(item))
    elif isinstance(value, tuple | list):
        yield from (tensor for item in value for tensor in tensors_of(item))
    elif is_dataclass(value):
        yield from (tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name)))


def random_keep(plan: ChannelPlan, seed: int) -> ChannelMask:
    """A mask over spaces of every unit, each with a density of its own; some keep a single index."""
    generator = torch.Generator().manual_seed(seed)
    keep = {s.name: torch.rand(s.size, generator=generator) < torch.rand((), generator=generator) for s in plan}
    for kept in keep.values():
        kept[int(torch.randint(len(kept), (), generator=generator))] = True
    return ChannelMask(plan, keep)


def thinnest(plan: ChannelPlan, units: tuple[str, ...]) -> ChannelMask:
    """One index of every space of these units."""
    return ChannelMask(plan, {s.name: torch.arange(s.size) == s.size // 2 for s in plan if s.unit in units})


def assert_law(model: nn.Module, arguments: dict[str, Any], mask: ChannelMask) -> nn.Module:
    """Outputs and gradients in float64, those of removed channels zero; returns the shrunken model."""
    small, dense = ebdiff.shrink(model, mask), ebdiff.masked(model, mask)
    ours, theirs = list(tensors_of(small(**arguments))), list(tensors_of(dense(**arguments)))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(other).all()
        atol = 10.0 ** -(DIGITS + 1) * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=10.0**-DIGITS, atol=atol)
    for outputs in (ours, theirs):
        torch.stack([tensor.square().mean() for tensor in outputs]).sum().backward()
    slim = dict(small.named_parameters())
    for name, parameter in dense.named_parameters():
        assert_gradient_matches(mask.plan, mask, name, parameter, slim[name], DIGITS)
    return small


def assert_changes_the_output(model: nn.Module, arguments: dict[str, Any], mask: ChannelMask) -> None:
    """A law about a mask that removes nothing of interest would say nothing."""
    with torch.no_grad():
        whole, left = (list(tensors_of(f(**arguments))) for f in (model, ebdiff.masked(model, mask)))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, left, strict=True)) > 1e-4


def assert_comes_back(small: nn.Module, arguments: dict[str, Any], folder: Path) -> None:
    """Saved and loaded, it returns the same bits."""
    ebdiff.save(small, folder)
    loaded = ebdiff.load(folder)
    with torch.no_grad():
        pairs = zip(tensors_of(loaded(**arguments)), tensors_of(small(**arguments)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def assert_trains(model: nn.Module, arguments: dict[str, Any], mask: ChannelMask, steps: int = 20) -> None:
    """Shrunken in mid-training, every parameter that the dense model trains goes on moving, and the loss falls.

    The model is changed.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    targets = [torch.randn_like(tensor) for tensor in tensors_of(model(**arguments))]

    def loss() -> Tensor:
        outputs = tensors_of(model(**arguments))
        return torch.stack([(a - b).square().mean() for a, b in zip(outputs, targets, strict=True)]).sum()

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return float(value.detach())

    step()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    ebdiff.shrink_(model, mask, optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = step()
    for _ in range(steps - 1):
        step()
    assert float(loss().detach()) < 0.9 * first
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not still & trained, f"not trained any more: {sorted(still & trained)}"
