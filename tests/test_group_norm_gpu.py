"""group_norm_silu on a GPU, by the Triton kernels: the specification, the same bits, CUDA graphs, past 2^31 elements.

Never run on a GPU so far; the same kernels are interpreted in test_group_norm_triton.py.
"""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernels_only import only_kernels_of
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops import group_norm_reference as reference
from ebdiff.ops.group_norm_reference import Norm

operator = importlib.import_module("ebdiff.ops.group_norm")
pytestmark = pytest.mark.gpu

RAGGED = (0, 8, 11, 11, 40, 72, 87)
# One that a program holds, one that it reads again from the cache, one in two passes; groups of any size; one position.
SHAPES = {
    "held": ((4, 64, 16, 16), tuple(range(0, 65, 8))),
    "cached": ((8, 320, 64, 64), tuple(range(0, 321, 10))),
    "two passes": ((2, 64, 160, 160), tuple(range(0, 65, 2))),
    "ragged": ((3, 87, 17, 13), RAGGED),
    "ragged, two passes": ((1, 87, 130, 67), RAGGED),
    "one position": ((33, 96), tuple(range(0, 97, 3))),
    "five dimensions": ((2, 24, 3, 9, 10), (0, 24)),
}
# Every dtype of every shape would take minutes to compile.
OTHERS = [("ragged", torch.float32), ("two passes", torch.float32), ("ragged, two passes", torch.float16)]


only_kernels = only_kernels_of(operator)


def tensors(name: str, dtype: torch.dtype, last: bool, mean: float = 0.0) -> tuple[Tensor, Tensor, Norm]:
    shape, offsets = SHAPES[name]
    made = torch.Generator("cuda").manual_seed(0)

    def values(*size: int) -> Tensor:
        return torch.randn(size, generator=made, device="cuda")

    n, c = shape[:2]
    x, dy = (values(*shape) + mean).to(dtype), values(*shape).to(dtype)
    if last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    keep = torch.arange(c, device="cuda") % 5 != 1
    return x, dy, Norm(values(c), values(c), values(n, c), values(n, c), values(n, c), keep, offsets, 1e-5, True)


def everything(x: Tensor, dy: Tensor, norm: Norm, module: Any = None) -> list[Tensor]:
    """y and the six gradients, by the operators or by a module."""
    needs = [True] * 6
    if module is None:
        y, mean, rstd = torch.ops.ebdiff.group_norm_silu_forward(x, *norm)
        return [y, *torch.ops.ebdiff.group_norm_silu_backward(dy, x, mean, rstd, *norm, needs)]
    y, mean, rstd = module.forward(x, norm)
    return [y, *module.backward(dy, x, mean, rstd, norm, needs)]


def doubled(norm: Norm) -> Norm:
    return Norm(*(None if t is None else t.double() for t in norm.tensors), *norm[5:])


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in SHAPES), *OTHERS])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_it_is_the_specification(name: str, dtype: torch.dtype, last: bool, mean: float) -> None:
    x, dy, norm = tensors(name, dtype, last, mean)
    truth = everything(x.double(), dy.double(), doubled(norm), reference)
    theirs = everything(x, dy, norm, reference)
    for mine, other, true in zip(everything(x, dy, norm), theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        assert mine.stride() == other.stride()
        order = (4 + mean) * torch.finfo(torch.float32).eps * true.abs().max().clamp(min=1.0)
        assert (mine - true).abs().max() <= 1.2 * (other - true).abs().max() + order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_it_errs_no_more_than_torch(dtype: torch.dtype, mean: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 64, 32, 32, device="cuda") + mean).to(dtype)
    truth = F.silu(F.group_norm(x.double(), 8))
    theirs, ours = F.silu(F.group_norm(x, 8)), operator.group_norm_silu(x, None, None, 8)
    assert (ours - truth).abs().max() <= 1.2 * (theirs - truth).abs().max() + 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_every_run_gives_the_same_bits(name: str) -> None:
    x, dy, norm = tensors(name, torch.bfloat16, True)
    first = everything(x, dy, norm)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(everything(x, dy, norm), first, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_what_removed_channels_hold_changes_no_bit(name: str) -> None:
    x, dy, norm = tensors(name, torch.bfloat16, False)
    assert norm.keep is not None
    first = everything(x, dy, norm)
    x[:, ~norm.keep], dy[:, ~norm.keep] = float("nan"), float("inf")
    found = everything(x, dy, norm)
    assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    assert not found[0][:, ~norm.keep].any()
    assert not found[1][:, ~norm.keep].any()


@pytest.mark.parametrize("name", ["held", "cached", "two passes"])
def test_replayed_from_a_cuda_graph(name: str) -> None:
    x, dy, norm = tensors(name, torch.bfloat16, False)
    everything(x, dy, norm)  # compiles, and copies the table of the groups
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(x, dy, norm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything(x, dy, norm)
    x.add_(0.5)
    dy.mul_(2.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, everything(x, dy, norm), strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("shape", [(1, 64, 1 << 26), (520, 64, 1 << 16)], ids=["one sample", "many"])
def test_past_two_to_the_31_elements(shape: tuple[int, int, int], last: bool) -> None:
    """The last channels and samples are what they are alone."""
    if torch.cuda.mem_get_info()[0] < 5 * 2 * torch.Size(shape).numel():
        pytest.skip("too little memory")
    n, c, hw = shape
    x = torch.empty((n, hw, c) if last else shape, dtype=torch.bfloat16, device="cuda").normal_()
    x = x.movedim(-1, 1) if last else x
    y = operator.group_norm_silu(x, None, None, 32)
    expected = operator.group_norm_silu(x[-1:, -2:].contiguous(), None, None, 1)
    torch.testing.assert_close(y[-1:, -2:], expected)


def test_what_autograd_keeps_is_x_and_two_numbers_a_group() -> None:
    x, _, norm = tensors("held", torch.bfloat16, False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operator.group_norm_silu(x.requires_grad_(), norm.weight, norm.bias, 8)
    assert sum(t.numel() for t in kept) == x.numel() + 2 * 4 * 8 + 2 * 64


def test_ragged_is_one_norm_per_group() -> None:
    x, _, norm = tensors("ragged", torch.float32, False)
    found = operator.group_norm_silu(x, norm.weight, norm.bias, RAGGED, silu=False)
    for a, b in pairwise(RAGGED):
        if a < b:
            expected = F.group_norm(x[:, a:b], 1, norm.weight[a:b], norm.bias[a:b])  # type: ignore[index]
            torch.testing.assert_close(found[:, a:b], expected)
