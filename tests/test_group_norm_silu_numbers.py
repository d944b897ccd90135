"""group_norm_silu's arithmetic: SiLU itself, means that no float32 can hold, gradients that are too large to keep."""

from __future__ import annotations

import pytest
import torch
from norm_cases import LAYOUTS, SMALL, Case, check
from op_cases import by_threads, generator, needs_native
from torch import Tensor

from ebdiff.ops.group_norm import group_norm_silu

INFINITE = float("inf")


def silu_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """silu(z) and its derivative by the operator: weights of 0 leave nothing but the shift."""
    channels = 1000
    shift = torch.nn.functional.pad(z, (0, -len(z) % channels)).view(-1, channels).requires_grad_()
    x, weight = torch.zeros(len(shift), 1, channels).movedim(1, -1).expand(-1, -1, 1), torch.zeros(channels)
    y = group_norm_silu(x, weight, None, 1, shift=shift)
    (slope,) = torch.autograd.grad(y, shift, torch.ones_like(y))
    return y.detach().flatten()[: len(z)], slope.flatten()[: len(z)]


def every(step: int) -> Tensor:
    """The float32 numbers in [-90, 90], each so-many-th."""
    largest = int(torch.tensor(90.0).view(torch.int32))
    positive = torch.arange(0, largest + 1, step, dtype=torch.int32).view(torch.float32)
    return torch.cat([positive, -positive])


def ulp(value: Tensor) -> Tensor:
    """The distance of float32 numbers at a float64 value."""
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=2.0**-126))) - 23)


@needs_native
def test_silu_is_exact_to_a_few_units_in_the_last_place() -> None:
    """From -80 on, below which it is as good as 0. Its derivative passes through 0: units of 1 there."""
    z = every(step=3571)
    y, slope = silu_of(z)
    wide = z.double()
    true, sigmoid = wide * wide.sigmoid(), wide.sigmoid()
    error = (y - true).abs() / ulp(true)
    assert error[z >= -80].max() <= 3.25
    assert (y - true)[z < -80].abs().max() < 2e-33
    assert (slope - sigmoid * (1 + wide * (1 - sigmoid))).abs().max() <= 2.25 * 2.0**-23


def test_silu_of_extremes() -> None:
    z = torch.tensor(
        [INFINITE, 3e38, 1e30, -INFINITE, -3e38, -88.72284, -103.9, 0.0, -0.0, 1e-40, -1e-40, float("nan")]
    )
    y, slope = silu_of(z)
    assert torch.equal(y[:3], z[:3])
    assert y[3:7].abs().max() < 2e-33
    assert torch.equal(y[7:9], z[7:9])
    assert torch.equal(y[9:11], z[9:11] / 2)
    assert torch.equal(slope[:3], torch.ones(3))
    assert slope[3:7].abs().max() < 2e-33
    assert torch.equal(slope[7:11], torch.full((4,), 0.5))
    assert y[11].isnan()
    assert slope[11].isnan()


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("only", [SMALL, ("weight", "bias")])
def test_a_mean_that_float32_cannot_hold(only: tuple[str, ...], layout: str) -> None:
    """Beyond 2^24 lie only even numbers: half of these values are one below their mean, half are one above."""
    case = Case((2, 6, 8, 24), 2, only=only, silu=False)
    signs = torch.tensor([-1.0, 1.0]).repeat(2, 6, 8, 12)[..., torch.randperm(24, generator=generator(0))]
    case.x = LAYOUTS[layout](signs + (2.0**24 + 1))
    if "time_bias" in only:
        case.small["time_bias"] = torch.tensor([[-3.0, -1.0, 5.0, 3.0, 7.0, 2.0]]).repeat(2, 1)
    for mine, true in zip(case.results(case.ours), case.results(case.torchs, torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6 * float(true.abs().max()))


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(8, 3, 90001), (1, 7, 600011)])
def test_gradients_that_are_computed_twice(shape: tuple[int, ...], layout: str) -> None:
    """In 16 bits what one thread, or all of them on one sample, would have to keep in float32 grows too large."""
    case = Case(shape, [0, shape[1]], dtype=torch.bfloat16, keep=[1])
    case.x = LAYOUTS[layout](case.x)
    check(case)
    first, *others = by_threads(lambda: case.results(case.ours))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
