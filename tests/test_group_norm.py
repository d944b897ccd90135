"""Group normalisation of unequal groups: torch's where groups are equal, one norm per group elsewhere."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import ebdiff
from ebdiff import EbdiffError
from ebdiff.nn.group_norm import GroupNormSiLU, MaskedGroupNorm, RaggedGroupNorm
from ebdiff.ops.group_norm import group_norm_silu

SHAPES = [(3, 7), (2, 7, 5), (2, 7, 5, 3), (1, 7, 2, 3, 4), (2, 7, 1, 1)]


def one_norm_per_group(x: Tensor, sizes: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    parts = zip(x.split(sizes, 1), weight.split(sizes), bias.split(sizes), strict=True)
    return torch.cat([F.group_norm(part, 1, w, b, eps) for part, w, b in parts], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_is_one_norm_per_group(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RaggedGroupNorm((3, 1, 0, 2, 1), dtype=torch.float64)
    assert norm.group_sizes == (3, 1, 2, 1)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = one_norm_per_group(x, norm.group_sizes, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), expected)
    if x[0].numel() > 7:  # where a group has one element its gradient is zero either way
        assert torch.autograd.gradcheck(norm, (x.detach().requires_grad_(),))


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_no_larger_than_torchs_own(dtype: torch.dtype, mean: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 12, 9, 9) + mean).to(dtype)
    weight, bias = torch.randn(12), torch.randn(12)
    truth = F.group_norm(x.double(), 4, weight.double(), bias.double())
    ours = group_norm_silu(x, weight, bias, 4, silu=False)
    theirs = F.group_norm(x, 4, weight.to(dtype), bias.to(dtype))
    assert ours.dtype == dtype
    one_rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + one_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_err_no_more_than_torchs_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(3, 12, 6, 5) + 3).to(dtype), torch.randn(3, 12, 6, 5).to(dtype)
    affine = torch.randn(2, 12)

    def gradients(norm: Any, wide: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(wide).requires_grad_() for t in (x, *affine)]
        return list(torch.autograd.grad(norm(*inputs), inputs, dy.to(wide)))

    truth = gradients(lambda x, w, b: F.group_norm(x, 4, w, b), torch.float64)
    theirs = gradients(lambda x, w, b: F.group_norm(x, 4, w, b), dtype)
    ours = gradients(lambda x, w, b: group_norm_silu(x, w, b, 4, silu=False), dtype)
    for mine, torchs, true in zip(ours, theirs, truth, strict=True):
        assert (mine - true).abs().max() <= 2 * (torchs - true).abs().max() + 1e-6 * true.abs().max()


def test_second_derivatives() -> None:
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)]
    x, weight, bias = inputs[0].requires_grad_(), *(row.requires_grad_() for row in inputs[1].unbind())
    assert torch.autograd.gradgradcheck(lambda *a: group_norm_silu(*a, [0, 2, 5], silu=False), (x, weight, bias))


def test_removed_channels_are_zero_and_take_no_part() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    groups = torch.tensor([0, -1, 0, -1, 1, 1])
    x = torch.randn(2, 6, 4, 4)
    y = MaskedGroupNorm(norm, groups)(x)
    x[:, [1, 3]] = 1e6
    assert torch.equal(MaskedGroupNorm(norm, groups)(x), y)
    assert not y[:, [1, 3]].any()
    kept = groups >= 0
    expected = one_norm_per_group(x[:, kept], (2, 2), norm.weight[kept], norm.bias[kept], norm.eps)
    torch.testing.assert_close(y[:, kept], expected)


def test_what_a_mask_removes_survives_casts_and_empty_memory() -> None:
    """It is neither state nor to be cast with it: no buffer."""
    norm = nn.GroupNorm(2, 6)
    masked, x = MaskedGroupNorm(norm, torch.tensor([0, -1, 0, 1, -1, 1])), torch.randn(2, 6, 4)
    expected, state = masked(x), copy.deepcopy(masked.state_dict())
    assert list(state) == ["weight", "bias"]
    moved = copy.deepcopy(masked).type(torch.float32).to("meta").to_empty(device="cpu")
    moved.load_state_dict(state)
    assert torch.equal(moved(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        masked(mode.from_tensor(x))
    assert torch.equal(masked(x), expected)
    with pytest.raises(EbdiffError, match="rising"):
        MaskedGroupNorm(norm, torch.tensor([1, 1, 1, 0, 0, 0]))


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(1, 2), lambda x: x[:, ::2], lambda x: x[:, 1:5], lambda x: x[..., 1:]]
)
def test_strided_inputs(view: Any) -> None:
    x = view(torch.randn(3, 8, 8, dtype=torch.float64))
    sizes = (1, 3) if x.shape[1] == 4 else (1, 3, 2, 2)
    norm = RaggedGroupNorm(sizes, dtype=torch.float64)
    torch.testing.assert_close(norm(x), one_norm_per_group(x, sizes, norm.weight, norm.bias, norm.eps))


def test_a_batch_of_one_that_only_looks_channels_last() -> None:
    """Attention hands over [1, C, H, W] with any stride over the batch; ATen refuses what torch calls contiguous."""
    x = torch.randn(1, 16, 6, dtype=torch.float64).transpose(1, 2).view(1, 6, 4, 4)
    norm = RaggedGroupNorm((2, 1, 3), dtype=torch.float64)
    expected = one_norm_per_group(x.contiguous(), (2, 1, 3), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (2, 6, 1, 4), (2, 6, 4, 1), (1, 6, 1, 2), (3, 6, 1, 1), (1, 6, 5)])
def test_any_strides_over_dimensions_of_one(shape: tuple[int, ...]) -> None:
    norm = RaggedGroupNorm((2, 1, 3), dtype=torch.float64)
    values = torch.randn(shape, dtype=torch.float64)
    for order in permutations(range(len(shape))):
        laid_out = values.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
        for odd in (1, 7, 1000):
            strides = [odd if n == 1 else s for n, s in zip(shape, laid_out.stride(), strict=True)]
            x = laid_out.as_strided(shape, strides)
            expected = one_norm_per_group(values, (2, 1, 3), norm.weight, norm.bias, norm.eps)
            torch.testing.assert_close(norm(x), expected)


def test_memory_format_and_state_dict_keys() -> None:
    norm = RaggedGroupNorm((3, 1))
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    assert list(norm.state_dict()) == list(nn.GroupNorm(2, 4).state_dict())


def test_it_compiles_without_graph_breaks() -> None:
    norm, x = RaggedGroupNorm((3, 1)), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="eager")(x), norm(x))


@pytest.mark.parametrize("sizes", [(), (0, 0), (3, -1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(EbdiffError, match="RaggedGroupNorm"):
        RaggedGroupNorm(sizes)


class Modulated(nn.Module):
    """A block written with the fused layer: time embedding in, scale and shift out of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), GroupNormSiLU(4, 16)
        self.time, self.scale, self.last = nn.Linear(5, 16), nn.Linear(5, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x), time_bias=self.time(t), scale=self.scale(t)))


@pytest.mark.parametrize("norm", ["ragged", "balanced"])
def test_the_law_holds_for_networks_written_with_the_fused_layer(norm: Any) -> None:
    torch.manual_seed(0)
    model, x, t = Modulated().double(), torch.randn(2, 3, 6, 6).double(), torch.randn(2, 5).double()
    plan = ebdiff.trace(model, x, t)
    assert [space.size for space in plan] == [16]
    scores = {space.name: torch.rand(space.size) for space in plan}
    mask = ebdiff.ChannelMask.draw(scores, plan=plan, ratio=0.5, norm=norm)
    small = ebdiff.shrink(model, mask)
    assert small.first.out_channels == 8
    assert isinstance(small.norm, GroupNormSiLU if norm == "balanced" else GroupNormSiLU | RaggedGroupNorm)
    torch.testing.assert_close(small(x, t), ebdiff.masked(model, mask)(x, t))
    plan = ebdiff.trace(small, x, t)
    assert [space.size for space in plan] == [8]
