"""The channel masks that were drawn so far: the first and the last k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..pruning.mask import ChannelMask, NormMode
from ..pruning.plan import ChannelPlan
from .bits import BitHistory

__all__ = ["MaskHistory"]


@dataclass(frozen=True)
class _Recipe:
    """What all masks of a history share besides the plan."""

    norm: NormMode
    asked: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, mask: ChannelMask) -> _Recipe:
        return cls(mask.norm, tuple(sorted(mask.asked.items())))

    def __str__(self) -> str:
        return f"{', '.join(f'{name} {value:g}' for name, value in self.asked) or 'by hand'}, {self.norm} norms"


class MaskHistory(BitHistory):
    """The first channel mask ever added (the initial one) and the last `keep`, with the steps they were drawn at.

    All masks are of one plan and were asked for in one way (ratio or MACs, norm). Distances are normalised Hamming
    distances, or with ``corrected=True`` divided by 2p(1-p), what two independent masks that remove the share p differ
    by (see `ebdiff.distance`).

    Args:
        plan: the plan of the masks.
        keep: how many masks to remember besides the first.
    """

    def __init__(self, plan: ChannelPlan, keep: int = 64) -> None:
        super().__init__(sum(space.size for space in plan), keep)
        self.plan = plan
        self._recipe: _Recipe | None = None

    def add(self, step: int, mask: ChannelMask) -> None:
        """Remember `mask` as drawn at `step`.

        Raises:
            EbdiffError: a mask of another plan or asked for otherwise, or a step that is not later than the newest.
        """
        recipe = _Recipe.of(mask)
        if mask.plan is not self.plan and mask.plan.fingerprint() != self.plan.fingerprint():
            self._refuse("plan", self.plan.fingerprint(), mask.plan.fingerprint())
        if self._recipe not in (None, recipe):
            self._refuse("recipe", str(self._recipe), str(recipe))
        self._remember(step, mask.bits())
        self._recipe = recipe

    def __getitem__(self, index: int) -> ChannelMask:
        """The mask at this place: 0 is the first, -1 the newest."""
        parts = torch.split(self._bits(index), [s.size for s in self.plan])
        assert self._recipe is not None
        kept = dict(zip((s.name for s in self.plan), parts, strict=True))
        return ChannelMask(self.plan, kept, self._recipe.norm, dict(self._recipe.asked))

    def state_dict(self) -> dict[str, Any]:
        """{"bits": uint8 [n, bytes], "steps", "recipe"}; all but the bits is JSON."""
        recipe = None if self._recipe is None else [self._recipe.norm, dict(self._recipe.asked)]
        return {**super().state_dict(), "recipe": recipe}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            EbdiffError: a state that does not fit the plan; nothing is changed.
        """
        recipe = state["recipe"]
        super().load_state_dict(state if recipe else {**state, "steps": []})  # so that masks without one do not fit
        self._recipe = None if recipe is None else _Recipe(recipe[0], tuple(sorted(recipe[1].items())))
