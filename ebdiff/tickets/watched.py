"""What is watched, and how it is looked up by criterion, ratio and region."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import EbdiffError
from .attention_watch import AttentionWatch
from .history import MaskHistory
from .settings import Key, Settings
from .ticket import Ticket

__all__ = ["Tickets", "Watched"]


@dataclass
class Watched:
    """One line of the search: a criterion at a ratio, for the region of this number or (None) for all."""

    criterion: str
    ratio: float
    region: int | None
    history: MaskHistory
    ticket: Ticket | None = None

    @property
    def key(self) -> Key:
        """(criterion, ratio, number of the region)."""
        return self.criterion, self.ratio, self.region


class Tickets:
    """The tickets of a search, None where there is none yet.

    ``tickets[0.6]`` is the first criterion's, ``tickets["taylor", 0.6]`` another's, ``tickets["taylor", 0.6, 2]`` one
    region's. What is drawn once for all regions (magnitude) may be asked for any of them: the ticket then names it.

    Where attention is watched, a ticket is there when channels and blocks have settled. It holds the blocks of its
    region; where it is for all of several, those that some region keeps.
    """

    def __init__(self, watched: Sequence[Watched], settings: Settings, attention: AttentionWatch | None = None) -> None:
        self._watched, self._settings, self._attention = watched, settings, attention

    def __getitem__(self, key: Any) -> Ticket | None:
        watched, region = self.find(key)
        ticket = self._with_blocks(watched, region)
        if ticket is None or region is None or watched.region is not None or self._settings.regions is None:
            return ticket
        return replace(ticket, region=self._settings.regions[region])

    def _with_blocks(self, watched: Watched, region: int | None = None) -> Ticket | None:
        ticket = watched.ticket
        if ticket is None or self._attention is None:
            return ticket
        found = self._attention.found(region if watched.region is None else watched.region)
        if found is None:
            return None
        settled = ticket.settled and found.settled
        return replace(ticket, blocks=found.blocks, step=max(ticket.step, found.step), settled=settled)

    def find(self, key: Any) -> tuple[Watched, int | None]:
        """What a key names, and the number of the region it was asked for.

        Raises:
            EbdiffError: nothing is watched under this key, or it could mean several regions.
        """
        criterion, ratio, *rest = key if isinstance(key, tuple) and len(key) > 1 else (self._settings.criteria[0], key)
        region = self._settings.number_of(rest[0]) if rest else None
        found = [watched for watched in self._watched if (watched.criterion, watched.ratio) == (criterion, ratio)]
        if region is not None:
            found = [watched for watched in found if watched.region in (region, None)]
        found = found if len(rest) < 2 else []
        if len(found) == 1:
            return found[0], region
        raise EbdiffError(
            "this key means several regions" if found else "nothing is watched under this key",
            expected="one of " + ", ".join(_shown(watched) for watched in found or self._watched),
            got=f"[{key!r}]",
            remedy="name criterion, ratio and region",
        )

    def __iter__(self) -> Iterator[Key]:
        return (watched.key for watched in self._watched)

    def __len__(self) -> int:
        return len(self._watched)

    def items(self) -> Iterator[tuple[Key, Ticket | None]]:
        """((criterion, ratio, number of the region or None), ticket or None)."""
        return ((watched.key, self._with_blocks(watched)) for watched in self._watched)

    def __str__(self) -> str:
        lines = ((_shown(watched), self._with_blocks(watched)) for watched in self._watched)
        return "\n".join(f"{key}: {ticket or 'not settled yet'}" for key, ticket in lines)


def _shown(watched: Watched) -> str:
    region = "" if watched.region is None else f", {watched.region}"
    return f'["{watched.criterion}", {watched.ratio:g}{region}]'
