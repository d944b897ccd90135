"""GroupNorm + SiLU, forward and with backward, against what one writes in plain torch.

Targets on 2 cores: forward 1.15 times faster than eager and than torch.compile, forward + backward 1.3 times; with
equal groups, and with the unequal ones of a ticket, for which torch has no operator.

The floor counts tensors of x's size: forward reads x and writes y (2), backward reads x and dy and writes dx (3).
`share_of_copy` is that floor by the time, over what copy_ of as many elements reaches; tensors of a few MB stay in the
caches, and so does the copy's.

On a GPU, in bfloat16, max-autotune too, and ours, eager and torch.compile replayed from CUDA graphs; none of these has
run on one yet. `saved_mb`: what autograd keeps between forward and backward, weights counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Candidate, copy_of, side_by_side
from ebdiff.ops.group_norm import fallbacks, group_norm_silu

ROUNDS = 41
EPS = 1e-5
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

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, [0, *accumulate(self.sizes)], eps=EPS)

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


def ways(case: Case, layout: str, dtype: torch.dtype, device: torch.device) -> dict[str, Function]:
    """Everything a user would pick, for one shape, dtype and layout."""
    found: dict[str, Function] = {"ebdiff": case.ours, "eager": case.plain}
    found["torch.compile"] = torch.compile(case.plain, dynamic=False)
    if not case.even:
        found["eager, 8 equal groups"] = case.as_if_even
    if device.type == "cuda":
        if dtype == torch.bfloat16:  # in every dtype it would compile for longer than the suite has
            found["max-autotune"] = torch.compile(case.plain, dynamic=False, mode="max-autotune-no-cudagraphs")
        if find_spec("liger_kernel") and case.even and layout == "NCHW":
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


def replayed(call: Callable[[], Any]) -> Callable[[], None]:
    """The call, captured in a CUDA graph after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def candidates_of(case: Case, layout: str, dtype: torch.dtype, device: torch.device) -> dict[str, Candidate]:
    """Forward alone, then forward and backward, of each way; all of them have to agree."""
    torch.manual_seed(0)
    x, dy = (torch.randn(case.shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    affine = torch.randn(2, case.shape[1], device=device).to(dtype).unbind()
    inputs = [tensor.clone().requires_grad_() for tensor in (x, *affine)]
    size = x.numel() * x.itemsize
    found = {}
    for name, function in ways(case, layout, dtype, device).items():
        forward = torch.no_grad()(partial(function, *inputs))
        both = partial(with_backward, function, inputs, dy)
        if name != "eager, 8 equal groups":
            assert torch.allclose(forward().float(), case.plain(x, *affine).float(), atol=0.05, rtol=0.02), name
        label = f"{str(dtype)[6:]}, {layout}"
        found[f"{label}, forward: {name}"] = Candidate(forward, 2 * size, f"{label}, forward: ebdiff")
        found[f"{label}, both: {name}"] = Candidate(both, 5 * size, f"{label}, both: ebdiff")
        if device.type == "cuda" and dtype == torch.bfloat16 and name in ("ebdiff", "eager", "torch.compile"):
            for what, call, floor in (("forward", forward, 2 * size), ("both", both, 5 * size)):
                ours = f"{label}, {what}: ebdiff, graph"
                found[f"{label}, {what}: {name}, graph"] = Candidate(replayed(call), floor, ours)
    return found


@pytest.mark.benchmark(group="group norm")
@pytest.mark.parametrize("shape", CASES)
def test_group_norm_silu(benchmark: Any, device: torch.device, report: Any, shape: str) -> None:
    case = CASES[shape]
    candidates = {"copy_": copy_of(torch.Size(case.shape).numel(), device)}
    fallbacks.clear()
    torch._dynamo.reset()  # 8 variants of a function are compiled, then no more: just what one shape needs
    for dtype, layout in product((torch.float32, torch.bfloat16), LAYOUTS):
        candidates |= candidates_of(case, layout, dtype, device)
    x, affine = torch.randn(case.shape, device=device), torch.randn(2, case.shape[1], device=device)
    inputs = [tensor.requires_grad_() for tensor in (x, *affine.unbind())]
    saved = {
        name: saved_bytes(function, inputs) / 1e6
        for name, function in ways(case, "NCHW", torch.float32, device).items()
    }
    rows = side_by_side(benchmark, device, candidates, ROUNDS, warm=True)
    facts = {"what": "GroupNorm + SiLU", "shape": list(case.shape), "groups": list(case.sizes), "rounds": ROUNDS}
    report(rows, {**facts, "saved_mb": saved, "served_by_the_reference": dict(fallbacks)})
