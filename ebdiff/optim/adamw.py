"""torch.optim.AdamW's twin: the same steps and the same state, with the mask and the EMA in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..ops.adamw import check_update, masked_adamw_
from ..ops.channel_mask_reference import Lists
from .average import Average, Decay, Named, shrink_tensors
from .parts import MOMENTS, Part, Plan
from .removed import Removed, kept_of, mask_of, named

if TYPE_CHECKING:
    from ..pruning.mask import ChannelMask
    from ..tickets.ticket import Ticket

__all__ = ["AdamW"]

Found: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # params, grads, exp_avg, exp_avg_sq

# Keys of torch.optim.AdamW's groups that mean nothing here; carried so that it can load what is saved here.
_TORCH = {"foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True}


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that can hold removed channels at zero and move an EMA along.

    Equal, to rounding, to torch.optim.AdamW, then masks on weights, moments and EMA, then ``ema.step(parameters)``;
    but one pass over memory. Its state_dict is torch.optim.AdamW's, in both directions. State keeps the memory layout
    of its parameter. A learning rate that is a tensor on a GPU costs a synchronisation in every step.

    Args:
        params: tensors, (name, tensor) pairs such as ``model.named_parameters()``, or groups of either.
        lr: a float, or a tensor of one element.
        betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        amsgrad, capturable, differentiable: not offered; only False.
        foreach, fused: taken so that calls need not change; it is one pass in any case.
        mask: a ChannelMask or Ticket. From the first step on, the removed channels of weights, moments and EMA are
            exact zeros, whatever their gradients hold. Needs named parameters. `mask` can be set again later.
        ema: diffusers' EMAModel, which goes on counting its own steps; or, with `ema_decay`, a module of the same
            structure, a list of tensors, or a dict by name. It moves in `step`: do not call ``ema.step`` as well.
            Averages of parameters that have no gradient move too; of those that are not trained they are copies.
        ema_decay: the share of the average that stays, or a function of the step's number, from 1.
        ema_params: what `ema` follows, in its order, named or not. By default all parameters of the optimizer; to be
            given where an EMA without names has others, or where there are several groups.

    Raises:
        EbdiffError: amsgrad, negative settings, complex parameters, or a mask or EMA that does not fit, by the call
            itself; sparse gradients, by `step`, before anything is changed.
    """

    _mask: ChannelMask | None = None
    _average: Average | None = None
    _removed: Removed | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        mask: ChannelMask | Ticket | None = None,
        ema: Any = None,
        ema_decay: Decay | None = None,
        ema_params: Iterable[Any] | None = None,
    ) -> None:
        self._forget()
        if capturable or differentiable:
            got, remedy = f"capturable={capturable}, differentiable={differentiable}", "use torch.optim.AdamW for these"
            raise EbdiffError("AdamW", expected="neither capturable nor differentiable", got=got, remedy=remedy)
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        theirs = {"foreach": foreach, "capturable": capturable, "differentiable": differentiable, "fused": fused}
        super().__init__(params, {**own, "maximize": maximize, **_TORCH, **theirs})
        self.mask = mask
        if ema is not None:
            self._average = Average(ema, ema_decay, self._followed(ema, ema_params))
        elif ema_decay is not None or ema_params is not None:
            raise EbdiffError("ema_decay", expected="an EMA", got="none", remedy="pass ema, or leave it out")

    @property
    def ema(self) -> Any:
        """The EMA that moves in `step`, or None."""
        return None if self._average is None else self._average.ema

    @property
    def mask(self) -> ChannelMask | None:
        """Which channels stay; None for all. One that is set takes effect with the next step."""
        return self._mask

    @mask.setter
    def mask(self, mask: ChannelMask | Ticket | None) -> None:
        chosen = None if mask is None else mask_of(mask)
        removed = Removed(chosen, self.param_groups)
        self._forget()
        self._mask, self._removed = chosen, removed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Its parameters are masked too, and followed where the EMA has their names."""
        super().add_param_group(param_group)
        try:
            _check_group(param_group)
            Removed(self._mask, [param_group])
            if self._average is not None and self._average.by_name:
                self._average.follow(pair for pair in named(param_group) if self._average.lacks(pair))
        except EbdiffError:
            self.param_groups.pop()
            raise
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update parameters, moments and EMA, and zero what is removed.

        Args:
            closure: called first, with gradients enabled; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_sparse(self.param_groups)
        average = self._average
        shadows = [] if average is None else average.shadows()
        updates = [update for group in range(len(self.param_groups)) for update in self._updates(group, shadows)]
        decay = 0.0 if average is None else average.decay_at(self._number([part for *_, part in updates]))
        calls = [(group, _lists(found, part, shadows), part) for group, found, part in updates]
        for group, lists, part in calls if len(calls) > 1 else ():  # all, before the first is written
            check_update(lists, part.axes, part.step, (float(group["betas"][0]), float(group["betas"][1])))
        for group, lists, part in calls:
            _update(group, lists, part, decay)
        if self._mask is not None:
            self._mask_resting()
        if average is not None:
            self._move_others(average, {place for *_, part in updates for place in part.shadows}, decay)
            average.advance(decay)
        return loss

    def check_shrink(self, mask: ChannelMask) -> None:
        """May `ebdiff.shrink_` go ahead? It asks before it changes anything.

        Raises:
            EbdiffError: the optimizer masks by another mask, whose channels shrinking would not remove.
        """
        ours = self._mask
        if ours is not None and not (ours.keep.keys() == mask.keep.keys() and torch.equal(ours.bits(), mask.bits())):
            raise EbdiffError(
                "the optimizer has another mask",
                expected=f"the ticket's, which removes {mask.removed:.1%} of the channels",
                got=f"one that removes {ours.removed:.1%}",
                remedy="set optimizer.mask = None first, or shrink by its mask",
            )

    def shrunk(self, mask: ChannelMask) -> None:
        """`ebdiff.shrink_` has shrunken parameters and moments by this mask: there is nothing left to mask.

        The EMA: what `shrink_` was given as `ema=` is shrunken already. Where it was not given, the tensors of an
        EMAModel, a list or a dict are shrunken here by their parameters' names. A module,
        which is more than its tensors, `shrink_` shrinks by itself.
        """
        self.mask = None
        if self._average is not None:
            names = {id(p): name for group in self.param_groups for name, p in named(group)}
            shrink_tensors(self._average, names, lambda name: kept_of(mask, name))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mask": self._mask, "_average": self._average}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, with state and groups alone."""
        for group in state["param_groups"]:
            for key, value in {"amsgrad": False, "maximize": False, **_TORCH}.items():
                group.setdefault(key, value)
            _check_group(group)
        Removed(state.get("_mask", self._mask), state["param_groups"])  # names come with the groups
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Whatever was found out about parameters and state may have changed."""
        self._plans: dict[int, Plan] = {}
        self._removed = None

    def _updates(self, number: int, shadows: list[Tensor]) -> list[tuple[dict[str, Any], Found, Part]]:
        """Of a group: its settings, what its parameters with a gradient consist of, and the parts to update them in."""
        group = self.param_groups[number]
        trained = [p for p in group["params"] if p.grad is not None]
        if not trained:
            return []
        states = [self.state[p] or self._begin(p) for p in trained]
        plan = self._plans.get(number)
        if plan is None or not plan.fits(trained, states, shadows):
            if self._average is not None:
                self._average.check()
            plan = self._plans[number] = Plan(trained, states, shadows, self._average, self._masks())
        gradients = [p.grad for p in trained]
        first, second = ([state[name] for state in states] for name in MOMENTS)
        return [(group, (trained, gradients, first, second), part) for part in plan.parts]

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _masks(self) -> Removed:
        if self._removed is None:
            self._removed = Removed(self._mask, self.param_groups)
        return self._removed

    def _number(self, parts: list[Part]) -> int:
        """The number of this step: of the most that any parameter has taken."""
        taken = [part.step for part in parts] or [int(state["step"]) for state in self.state.values()]
        return max(taken, default=0)

    def _mask_resting(self) -> None:
        """Parameters without a gradient lose their removed channels too."""
        resting = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        moments = [(p, self.state[p][name]) for p in resting if p in self.state for name in MOMENTS]
        self._masks().zero_([*((p, p) for p in resting), *moments])

    def _move_others(self, average: Average, moved: set[int], decay: float) -> None:
        """The averages that no call of the operator has moved."""
        if len(moved) < len(average.followed):
            others = [place for place in range(len(average.followed)) if place not in moved]
            average.move(others, decay)
            shadows = average.shadows()
            self._masks().zero_((average.followed[place], shadows[place]) for place in others)

    def _followed(self, ema: Any, given: Iterable[Any] | None) -> list[Named]:
        if given is not None:
            return [entry if isinstance(entry, tuple) else (None, entry) for entry in given]
        if len(self.param_groups) > 1 and not isinstance(ema, dict | nn.Module):
            raise EbdiffError(
                "an EMA has an order, which that of several parameter groups may not be",
                expected="ema_params",
                got=f"{len(self.param_groups)} groups",
                remedy="say what it follows: ema_params=model.parameters()",
            )
        return [pair for group in self.param_groups for pair in named(group)]


def _lists(found: Found, part: Part, shadows: list[Tensor]) -> Lists:
    whole = len(part.places) == len(found[0])
    params, grads, first, second = found if whole else ([tensors[i] for i in part.places] for tensors in found)
    return Lists(params, grads, first, second, [shadows[place] for place in part.shadows])


def _update(group: dict[str, Any], lists: Lists, part: Part, decay: float) -> None:
    beta1, beta2 = group["betas"]
    masked_adamw_(
        *lists,
        part.axes,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=part.step,
        ema_decay=decay,
        maximize=group["maximize"],
    )
    part.count.add_(1)


def _check_group(group: dict[str, Any]) -> None:
    betas, lr = [float(beta) for beta in group["betas"]], group["lr"]
    checks = {
        "lr a number of at least 0, or a tensor of one": (not isinstance(lr, Tensor) or lr.numel() == 1) and lr >= 0,
        "betas of two numbers in [0, 1)": len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "eps of at least 0": group["eps"] >= 0,
        "weight_decay of at least 0": group["weight_decay"] >= 0,
        "amsgrad=False: the largest second moment is not offered": not group["amsgrad"],
        "real parameters": not any(p.is_complex() for p in group["params"]),
    }
    for expected, holds in checks.items():
        if not holds:
            got = ", ".join(f"{key}={group[key]}" for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"))
            raise EbdiffError("AdamW", expected=expected, got=got, remedy="change it, or use torch.optim.AdamW")


def _refuse_sparse(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
            got, remedy = "sparse ones", "use torch.optim.SparseAdam for these parameters"
            raise EbdiffError("gradients", expected="dense ones", got=got, remedy=remedy)
