"""What takes the place of a module while a model is traced: the same parameters, in operators that have rules."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn.group_norm import GroupNormSiLU, RaggedGroupNorm
from ..nn.multihead import MultiheadAttention, unnest
from .modules import replace

__all__ = ["put_stand_ins"]


def put_stand_ins(model: nn.Module) -> None:
    """Replace the modules of a model, in place, that compute in operators without rules."""
    for name, module in list(model.named_modules()):
        made: nn.Module
        if isinstance(module, RaggedGroupNorm | GroupNormSiLU):
            made = _GroupNorm(module)
        elif MultiheadAttention.stands_for(module) or isinstance(module, MultiheadAttention):
            made = _MultiheadAttention(module)
        else:
            continue
        vars(made).update({key: mark for key, mark in vars(module).items() if key.startswith("_ebdiff")})
        replace(model, name, made)
    unnest(model)


class _GroupNorm(nn.GroupNorm):
    """What the layers of ebdiff.nn.group_norm compute, in operators with rules; shapes are all that a trace sees."""

    def __init__(self, norm: RaggedGroupNorm | GroupNormSiLU) -> None:
        super().__init__(1, norm.num_channels, affine=False)
        self.weight, self.bias, self.silu = norm.weight, norm.bias, norm.silu
        if isinstance(norm, RaggedGroupNorm):
            self.group_sizes = norm.group_sizes
        else:
            self.group_sizes = (norm.num_channels // norm.num_groups,) * norm.num_groups

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, time_bias: Tensor | None = None
    ) -> Tensor:
        here = (..., *[None] * (x.dim() - 2))
        y = super().forward(x if time_bias is None else x + time_bias[here])
        y = y if scale is None else y * (1 + scale[here])
        y = y if shift is None else y + shift[here]
        return nn.functional.silu(y) if self.silu else y


class _MultiheadAttention(MultiheadAttention):
    """Whoever looks at attention weights averaged over the heads needs all of them; most callers never look.

    A single head has the shape of the average, and freezes the heads as soon as it is looked at.
    """

    def _averaged(self, weights: Tensor) -> Tensor:
        return weights.select(1, 0)
