"""What `accelerate` has done, and what not, for a person to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What `ebdiff.accelerate` has done. str() of it is what is printed.

    Args:
        fused: {module: its norms that run as one operator with their SiLU}.
        left: {norm: why it stays as it was}.
        optimizer: what became of the optimizer; empty where none was given.
        memory_format: what became of the memory format, and why.
        kinds: {class: how many norms its instances fuse}.
        kernels: on which of its devices there is none, so that norms run as they were; empty where all is well.
        modulated: how many norms in `fused` have scale or shift in between. They run as one operator in calls where
            these are one number per channel, and as they were in others.
    """

    fused: dict[str, tuple[str, ...]]
    left: dict[str, str]
    optimizer: str = ""
    memory_format: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    kernels: str = ""
    modulated: int = 0

    @property
    def norms(self) -> int:
        """How many group norms are fused with their SiLU."""
        return sum(map(len, self.fused.values()))

    def __str__(self) -> str:
        lines = [f"GroupNorm + SiLU as one operator: {self.norms} of {self.norms + len(self.left)} group norms"]
        lines += [f"  {count:4d} in {kind}" for kind, count in self.kinds.items()]
        if self.modulated:
            condition = "where scale and shift, if there are any, are one number per channel"
            lines.append(f"  {self.modulated:4d} of them {condition}")
        if not self.norms and not self.left:
            lines = ["GroupNorm + SiLU as one operator: this model has no group norm"]
        if self.left:
            lines.append("left as they were:")
        for why, count in Counter(self.left.values()).most_common():
            names = [name for name, reason in self.left.items() if reason == why]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"  {count:4d} {why}: {shown}")
        lines += [f"{what}: {value}" for what, value in self._others() if value]
        return "\n".join(lines)

    def _others(self) -> list[tuple[str, str]]:
        return [("kernels", self.kernels), ("memory format", self.memory_format), ("optimizer", self.optimizer)]
