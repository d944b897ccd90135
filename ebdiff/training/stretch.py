"""One stretch of training in its folder: resumed at its newest checkpoint, networks kept at marks, costs counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from torch import nn

from ..files import read_json, write_json
from ..pruning.save import save
from ..timesteps.region import Partition
from ..timesteps.sampler import Sampler
from .accounting import FORWARD_AND_BACKWARD, Cost, Meter
from .checkpoint import Checkpoints, Saved
from .log import StepLog
from .loop import StepReport, TrainConfig, TrainState, train
from .stages import Tick, done, finish, locked, write_folder
from .world import World

__all__ = [
    "Conclusion",
    "Stretch",
    "Watch",
    "begun",
    "cost_of",
    "cost_per_step",
    "dense_state",
    "network_at",
    "restore",
]

Facts = dict[str, Any]


class Watch(Protocol):
    """What looks at every step of a search, an `EarlyBird` or an `AttentionWatch`."""

    @property
    def settled(self) -> bool: ...
    def step(self, region: int | None = None) -> None: ...
    def state_dict(self) -> dict[str, dict[str, Any]]: ...
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None: ...


class Conclusion(NamedTuple):
    """Facts to leave, and what it took to find them, but for the seconds of this process."""

    facts: Facts
    cost: Cost = Cost()


@dataclass(frozen=True)
class Stretch:
    """What to train, and where.

    Args:
        name: of the stage.
        folder: where everything goes.
        macs: of one image's forward pass.
        steps: how many to take; 0 leaves what was started from.
        sampler: which timesteps.
        seed: of data order, noise and timesteps.
        start: makes the state that the first step starts from.
        marks: {share: steps}: after so many steps the EMA network is kept under this name.
        regions: let all timesteps of a step come from one of these.
        watch: makes what watches for tickets.
        conclude: what to leave at the end, found in ticks of its own; called with the state then, and what watched.
        until_settled: end earlier, as soon as what watches says that all has settled.
        resumable: leave checkpoints.
    """

    name: str
    folder: Path
    macs: float
    steps: int
    sampler: Sampler
    seed: int
    start: Callable[[], TrainState]
    marks: Mapping[float, int]
    regions: Partition | None = None
    watch: Callable[[TrainState], Watch | None] | None = None
    conclude: Callable[[TrainState, Watch | None], Generator[Tick, None, Conclusion]] | None = None
    facts: Facts = field(default_factory=dict)
    until_settled: bool = False
    resumable: bool = True

    def run(self, world: World) -> Iterator[Tick]:
        """Train to the end, yielding after every step; at once where it is finished already.

        Closed before the end, it leaves a checkpoint of where it is, if it is `resumable`.
        """
        per_step = cost_per_step(world, self.macs)
        with locked(self.folder):
            if done(self.folder):
                yield Tick(self.name, per_step * self.steps, "already there", before=True)
                return
            yield from self._train(world, per_step)

    def _train(self, world: World, per_step: float) -> Iterator[Tick]:
        checkpoints = Checkpoints(self.folder / "checkpoints")
        before, state = Cost(), self.start()
        first, watch = state.step, self.watch(state) if self.watch else None
        saved = checkpoints.newest()
        if saved is not None:
            before = restore(saved, state, watch)
            yield Tick(self.name, per_step * (state.step - first), f"resumed at step {state.step}", before=True)
        meter, begun = Meter(world.device.type, before), state.step

        def cost(step: int) -> Cost:
            images = (step - begun) * world.config.train.batch_size * world.config.train.accumulate
            return meter.read(steps=step - begun, images=images, macs=(step - begun) * per_step)

        def over() -> bool:
            settled = self.until_settled and watch is not None and watch.settled
            return state.step - first == self.steps or settled

        def keep() -> None:
            taken = state.step - first
            for share, steps in self.marks.items():
                if taken == steps or (steps == self.steps and over()):
                    keep_network(self.folder, share, state, cost(state.step))
            if over() or (taken and taken % world.config.train.checkpoint_every == 0):
                leave()

        def leave() -> None:
            if self.resumable:
                store(checkpoints, state, watch, cost(state.step))

        if saved is None:
            keep()
        with StepLog(self.folder, begun, world.config.train.log_every) as log:
            for report in () if over() else self._steps(world, state, first + self.steps, checkpoints):
                if watch is not None:
                    watch.step(report.region)
                keep()
                log.add(report, cost(report.step).device_seconds)
                try:
                    yield Tick(self.name, per_step, f"step {report.step}, loss {report.loss:.4f}")
                except GeneratorExit:
                    leave()
                    raise
                if over():
                    break
        if state.step - first < self.steps:
            yield Tick(self.name, per_step * (first + self.steps - state.step), f"settled at step {state.step}", True)
        conclusion = (yield from self.conclude(state, watch)) if self.conclude else Conclusion({})
        total = cost(state.step) + conclusion.cost
        finish(self.folder, {**self.facts, **conclusion.facts, "cost": total.to_json()})

    def _steps(self, world: World, state: TrainState, until: int, checkpoints: Checkpoints) -> Iterator[StepReport]:
        return train(
            state,
            world.data.train,
            scheduler=world.scheduler,
            sampler=self.sampler,
            config=train_config(world, self.seed),
            until=until,
            checkpoints=checkpoints,
            checkpoint_every=0,  # written here, with what watches: see `store`
            regions=self.regions,
            conditions=world.conditions,
            accelerator=Accelerator(cpu=world.device.type == "cpu"),
        )


def dense_state(world: World) -> TrainState:
    """The dense network before its first step, with its optimizer and EMA, on the run's device."""
    return begun(world, world.network())


def begun(world: World, network: nn.Module) -> TrainState:
    """A network before its first step, with its optimizer and EMA, on the run's device."""
    state = TrainState.begin(network, train_config(world, world.config.seed))
    state.to(world.device)
    return state


def train_config(world: World, seed: int) -> TrainConfig:
    """The configuration's `train` section as the loop takes it."""
    t = world.config.train
    return TrainConfig(
        batch_size=t.batch_size,
        lr=t.lr,
        betas=t.betas,
        weight_decay=t.weight_decay,
        grad_clip=t.grad_clip,
        accumulate=t.accumulate,
        ema_decay=t.ema_decay,
        precision=t.precision,
        seed=seed,
        flip=t.flip,
        channels_last=t.channels_last,
        accelerate=t.accelerate,
        compile=t.compile,
    )


def cost_per_step(world: World, macs: float) -> float:
    """MACs of one optimizer step of a network whose forward pass takes `macs` per image."""
    t = world.config.train
    return macs * FORWARD_AND_BACKWARD * t.batch_size * t.accumulate


def store(checkpoints: Checkpoints, state: TrainState, watch: Watch | None, cost: Cost) -> None:
    """Save everything that going on exactly needs, and what it cost so far."""
    tensors, facts = dict(state.tensors()), {"state": state.facts(), "cost": cost.to_json()}
    if watch is not None:
        watched = watch.state_dict()
        tensors |= {_WATCH + name: tensor for name, tensor in watched["tensors"].items()}
        facts["watch"] = watched["facts"]
    checkpoints.save(state.step, tensors, facts)


def restore(saved: Saved, state: TrainState, watch: Watch | None = None) -> Cost:
    """Go on from what `store` saved; returns the cost up to there."""
    own = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(_WATCH)}
    state.restore(Saved(saved.step, own, saved.facts["state"]))
    if watch is not None:
        watched = {name.removeprefix(_WATCH): t for name, t in saved.tensors.items() if name.startswith(_WATCH)}
        watch.load_state_dict({"tensors": watched, "facts": saved.facts["watch"]})
    return Cost.from_json(saved.facts["cost"])


_WATCH = "watch."


def keep_network(folder: Path, share: float, state: TrainState, cost: Cost) -> None:
    """Keep the network with its EMA weights under nets/<share>, and beside it what it had cost."""

    def write(where: Path) -> None:
        network = copy.deepcopy(state.model)
        network.requires_grad_(True)
        state.ema.copy_to(network.parameters())
        save(network.eval(), where)
        write_json(where / "cost.json", cost.to_json())

    (folder / "nets").mkdir(parents=True, exist_ok=True)
    write_folder(network_at(folder, share), write)


def network_at(folder: Path, share: float) -> Path:
    """Where a stage keeps its network of this mark."""
    return folder / "nets" / f"{share:g}"


def cost_of(folder: Path, share: float) -> Cost:
    """What the network of this mark had cost its own stage."""
    return Cost.from_json(read_json(network_at(folder, share) / "cost.json"))
