"""What each arm had cost by a mark: all that its networks needed up to there, the search included."""

from __future__ import annotations

from .accounting import Cost
from .regions import region_folder
from .stages import needed
from .stretch import cost_of
from .world import World

__all__ = ["cost_at", "stages_at", "training_cost"]


def stages_at(world: World, mark: float) -> dict[str, Cost]:
    """{stage: its cost} of the tickets: the search, above mark 0 the joint stage and this share of every region's.

    Raises:
        EbdiffError: a stage is not finished.
    """
    stages = {"search": Cost.from_json(needed(world.out / "search", "ebdiff find")["cost"])}
    if not mark:
        return stages
    if world.config.regions.branch_at:
        stages["joint"] = Cost.from_json(needed(world.out / "joint", "ebdiff run")["cost"])
    for number in range(len(world.partition)):
        folder = region_folder(world.out, number)
        needed(folder, f"ebdiff train --region {number}")
        stages[f"region {number}"] = cost_of(folder, mark)
    return stages


def cost_at(world: World, mark: float) -> Cost:
    """Of all these stages together.

    Raises:
        EbdiffError: a stage is not finished.
    """
    return sum(stages_at(world, mark).values(), Cost())


def training_cost(world: World, arm: str, mark: float) -> Cost:
    """Of the tickets or of the dense control."""
    return cost_of(world.out / "dense", mark) if arm == "dense" else cost_at(world, mark)
