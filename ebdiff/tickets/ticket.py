"""Ticket: masks, the plan they belong to, and where they were drawn. JSON and safetensors on disk, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import EbdiffError
from ..files import read_json, read_tensors, write_json, write_tensors
from ..ops.block_mask import BlockMask
from ..pruning.blocks import read_blocks, written
from ..pruning.mask import ChannelMask
from ..pruning.plan import ChannelPlan
from ..timesteps.region import Region

__all__ = ["Ticket"]

_FACTS, _MASKS = "ticket.json", "ticket.safetensors"


@dataclass(frozen=True)
class Ticket:
    """Which channels to keep, and which blocks of attention, and how that was found.

    Args:
        mask: the kept channels; knows its plan.
        ratio: share of channels asked to be REMOVED (what was reached: `achieved`).
        step: optimizer steps taken before it was drawn.
        criterion: how channels were scored.
        region: the timesteps it is for, a Region or its number; None for all of them.
        settled: did it settle, or did the search end first?
        blocks: {name of a module that computes attention: its kept blocks}; of other modules all are kept.
    """

    mask: ChannelMask
    ratio: float
    step: int
    criterion: str
    region: Region | int | None = None
    settled: bool = True
    blocks: Mapping[str, BlockMask] = field(default_factory=dict)

    @property
    def plan(self) -> ChannelPlan:
        """The plan of the mask."""
        return self.mask.plan

    @property
    def achieved(self) -> dict[str, float]:
        """{"channels": share removed, "macs": share kept, "parameters": ...}; "blocks": share kept, of attention."""
        kept = [mask.kept for mask in self.blocks.values()]
        blocks = {"blocks": sum(int(k.sum()) for k in kept) / sum(k.numel() for k in kept)} if kept else {}
        return {
            "channels": self.mask.removed,
            "macs": self.plan.macs(self.mask) / max(self.plan.macs(), 1e-30),
            "parameters": self.plan.parameters(self.mask) / max(self.plan.parameters(), 1),
            **blocks,
        }

    def __str__(self) -> str:
        where = "all timesteps" if self.region is None else f"timesteps {self.region}"
        where = f"region {self.region}" if isinstance(self.region, int) else where
        got = self.achieved
        blocks = f", {got['blocks']:.1%} of the blocks in {len(self.blocks)} attention layers" if self.blocks else ""
        return (
            f"{self.criterion} ticket for {where}, {'settled' if self.settled else 'NOT settled, drawn'} at step "
            f"{self.step}: {self.ratio:.1%} asked, {got['channels']:.1%} of the channels removed; keeps "
            f"{got['macs']:.1%} of the MACs and {got['parameters']:.1%} of the parameters{blocks}"
        )

    def facts(self) -> dict[str, Any]:
        """Everything but the plan and the masks, as JSON values."""
        return {
            "ratio": self.ratio,
            "achieved": self.achieved,
            "step": self.step,
            "criterion": self.criterion,
            "region": self.region.to_json() if isinstance(self.region, Region) else self.region,
            "settled": self.settled,
            "norm": self.mask.norm,
            "asked": dict(self.mask.asked),
            **written(self.blocks)[1],
        }

    def save(self, folder: str | Path) -> None:
        """Write ticket.json (facts, plan, fingerprint) and ticket.safetensors (bool masks, True = kept) to `folder`.

        Of a ticket without masks of blocks the files are those of versions that knew none.
        """
        facts, plan = self.facts(), self.plan.to_json()
        masks = {**self.mask.keep, **{name: kept.cpu() for name, kept in written(self.blocks)[0].items()}}
        write_tensors(Path(folder) / _MASKS, masks)
        value = {"fingerprint": self.plan.fingerprint(), "digest": _digest(facts, plan, masks), **facts}
        write_json(Path(folder) / _FACTS, {**value, "plan": plan})

    @classmethod
    def load(cls, folder: str | Path, plan: ChannelPlan | None = None) -> Ticket:
        """The ticket saved in `folder`.

        Args:
            folder: where `save` wrote it.
            plan: the plan it is to be used with, if there is one already.

        Raises:
            EbdiffError: missing, damaged or edited files, or a ticket of another architecture than `plan`'s.
        """
        value, (masks, _) = read_json(Path(folder) / _FACTS), read_tensors(Path(folder) / _MASKS)
        try:
            written, digest, stored = value.pop("fingerprint"), value.pop("digest"), value.pop("plan")
            _same("edited ticket (digest of its content)", digest, _digest(value, stored, masks), folder)
            found = ChannelPlan.from_json(stored)
            _same("edited ticket (plan fingerprint)", written, found.fingerprint(), folder)
            region = Region.from_json(value["region"]) if isinstance(value["region"], list) else value["region"]
            facts = {name: value[name] for name in ("ratio", "step", "criterion", "settled")}
            blocks = read_blocks(masks, value)
            mask = ChannelMask(found, masks, value["norm"], value["asked"])
        except (AttributeError, KeyError, TypeError) as error:
            raise EbdiffError(
                f"{Path(folder) / _FACTS} is no ticket", got=repr(error), remedy="save the ticket again"
            ) from None
        if plan is not None and plan.fingerprint() != written:
            raise EbdiffError(
                f"the ticket in {folder} belongs to another architecture",
                expected=plan.fingerprint(),
                got=written,
                remedy="draw a ticket for this model",
            )
        return cls(mask, region=region, blocks=blocks, **facts)


def _same(problem: str, expected: str, got: str, folder: str | Path) -> None:
    if expected != got:
        raise EbdiffError(f"{problem} in {folder}", expected=str(expected), got=got, remedy="save the ticket again")


def _digest(facts: Mapping[str, Any], plan: Mapping[str, Any], keep: Mapping[str, Tensor]) -> str:
    """sha256 over all that a ticket consists of."""
    digest = hashlib.sha256(json.dumps([facts, plan], sort_keys=True).encode())
    for name in sorted(keep):
        digest.update(f"{name} {keep[name].dtype} ".encode() + keep[name].numpy().tobytes())
    return digest.hexdigest()[:16]
