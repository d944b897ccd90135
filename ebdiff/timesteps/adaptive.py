"""Where to draw, as the losses themselves say: IDDPM's resampler, and one that costs less and knows more beforehand.

The density with the least variance of the loss draws each timestep in proportion to its weight times the root of the
loss's second moment (IDDPM, arXiv 2102.09672, section 3.3). Both samplers here divide the weight by what they draw more
often, so that in expectation the objective stays what it was: they choose a proposal, never an objective.

With torch.distributed running, all ranks learn from the losses of all, in the order of the ranks: so all have the same
bits, and draw from the same density.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import EbdiffError
from .learned import Learned, of_all_ranks
from .profile import NoiseProfile, checked
from .sampler import Sampler, Uniform
from .weighting import positive

if TYPE_CHECKING:
    from ..ops.timestep_loss_statistics import LossStatistics

__all__ = ["Adaptive", "LossSecondMoment"]


class LossSecondMoment(Learned):
    """IDDPM's loss-second-moment resampler: p(t) ~ sqrt(E[L_t²]) over the last losses of each timestep.

    Nichol and Dhariwal (arXiv 2102.09672), equation 18. As in their code: uniform until every timestep has `history`
    losses, then (1 - floor) p + floor / T; weights 1 / (T p), so the objective is that of uniform timesteps.

    Args:
        schedule: the number of timesteps, or the profile.
        history: losses kept of each timestep.
        floor: the share that is drawn uniformly.

    Raises:
        EbdiffError: unless history >= 1 and 0 < floor <= 1.
    """

    def __init__(self, schedule: NoiseProfile | int, *, history: int = 10, floor: float = 1e-3) -> None:
        _share(floor=floor)
        positive(history=history)
        prior, profile = Uniform(schedule), schedule if isinstance(schedule, NoiseProfile) else None
        # A row more than timesteps: what is not kept goes there, as 0.
        losses = torch.zeros(prior.T + 1, history, dtype=torch.float64)
        super().__init__(prior, profile, losses=losses, counts=torch.zeros(prior.T + 1, dtype=torch.int64))
        self.floor = floor

    def proposal(self, prior: Tensor, weight: Tensor) -> Tensor:
        losses, counts = (self.state.tensors[name][:-1] for name in ("losses", "counts"))
        root = losses.square().mean(1).sqrt()
        ready = (counts >= losses.shape[1]).all() & (root.sum() > 0)
        return torch.where(ready, (1 - self.floor) * root / root.sum() + self.floor / self.T, prior)

    def learn(self, cell: Tensor, losses: Tensor) -> bool:
        kept, counts = self.state.tensors["losses"], self.state.tensors["counts"]
        cell = torch.where(losses.isfinite(), cell, self.T)
        # In runs of one cell, each in order; a run's number i of n goes to place (count + i) of the ring, unless it is
        # pushed out by the n - i after it.
        cell, order = cell.sort(stable=True)
        first, last = (torch.searchsorted(cell, cell, right=right) for right in (False, True))
        place = torch.arange(len(cell), device=cell.device) - first
        history = kept.shape[1]
        row = torch.where(place >= last - first - history, cell, self.T)
        kept[row, (counts[cell] + place) % history] = torch.where(row < self.T, losses[order], 0.0)
        counts[cell] = counts[cell] + last - first  # the same number wherever a run writes it
        return True


class Adaptive(Learned):
    """A prior's objective, drawn where its losses have a large second moment: the shares of some thirty noise levels.

    p = (1 - floor) ((1 - mix) prior + mix q) + floor * uniform over the prior's timesteps, with q in proportion to
    prior * weight * sqrt(E[L²]); E[L²] is a moving average in each bucket. p is at least (1 - floor) (1 - mix) of the
    prior, so no weight grows by more than the inverse of that. q is the prior until every bucket has seen ten losses.

    Buckets are intervals of log-SNR of equal mass under the prior, not of equal width: each sees as many losses as any
    other and its average is as good, where the ends of equal intervals would starve (Kingma and Gao, arXiv
    2303.00848, adapt per interval of log-SNR as well). It is also the same for any way to count time.

    Args:
        profile: the schedule.
        prior: what to draw for, for example `SpeeD(profile)`; by default uniform timesteps. May change by a plan.
        buckets: how many; fewer where single timesteps have more than their share of the prior.
        mix: the share of q.
        floor: the share that is drawn uniformly.
        halflife: the number of losses after which one counts half in its bucket.
        every: updates between two changes of p.

    Raises:
        EbdiffError: unless buckets, halflife and every are > 0, mix and floor in (0, 1], and the prior has as many
            timesteps as the profile.
    """

    def __init__(
        self,
        profile: NoiseProfile,
        prior: Sampler | None = None,
        *,
        buckets: int = 32,
        mix: float = 0.5,
        floor: float = 0.01,
        halflife: float = 512.0,
        every: int = 10,
    ) -> None:
        positive(buckets=buckets, halflife=halflife, every=every)
        _share(mix=mix, floor=floor)
        prior = Uniform(profile) if prior is None else prior
        if prior.T != checked(profile).T:
            raise EbdiffError(
                "the prior is of another schedule",
                expected=f"{profile.T} timesteps",
                got=str(prior.T),
                remedy="make both from one profile",
            )
        self.mix, self.floor, self.every = mix, floor, every
        self.decay = 0.5 ** (1 / halflife)
        bucket = _quantiles(prior.pmf(), buckets)
        none = torch.zeros(2, int(bucket.max()) + 1, dtype=torch.float64)
        super().__init__(prior, profile, average=none, pending=none.clone(), buckets=bucket)

    @property
    def buckets(self) -> Tensor:
        """int64[T]: the bucket of each cell, rising with the cell, where the state is."""
        return self.state.tensors["buckets"]

    def proposal(self, prior: Tensor, weight: Tensor) -> Tensor:
        moment, share = self.state.tensors["average"]
        seen = (share > 1 - self.decay**9.5).all()  # nine losses make less, ten more
        root = torch.where(share > 0, moment / share, 0.0).sqrt()
        best = prior * weight * root.index_select(0, self.buckets)
        best = torch.where(seen & (best.sum() > 0), best / best.sum(), prior)
        drawn = (prior > 0).double()
        uniform = drawn / drawn.sum()
        return (1 - self.floor) * ((1 - self.mix) * prior + self.mix * best) + self.floor * uniform

    def learn(self, cell: Tensor, losses: Tensor) -> bool:
        bucket = self.buckets.index_select(0, cell)
        every_bucket = torch.arange(self.state.tensors["pending"].shape[1], device=bucket.device)[:, None]
        # One row per bucket: sums in a fixed order, which an indexed addition on a GPU has not.
        mine = (bucket == every_bucket) & losses.isfinite()
        squares = torch.where(mine, losses.square(), 0.0).sum(1)
        return self._add(torch.stack([squares, mine.sum(1)]))

    def update_from(self, statistics: LossStatistics) -> None:
        """Learn what the fused loss has added up since the last call, on all ranks, and empty it; instead of `update`.

        A bucket with a loss that is not finite is left out. Nothing waits for the device.

        Args:
            statistics: `LossStatistics(sampler.buckets.to(device))`.

        Raises:
            EbdiffError: for another number of buckets.
        """
        K = self.state.tensors["pending"].shape[1]
        if statistics.totals.shape != (3, K):
            raise EbdiffError(
                "statistics of other buckets",
                expected=f"{K} buckets",
                got=str(statistics.totals.shape[1]),
                remedy="make them by LossStatistics(sampler.buckets)",
            )
        self.state.to(statistics.totals.device)
        self.state.updates += 1
        sums = torch.where(statistics.square.isfinite(), statistics.totals[1:].double(), 0.0)
        self.state.version += self._add(of_all_ranks(sums).sum(0))
        statistics.reset_()

    def _add(self, sums: Tensor) -> bool:
        """Take sums of squares and counts, float64[2, K]; every so often, let them change the averages."""
        tensors = self.state.tensors
        tensors["pending"] = tensors["pending"] + sums
        if self.state.updates % self.every:
            return False
        squares, count = tensors["pending"]
        keep = self.decay**count
        # Both of one decay: their ratio is the average without the bias of its start at 0 (as Adam's).
        news = torch.stack([squares / count.clamp(min=1), torch.ones_like(count)])
        tensors["average"] = tensors["average"] * keep + news * (1 - keep)
        tensors["pending"] = torch.zeros_like(tensors["pending"])
        return True


def _quantiles(prior: Tensor, buckets: int) -> Tensor:
    """int64[T]: the bucket of each cell, of about equal mass under the prior, rising with the cell, without gaps."""
    middle = prior.cumsum(0) - prior / 2
    bucket = (middle * buckets).to(torch.int64).clamp(max=buckets - 1)
    used = bucket[prior > 0].unique()
    return torch.searchsorted(used, bucket).clamp(max=len(used) - 1)


def _share(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value <= 1:
            raise EbdiffError(f"no such {name}", expected="0 < share <= 1", got=str(value), remedy="see its paper")
