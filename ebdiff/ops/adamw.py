"""AdamW, its masks and the moving average of the weights in one pass: torch.ops.ebdiff.masked_adamw_."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .channel_mask_checks import check_adamw, check_axes, check_devices, refuse_freed, refuse_shared
from .channel_mask_reference import Lists, by_owner
from .library import define
from .mask_axes import Axes
from .serve import is_plain, reference_of, run, written

__all__ = ["check_update", "masked_adamw_"]


@torch.no_grad()
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    ema: Sequence[Tensor],
    axes: Axes,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of AdamW, of the moving average of the weights, and of the masks on all of them, in one pass.

    Computed in float32 (float64 for float64), each operation rounded once and stored to the nearest: the same bits
    from the reference, from every instruction set and with any number of threads. Removed channels of the parameters,
    both moments and the average become exact zeros, whatever their gradients hold.

    Args:
        params, grads, exp_avg, exp_avg_sq: lists of equal length; the tensors of one place share shape and dtype
            (float32, float64, bfloat16, float16).
        ema: as `params`, or empty for no average.
        axes: masks on the parameters; empty for none.
        lr, beta1, beta2, eps, weight_decay: of AdamW (decoupled decay).
        step: number of this step, from 1.
        ema_decay: ema <- ema_decay * ema + (1 - ema_decay) * new parameters.
        maximize: go up the gradient.

    Raises:
        EbdiffError: lists, shapes, dtypes or devices that do not fit together, or tensors that share memory. Nothing
            was changed then.
    """
    if not params:
        return
    lists = Lists(params, grads, exp_avg, exp_avg_sq, ema)
    numbers = _Numbers(lr, beta1, beta2, eps, weight_decay, step, ema_decay, maximize)
    if is_plain(*lists, masks=axes.keep):
        _masked_adamw(lists, axes, numbers)
    else:
        _masked_adamw_op(*lists, *axes.triples, *numbers)


class _Numbers(NamedTuple):
    """Of one step of AdamW and of the average, as the operator takes them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    ema_decay: float
    maximize: bool

    def derived(self) -> dict[str, float]:
        """What the implementations compute with."""
        return {
            "one_minus_beta1": 1 - self.beta1,
            "beta2": self.beta2,
            "one_minus_beta2": 1 - self.beta2,
            "decay": 1 - self.lr * self.weight_decay,
            "inverse_bias2": 1 / sqrt(1 - self.beta2**self.step),
            "eps": self.eps,
            "step_size": self.lr / (1 - self.beta1**self.step),
            "one_minus_ema": 1 - self.ema_decay,
        }


def _masked_adamw_impl(*arguments: Any) -> None:
    lists, masks, numbers = Lists(*arguments[:5]), arguments[5:8], _Numbers(*arguments[8:])
    _masked_adamw(lists, Axes(*map(tuple, masks)), numbers)


def _masked_adamw(lists: Lists, axes: Axes, numbers: _Numbers) -> None:
    params = lists.params
    check_axes(params, axes, written=True)
    check_adamw(lists, numbers.step, (numbers.beta1, numbers.beta2))
    derived = numbers.derived()
    strides = list(map(Tensor.stride, params))
    lists = lists._replace(grads=_laid_out(lists.grads, params, strides))
    alike = all(list(map(Tensor.stride, tensors)) == strides for tensors in lists if tensors)
    serve = run if alike else reference_of
    if len({parameter.dtype for parameter in params}) == 1:
        serve("masked_adamw_", params[0], lists, axes, derived, numbers.maximize)
    else:
        for tensors in lists:  # before the first is written
            refuse_freed(tensors)
        refuse_shared(list(chain.from_iterable(lists.written)), read=lists.grads)
        for part, part_axes in _by_dtype(lists, axes):
            serve("masked_adamw_", params[0], part, part_axes, derived, numbers.maximize)
    written(*lists.written)


def check_update(lists: Lists, axes: Axes, step: int, betas: tuple[float, float]) -> None:
    """Refuse what `masked_adamw_` refuses, but for memory that is shared: for whoever updates in several calls.

    Raises:
        EbdiffError: as `masked_adamw_`.
    """
    if not is_plain(*lists, masks=axes.keep):
        return
    check_axes(lists.params, axes, written=True)
    check_adamw(lists, step, betas)
    for tensors in lists:
        refuse_freed(tensors)


def _laid_out(
    grads: Sequence[Tensor], params: Sequence[Tensor], strides: Sequence[tuple[int, ...]]
) -> Sequence[Tensor]:
    """Gradients laid out in memory as their parameters."""
    if [grad.stride() for grad in grads] == strides:
        return grads
    return [
        grad if grad.stride() == stride else torch.empty_like(parameter).copy_(grad)
        for grad, parameter, stride in zip(grads, params, strides, strict=True)
    ]


def _by_dtype(lists: Lists, axes: Axes) -> Iterator[tuple[Lists, Axes]]:
    """The tensors of each dtype, and their masks, which `axes` remembers."""
    dtypes = [parameter.dtype for parameter in lists.params]
    parts = axes.known("by dtype", dtypes)
    if parts is None:
        places: dict[torch.dtype, list[int]] = {}
        for i, dtype in enumerate(dtypes):
            places.setdefault(dtype, []).append(i)
        masks = by_owner(axes)
        parts = [(chosen, Axes.of(masks.get(i, {}) for i in chosen)) for chosen in places.values()]
        axes.remember("by dtype", dtypes, parts)
    for chosen, part_axes in parts:
        yield Lists(*([tensors[i] for i in chosen] if tensors else [] for tensors in lists)), part_axes


_masked_adamw_op = define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] ema, Tensor[] keep, int[] owner, int[] dims, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step, float ema_decay, bool maximize) -> ()",
    _masked_adamw_impl,
    lambda *arguments: check_devices(*arguments[:5], keep=arguments[5]),
)
