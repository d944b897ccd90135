"""The dense runs: the search that tickets are drawn from, and the control that gets equal MACs."""

from __future__ import annotations

from .costs import cost_at
from .drawing import conclude, watcher
from .stretch import Stretch, cost_per_step, dense_state
from .world import World

__all__ = ["control", "control_steps", "search"]


def search(world: World) -> Stretch:
    """One dense run serves all regions: each step's timesteps come from one of them, in the proportion of their mass.

    At the end, what has not settled is drawn anyway and marked so.
    """
    return Stretch(
        name="search",
        folder=world.out / "search",
        macs=world.plan.macs(),
        steps=world.config.search.steps,
        sampler=world.sampler,
        seed=world.config.seed,
        start=lambda: dense_state(world),
        marks={0.0: world.config.search.steps},
        regions=world.partition,
        watch=lambda state: watcher(world, state),
        conclude=lambda state, watch: conclude(world, state, watch),
        until_settled=world.config.search.until == "settled",
    )


def control(world: World) -> Stretch:
    """The dense control: same first weights and seed, all timesteps, as many MACs as search and regions together."""
    steps = {share: control_steps(world, share) for share in world.config.evaluate.marks}
    return Stretch(
        name="dense control",
        folder=world.out / "dense",
        macs=world.plan.macs(),
        steps=steps[1.0],
        sampler=world.sampler,
        seed=world.config.seed,
        start=lambda: dense_state(world),
        marks=steps,
    )


def control_steps(world: World, share: float) -> int:
    """Dense steps that cost what the search, the joint stage and this share of the regions' training cost, in MACs."""
    return round(cost_at(world, share).macs / cost_per_step(world, world.plan.macs()))
