"""What a draw reads: the inverse of a distribution over cells, and the weights, on one device and made once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["Tables", "conditional", "normalised"]


def conditional(pmf: Tensor, lo: int, hi: int) -> Tensor:
    """float64[T]: P(t | lo <= t < hi), 0 outside.

    Raises:
        EbdiffError: where that region has no probability.
    """
    inside = torch.zeros_like(pmf)
    inside[lo:hi] = pmf[lo:hi]
    mass = inside.sum()
    if not mass > 0:
        raise EbdiffError(
            f"the sampler never draws in [{lo}, {hi})",
            expected="a region of positive probability",
            got=f"a sampler of {int((pmf > 0).sum())} timesteps, none of them in it",
            remedy="take another region or sampler; nested regions must overlap",
        )
    return inside / mass


def normalised(weights: Tensor, pmf: Tensor) -> Tensor:
    """float32[T]: the weights over their mean under `pmf`, and 0 where nothing is ever drawn.

    Raises:
        EbdiffError: where all that can be drawn has weight 0.
    """
    weights = torch.where(pmf > 0, weights.double(), 0.0)
    mean = (pmf * weights).sum()
    if not mean > 0:
        drawn = pmf.nonzero()
        raise EbdiffError(
            f"every weight in [{int(drawn[0])}, {int(drawn[-1]) + 1}) is zero",
            expected="one above 0",
            got="none",
            remedy="check the weighting",
        )
    return (weights / mean).float()


class Tables(NamedTuple):
    """See `of`.

    Args:
        cdf: float64[T], so that the first entry greater than u in [0, 1] is the cell drawn.
        weights: float32[T].
        within: in continuous time only, float64[T, 4]: the line from u to t inside each cell, as its value at u = 0 and
            its slope, and the least and the largest float32 in the cell.
        guide: on the CPU, where to begin looking in `cdf`; None where that does not help.
    """

    cdf: Tensor
    weights: Tensor
    within: Tensor | None
    guide: Tensor | None

    @classmethod
    def of(
        cls, pmf: Tensor, weights: Tensor, edges: Tensor | None, device: torch.device, *, lasting: bool = True
    ) -> Tables:
        """The tables of a distribution over cells, with its weights and, in continuous time, the cells' borders.

        All three on one device, which nothing waits for unless it is the CPU.

        Args:
            pmf, weights, edges: see `Sampler`.
            device: where draws are made.
            lasting: whether more than some ten batches will be drawn: then making the guide pays.

        Raises:
            EbdiffError: on the CPU, for weights that are negative or not finite, and cells that hold no float32.
        """
        if pmf.device.type == "cpu" and not bool((weights.isfinite() & (weights >= 0)).all()):
            raise EbdiffError(
                "bad loss weight", expected="finite and >= 0", got=str(weights), remedy="check the sampler"
            )
        # Scaled by the largest entry first, which makes a constant pmf exact.
        counts = (pmf / pmf.max()).cumsum(0)
        cdf = counts / counts[-1]
        within = None if edges is None else _within(cdf, edges).to(device)
        # Infinite where all mass has been counted, also in entries of probability 0 after that: so no rounding, of the
        # sum or of u, can leave the support.
        cdf = torch.where(counts >= counts[-1], torch.inf, cdf).to(device)
        return cls(cdf, weights.to(device), within, _guide(cdf) if lasting and device.type == "cpu" else None)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The t (int64[n], or float32[n] in continuous time) and the weight float32[n] of numbers u in [0, 1]."""
        if self.guide is None:
            cell = torch.searchsorted(self.cdf, u, right=True)
        else:
            cell = self.guide.index_select(0, (u * float(self.guide.shape[0] - 1)).long())
            cell += self.cdf.index_select(0, cell) <= u
        weight = self.weights.index_select(0, cell)
        if self.within is None:
            return cell, weight
        base, scale, least, most = self.within.index_select(0, cell).unbind(1)
        # Both bounds are float32, so that rounding t to float32 cannot leave the half-open cell.
        return torch.addcmul(base, u, scale).clamp_(least, most).float(), weight


def _guide(cdf: Tensor) -> Tensor | None:
    """int64[M + 1]: the first entry of `cdf` greater than j / M, if from each the search is over after one more entry.

    A draw on the CPU then is two look-ups (Chen and Asau 1974). torch.searchsorted takes twice as long, and shares more
    than 200 numbers out among threads: where the cores are busy, waiting for them takes milliseconds.
    """
    places = 1 << (8 * len(cdf) - 1).bit_length()  # a power of two: multiplying with it does not round
    guide = torch.searchsorted(cdf, torch.arange(places + 1, dtype=torch.float64) / places, right=True)
    return guide if int(guide.diff().max()) <= 1 else None


def _within(cdf: Tensor, edges: Tensor) -> Tensor:
    """See `Tables`."""
    before = torch.cat([cdf.new_zeros(1), cdf[:-1]])
    nearest = edges.float()
    above = torch.where(nearest.double() < edges, nearest.nextafter(torch.full_like(nearest, torch.inf)), nearest)
    least, most = above[:-1], above[1:].nextafter(torch.full_like(above[1:], -torch.inf))
    if cdf.device.type == "cpu" and bool((least > most).any()):
        where = int((least > most).nonzero()[0])
        raise EbdiffError(
            "cells too narrow for float32",
            expected="a float32 in each",
            got=f"none in [{float(edges[where])}, {float(edges[where + 1])})",
            remedy="use fewer cells",
        )
    slope = torch.where(cdf > before, edges.diff() / (cdf - before), 0.0)
    return torch.stack([edges[:-1] - before * slope, slope, least.double(), most.double()], dim=1)
