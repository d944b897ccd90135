"""What each arm had cost by a mark: all that its networks needed up to there, the search included."""

from __future__ import annotations

from .accounting import Cost
from .regions import region_folder
from .stages import needed
from .stretch import cost_of
from .world import World

__all__ = ["cost_at", "training_cost"]


def cost_at(world: World, mark: float) -> Cost:
    """Of the tickets: the search, and above mark 0 the joint stage and this share of every region's training.

    Raises:
        EbdiffError: a stage is not finished.
    """
    cost = Cost.from_json(needed(world.out / "search", "ebdiff find")["cost"])
    if not mark:
        return cost
    if world.config.regions.branch_at:
        cost += Cost.from_json(needed(world.out / "joint", "ebdiff run")["cost"])
    for number in range(len(world.partition)):
        folder = region_folder(world.out, number)
        needed(folder, f"ebdiff train --region {number}")
        cost += cost_of(folder, mark)
    return cost


def training_cost(world: World, arm: str, mark: float) -> Cost:
    """Of the tickets or of the dense control."""
    return cost_of(world.out / "dense", mark) if arm == "dense" else cost_at(world, mark)
