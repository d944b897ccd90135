"""Where the programs of a launch count themselves: numbers that are 0 again after each launch."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["counter"]

_MANY = 256
_APART = 32  # numbers: counters that are in use at the same time share no line of the cache


class _Counters(NamedTuple):
    """Of one device."""

    free: count[int]
    places: tuple[Tensor, ...]
    of_stream: dict[int, Tensor]


_known: dict[torch.device, _Counters] = {}


def counter(device: torch.device) -> Tensor:
    """int32 [*], whose first number is 0 and is so again after the launch.

    Launches that can run at the same time have different ones: each stream its own, and each launch in a CUDA graph.
    """
    stream, capturing = _now(device)
    counters = _known.get(device)
    if counters is None:
        if capturing:
            return _zero(device)
        # Copied from the CPU, which waits for the device: from then on any stream may use them.
        places = torch.zeros(_MANY, _APART, dtype=torch.int32).to(device).unbind()
        counters = _known[device] = _Counters(count(), places, {})
    if capturing:
        return _next(counters, device)
    if stream not in counters.of_stream:
        counters.of_stream[stream] = _next(counters, device)
    return counters.of_stream[stream]


def _now(device: torch.device) -> tuple[int, bool]:
    """The current stream, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _next(counters: _Counters, device: torch.device) -> Tensor:
    place = next(counters.free)
    return counters.places[place] if place < len(counters.places) else _zero(device)


def _zero(device: torch.device) -> Tensor:
    """Zeroed on the current stream; in a CUDA graph in every replay."""
    return torch.zeros(1, dtype=torch.int32, device=device)
