"""EarlyBird: the watcher a training loop calls after each step; many ratios, criteria and regions in one dense run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..pruning.channel_sums import ChannelSums, Kind
from ..pruning.mask import ChannelMask, NormMode, Scope
from ..pruning.modules import refuse_wrapped
from ..pruning.plan import ChannelPlan
from ..timesteps.region import Partition, Region
from .attention import Attention
from .attention_watch import AttentionWatch
from .history import MaskHistory
from .scores import RunningScores, gradient_scores, weights_of
from .settings import Criterion, Pace, Settings, parts_of, refuse_other_settings
from .ticket import Ticket
from .watched import Tickets, Watched

__all__ = ["EarlyBird", "Tickets"]


class EarlyBird:
    """Watches a network in dense training until the masks drawn from it settle (EB-Diff-Train, section 4).

    Call `step` once per optimizer step, after ``optimizer.step()`` and before ``zero_grad()``. A ticket is declared
    when the newest mask differs by at most `eta` from each of the other `fifo` - 1 masks, which span at least `window`
    steps, and its distance to the initial mask exceeds twice the largest of those (see `MaskHistory.settled`).

    Criteria:
      - "magnitude", "magnitude-l1": from the weights, the same for every region; the initial mask is drawn here.
      - "taylor": per channel |sum of w * dL/dw| of one mini-batch (Molchanov et al. 2019), averaged over mini-batches
        with an exponential fading of window / 2 steps: the oldest mask of a window shares 14% of the newest's data. The
        absolute value is taken per mini-batch: the signed mean tends to zero as training converges. With `regions`,
        scores are kept apart by the region that `step` is told. The initial mask is the first drawn; it rests on few
        mini-batches, so its distance holds their noise too.
      - "random": new random scores at every draw. A control: a rule that settles on these is worth nothing.

    Args:
        model: the model in training, as it was traced (inside DDP: its ``.module``).
        plan: its plan.
        ratios: shares of channels to remove; (0.3, 0.6, 0.8) by default.
        criteria: see above; the first is the default of `tickets`.
        window: steps that the masks compared must span; one epoch, or a pseudo-epoch of 1000 steps on large data.
        every: steps between draws; by default window / 20.
        eta: the largest distance that counts as settled. By default the paper's 0.1; with `corrected`, 0.2: at ratio p
            chance is 2p(1-p), at p = 0.5 therefore 0.5, of which 0.1 is 0.2. (Uncorrected, 0.1 is lax at high ratios:
            two random masks at p = 0.95 are 0.095 apart. Corrected, 0.2 is a Hamming distance of 0.064 at p = 0.8.)
        corrected: use chance-corrected distances.
        fifo: how many masks are compared.
        regions: keep Taylor scores, masks and tickets apart by region of timesteps.
        region_ratios: instead of `ratios`: region i is watched at its own ratio only.
        norm, multiple_of, scope: as in `ChannelMask.draw`.
        ema: take magnitudes from this EMA (a module, or an object with ``shadow_params``) instead of the raw weights.
            Slow averages settle by construction: with decay 0.9999 masks still equal the initial one after epochs.
        taylor_every: steps between reading gradients; by default window / 200.
        attention: also watch which blocks of attention matter, an `Attention` or the share of them to keep, by region
            where there are regions; tickets then hold block masks too, and are declared when both have settled. See
            `AttentionWatch`.
        seed: of the random criterion.

    Raises:
        EbdiffError: settings that make no sense, a wrapped model, or one that is not the plan's.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ChannelPlan,
        ratios: Sequence[float] | None = None,
        criteria: Sequence[Criterion] = ("magnitude",),
        window: int = 1000,
        every: int | None = None,
        eta: float | None = None,
        corrected: bool = False,
        fifo: int = 5,
        regions: Partition | None = None,
        norm: NormMode = "ragged",
        multiple_of: int = 1,
        ema: Any = None,
        *,
        region_ratios: Sequence[float] | None = None,
        taylor_every: int | None = None,
        attention: Attention | float | None = None,
        scope: Scope = "local",
        seed: int = 0,
    ) -> None:
        if ratios is not None and region_ratios is not None:
            raise EbdiffError("ratios", expected="ratios or region_ratios", got="both", remedy="give one")
        for name, shares in (("ratios", ratios), ("region_ratios", region_ratios)):
            if not isinstance(shares, Sequence | None) or isinstance(shares, str):
                got = repr(shares)
                raise EbdiffError(name, expected="several shares removed", got=got, remedy=f"{name}=(0.3, 0.6)")
        self.settings = Settings(
            **vars(Pace.of(window, every, eta, corrected, fifo, regions)),
            ratios=tuple(dict.fromkeys(region_ratios or (0.3, 0.6, 0.8)) if ratios is None else ratios),
            criteria=(criteria,) if isinstance(criteria, str) else tuple(criteria),
            region_ratios=None if region_ratios is None else tuple(region_ratios),
            norm=norm,
            multiple_of=multiple_of,
            scope=scope,
            taylor_every=max(1, window // 200) if taylor_every is None else taylor_every,
            seed=seed,
            attention=attention if attention is None or isinstance(attention, Attention) else Attention(attention),
        )
        refuse_wrapped(model)
        plan.check(model)
        self.model, self.plan, self.ema = model, plan, ema
        self.steps = 0
        self._sums = ChannelSums(plan)
        self._running = [RunningScores(self._sums.size, self.settings.fading) for _ in range(self.settings.parts)]
        self._watched = [Watched(*key, MaskHistory(plan, self.settings.masks_kept)) for key in self.settings.watched()]
        self._draw(self._watched)
        s = self.settings
        self.attention = None if s.attention is None else AttentionWatch(model, s.attention, s)

    def step(self, region: int | Region | None = None) -> None:
        """Count one optimizer step; now and then read the gradients, draw masks and see whether they settled.

        Args:
            region: the region that all timesteps of this step came from, where a "taylor" search tells regions apart.

        Raises:
            EbdiffError: gradients are needed and missing, or the region is, or there is no attention to look at.
        """
        number, step = self.settings.number_of(region), self.steps + 1
        if self.settings.takes_gradients:
            self._read_gradients(number, step)
        if self.attention is not None:
            self.attention.step(number)
        self.steps = step
        if step % self.settings.every == 0:
            self._draw([watched for watched in self._watched if watched.ticket is None])

    def _read_gradients(self, region: int | None, step: int) -> None:
        running = self._running[self.settings.part_of(region)]
        if running.weight and step - running.newest < self.settings.taylor_every * self.settings.parts:
            return
        weights = dict(self.model.named_parameters())
        if any(name not in weights or weights[name].shape != self.plan.shapes[name] for name in self._sums.dims):
            self.plan.check(self.model)
        scores = gradient_scores(self._sums, weights)
        if scores is not None:
            running.add(step, scores)

    def _draw(self, wanted: Sequence[Watched]) -> None:
        """Add a mask to each of these histories where there is something new, and declare tickets."""
        if not wanted:
            return
        self.plan.check(self.model)
        cache: dict[tuple[str, int | None], Mapping[str, Tensor] | None] = {}
        for watched in wanted:
            source = (watched.criterion, watched.region)
            if source not in cache:
                cache[source] = self._new_scores(*source, watched.history)
            scores = cache[source]
            if scores is None:
                continue
            watched.history.add(self.steps, self._mask(scores, watched.ratio))
            if self.settings.settled(watched.history):
                watched.ticket = self._ticket(watched, settled=True)

    def _new_scores(self, criterion: str, region: int | None, history: MaskHistory) -> Mapping[str, Tensor] | None:
        """Scores to draw by; None where no gradient was read since the last draw: an old mask proves nothing."""
        if criterion == "taylor":
            running = self._running[region or 0]
            if not running.weight or (len(history) and running.newest <= history.steps[-1]):
                return None
        return self.scores(criterion, region)

    def scores(self, criterion: str, region: int | Region | None = None, raw: bool = False) -> dict[str, Tensor]:
        """{space name: float32 [size]}: the scores masks are drawn from now.

        Args:
            criterion: any criterion; "taylor" only where it is watched.
            region: whose scores, where they differ between regions.
            raw: not divided by the mean of the space. Raw Taylor scores predict how much the loss rises when a channel
                goes (see `split_budget`).

        Raises:
            EbdiffError: an unknown criterion, or no gradient was read yet.
        """
        if criterion == "taylor":
            number = self.settings.number_of(region)
            mean = self._running[number or 0].mean
            if mean is None or (number is None and self.settings.regions is not None):
                where = "" if number is None else f" in region {number}"
                raise EbdiffError(
                    f"no Taylor scores{where}",
                    expected="gradients seen by step(), and the region where there are several",
                    got=f"{self.steps} steps",
                    remedy="watch criteria=('taylor',) and take steps in every region",
                )
            return self._sums.split(mean, raw)
        if criterion == "random":
            generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + self.steps) % 2**63)
            return self._sums.split(torch.rand(self._sums.size, generator=generator, dtype=torch.float64), raw)
        if criterion not in ("magnitude", "magnitude-l1"):
            raise EbdiffError("criterion", expected="one of Criterion", got=repr(criterion), remedy="choose one")
        weights = weights_of(self.model, self.ema)
        kind: Kind = "square" if criterion == "magnitude" else "absolute"
        return self._sums.split(self._sums.of(kind, weights), raw)

    def _mask(self, scores: Mapping[str, Tensor], ratio: float) -> ChannelMask:
        s = self.settings
        how: dict[str, Any] = {"norm": s.norm, "multiple_of": s.multiple_of, "scope": s.scope}
        return ChannelMask.draw(scores, plan=self.plan, ratio=ratio, **how)

    def _ticket(self, watched: Watched, settled: bool) -> Ticket:
        """The newest mask as a ticket."""
        regions = self.settings.regions
        region = None if watched.region is None or regions is None else regions[watched.region]
        step = watched.history.steps[-1]
        return Ticket(watched.history[-1], watched.ratio, step, watched.criterion, region, settled)

    def finish(self) -> Tickets:
        """Draw a ticket now, marked as not settled, wherever none settled; returns `tickets`.

        Raises:
            EbdiffError: a region in which no gradient was ever read, or no attention looked at; nothing is drawn.
        """
        left = [watched for watched in self._watched if watched.ticket is None]
        for watched in left:
            if watched.criterion == "taylor":
                self.scores("taylor", watched.region)
        if self.attention is not None:
            self.attention.finish()
        self._draw([watched for watched in left if self.steps not in watched.history.steps])
        for watched in left:
            watched.ticket = watched.ticket or self._ticket(watched, settled=False)
        return self.tickets

    @property
    def tickets(self) -> Tickets:
        """The tickets found so far: ``tickets[0.6]``, ``["taylor", 0.6]``, ``["taylor", 0.6, region]``."""
        return Tickets(self._watched, self.settings, self.attention)

    @property
    def settled(self) -> bool:
        """Has everything that is watched settled?"""
        blocks = self.attention is None or self.attention.settled
        return blocks and all(watched.ticket is not None and watched.ticket.settled for watched in self._watched)

    def history(self, key: Any) -> MaskHistory:
        """The masks drawn so far for a key as `tickets` takes it. It ends where the ticket was drawn."""
        return self.tickets.find(key)[0].history

    def heatmap(self, key: Any) -> tuple[tuple[int, ...], Tensor]:
        """(steps, float64 [n, n]): the distances between all pairs of masks of a key, the initial one first."""
        return self.history(key).heatmap(self.settings.corrected)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{"tensors": {name: tensor}, "facts": JSON values}: all that an exact resume needs besides model and EMA."""
        states = [watched.history.state_dict() for watched in self._watched]
        tensors = {f"masks.{i}": state.pop("bits") for i, state in enumerate(states)}
        tensors |= {f"scores.{i}": running.total for i, running in enumerate(self._running)}
        facts = {
            "settings": self._identity(),
            "steps": self.steps,
            "histories": states,
            "running": [running.facts() for running in self._running],
            "settled": [None if watched.ticket is None else watched.ticket.settled for watched in self._watched],
        }
        if self.attention is not None:
            watch = self.attention.state_dict()
            tensors |= {f"attention.{name}": tensor for name, tensor in watch["tensors"].items()}
            facts["attention"] = watch["facts"]
        return {"tensors": tensors, "facts": facts}

    def _identity(self) -> dict[str, Any]:
        return {**self.settings.to_json(), "plan": self.plan.fingerprint(), "ema": self.ema is not None}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a saved state.

        Raises:
            EbdiffError: it was saved with other settings or another plan, or is damaged; nothing is changed.
        """
        tensors, facts = parts_of(state)
        refuse_other_settings(self._identity(), {"scope": "local", **facts.get("settings", {})})  # as it was
        running = [RunningScores(self._sums.size, self.settings.fading) for _ in self._running]
        fresh = [Watched(*w.key, MaskHistory(self.plan, self.settings.masks_kept)) for w in self._watched]
        try:
            steps = int(facts["steps"])
            for i, scores in enumerate(running):
                scores.load(tensors[f"scores.{i}"], facts["running"][i])
            for i, watched in enumerate(fresh):
                watched.history.load_state_dict({**facts["histories"][i], "bits": tensors[f"masks.{i}"]})
                if facts["settled"][i] is not None:
                    watched.ticket = self._ticket(watched, facts["settled"][i])
            if self.attention is not None:
                named = {name.removeprefix("attention."): tensor for name, tensor in tensors.items()}
                self.attention.load_state_dict({"tensors": named, "facts": facts["attention"]})
        except EbdiffError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EbdiffError(
                "damaged state of an early-bird search", got=repr(error), remedy="start it anew"
            ) from None
        self.steps, self._running, self._watched = steps, running, fresh
