"""Which ratio each channel space is asked for: by its name, a pattern, or the layers that make it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from ..errors import EbdiffError
from .plan import ChannelPlan, ChannelSpace

__all__ = ["ratios_by_space"]

REST = "*"


def ratios_by_space(plan: ChannelPlan, spaces: Sequence[ChannelSpace], asked: Mapping[str, float]) -> dict[str, float]:
    """{space name: share removed}, for every space; 0 where nothing is asked.

    Args:
        plan: the plan of the spaces.
        spaces: those that may shrink.
        asked: by key. A key is a space's name; a pattern of such names ("*.to_q.head"); or the name of a module
            ("down_blocks.1"), which stands for every space that one of its layers makes. "*" is for all spaces that
            no other key matches.

    Raises:
        EbdiffError: a key that matches nothing, or two that ask different ratios of one space, as they do when they
            name layers that can only shrink together.
    """
    keys: dict[str, list[str]] = {space.name: [] for space in spaces}
    for key in asked:
        matched = [space.name for space in spaces if key != REST and _matches(plan, space, key)]
        for name in matched:
            keys[name].append(key)
        if not matched and key != REST:
            raise EbdiffError(
                f"ratio of {key!r}",
                expected="the name of a prunable space or of a module that makes one, or a pattern",
                got="nothing of that name",
                remedy="print(plan) lists the spaces, and what is frozen and why",
            )
    for name, found in keys.items():
        if len({asked[key] for key in found}) > 1:
            raise EbdiffError(
                "contradictory ratios",
                expected=f"one ratio for {name}, whose layers can only shrink together",
                got=", ".join(f"{asked[key]:g} by {key!r}" for key in found),
                remedy="give these the same ratio",
            )
    return {name: asked[found[0]] if found else asked.get(REST, 0.0) for name, found in keys.items()}


def _matches(plan: ChannelPlan, space: ChannelSpace, key: str) -> bool:
    if fnmatchcase(space.name, key):
        return True
    return any(parameter.startswith(f"{key}.") for parameter in _made_by(plan, space))


def _made_by(plan: ChannelPlan, space: ChannelSpace) -> Iterator[str]:
    """The weights that make a space: their bias follows it, or, where they have none, the dimension they make."""
    following = {member.parameter for member in space.members}
    for member in space.members:
        bias = f"{member.parameter.removesuffix('weight')}bias"
        makes = bias in following if bias in plan.shapes else member.dim == (member.parameter in plan.transposed)
        if makes and len(plan.shapes[member.parameter]) > 1:
            yield member.parameter
