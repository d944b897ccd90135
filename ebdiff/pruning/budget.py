"""From a ratio or a MACs budget to widths that the model and the hardware can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..numbers import as_real, as_whole
from .plan import ChannelPlan, ChannelSpace
from .ratios import ratios_by_space

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
    latency: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "macs", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise EbdiffError(
                "mask budget",
                expected="either ratio, macs or latency",
                got=" and ".join(given) or "none",
                remedy="give one",
            )
        (name,), by_name = given, isinstance(self.ratio, Mapping)
        asked = getattr(self, name)
        shares = {key: _share(name, share) for key, share in asked.items()} if by_name else _share(name, asked)
        object.__setattr__(self, name, shares)
        if (as_whole(self.multiple_of) or 0) < 1:
            got = repr(self.multiple_of)
            raise EbdiffError("multiple_of", expected="a whole number, at least 1", got=got, remedy="e.g. 8")
        if self.scope not in ("local", "global", "cost"):
            raise EbdiffError(
                "scope", expected="'local', 'global' or 'cost'", got=repr(self.scope), remedy="choose one"
            )
        if by_name and self.scope != "local":
            raise EbdiffError(
                "ratios by name", expected="scope='local'", got=repr(self.scope), remedy="give one ratio instead"
            )

    def asked(self) -> dict[str, float]:
        """The request, for the record."""
        if self.macs is not None:
            return {"macs": self.macs}
        if self.latency is not None:
            return {"latency": self.latency}
        return dict(self.ratio) if isinstance(self.ratio, Mapping) else {"ratio": float(self.ratio or 0)}


def _share(name: str, value: Any) -> float:
    """A ratio in [0, 1), or a share kept in (0, 1]."""
    found = as_real(value)
    if found is not None and (0 <= found < 1 if name == "ratio" else 0 < found <= 1):
        return found
    expected = "a share removed in [0, 1)" if name == "ratio" else "a share kept in (0, 1]"
    raise EbdiffError(name, expected=expected, got=repr(value), remedy=f"e.g. {name}=0.4")


def widths_for(
    plan: ChannelPlan,
    spaces: Sequence[ChannelSpace],
    scores: Mapping[str, Tensor],
    budget: Budget,
    timed: Callable[[Widths], float] | None = None,
) -> Widths:
    """{space name: kept width}, every one feasible. Larger requests never give larger widths.

    `timed`: for a latency budget, the share of the dense time that a network of these widths takes.
    """
    feasible = {space.name: _feasible(plan, space, budget) for space in spaces}

    def rounded(wanted: Mapping[str, float]) -> Widths:
        return {name: min(widths, key=lambda w: (abs(w - wanted[name]), w)) for name, widths in feasible.items()}

    if isinstance(budget.ratio, Mapping):
        ratios = ratios_by_space(plan, spaces, budget.ratio)
        return rounded({s.name: s.size * (1 - ratios[s.name]) for s in spaces})
    if budget.scope == "local":
        at: Callable[[float], Widths] = lambda ratio: rounded({s.name: s.size * (1 - ratio) for s in spaces})  # noqa: E731
        if budget.ratio is not None:
            return at(float(budget.ratio))
        return _search(plan, lambda level: at(level / _LEVELS), _LEVELS, budget, timed)
    if not spaces:
        return {}
    narrower, levels = _by_cost(plan, spaces, rounded) if budget.scope == "cost" else _global(spaces, scores, rounded)
    if not isinstance(budget.ratio, float):
        return _search(plan, narrower, levels, budget, timed)
    total = sum(space.size for space in spaces)
    target = total - round(budget.ratio * total)
    return narrower(_first(lambda level: sum(narrower(level).values()) <= target, levels))


_LEVELS = 1 << 20
_TIMED_LEVELS = 32  # a measurement tells no finer ones apart


def _global(
    spaces: Sequence[ChannelSpace], scores: Mapping[str, Tensor], rounded: Callable[[Mapping[str, float]], Widths]
) -> tuple[Callable[[int], Widths], int]:
    """Remove the lowest of all channels together; the best channel of every space is out of reach.

    Returns:
        Widths that fall from level to level, and the last level.
    """
    ranked = [torch.sort(scores[s.name].detach().double().cpu())[0][:-1] for s in spaces]
    owner = torch.cat([torch.full((len(r),), i, device="cpu") for i, r in enumerate(ranked)])
    order = owner[torch.argsort(torch.cat(ranked), stable=True)]

    def at(count: int) -> Widths:
        lost = torch.bincount(order[:count], minlength=len(spaces)).tolist()
        return rounded({s.name: s.size - gone for s, gone in zip(spaces, lost, strict=True)})

    return at, len(order)


def _by_cost(
    plan: ChannelPlan, spaces: Sequence[ChannelSpace], rounded: Callable[[Mapping[str, float]], Widths]
) -> tuple[Callable[[int], Widths], int]:
    """Remove more where channels cost more: every space keeps a share that goes with its layers' MACs to the -1/3.

    Where keeping the share k of a space leaves an error of a / k, and its layers cost C k^2, that is the least error
    that a sum of costs can buy. Returns as `_global`.
    """
    shares = {space.name: max(_layer_macs(plan, space), 1.0) ** (-1 / 3) for space in spaces}
    least = min(shares.values())

    def at(level: int) -> Widths:
        scale = (1 - level / _LEVELS) / least
        return rounded({space.name: space.size * min(1.0, scale * shares[space.name]) for space in spaces})

    return at, _LEVELS


def _layer_macs(plan: ChannelPlan, space: ChannelSpace) -> float:
    """Multiply-accumulates of the layers that make or read a space, mean over their weights."""
    touched = tuple(term for term in plan.cost if space.name in term[1])
    weights = {member.parameter for member in space.members if len(plan.shapes[member.parameter]) > 1}
    return plan.value(touched, {}) / max(1, len(weights))


def _search(
    plan: ChannelPlan,
    at: Callable[[int], Widths],
    levels: int,
    budget: Budget,
    timed: Callable[[Widths], float] | None,
) -> Widths:
    """The widest network within a budget of MACs or of measured time; `at` narrows from level to level."""
    if budget.macs is not None:
        whole, share = plan.macs(), budget.macs
        widths = at(_first(lambda level: plan.macs_of(at(level)) <= share * whole * (1 + 1e-9), levels))
        least = plan.macs_of(widths) / whole
        found, remedy = least <= share * (1 + 1e-9), "ask for more MACs, or allow more axes to shrink (see plan.frozen)"
    else:
        assert timed is not None
        assert budget.latency is not None
        share = budget.latency
        times: dict[int, float] = {}

        def fast_enough(step: int) -> bool:
            if step not in times:
                times[step] = timed(at(step * levels // _TIMED_LEVELS))
            return times[step] <= share

        step = _first(fast_enough, _TIMED_LEVELS)
        widths, found = at(step * levels // _TIMED_LEVELS), fast_enough(step)
        least, remedy = times[step], "ask for more time: layers that cannot shrink and launches take theirs"
    if not found:
        raise EbdiffError(
            f"{'MACs' if budget.macs else 'latency'} budget cannot be met",
            expected=f"at least {least:.3f} of the dense network's, what the smallest network needs",
            got=f"{share:g}",
            remedy=remedy,
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
    groups = {plan.aliases.get(norm.weight, norm.weight): len(norm.group_sizes) for norm in plan.group_norms}
    step = 1
    for parameter in {m.parameter for m in space.members} & groups.keys():
        per_channel = sum(m.outer * m.inner for m in space.members if m.parameter == parameter)
        step = lcm(step, groups[parameter] // gcd(groups[parameter], per_channel))
    return step
