"""Which channels stay: a validated, immutable {space: bool}, True = KEPT; how it is drawn and how far two are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..ops.channel_mask import mask_distance
from ..ops.dispatch import is_listened_to
from ..ops.mask_axes import Axes
from .budget import Budget, widths_for
from .plan import Along, ChannelPlan, Norm

if TYPE_CHECKING:
    from ..tickets.ticket import Ticket

__all__ = ["ChannelMask", "NormMode", "Scope", "chance_corrected", "distance", "distances", "mask_distance"]

NormMode = Literal["ragged", "balanced"]
Scope = Literal["local", "global", "cost"]
_MOST_AXES = 8  # lists of parameters that a mask remembers


@dataclass(frozen=True, eq=False)
class ChannelMask:
    """The kept channels of every space of a plan. True = KEPT.

    Args:
        plan: the plan whose spaces are masked.
        keep: {space name: bool [size]}; spaces not named are kept whole.
        norm: what happens to group normalisation. "ragged" keeps every channel in its original group, so groups may
            become unequal or vanish; "balanced" deals the kept channels out anew, in order, to the original number of
            groups, so that a plain nn.GroupNorm serves.
        asked: what was asked of `draw`, for the record.

    Raises:
        EbdiffError: an unknown space, a wrong size or dtype, an emptied space, or (balanced) a norm whose number of
            groups does not divide its kept channels.
    """

    plan: ChannelPlan
    keep: Mapping[str, Tensor]
    norm: NormMode = "ragged"
    asked: Mapping[str, float] = field(default_factory=dict)
    _kept: dict[str, Mapping[int, Tensor]] = field(init=False, repr=False)
    _cut: frozenset[str] = field(init=False, repr=False)  # spaces that lose channels
    _axes: dict[tuple[str, ...], Axes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, kept in self.keep.items():
            self._check(name, kept)
        whole = {s.name: torch.ones(s.size, dtype=torch.bool, device="cpu") for s in self.plan}
        keep = {
            name: self.keep[name].detach().cpu().clone() if name in self.keep else kept for name, kept in whole.items()
        }
        object.__setattr__(self, "keep", MappingProxyType(keep))
        object.__setattr__(self, "asked", MappingProxyType(dict(self.asked)))
        object.__setattr__(self, "_kept", {})
        object.__setattr__(self, "_axes", {})
        object.__setattr__(self, "_cut", frozenset(name for name, kept in keep.items() if not bool(kept.all())))
        _ = self.plan.by_parameter  # a table that torch.compile can read but not make
        if self.norm not in ("ragged", "balanced"):
            raise EbdiffError("norm", expected="'ragged' or 'balanced'", got=repr(self.norm), remedy="choose one")
        if self.norm == "balanced":
            for norm in self.plan.group_norms:
                self._check_divides(norm)

    def _check(self, name: str, kept: Tensor) -> None:
        if name not in self.plan:
            raise EbdiffError(
                "mask of an unknown channel space",
                expected="a name in the plan",
                got=name,
                remedy="use this model's plan",
            )
        size = self.plan[name].size
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or tuple(kept.shape) != (size,):
            got = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise EbdiffError(
                f"mask of {name}", expected=f"a tensor, bool [{size}]", got=got, remedy="True = kept; torch.as_tensor"
            )
        if not kept.any():
            raise EbdiffError(
                f"mask of {name} empties the space", expected="at least one kept channel", got="none", remedy="keep one"
            )

    def _check_divides(self, norm: Norm) -> None:
        kept = int(self.kept_by(norm).sum())
        if kept % len(norm.group_sizes):
            raise EbdiffError(
                f"balanced mask at {norm.module}",
                expected=f"a multiple of its {len(norm.group_sizes)} groups",
                got=f"{kept} kept channels",
                remedy='draw with norm="balanced", or use norm="ragged"',
            )

    @classmethod
    def draw(
        cls,
        scores: Mapping[str, Tensor],
        *,
        plan: ChannelPlan,
        ratio: float | Mapping[str, float] | None = None,
        macs: float | None = None,
        latency: float | None = None,
        measure: Callable[[ChannelMask], float] | None = None,
        multiple_of: int = 1,
        norm: NormMode = "ragged",
        scope: Scope = "local",
        head_dim: bool = False,
        residual: bool = False,
    ) -> ChannelMask:
        """Keep the channels with the highest scores.

        Widths are rounded to what is feasible and never below one channel; no space is skipped. Asking for more never
        removes fewer.

        Args:
            scores: {space name: float [size]}, as `importance` returns.
            plan: the plan the scores belong to.
            ratio: share of channels REMOVED, of every space; or by name of a space, pattern of names or module that
                makes it ("down_blocks.1"), with "*" for the rest (else the rest stays whole).
            macs: instead of `ratio`: share of the dense multiply-accumulates KEPT, at most.
            latency: instead of `ratio`: share of the dense network's time KEPT, at most, as `measure` finds it in about
                six trials.
            measure: with `latency`: the time of a mask's network as a share of the dense one's;
                `ebdiff.pruning.latency.Latency(model, *args)` times forward and backward.
            multiple_of: round kept widths to multiples of this, where a space is large enough.
            norm: "ragged" or "balanced", see `ChannelMask`.
            scope: "local" asks the same of every space; "global" ranks the channels of all spaces together; "cost"
                asks more of those whose layers cost more MACs, so that a U-Net loses most at its full resolution, and
                `ratio` is the share of all channels.
            head_dim: also prune head_dim where there are several heads (a single head's is always prunable).
            residual: also prune the width of residual streams; their norms then take statistics over what is kept.

        Raises:
            EbdiffError: missing or non-finite scores, not exactly one of ratio, macs and latency, values outside
                [0, 1), ratios that contradict each other, or a budget that even the smallest network exceeds.
        """
        whole = {unit for unit, asked in (("head_dim", head_dim), ("residual", residual)) if not asked}
        prunable = [space for space in plan if space.unit not in whole]
        for space in prunable:
            found = scores.get(space.name)
            if not isinstance(found, Tensor):
                got, right = "none" if found is None else type(found).__name__, False
            else:
                right = tuple(found.shape) == (space.size,) and bool(torch.isfinite(found).all())
                got = f"{list(found.shape)}, finite: {bool(torch.isfinite(found).all())}"
            if not right:
                raise EbdiffError(
                    f"scores of {space.name}",
                    expected=f"a finite tensor [{space.size}]",
                    got=got,
                    remedy="use ebdiff.importance",
                )
        budget = Budget(ratio, macs, multiple_of, norm == "balanced", scope, latency)
        if (latency is None) != (measure is None):
            given = "latency" if measure is None else "measure"
            raise EbdiffError("mask budget", expected="latency with measure", got=f"only {given}", remedy="give both")

        def of(widths: Mapping[str, int]) -> ChannelMask:
            keep = {space.name: _top(scores[space.name], widths[space.name]) for space in prunable}
            return cls(plan, keep, norm, budget.asked())

        return of(widths_for(plan, prunable, scores, budget, measure and (lambda widths: measure(of(widths)))))

    def __getitem__(self, name: str) -> Tensor:
        return self.keep[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keep)

    def __len__(self) -> int:
        return len(self.keep)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelMask) or self.norm != other.norm or self.keep.keys() != other.keep.keys():
            return False
        return all(torch.equal(self.keep[name], other.keep[name]) for name in self.keep)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: object) -> ChannelMask:
        return self  # immutable: a copied model shares it

    def __reduce__(self) -> tuple[type[ChannelMask], tuple[object, ...]]:
        return ChannelMask, (self.plan, dict(self.keep), self.norm, dict(self.asked))

    @property
    def size(self) -> int:
        """Channels of all spaces."""
        return sum(space.size for space in self.plan)

    @property
    def removed(self) -> float:
        """Share of all channels removed."""
        return 1 - sum(int(kept.sum()) for kept in self.keep.values()) / self.size if self.size else 0.0

    def kept(self, parameter: str) -> Mapping[int, Tensor]:
        """{dim: bool [size of dim]}, True = kept, for each dimension of a parameter of which some channel is removed.

        The same tensors at every call: they are not to be changed.
        """
        if parameter not in self._kept:
            slices = self.plan.by_parameter.get(parameter, {})
            cut = [dim for dim, members in slices.items() if any(space.name in self._cut for space, _ in members)]
            kept = self.plan.kept(self.keep, parameter) if cut else {}
            made = {dim: kept[dim] for dim in cut}
            if is_listened_to():
                return made  # part of a graph, or not real
            self._kept[parameter] = made
        return self._kept[parameter]

    def axes(self, parameters: Sequence[str]) -> Axes:
        """The masked axes of tensors in the shapes of these parameters, for `ebdiff.ops.channel_mask`.

        The same object at every call with the same names: what the operators find out about it, they remember.
        """
        if is_listened_to():
            return Axes.of(map(self.kept, parameters))
        names = tuple(parameters)
        made = self._axes.pop(names, None) or Axes.of(map(self.kept, names))
        self._axes[names] = made  # the last used at the end
        if len(self._axes) > _MOST_AXES:
            del self._axes[next(iter(self._axes))]
        return made

    def bits(self) -> Tensor:
        """bool [size]: the masks of all spaces one after another, in the plan's order."""
        return (
            torch.cat([self.keep[space.name] for space in self.plan])
            if len(self.plan)
            else torch.empty(0, dtype=torch.bool, device="cpu")
        )

    def kept_by(self, norm: Norm) -> Tensor:
        """bool [channels]: which channels of a group normalisation are kept."""
        name = self.plan.aliases.get(norm.weight, norm.weight)
        whole = torch.ones(self.plan.shapes[name][0], dtype=torch.bool, device="cpu")
        return self.plan.kept(self.keep, name).get(0, whole)

    def kept_along(self, sides: Iterable[Along]) -> dict[int, Tensor]:
        """{dim: bool [size], True = kept} for the dimensions of a module's input or output that lose channels."""
        return {
            along.dim: self.kept(along.parameter)[along.axis]
            for along in sides
            if along.axis in self.kept(along.parameter)
        }

    def groups_of(self, norm: Norm) -> Tensor:
        """int64 [channels]: the group each channel's statistics are taken over, -1 where it is removed."""
        kept = self.kept_by(norm)
        count = len(norm.group_sizes)
        sizes = torch.tensor(norm.group_sizes, device="cpu")
        groups = torch.repeat_interleave(torch.arange(count, device="cpu"), sizes)
        if self.norm == "balanced":
            groups[kept] = torch.arange(int(kept.sum()), device="cpu") // (int(kept.sum()) // count)
        return groups.masked_fill(~kept, -1)

    def regroups(self, norm: Norm) -> bool:
        """Are some of a norm's channels removed, so that its statistics change?"""
        if norm.kind == "statistics":
            return bool(self.kept_along((*norm.inputs, *norm.outputs)))
        return not bool(self.kept_by(norm).all())

    def regrouped(self) -> list[str]:
        """Names of the norms in which some kept channel changes its group (balanced masks only)."""
        ragged = ChannelMask(self.plan, self.keep)
        return [n.module for n in self.plan.group_norms if not torch.equal(self.groups_of(n), ragged.groups_of(n))]

    def __str__(self) -> str:
        asked = ", ".join(f"{name} {value:g}" for name, value in self.asked.items()) or "by hand"
        macs = self.plan.macs(self) / max(self.plan.macs(), 1)
        parameters = self.plan.parameters(self) / max(self.plan.parameters(), 1)
        moved = self.regrouped()
        return (
            f"asked: {asked}; achieved: {self.removed:.1%} of the channels removed, "
            f"{macs:.1%} of the MACs and {parameters:.1%} of the parameters kept; {self.norm} norms"
            + (f"; channels change their group in {', '.join(moved)}" if moved else "")
        )


def _top(scores: Tensor, count: int) -> Tensor:
    """bool: the `count` highest scores; of equal ones the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device="cpu")
    kept[torch.argsort(scores.detach().cpu(), descending=True, stable=True)[:count]] = True
    return kept


def distance(a: ChannelMask | Ticket, b: ChannelMask | Ticket, corrected: bool = False) -> float:
    """Normalised Hamming distance: the share of channels kept by exactly one of the two masks.

    With `corrected`, divided by 2p(1-p), what two independent random masks that remove the share p differ by: 1 means
    no better than chance, whatever the ratio (p is the mean share of the two; 0 where p is 0 or 1).
    Source: Early-Bird tickets (You et al. 2020); the correction is ours.
    """
    a, b = _alike(a, b)
    share = float((a.bits() ^ b.bits()).float().mean()) if a.size else 0.0
    return chance_corrected(share, (a.removed + b.removed) / 2) if corrected else share


def distances(a: ChannelMask | Ticket, b: ChannelMask | Ticket, corrected: bool = False) -> dict[str, float]:
    """`distance`, for each space by itself."""
    a, b = _alike(a, b)
    result = {}
    for name in a:
        share = float((a.keep[name] ^ b.keep[name]).float().mean())
        removed = 1 - float((a.keep[name].float().mean() + b.keep[name].float().mean()) / 2)
        result[name] = chance_corrected(share, removed) if corrected else share
    return result


def chance_corrected(share: float, removed: float) -> float:
    """A Hamming distance divided by that of two independent masks that remove the share `removed`; 0 without chance."""
    chance = 2 * removed * (1 - removed)
    return share / chance if chance > 1e-12 else 0.0


def _alike(*given: ChannelMask | Ticket) -> list[ChannelMask]:
    """The masks themselves, of one plan."""
    a, b = masks = [each if isinstance(each, ChannelMask) else each.mask for each in given]
    if a.plan.fingerprint() != b.plan.fingerprint():
        raise EbdiffError(
            "distance between masks of different architectures",
            expected=a.plan.fingerprint(),
            got=b.plan.fingerprint(),
            remedy="compare masks drawn from the same plan",
        )
    return masks
