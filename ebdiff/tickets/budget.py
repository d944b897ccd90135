"""One MACs budget for all regions, split where it costs the least loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..errors import EbdiffError
from ..pruning.mask import ChannelMask, NormMode, Scope
from ..pruning.plan import ChannelPlan

__all__ = ["split_budget"]

Point = tuple[float, float]  # (share of the dense MACs kept, predicted increase of the loss)
_RATIOS = tuple(level / 20 for level in range(20))


def split_budget(
    plan: ChannelPlan,
    scores: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    macs: float,
    *,
    ratios: Sequence[float] = _RATIOS,
    norm: NormMode = "ragged",
    multiple_of: int = 1,
    scope: Scope = "local",
) -> list[float]:
    """MACs shares per region that minimise the predicted increase of the loss, the mean share being `macs`.

    To first order, removing channels costs the sum of their raw Taylor scores (Molchanov et al. 2019, eq. 8). For each
    region that is known at every ratio of a grid; on the lower convex hull of these points the best split follows from
    taking, again and again, the cheapest step of all regions. The last step is cut so that the budget is used up.
    A first-order prediction is too optimistic about high ratios: bound them with `ratios`.

    Args:
        plan: the plan of the scores.
        scores: per region, raw scores by space, as ``EarlyBird.scores("taylor", i, raw=True)`` returns.
        weights: share of the timesteps (or of the sampler's steps) in each region; normalised here.
        macs: mean share of the dense multiply-accumulates to KEEP, weighted by `weights`.
        ratios: grid of ratios in [0, 1) considered; the largest bounds how much a region can lose.
        norm, multiple_of, scope: as the masks will be drawn.

    Returns:
        For each region the share to pass to ``ChannelMask.draw(..., macs=share)``; their weighted mean is `macs`.

    Raises:
        EbdiffError: wrong numbers of regions, weights that are no shares, or a budget below the largest ratio's.
    """
    total = float(sum(weights))
    if len(scores) != len(weights) or not scores or min(weights) < 0 or not total > 0:
        raise EbdiffError(
            "cannot split the budget",
            expected="one weight >= 0 per region",
            got=f"{len(scores)} regions, weights {list(weights)}",
            remedy="weights are each region's share of the timesteps",
        )
    if not 0 < macs <= 1:
        raise EbdiffError("macs", expected="a share kept in (0, 1]", got=repr(macs), remedy="e.g. macs=0.4")
    shares = [weight / total for weight in weights]
    how = {"norm": norm, "multiple_of": multiple_of, "scope": scope}
    hulls = [_hull(_curve(plan, s, sorted(ratios), how)) for s in scores]
    kept = [hull[0][0] for hull in hulls]
    # (loss per MAC saved, region, MACs share afterwards): rising along each hull, so sorting keeps each region's order.
    steps = [
        (_slope(a, b), region, b[0])
        for region, hull in enumerate(hulls)
        for a, b in pairwise(hull)
        if shares[region] > 0
    ]
    for _, region, share in sorted(steps, key=lambda step: step[:2]):
        excess = sum(w * k for w, k in zip(shares, kept, strict=True)) - macs
        if excess <= 0:
            return kept
        kept[region] = max(share, kept[region] - excess / shares[region])
    reached = sum(w * k for w, k in zip(shares, kept, strict=True))
    if reached > macs * (1 + 1e-9):
        raise EbdiffError(
            "MACs budget cannot be met",
            expected=f"at least {reached:.3f} of the dense MACs, what ratio {max(ratios):g} leaves",
            got=f"{macs:g}",
            remedy="ask for more MACs, or allow higher ratios",
        )
    return kept


def _curve(
    plan: ChannelPlan, scores: Mapping[str, Tensor], ratios: Sequence[float], how: Mapping[str, Any]
) -> list[Point]:
    """(MACs share, predicted loss increase) at each ratio, MACs falling."""
    points = []
    for ratio in (0.0, *ratios):
        mask = ChannelMask.draw(scores, plan=plan, ratio=ratio, **how)
        lost = sum(float(scores[name].double()[~kept].sum()) for name, kept in mask.keep.items() if name in scores)
        points.append((plan.macs(mask) / plan.macs(), lost))
    return points


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def _hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points with falling MACs: loss per MAC saved never falls along it."""
    hull: list[Point] = []
    for point in points:
        if hull and point[0] >= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull
