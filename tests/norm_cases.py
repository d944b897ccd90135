"""Arguments for group_norm_silu, the same out of torch's own operators, and what both return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from op_cases import values
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops.group_norm import group_norm_silu

SMALL = ("weight", "bias", "scale", "shift", "time_bias")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice of a wider one": lambda x: torch.cat([x, x + 7, x], 1)[:, x.shape[1] : 2 * x.shape[1]] - 7,
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "an offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
}


class Case:
    """x, its first 200 positions `first` higher; the other arguments by name; small tensors in `small`'s dtype."""

    def __init__(
        self,
        shape: Sequence[int],
        groups: int | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        small: torch.dtype | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        first: float = 0.0,
        keep: Sequence[int] | None = None,
        only: Sequence[str] = SMALL,
        silu: bool = True,
        draw: int = 0,
    ) -> None:
        n, c = shape[:2]
        seed = 100 * draw
        x = values(shape, torch.float64, seed + 1) * std + mean
        x.view(n, c, prod(shape[2:]))[..., :200] += first
        self.x = x.to(dtype)
        self.dy = values(shape, torch.float64, seed + 2).to(dtype)
        shapes = {name: (c,) if name in ("weight", "bias") else (n, c) for name in only}
        self.small = {
            name: values(s, torch.float64, seed + 3 + i).to(small or dtype)
            for i, (name, s) in enumerate(shapes.items())
        }
        step = c // groups if isinstance(groups, int) else 0
        self.offsets = list(range(0, c + 1, step)) if isinstance(groups, int) else list(groups)
        self.keep = None if keep is None else torch.tensor([i not in keep for i in range(c)])
        self.silu = silu

    def ours(self, x: Tensor, small: dict[str, Tensor]) -> Tensor:
        two = small.get("weight"), small.get("bias")
        rest = {name: tensor for name, tensor in small.items() if name not in ("weight", "bias")}
        return group_norm_silu(x, *two, self.offsets, keep=self.keep, silu=self.silu, **rest)

    def torchs(self, x: Tensor, small: dict[str, Tensor]) -> Tensor:
        """The same out of torch's own operators: one norm for each group's kept channels."""
        full = (..., *[None] * (x.dim() - 2))
        kept = torch.arange(x.shape[1]) if self.keep is None else self.keep.nonzero()[:, 0]
        moved = x + small["time_bias"][full].to(x.dtype) if "time_bias" in small else x
        parts = [moved[:, :0]]
        for a, b in zip(self.offsets, self.offsets[1:], strict=False):
            at = kept[(kept >= a) & (kept < b)]
            if len(at):
                affine = [small[name][at] if name in small else None for name in ("weight", "bias")]
                parts.append(F.group_norm(moved[:, at], 1, *affine))
        y = torch.cat(parts, 1)
        if "scale" in small:
            y = y * (1 + small["scale"][:, kept][full].to(x.dtype)) + small["shift"][:, kept][full].to(x.dtype)
        y = F.silu(y) if self.silu else y
        return torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy(1, kept, y)

    def results(
        self, function: Any, wide: torch.dtype | None = None, needs: Sequence[str] | None = None
    ) -> list[Tensor]:
        """y and the gradients of x and all small tensors (or of those named), in `wide`."""
        inputs = {"x": self.x, **self.small}
        inputs = {
            k: v.detach().to(wide or v.dtype).requires_grad_(needs is None or k in needs) for k, v in inputs.items()
        }
        y = function(inputs["x"], {k: v for k, v in inputs.items() if k != "x"})
        wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, self.dy.to(y.dtype))]


def check(case: Case) -> None:
    """No error is larger than 1.2 times torch's own, but for one rounding of the result."""
    truth, theirs, ours = case.results(case.torchs, torch.float64), case.results(case.torchs), case.results(case.ours)
    for name, true, torchs, mine in zip(["y", "x", *case.small], truth, theirs, ours, strict=True):
        assert mine.dtype == torchs.dtype
        error, allowed = (float((result.double() - true).abs().max()) for result in (mine, torchs))
        rounding = torch.finfo(mine.dtype).eps * float(true.abs().max())
        assert error <= 1.2 * allowed + rounding, name
