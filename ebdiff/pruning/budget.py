"""From a ratio or a MACs budget to widths that the model and the hardware can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm

import torch
from torch import Tensor

from ..errors import EbdiffError
from .plan import ChannelPlan, ChannelSpace

__all__ = ["Budget", "widths_for"]

Widths = dict[str, int]


@dataclass(frozen=True)
class Budget:
    """What is asked of a mask: see `ChannelMask.draw`."""

    ratio: float | Mapping[str, float] | None = None
    macs: float | None = None
    multiple_of: int = 1
    balanced: bool = False
    scope: str = "local"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.macs is None):
            raise EbdiffError("mask budget", expected="either ratio or macs", got="both or neither", remedy="give one")
        ratios = list(self.ratio.values()) if isinstance(self.ratio, Mapping) else [self.ratio]
        for ratio in ratios:
            if ratio is not None and not (isinstance(ratio, int | float) and 0 <= ratio < 1):
                raise EbdiffError(
                    "ratio", expected="a share removed in [0, 1)", got=repr(ratio), remedy="e.g. ratio=0.5"
                )
        if self.macs is not None and not 0 < self.macs <= 1:
            raise EbdiffError("macs", expected="a share kept in (0, 1]", got=repr(self.macs), remedy="e.g. macs=0.4")
        if self.multiple_of < 1:
            raise EbdiffError("multiple_of", expected="at least 1", got=str(self.multiple_of), remedy="e.g. 8")
        if self.scope not in ("local", "global"):
            raise EbdiffError("scope", expected="'local' or 'global'", got=repr(self.scope), remedy="choose one")
        if isinstance(self.ratio, Mapping) and self.scope == "global":
            raise EbdiffError(
                "ratios by name", expected="scope='local'", got="'global'", remedy="give one ratio instead"
            )

    def asked(self) -> dict[str, float]:
        """The request, for the record."""
        if self.macs is not None:
            return {"macs": self.macs}
        return dict(self.ratio) if isinstance(self.ratio, Mapping) else {"ratio": float(self.ratio or 0)}


def widths_for(
    plan: ChannelPlan, spaces: Sequence[ChannelSpace], scores: Mapping[str, Tensor], budget: Budget
) -> Widths:
    """{space name: kept width}, every one feasible. Larger requests never give larger widths."""
    feasible = {space.name: _feasible(plan, space, budget) for space in spaces}

    def rounded(wanted: Mapping[str, float]) -> Widths:
        return {name: min(widths, key=lambda w: (abs(w - wanted[name]), w)) for name, widths in feasible.items()}

    if isinstance(budget.ratio, Mapping):
        unknown = sorted(set(budget.ratio) - set(feasible))
        if unknown:
            raise EbdiffError("ratio", expected="names of prunable spaces", got=unknown[0], remedy="see plan.spaces")
        return rounded({s.name: s.size * (1 - budget.ratio.get(s.name, 0.0)) for s in spaces})
    if budget.scope == "local":
        at: Callable[[float], Widths] = lambda ratio: rounded({s.name: s.size * (1 - ratio) for s in spaces})  # noqa: E731
        if budget.macs is None:
            return at(float(budget.ratio or 0))
        return _search_macs(plan, lambda level: at(level / _LEVELS), _LEVELS, budget.macs)
    return _global(plan, spaces, scores, budget, rounded)


_LEVELS = 1 << 20


def _global(
    plan: ChannelPlan,
    spaces: Sequence[ChannelSpace],
    scores: Mapping[str, Tensor],
    budget: Budget,
    rounded: Callable[[Mapping[str, float]], Widths],
) -> Widths:
    """Remove the lowest of all channels together; the best channel of every space is out of reach."""
    if not spaces:
        return {}
    ranked = [torch.sort(scores[s.name].detach().double().cpu())[0][:-1] for s in spaces]
    owner = torch.cat([torch.full((len(r),), i) for i, r in enumerate(ranked)])
    order = owner[torch.argsort(torch.cat(ranked), stable=True)]

    def at(count: int) -> Widths:
        lost = torch.bincount(order[:count], minlength=len(spaces)).tolist()
        return rounded({s.name: s.size - gone for s, gone in zip(spaces, lost, strict=True)})

    if budget.macs is not None:
        return _search_macs(plan, at, len(order), budget.macs)
    assert isinstance(budget.ratio, float | int)
    total = sum(s.size for s in spaces)
    target = total - round(budget.ratio * total)
    return at(_first(lambda count: sum(at(count).values()) <= target, len(order)))


def _search_macs(plan: ChannelPlan, at: Callable[[int], Widths], levels: int, share: float) -> Widths:
    """The widest network within the budget."""
    limit = share * plan.macs() * (1 + 1e-9)
    widths = at(_first(lambda level: plan.macs_of(at(level)) <= limit, levels))
    least = plan.macs_of(widths)
    if least > limit:
        raise EbdiffError(
            "MACs budget cannot be met",
            expected=f"at least {least / plan.macs():.3f} of the dense MACs, what the smallest network needs",
            got=f"{share:g}",
            remedy="ask for more MACs, or allow more axes to shrink (see plan.frozen)",
        )
    return widths


def _first(holds: Callable[[int], bool], last: int) -> int:
    """The smallest of 0..last for which a monotone condition holds; `last` if none does."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _feasible(plan: ChannelPlan, space: ChannelSpace, budget: Budget) -> list[int]:
    """Kept widths this space can have: balanced norms bound what may go, `multiple_of` what should stay."""
    step = _balanced_step(plan, space) if budget.balanced else 1
    held = [width for width in range(space.size, 0, -1) if (space.size - width) % step == 0]
    unit = min(member.outer * member.inner for member in space.members)
    aligned = [width for width in held if width * unit % budget.multiple_of == 0]
    return sorted({space.size, *aligned}) if aligned and min(aligned) < space.size else held


def _balanced_step(plan: ChannelPlan, space: ChannelSpace) -> int:
    """Removing multiples of this keeps every norm's channels divisible by its number of groups."""
    groups = {plan.aliases.get(norm.weight, norm.weight): len(norm.group_sizes) for norm in plan.norms}
    step = 1
    for parameter in {m.parameter for m in space.members} & groups.keys():
        per_channel = sum(m.outer * m.inner for m in space.members if m.parameter == parameter)
        step = lcm(step, groups[parameter] // gcd(groups[parameter], per_channel))
    return step
