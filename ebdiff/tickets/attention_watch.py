"""AttentionWatch: looks at a network's attention while it trains, and draws block masks until they settle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..ops.block_mask import BlockMask
from ..timesteps.region import Region
from .attention import Attention, BlockHistory, Grid, union
from .attention_look import Look
from .scores import RunningScores
from .settings import Pace, parts_of, refuse_other_settings

__all__ = ["AttentionWatch", "Found"]


class Found(NamedTuple):
    """Block masks by layer, the step they were drawn at, and whether they had settled."""

    blocks: Mapping[str, BlockMask]
    step: int
    settled: bool


class AttentionWatch:
    """Watches where a network in dense training looks, until the masks of its top blocks settle.

    Every few steps it looks at the queries and keys of every call of scaled_dot_product_attention during the forward,
    whatever code makes it, and adds up how much attention each block holds (`attention_mass`), with the fading of
    Taylor scores. Masks keep each head's blocks of most mass. When they settle is told as for channels: see
    `EarlyBird`, which holds one of these where it is given `attention`. The initial mask is the first drawn.

    Call `step` once per optimizer step. Only forwards in which gradients are recorded count. Under
    DistributedDataParallel each process sees its own samples: let one process draw, and share what it found.

    Args:
        model: the module that the loop runs, or DDP's ``.module``; compile it afterwards.
        attention: what is watched; a number is its density.
        pace: when masks are drawn and count as settled; by region, where it has regions.
    """

    def __init__(self, model: nn.Module, attention: Attention | float, pace: Pace | None = None) -> None:
        self.model, self.pace = model, pace or Pace.of()
        self.attention = attention if isinstance(attention, Attention) else Attention(attention)
        self.every = self.attention.pace(self.pace.window)
        self.steps = 0
        self.grids: dict[str, Grid] = {}
        self._running: list[RunningScores] = []
        self._histories: list[BlockHistory] = []
        self._found: list[Found | None] = [None] * self.pace.parts
        self._look = Look(self.attention)
        self._hooks = self._look.attach(model) if self._is_due() else []

    def _is_due(self) -> bool:
        """Is the next step one to look at?"""
        return None in self._found and self.attention.is_due(self.steps, self.pace.window)

    def step(self, region: int | Region | None = None) -> None:
        """Count one optimizer step; now and then take what was seen, draw masks and see whether they settled.

        Args:
            region: the region that all timesteps of this step came from, where there are regions.

        Raises:
            EbdiffError: the region is missing, or there was no attention to look at.
        """
        part = self.pace.part_of(region)
        if self._is_due():
            self._take(part)
        self.steps += 1
        self.detach()
        if self.steps % self.pace.every == 0:
            self._draw([i for i, found in enumerate(self._found) if found is None])
        if self._is_due():
            self._hooks = self._look.attach(self.model)

    def detach(self) -> None:
        """Leave the model as it was; `step` looks again when it is time."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._look.leave()

    def _take(self, part: int) -> None:
        seen = self._look.take(self.grids)
        if not self.grids:
            self.grids = dict(self._look.grids)
            self._running, self._histories = self._empty(self.grids, next(iter(seen.values())).device)
        self._running[part].add(self.steps + 1, torch.cat([seen[name].flatten() for name in self.grids]).double())

    def _empty(self, grids: Mapping[str, Grid], device: torch.device) -> tuple[list[RunningScores], list[BlockHistory]]:
        """For each part, what is added up and what was drawn: nothing yet."""
        size, pace, parts = sum(grid.size for grid in grids.values()), self.pace, range(self.pace.parts)
        running = [RunningScores(size, pace.fading, device) for _ in parts]
        return running, [BlockHistory(grids, pace.masks_kept) for _ in parts]

    def mass(self, region: int | Region | None = None) -> dict[str, Tensor]:
        """{layer: float64 [heads, blocks of queries, blocks of keys]}: how much attention each block holds, till now.

        Raises:
            EbdiffError: nothing was looked at yet, in this region.
        """
        mean = self._running[self.pace.part_of(region)].mean if self.grids else None
        if mean is None:
            raise EbdiffError(
                "no attention was looked at" + ("" if region is None else f" in region {region}"),
                expected=f"every {self.every} steps a forward with gradients, in every region",
                got=f"{self.steps} steps",
                remedy="take more steps, or look more often: Attention(..., every=1)",
            )
        parts = torch.split(mean, [grid.size for grid in self.grids.values()])
        return {name: flat.view(grid.shape) for (name, grid), flat in zip(self.grids.items(), parts, strict=True)}

    def _draw(self, parts: list[int]) -> None:
        for part in parts if self.grids else ():
            running, history = self._running[part], self._histories[part]
            if not running.weight or (len(history) and running.newest <= history.steps[-1]):
                continue  # nothing new: an old mask proves nothing
            mass = self.mass(part if self.pace.regions else None)
            history.add(self.steps, {n: self.grids[n].top(m, self.attention.density) for n, m in mass.items()})
            if self.pace.settled(history):
                self._found[part] = Found(history[-1], self.steps, True)

    def finish(self) -> None:
        """Draw now, marked as not settled, wherever nothing settled.

        Raises:
            EbdiffError: a region in which no attention was looked at; nothing is drawn.
        """
        left = [part for part, found in enumerate(self._found) if found is None]
        for part in left:
            self.mass(part if self.pace.regions else None)
        self._draw([part for part in left if self.steps not in self._histories[part].steps])
        for part in left:
            history = self._histories[part]
            self._found[part] = self._found[part] or Found(history[-1], history.steps[-1], False)
        self.detach()

    @property
    def settled(self) -> bool:
        """Has every region settled?"""
        return all(found is not None and found.settled for found in self._found)

    def found(self, region: int | Region | None = None) -> Found | None:
        """What was found in a region, None where nothing has settled yet.

        Without a region, where there are several: the blocks that some region keeps.
        """
        number = self.pace.number_of(region)
        chosen = self._found if number is None else [self._found[number]]
        present = [found for found in chosen if found is not None]
        if len(present) < len(chosen):
            return None
        if len(present) == 1:
            return present[0]
        blocks, steps, settled = zip(*present, strict=True)
        return Found(union(list(blocks)), max(steps), all(settled))

    def history(self, region: int | Region | None = None) -> BlockHistory:
        """The masks drawn so far in a region.

        Raises:
            EbdiffError: nothing was looked at yet.
        """
        self.mass(region)
        return self._histories[self.pace.part_of(region)]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{"tensors": {name: tensor}, "facts": JSON values}: all that an exact resume needs besides the model."""
        states = [history.state_dict() for history in self._histories]
        tensors = {f"blocks.{i}": state.pop("bits") for i, state in enumerate(states)}
        tensors |= {f"mass.{i}": running.total for i, running in enumerate(self._running)}
        facts = {
            "settings": self._identity(),
            "steps": self.steps,
            "grids": {name: list(grid) for name, grid in self.grids.items()},
            "histories": states,
            "running": [running.facts() for running in self._running],
            "settled": [None if found is None else found.settled for found in self._found],
        }
        return {"tensors": tensors, "facts": facts}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a saved state.

        Raises:
            EbdiffError: it was saved with other settings, or is damaged; nothing is changed.
        """
        tensors, facts = parts_of(state)
        refuse_other_settings(self._identity(), facts.get("settings", {}))
        try:
            grids = {name: Grid(*sizes) for name, sizes in facts["grids"].items()}
            device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
            running, histories = self._empty(grids, device) if grids else ([], [])
            found: list[Found | None] = [None] * self.pace.parts
            for i, (scores, history) in enumerate(zip(running, histories, strict=True)):
                scores.load(tensors[f"mass.{i}"], facts["running"][i])
                history.load_state_dict({**facts["histories"][i], "bits": tensors[f"blocks.{i}"]})
                if facts["settled"][i] is not None:
                    found[i] = Found(history[-1], history.steps[-1], facts["settled"][i])
            steps = int(facts["steps"])
        except EbdiffError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EbdiffError("damaged state of an attention watch", got=repr(error), remedy="start anew") from None
        self.steps, self.grids, self._running, self._histories, self._found = steps, grids, running, histories, found
        self.detach()
        if self._is_due():
            self._hooks = self._look.attach(self.model)

    def _identity(self) -> dict[str, Any]:
        pace = Pace(*(getattr(self.pace, each.name) for each in fields(Pace)))  # of a search's settings these alone
        regions = None if pace.regions is None else pace.regions.to_json()
        return {**asdict(self.attention), **vars(pace), "regions": regions, "every": [pace.every, self.every]}
