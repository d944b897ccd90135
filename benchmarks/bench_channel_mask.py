"""Masks, scores and draws on the DDPM CIFAR UNet's parameters (35.75M), against what one writes in plain torch.

Targets on 2 cores: `apply_mask_` 3 times faster than the loop over tensors, 1.5 times faster than `_foreach_mul_` with
float masks, at 70% of the bandwidth of torch's own copy_; a draw for all ratios well under 1% of a training step.

The floor of a mask counts lines of memory, see `benchmarks.floors`: 4 bytes for each element of a row that is removed
whole (written), 8 for each in a kept row between removed columns (read and written), 0 for tensors without a removed
channel. `share_of_copy` is that floor by the time, over what copy_ of all parameters reaches (8 bytes an element).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import Candidate, copy_of, ddpm_cifar10, few, seconds_of, side_by_side
from benchmarks.axes import axes_of, full_size, listed, module_of, random_mask, tensors_of
from benchmarks.floors import Elements
from ebdiff import ChannelMask, EarlyBird
from ebdiff.ops import channel_mask_reference as reference
from ebdiff.ops.channel_mask import apply_mask_, channel_sums, mask_distance
from ebdiff.pruning.channel_sums import ChannelSums

ROUNDS = 15
BATCH = {True: 32, False: 4}  # at full size, and elsewhere


class Masked:
    """Ways to zero the removed channels of the UNet's parameters, or of lists of their shapes."""

    def __init__(self, ratio: float, device: torch.device) -> None:
        self.plan = listed("cifar_unet")
        self.mask = random_mask(self.plan, ratio)
        self.axes = axes_of(self.plan, self.mask)
        like = tensors_of(self.plan, device)
        self.floor = Elements.of(like, self.axes).apply_mask(4)
        # As every tool does, only those parameters that lose channels.
        self.touched = [i for i, name in enumerate(self.plan.shapes) if self.mask.kept(name)]
        self.bools = self._of_touched(full_size(self.plan, self.mask, like, torch.bool))
        self.floats = [mask.float() for mask in self.bools]
        self.removed = [
            (i, dim, (~kept).nonzero()[:, 0].to(device))
            for kept, i, dim in zip(self.axes.keep, self.axes.owner, self.axes.dims, strict=True)
        ]

    def _of_touched(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self.touched]

    def ways(self, compiled: Callable[..., None]) -> dict[str, Callable[[list[Tensor]], None]]:
        """Each takes a list of tensors in the shapes of all parameters."""
        return {
            "ebdiff": lambda tensors: apply_mask_(tensors, self.axes),
            "loop, bool masks (apex)": lambda tensors: self._loop(tensors, self.bools),
            "loop, float masks": lambda tensors: self._loop(tensors, self.floats),
            "index_fill_ per axis": self._index_fill,
            "_foreach_mul_, float masks": lambda tensors: torch._foreach_mul_(self._of_touched(tensors), self.floats),
            "_foreach_mul_, bool masks": lambda tensors: torch._foreach_mul_(self._of_touched(tensors), self.bools),
            "compiled _foreach_mul_, float masks": lambda tensors: compiled(self._of_touched(tensors), self.floats),
            "ebdiff's reference": lambda tensors: reference.apply_mask_(tensors, self.axes),
        }

    def _loop(self, tensors: list[Tensor], masks: list[Tensor]) -> None:
        for i, mask in zip(self.touched, masks, strict=True):
            tensors[i].mul_(mask)

    def _index_fill(self, tensors: list[Tensor]) -> None:
        for i, dim, positions in self.removed:
            tensors[i].index_fill_(dim, positions, 0)

    def check(self, ways: dict[str, Callable[[list[Tensor]], None]], device: torch.device) -> None:
        """All of them have to do the same, or their times mean nothing."""
        values = tensors_of(self.plan, device)
        expected = [value.clone() for value in values]
        for i, mask in zip(self.touched, self.bools, strict=True):
            expected[i][~mask] = 0
        for name, way in ways.items():
            got = [value.clone() for value in values]
            way(got)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


def compiled_multiplication() -> Callable[..., None]:
    """torch.compile of the foreach, in its default mode."""

    def multiply(tensors: list[Tensor], masks: list[Tensor]) -> None:
        torch._foreach_mul_(tensors, masks)

    return torch.compile(multiply)


def copy_of_all(device: torch.device) -> Candidate:
    """copy_ of as many elements as the UNet has parameters."""
    return copy_of(listed("cifar_unet").parameters(), device)


@pytest.mark.benchmark(group="channel mask")
def test_mask_of_weights(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    weights, compiled = tensors_of(listed("cifar_unet"), device), compiled_multiplication()
    candidates = {"copy_": copy_of_all(device)}
    for ratio in (0.5, 0.8):
        masked = Masked(ratio, device)
        ways = masked.ways(compiled)
        masked.check(ways, device)
        for name, way in ways.items():
            candidates[f"{ratio} {name}"] = Candidate(partial(way, weights), masked.floor, f"{ratio} ebdiff")
    rounds = few(ROUNDS, full)
    rows = side_by_side(benchmark, device, candidates, rounds)
    report(rows, {"what": "weights, float32, ratio removed", "rounds": rounds})


@pytest.mark.benchmark(group="channel mask")
def test_mask_of_training_state(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    masked = Masked(0.5, device)
    lists = [tensors_of(masked.plan, device) for _ in range(4)]
    together = [tensor for tensors in lists for tensor in tensors]
    axes = axes_of(masked.plan, masked.mask, len(lists))
    ways = masked.ways(compiled_multiplication())
    candidates = {
        "copy_": copy_of_all(device),
        "ebdiff": Candidate(lambda: apply_mask_(together, axes), 4 * masked.floor, "ebdiff"),
    }
    for name, way in ways.items():
        if name != "ebdiff":
            candidates[name] = Candidate(partial(_each, way, lists), 4 * masked.floor, "ebdiff")
    rounds = few(9, full)
    rows = side_by_side(benchmark, device, candidates, rounds)
    report(rows, {"what": "weights, gradients and both moments, float32", "ratio": 0.5, "rounds": rounds})


def _each(way: Callable[[list[Tensor]], None], lists: list[list[Tensor]]) -> None:
    for tensors in lists:
        way(tensors)


@pytest.mark.benchmark(group="channel mask")
def test_channel_sums(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    plan = listed("cifar_unet")
    sums, weights, gradients = ChannelSums(plan), tensors_of(plan, device), tensors_of(plan, device)
    named, named_gradients = (dict(zip(plan.shapes, tensors, strict=True)) for tensors in (weights, gradients))
    names = list(sums.dims)
    x, y = [named[name] for name in names], [named_gradients[name] for name in names]
    pairs = [(i, dim) for i, name in enumerate(names) for dim in sums.dims[name]]
    owner, dims = [i for i, _ in pairs], [dim for _, dim in pairs]

    def plain(of: Callable[[int], Tensor]) -> Tensor:
        """As one writes it: each weight once, its sums along every axis, in float32."""
        parts: list[Tensor] = []
        for i, name in enumerate(names):
            value = of(i)
            parts += [value.sum([d for d in range(value.dim()) if d != dim]) for dim in sums.dims[name]]
        return torch.cat(parts).cpu()

    once = 4 * sum(tensor.numel() for tensor in x)
    candidates = {
        "copy_": copy_of_all(device),
        "magnitude: channel_sums": Candidate(lambda: channel_sums(x, [], owner, dims, "square"), once),
        "magnitude: with scores of all spaces": Candidate(lambda: sums.of("square", named), once),
        "magnitude: per tensor, per axis": Candidate(
            lambda: plain(lambda i: x[i].square()), once, "magnitude: channel_sums"
        ),
        "magnitude: ebdiff's reference": Candidate(
            lambda: reference.channel_sums(x, [], owner, dims, "square"), once, "magnitude: channel_sums"
        ),
        "taylor: channel_sums": Candidate(lambda: channel_sums(x, y, owner, dims, "product"), 2 * once),
        "taylor: with scores of all spaces": Candidate(lambda: sums.of("product", named, named_gradients), 2 * once),
        "taylor: per tensor, per axis": Candidate(
            lambda: plain(lambda i: x[i] * y[i]), 2 * once, "taylor: channel_sums"
        ),
    }
    assert torch.allclose(candidates["magnitude: channel_sums"].call().float(), plain(lambda i: x[i].square()))
    rounds = few(ROUNDS, full)
    rows = side_by_side(benchmark, device, candidates, rounds)
    report(rows, {"what": "sums per channel along every prunable axis; theirs in float32", "rounds": rounds})


@pytest.mark.benchmark(group="channel mask")
def test_mask_draw(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    plan = listed("cifar_unet")
    model = module_of(plan, tensors_of(plan, device))
    watch = EarlyBird(model, plan, window=20)  # draws at every step; weights that stand still never settle
    bits = random_mask(plan, 0.5).bits()
    history = torch.stack([bits[torch.randperm(len(bits))] for _ in range(64)])
    bytes_ = torch.randint(0, 256, (64, -(-len(bits) // 8)), dtype=torch.uint8)
    scores = watch.scores("magnitude")
    candidates = {
        "a draw for 3 ratios": Candidate(watch.step),
        "of which scores": Candidate(lambda: watch.scores("magnitude")),
        "of which a mask": Candidate(lambda: ChannelMask.draw(scores, plan=plan, ratio=0.6)),
        "mask_distance, 64 masks": Candidate(lambda: mask_distance(bytes_)),
        "bool xor and sum, 64 masks": Candidate(lambda: (history ^ history[-1]).sum(1), ours="mask_distance, 64 masks"),
    }
    rounds = few(ROUNDS, full)
    rows = side_by_side(benchmark, device, candidates, rounds)
    facts: dict[str, Any] = {"channels": len(bits), "rounds": rounds}
    if find_spec("diffusers"):
        batch = BATCH[full]
        step = training_step(device, batch)
        facts |= {"training_step_ms": 1e3 * step, "batch": batch, "draw_share_of_step": rows[0]["ms"] / 1e3 / step}
    report(rows, facts)


def training_step(device: torch.device, batch: int) -> float:
    """Seconds of forward and backward of the UNet, the least of several."""
    model = ddpm_cifar10().to(device)

    def step(count: int) -> float:
        x, t = torch.randn(count, 3, 32, 32, device=device), torch.ones(count, device=device)
        return seconds_of(lambda: model(x, t).sample.square().mean().backward(), device)

    step(1)
    return min(step(batch) for _ in range(2 if device.type == "cpu" else 10))
