"""What a run costs: steps, MACs, device-seconds and wall-clock, counted on across interruptions.

A process works on one device: its device-seconds are the wall-clock of its GPU, or on the CPU its time over all
threads; those of several add up. Work that a crash destroyed is not counted: a cost is that of the result, not of the
accident.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FORWARD_AND_BACKWARD", "Cost", "Meter"]

FORWARD_AND_BACKWARD = 3  # MACs of a training step over those of its forward pass: gradients to inputs and to weights


@dataclass(frozen=True)
class Cost:
    """Costs add up.

    Args:
        steps: optimizer steps.
        images: images seen.
        macs: multiply-accumulates, forward and backward.
        device_seconds: wall-clock of the GPU, or process CPU time.
        wall_seconds: wall-clock.
    """

    steps: int = 0
    images: int = 0
    macs: float = 0.0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = asdict(self), asdict(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})

    def to_json(self) -> dict[str, Any]:
        """Plain values, what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cost:
        """The inverse of `to_json`."""
        return cls(**value)


class Meter:
    """Measures from when it is made, on top of what an interrupted run had cost already.

    Args:
        device: "cpu", or any other kind for the GPU.
        before: the cost at the checkpoint that this run goes on from.
    """

    def __init__(self, device: str, before: Cost | None = None) -> None:
        self.before = before or Cost()
        self.on_cpu = device == "cpu"
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self, *, steps: int = 0, images: int = 0, macs: float = 0.0) -> Cost:
        """The cost so far, given what was done since the meter was made."""
        wall = time.perf_counter() - self._wall
        spent = _cpu_seconds() - self._cpu if self.on_cpu else wall
        return self.before + Cost(steps, images, macs, spent, wall)


def _cpu_seconds() -> float:
    """User and system time of this process, all its threads, and its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
