"""Has what is drawn settled? The first mask and the last k, as packed bits, and how far apart they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import EbdiffError
from ..pruning.mask import chance_corrected, mask_distance

__all__ = ["BitHistory"]

Bits = npt.NDArray[np.uint8]
# How many bits are set in each byte; a mask of 12,032 channels (the CIFAR UNet's) is 1.5 kB.
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.int64)


class BitHistory:
    """The first mask ever added (the initial one) and the last `keep`, with the steps they were drawn at.

    Distances are normalised Hamming distances, or with ``corrected=True`` divided by 2p(1-p), what two independent
    masks that remove the share p differ by (see `ebdiff.distance`).

    Args:
        size: bits of a mask.
        keep: how many masks to remember besides the first.
    """

    def __init__(self, size: int, keep: int = 64) -> None:
        if keep < 1:
            raise EbdiffError("mask history", expected="keep >= 1", got=str(keep), remedy="e.g. 64")
        self._size = size
        self._first: tuple[int, Bits] | None = None
        self._last: deque[tuple[int, Bits]] = deque(maxlen=keep)

    def _remember(self, step: int, bits: Tensor) -> None:
        """Add a mask, bool [size], as drawn at `step`.

        Raises:
            EbdiffError: a step that is not later than the newest.
        """
        if self._first is not None and step <= self.steps[-1]:
            self._refuse("sequence of steps", f"a step after {self.steps[-1]}", str(step))
        entry = (int(step), np.packbits(bits.numpy()))
        if self._first is None:
            self._first = entry
        else:
            self._last.append(entry)

    @staticmethod
    def _refuse(what: str, expected: str, got: str) -> NoReturn:
        raise EbdiffError(f"one {what} per mask history", expected=expected, got=got, remedy="use a history for each")

    def _bits(self, index: int) -> Tensor:
        """bool [size]: the mask at this place."""
        return torch.from_numpy(np.unpackbits(self._entries[index][1], count=self._size).astype(bool))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def _entries(self) -> list[tuple[int, Bits]]:
        return [] if self._first is None else [self._first, *self._last]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps the masks were drawn at, rising."""
        return tuple(step for step, _ in self._entries)

    def distances(self, corrected: bool = False) -> list[float]:
        """From the newest mask to each of the others, in the order of `steps[:-1]`."""
        if len(self) < 2 or not self._size:
            return [0.0] * (len(self) - 1)
        rows = np.stack([bits for _, bits in self._entries])
        shares = [count / self._size for count in mask_distance(torch.from_numpy(rows)).tolist()[:-1]]
        if not corrected:
            return shares
        kept = [int(_ONES[row].sum()) for row in rows]
        removed = [1 - (count + kept[-1]) / (2 * self._size) for count in kept]
        return [chance_corrected(*pair) for pair in zip(shares, removed, strict=False)]

    def heatmap(self, corrected: bool = False) -> tuple[tuple[int, ...], Tensor]:
        """(steps, float64 [n, n]): the distances between all pairs of masks, the first mask included."""
        rows, size = self.state_dict()["bits"], max(self._size, 1)
        share = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for i in range(len(rows) if self._size else 0):  # row by row: of blocks of attention, one may be megabytes
            share[i] = mask_distance(rows, i) / size
        kept = torch.tensor([int(_ONES[row].sum()) for row in rows.numpy()], dtype=torch.float64)
        both = kept[:, None] + kept
        if corrected:
            removed = 1 - both / (2 * size)
            chance = 2 * removed * (1 - removed)
            share = torch.where(chance > 1e-12, share / chance.clamp_min(1e-12), 0.0)
        return self.steps, share

    def window(self, span: int, fifo: int) -> list[int]:
        """Places of the `fifo` masks to compare, newest first: they span at least `span` steps.

        Mask i is the latest that is at least i * span / (fifo - 1) steps older than the newest, however often masks are
        drawn. The first mask, drawn before training, is none of them. Empty where the history is still too short.
        """
        steps = self.steps
        chosen = [len(steps) - 1]
        for i in range(1, fifo):
            limit = steps[-1] - i * span / (fifo - 1) if steps else 0
            place = next((p for p in range(chosen[-1] - 1, 0, -1) if steps[p] <= limit), None)
            if place is None:
                return []
            chosen.append(place)
        return chosen

    def settled(self, span: int, *, eta: float, fifo: int = 5, corrected: bool = False) -> bool:
        """Is the newest mask an early-bird ticket?

        It must differ by at most `eta` from each of the other masks of the window, and from the first mask by more
        than twice the largest of these: a mask that has not moved yet has not settled either.
        Source: EB-Diff-Train section 4.1 (five masks, eta 0.1); the span and the comparison with the first mask: ours.
        """
        window = self.window(span, fifo)
        if not window:
            return False
        distances = self.distances(corrected)
        farthest = max(distances[place] for place in window[1:])
        return farthest <= eta and distances[0] > 2 * farthest

    def state_dict(self) -> dict[str, Any]:
        """{"bits": uint8 [n, bytes], "steps"}; the steps are JSON."""
        width = (self._size + 7) // 8
        rows = np.stack([bits for _, bits in self._entries]) if self._first else np.empty((0, width), np.uint8)
        return {"bits": torch.from_numpy(rows), "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            EbdiffError: a state that does not fit; nothing is changed.
        """
        bits, steps = state["bits"], list(state["steps"])
        expected = [len(steps), (self._size + 7) // 8]
        if bits.dtype != torch.uint8 or list(bits.shape) != expected:
            raise EbdiffError(
                "state of a mask history",
                expected=f"uint8 {expected}",
                got=f"{bits.dtype} {list(bits.shape)}",
                remedy="resume with the model and the settings it was saved with",
            )
        entries = [(int(step), row) for step, row in zip(steps, bits.cpu().numpy().copy(), strict=True)]
        self._first = entries[0] if entries else None
        self._last = deque(entries[1:], maxlen=self._last.maxlen)
