"""GroupNorm + SiLU, forward and with backward, against what one writes in plain torch.

Targets on 2 cores: forward 1.15 times faster than eager and than torch.compile, forward + backward 1.3 times; with
equal groups, and with the unequal ones of a ticket, for which torch has no operator.

The floor counts tensors of x's size: forward reads x and writes y (2), backward reads x and dy and writes dx (3).
`share_of_copy` is that floor by the time, over what copy_ of as many elements reaches; tensors of a few MB stay in the
caches, and so does the copy's.

On a GPU, in bfloat16, max-autotune too, and ours, eager and torch.compile replayed from CUDA graphs; and each kind of
kernel on tensors of 20 MB and more, against the floors of one pass and of two at an H200's bandwidth, beside a forward
in two passes written for this (two_pass_nhwc.py). Nothing of that has run on a GPU yet. `saved_mb`: what autograd keeps
between forward and backward, weights counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Candidate, copy_of, few, replayed, side_by_side
from ebdiff.kernels.group_norm_plan import OnePass, Shape, plan_of
from ebdiff.ops.group_norm import fallbacks, group_norm_silu

ROUNDS = 41
EPS = 1e-5
H200 = 4.3e12  # bytes a second that a copy reaches
# How often each reads or writes a tensor of x's size, in one pass and in two.
TENSORS = {"forward": (2, 3), "backward": (3, 5), "both": (5, 8)}
TWO_PASSES = "two passes, NHWC, as apex does"
OTHER_RESULT = "eager, 8 equal groups"
GRAPHS = ("ebdiff", "eager", "torch.compile")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape, and its groups.

    Args:
        shape: [N, C, H, W].
        sizes: channels of each group.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def even(self) -> bool:
        """May torch's own operator serve?"""
        return len(set(self.sizes)) == 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the groups begin, and C."""
        return (0, *accumulate(self.sizes))

    def kind(self, dtype: torch.dtype, layout: str) -> str:
        """The kernels that take it on a GPU: held (forward, and perhaps not backward), cached or in two passes."""
        n, c, *positions = self.shape
        size = torch.Size(positions).numel()
        plan = plan_of(Shape(n, c, size, dtype.itemsize, layout == "channels_last"), self.offsets)
        if not isinstance(plan, OnePass):
            return "two passes"
        return " and ".join(dict.fromkeys("held" if held else "cached" for *_, held in (plan.forward, plan.backward)))

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, self.offsets, eps=EPS)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As one writes it; unequal groups one after another."""
        if self.even:
            return F.silu(F.group_norm(x, len(self.sizes), weight, bias, EPS))
        parts = zip(x.split(self.sizes, 1), weight.split(self.sizes), bias.split(self.sizes), strict=True)
        return F.silu(torch.cat([F.group_norm(part, 1, w, b, EPS) for part, w, b in parts], 1))

    def as_if_even(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """torch's operator on as many channels in 8 equal groups: another result, for its time."""
        return F.silu(F.group_norm(x, 8, weight, bias, EPS))

    def liger(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Liger's, on [N, C, H * W]: its backward fails on four dimensions. It has no SiLU."""
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        n, c = x.shape[:2]
        y = LigerGroupNormFunction.apply(x.view(n, c, -1), weight, bias, c, len(self.sizes), EPS)
        return F.silu(y.view(x.shape))

    def in_two_passes(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Without a backward pass, for channels_last alone."""
        from benchmarks.two_pass_nhwc import group_norm_silu as in_two_passes

        return in_two_passes(x, weight, bias, len(self.sizes), EPS)


def ragged() -> Case:
    """What a random half of 176 channels in 32 groups leaves: 88 channels in unequal groups."""
    chance = torch.Generator().manual_seed(0)
    kept = torch.randperm(176, generator=chance)[:88]
    sizes = torch.bincount(kept * 32 // 176, minlength=32)
    return Case((8, 88, 32, 32), tuple(int(size) for size in sizes if size))


CASES = {
    "8x128x32x32": Case((8, 128, 32, 32), (4,) * 32),
    "2x320x64x64": Case((2, 320, 64, 64), (10,) * 32),
    "8x88x32x32_ragged": ragged(),
}
# A network on images of 16x16: here what is done once a call, a group or a channel weighs as much as the elements.
SHORT = {
    "32x32x16x16": Case((32, 32, 16, 16), (2,) * 16),
    "32x64x8x8": Case((32, 64, 8, 8), (4,) * 16),
    "32x128x4x4": Case((32, 128, 4, 4), (8,) * 16),
}
# On a GPU, by the elements of a group, tensors of 34, 21 and 134 MB in bfloat16; elsewhere small ones.
LARGE = {
    "4096_a_group": (Case((128, 128, 32, 32), (4,) * 32), Case((2, 8, 4, 4), (4,) * 2)),
    "40960_a_group": (Case((8, 320, 64, 64), (10,) * 32), Case((2, 20, 4, 4), (10,) * 2)),
    "262144_a_group": (Case((8, 128, 256, 256), (4,) * 32), Case((1, 8, 16, 16), (4,) * 2)),
}


def ways(case: Case, layout: str, dtype: torch.dtype, device: torch.device, full: bool = True) -> dict[str, Function]:
    """Everything a user would pick, for one shape, dtype and layout; where not `full`, compiled in float32 alone."""
    found: dict[str, Function] = {"ebdiff": case.ours, "eager": case.plain}
    on_gpu, narrow = device.type == "cuda", dtype == torch.bfloat16
    quick = not narrow and (case.even or layout == "NCHW")  # unequal groups take half a minute each time
    if narrow if on_gpu else (full or quick):  # in every dtype it would compile for longer than the suite has
        found["torch.compile"] = torch.compile(case.plain, dynamic=False)
    if not case.even:
        found[OTHER_RESULT] = case.as_if_even
    if on_gpu:
        if narrow:
            found["max-autotune"] = torch.compile(case.plain, dynamic=False, mode="max-autotune-no-cudagraphs")
        if case.even and layout == "channels_last" and find_spec("triton"):
            found[TWO_PASSES] = case.in_two_passes
        if case.even and layout == "NCHW" and find_spec("liger_kernel"):
            found["Liger + SiLU"] = case.liger
    return found


def with_backward(function: Function, inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*inputs), inputs, dy))


def saved_bytes(function: Function, inputs: Sequence[Tensor]) -> int:
    """Of the tensors that autograd keeps for the backward pass; memory that two of them share counts once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(*inputs)
    del y  # only now may what was kept be given back
    return sum(kept.values())


def floors_ms(tensor_bytes: int, what: str) -> dict[str, float]:
    """What an H200 takes to move the tensors of `what`, a key of TENSORS, in one pass and in two."""
    names = ("one_pass_floor_ms", "two_pass_floor_ms")
    return {name: 1e3 * count * tensor_bytes / H200 for name, count in zip(names, TENSORS[what], strict=True)}


def with_floors(rows: Sequence[Mapping[str, Any]], tensor_bytes: int) -> Iterator[dict[str, Any]]:
    """Rows named "..., forward: ..." and so on, with both floors, and the share of each that they reach."""
    for row in rows:
        what = row["what"].partition(":")[0].rpartition(", ")[2]
        floors = floors_ms(tensor_bytes, what) if what in TENSORS else {}
        shares = {name.replace("floor_ms", "share"): floor / row["ms"] for name, floor in floors.items()}
        yield {**row, **floors, **shares}


def calls_of(function: Function, inputs: Sequence[Tensor], dy: Tensor, *, forward_only: bool) -> dict[str, Any]:
    """{what: a call that does it}, with the names of TENSORS; backward alone on a graph that is kept."""
    calls = {"forward": torch.no_grad()(partial(function, *inputs))}
    if not forward_only:
        calls["backward"] = partial(torch.autograd.grad, function(*inputs), inputs, dy, retain_graph=True)
        calls["both"] = partial(with_backward, function, inputs, dy)
    return calls


def arguments(case: Case, layout: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias; dy."""
    torch.manual_seed(0)
    x, dy = (torch.randn(case.shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    affine = torch.randn(2, case.shape[1], device=device).to(dtype).unbind()
    return [tensor.clone().requires_grad_() for tensor in (x, *affine)], dy


def candidates_of(
    case: Case, layout: str, dtype: torch.dtype, device: torch.device, functions: Mapping[str, Function], whats: str
) -> dict[str, Candidate]:
    """Of each way what is asked for, "forward both" say; all of them have to agree."""
    inputs, dy = arguments(case, layout, dtype, device)
    size = inputs[0].numel() * dtype.itemsize
    expected = case.plain(*inputs).detach().float()
    label, found = f"{str(dtype)[6:]}, {layout}", {}
    for name, function in functions.items():
        calls = calls_of(function, inputs, dy, forward_only=name == TWO_PASSES)
        if name != OTHER_RESULT:
            assert torch.allclose(calls["forward"]().float(), expected, atol=0.05, rtol=0.02), name
        for what in [what for what in whats.split() if what in calls]:
            floor, row = TENSORS[what][0] * size, f"{label}, {what}: "
            found[row + name] = Candidate(calls[what], floor, f"{row}ebdiff")
            if device.type == "cuda" and dtype == torch.bfloat16 and name in GRAPHS and what != "backward":
                found[f"{row}{name}, graph"] = Candidate(replayed(calls[what]), floor, f"{row}ebdiff, graph")
    return found


@pytest.mark.benchmark(group="group norm")
@pytest.mark.parametrize("shape", CASES)
def test_group_norm_silu(benchmark: Any, device: torch.device, report: Any, full: bool, shape: str) -> None:
    case, rounds = CASES[shape], few(ROUNDS, full)
    candidates = {"copy_": copy_of(torch.Size(case.shape).numel(), device)}
    fallbacks.clear()
    torch._dynamo.reset()  # 8 variants of a function are compiled, then no more: just what one shape needs
    for dtype, layout in product((torch.float32, torch.bfloat16), LAYOUTS):
        functions = ways(case, layout, dtype, device, full)
        candidates |= candidates_of(case, layout, dtype, device, functions, "forward both")
    inputs, _ = arguments(case, "NCHW", torch.float32, device)
    saved = {
        name: saved_bytes(function, inputs) / 1e6
        for name, function in ways(case, "NCHW", torch.float32, device).items()
    }
    rows = side_by_side(benchmark, device, candidates, rounds, warm=True)
    facts = {"what": "GroupNorm + SiLU", "shape": list(case.shape), "groups": list(case.sizes), "rounds": rounds}
    report(rows, {**facts, "saved_mb": saved, "served_by_the_reference": dict(fallbacks)})


@pytest.mark.benchmark(group="group norm, short planes")
@pytest.mark.parametrize("shape", SHORT)
def test_group_norm_short_planes(benchmark: Any, device: torch.device, report: Any, full: bool, shape: str) -> None:
    case, rounds = SHORT[shape], few(ROUNDS, full)
    candidates = {"copy_": copy_of(torch.Size(case.shape).numel(), device)}
    functions: dict[str, Function] = {"ebdiff": case.ours, "eager": case.plain}
    fallbacks.clear()
    candidates |= candidates_of(case, "NCHW", torch.float32, device, functions, "forward both")
    rows = side_by_side(benchmark, device, candidates, rounds, warm=True)
    facts = {"what": "GroupNorm + SiLU, short planes", "shape": list(case.shape), "groups": list(case.sizes)}
    report(rows, {**facts, "rounds": rounds, "served_by_the_reference": dict(fallbacks)})


@pytest.mark.benchmark(group="group norm kernels")
@pytest.mark.parametrize("name", LARGE)
def test_group_norm_kernels(benchmark: Any, device: torch.device, report: Any, full: bool, name: str) -> None:
    """Forward and backward alone of each kind of kernel, in bfloat16. The floors are an H200's, so only on a GPU."""
    large, small = LARGE[name]
    case, dtype = large if device.type == "cuda" else small, torch.bfloat16
    rounds = few(ROUNDS, full)
    elements = torch.Size(case.shape).numel()
    candidates = {"copy_": copy_of(elements, device)}
    fallbacks.clear()
    torch._dynamo.reset()
    for layout in LAYOUTS:
        functions = ways(case, layout, dtype, device, full)
        functions.pop("max-autotune", None)
        candidates |= candidates_of(case, layout, dtype, device, functions, "forward backward")
    rows = side_by_side(benchmark, device, candidates, rounds, warm=True)
    facts = {"what": "GroupNorm + SiLU kernels", "shape": list(case.shape), "groups": len(case.sizes), "rounds": rounds}
    if device.type == "cuda":
        rows = list(with_floors(rows, elements * dtype.itemsize))
        facts["kinds"] = {layout: case.kind(dtype, layout) for layout in LAYOUTS}
    report(rows, {**facts, "served_by_the_reference": dict(fallbacks)})
