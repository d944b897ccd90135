"""Diffusion training as a generator: one StepReport per optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import EbdiffError
from ..optim import steps_ema
from ..pruning.modules import refuse_wrapped
from ..seeds import seed_for
from ..timesteps.region import Partition
from ..timesteps.sampler import Sampler
from .arguments import check_channels, check_kinds, check_steps
from .batches import Batch, Batches
from .checkpoint import Checkpoints
from .conditions import Conditions, Told, ask
from .objective import Objective
from .prepared import prepared
from .state import TrainConfig, TrainState

__all__ = ["StepReport", "TrainConfig", "TrainState", "train"]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    Args:
        step: how many steps are finished.
        loss: weighted mean over the step's images and all processes.
        grad_norm: of all gradients together, before clipping.
        lr: of the first parameter group.
        images: images seen so far.
        region: index of the region all timesteps came from, where regions were given.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    images: int
    region: int | None = None


def train(
    state: TrainState,
    images: Tensor,
    *,
    scheduler: Any,
    sampler: Sampler,
    config: TrainConfig,
    until: int,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    regions: Partition | None = None,
    conditions: Conditions | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[StepReport]:
    """Train until ``state.step == until``, yielding after every optimizer and EMA step, before gradients are cleared.

    Data order, flips, noise, timesteps and regions depend on (seed, step) alone and are drawn for all processes
    together, so a run goes on exactly after `TrainState.restore` and sees the same with any number of processes; the
    dropout of each process depends on its number, too. `state` stays the caller's: its model may be shrunken between
    steps.

    Args:
        state: what is trained, in place; moved to the accelerator's device.
        images: uint8 [N, C, H, W], or floats as the model sees them (latents), on the CPU.
        scheduler: diffusers' DDPMScheduler or its like: add_noise, get_velocity and config.prediction_type
            ("epsilon", "v_prediction" or "sample").
        sampler: draws timesteps and weights on that prediction's squared error. One that learns is told each sample's
            after every step, of all processes; it is to be `state.learner`, to be saved with the rest. (What it learns
            is the same for any number of processes as far as the losses are: but for their last digits.)
        config: how to train.
        until: the step to stop at.
        checkpoints: where to write state every `checkpoint_every` steps and at the end, before that step is yielded;
            0: the caller writes there. Errors name the newest.
        regions: let all timesteps of a step come from one region, drawn with the mass that `sampler` gives it; the
            distribution of timesteps over many steps stays that of `sampler`.
        conditions: what the network is told about each of the images, besides x and t: it is called as
            model(x, t, **told).
        accelerator: of accelerate; made here if not given.

    Raises:
        EbdiffError: what does not fit together, by the call itself; later, a loss or gradient that is not finite: that
            step is not applied.
    """
    check_kinds(
        scheduler,
        state=state,
        images=images,
        sampler=sampler,
        config=config,
        checkpoints=checkpoints,
        regions=regions,
        conditions=conditions,
    )
    check_steps(until, checkpoint_every)
    accelerator = accelerator or Accelerator()
    _check_data(images, scheduler, sampler, regions, conditions)
    _check_training(state, config, accelerator)
    check_channels(state.model, images, conditions)
    _check_learner(state, sampler)
    if checkpoint_every and checkpoints is None:
        got = f"checkpoint_every={checkpoint_every} alone"
        raise EbdiffError("checkpoint_every", expected="checkpoints", got=got, remedy="say where: Checkpoints(folder)")
    state.to(accelerator.device)
    every = until if checkpoint_every is None else checkpoint_every
    return _steps(
        state, images, scheduler, sampler, config, until, checkpoints, every, regions, conditions, accelerator
    )


def _steps(
    state: TrainState,
    images: Tensor,
    scheduler: Any,
    sampler: Sampler,
    config: TrainConfig,
    until: int,
    checkpoints: Checkpoints | None,
    checkpoint_every: int,
    regions: Partition | None,
    conditions: Conditions | None,
    accelerator: Accelerator,
) -> Iterator[StepReport]:
    total = config.batch_size * config.accumulate
    batches, objective = Batches(images, sampler, config, regions, conditions), Objective(scheduler)
    network, known, modules, weights = None, None, [], []
    while state.step < until:
        step = state.step
        batch = batches(step)
        backward = partial(_backward, batch, objective, config, step, accelerator)
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        if known is None or known != _shapes(parameters, weights):  # the first step, or shrunken since
            network = prepared(state.model, config, accelerator, backward)
            # Once: looking for them takes as long as small layers do.
            modules, weights = list(network.modules()), list(state.model.parameters())
            known = _shapes(parameters, weights)
        assert network is not None
        if not all(module.training for module in modules):
            network.train()
        _forget_gradients(weights)
        loss, seen = backward(network)
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
        _check_finite(float(loss), float(norm), step + 1, config, checkpoints)
        state.optimizer.step()
        if not steps_ema(state.optimizer, state.ema):
            state.ema.step(state.model.parameters())
        if state.learner is not None:
            for t, per_sample in seen:
                state.learner.update(t, per_sample)
        state.step += 1
        due = checkpoint_every > 0 and (state.step == until or state.step % checkpoint_every == 0)
        if checkpoints is not None and due and accelerator.is_main_process:
            checkpoints.save(state.step, state.tensors(), state.facts())
        lr = float(state.optimizer.param_groups[0]["lr"])
        yield StepReport(state.step, float(loss), float(norm), lr, state.step * total, batch.region)
        _forget_gradients(weights)


def _shapes(*lists: Iterable[Tensor]) -> list[tuple[int, torch.Size]]:
    return [(id(p), p.shape) for parameters in lists for p in parameters]


def _forget_gradients(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        weight.grad = None


def _check_data(
    images: Tensor, scheduler: Any, sampler: Sampler, regions: Partition | None, conditions: Conditions | None
) -> None:
    shaped = images.dim() == 4 and len(images) > 0 and images.device.type == "cpu"
    if not shaped or not (images.dtype == torch.uint8 or _seen_by_a_model(images)):
        raise EbdiffError(
            "images",
            expected="uint8 [N, C, H, W] or floats as the model sees them (latents), on the CPU, N >= 1",
            got=f"{images.dtype} {list(images.shape)} on {images.device}",
            remedy="see ebdiff.data.load_images",
        )
    rows = next(iter(conditions.rows.values()), images) if conditions else images
    if len(rows) != len(images):
        raise EbdiffError("conditions", expected=f"{len(images)} rows, one per image", got=str(len(rows)))
    if sampler.edges is not None:
        remedy = "make it with NoiseProfile.from_scheduler(scheduler)"
        raise EbdiffError("sampler", expected="whole timesteps", got="continuous time", remedy=remedy)
    timesteps = getattr(scheduler.config, "num_train_timesteps", None)
    if timesteps != sampler.T:
        expected = f"{sampler.T} timesteps, the sampler's"
        raise EbdiffError("scheduler", expected=expected, got=str(timesteps), remedy="make them agree")
    if regions is not None and regions.T != sampler.T:
        expected, got = f"regions that tile [0, {sampler.T}), the sampler's timesteps", f"[0, {regions.T})"
        raise EbdiffError("regions", expected=expected, got=got, remedy="make them agree")
    kind, known = getattr(scheduler.config, "prediction_type", None), ("epsilon", "v_prediction", "sample")
    if kind not in known:
        expected = ", ".join(known[:-1]) + f" or {known[-1]}"
        raise EbdiffError("prediction_type", expected=expected, got=str(kind), remedy="use a scheduler like DDPM's")


def _seen_by_a_model(values: Tensor) -> bool:
    """Floats, and not pixels of 0 to 255 that were made floats."""
    return values.is_floating_point() and not (float(values.min()) >= 0 and float(values.max()) > 30)


def _check_training(state: TrainState, config: TrainConfig, accelerator: Accelerator) -> None:
    refuse_wrapped(state.model)
    if config.batch_size % accelerator.num_processes:
        expected, got = f"a multiple of {accelerator.num_processes} processes", str(config.batch_size)
        raise EbdiffError("batch_size", expected=expected, got=got, remedy="change it")
    if accelerator.mixed_precision != "no":  # it would patch the caller's model, and only with several processes
        raise EbdiffError(
            "accelerator",
            expected='mixed_precision "no"',
            got=f'"{accelerator.mixed_precision}"',
            remedy="set the precision in TrainConfig",
        )
    if config.compile == "reduce-overhead" and accelerator.num_processes > 1:
        got, remedy = f"{accelerator.num_processes} processes", "use compile=True"
        raise EbdiffError("compile='reduce-overhead'", expected="one process", got=got, remedy=remedy)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    if not held or not held <= {id(p) for p in state.model.parameters()}:
        raise EbdiffError(
            "optimizer", expected="the model's parameters", got="others", remedy="build it from this model"
        )
    if [s.shape for s in state.ema.shadow_params] != [p.shape for p in state.model.parameters()]:
        raise EbdiffError("ema", expected="the model's shapes", got="others", remedy="build it from this model")


def _check_learner(state: TrainState, sampler: Sampler) -> None:
    if sampler.learner is not state.learner:
        names = ["none" if learner is None else type(learner).__name__ for learner in (sampler.learner, state.learner)]
        raise EbdiffError(
            "a sampler that learns",
            expected=f"the sampler's as state.learner: {names[0]}",
            got=names[1] if names[0] != names[1] else "another one",
            remedy="TrainState.begin(model, config, sampler.learner), before anything is restored",
        )


def _backward(
    batch: Batch, objective: Objective, config: TrainConfig, step: int, accelerator: Accelerator, network: nn.Module
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Accumulate the gradients of one step.

    Returns:
        The mean loss over all micro-batches and processes; (t, each sample's loss) of this process's micro-batches.
    """
    share = config.batch_size // accelerator.num_processes
    losses, seen = [], []
    if config.compile:
        torch.compiler.cudagraph_mark_step_begin()  # what graphs gave in the last step may be written over
    for micro in range(config.accumulate):
        start = micro * config.batch_size + accelerator.process_index * share
        clean, noise, t, weight = batch.part(start, share, accelerator.device)
        last = micro == config.accumulate - 1
        dropout = seed_for(config.seed, "dropout", step, micro, accelerator.process_index)
        with _seeded(dropout, accelerator.device), nullcontext() if last else accelerator.no_sync(network):
            told = batch.told_part(start, share, accelerator.device)
            predicted = _predicted(network, objective.noisy(clean, noise, t), t, told, config.precision)
            loss, per_sample = objective.loss(predicted, clean, noise, t, weight)
            (loss / config.accumulate).backward()
        losses.append(loss.detach())
        seen.append((t, per_sample))
    return accelerator.reduce(torch.stack(losses).mean(), "mean"), seen


def _predicted(network: nn.Module, noisy: Tensor, t: Tensor, told: Told, precision: str) -> Tensor:
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return ask(network, noisy, t, told)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators for dropout, and give the user's back afterwards."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if gpu else []), torch.cuda.device(device) if gpu else nullcontext():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every other GPU of the machine
        if gpu:
            torch.cuda.manual_seed(seed)
        yield


def _check_finite(loss: float, norm: float, step: int, config: TrainConfig, checkpoints: Checkpoints | None) -> None:
    sums = {"loss": loss, "gradient norm": norm}
    bad = next((name for name, value in sums.items() if not abs(value) < float("inf")), None)
    if bad is None:
        return
    good = checkpoints.newest_step() if checkpoints is not None else None
    remedies = ["lower lr"]
    remedies += ["set grad_clip (1.0 is usual)"] if config.grad_clip is None else []
    remedies += ['train in float32 (precision "no")'] if config.precision != "no" else []
    kept = f"; the checkpoint of step {good} is whole" if good is not None else ""
    raise EbdiffError(
        f"training stopped at step {step}",
        expected=f"a finite {bad}",
        got=str(sums[bad]),
        remedy=" or ".join(remedies) + kept,
    )
