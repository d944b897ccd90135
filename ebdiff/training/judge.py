"""Both arms judged at the same marks: held-out loss per timestep bin, and scores of images from the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import to_uint8
from ..errors import EbdiffError
from ..evaluation import evaluate, likeness, loss_per_bin
from ..files import write_json, write_tensors
from ..nn.router import TimestepRouter
from ..pruning.save import load
from ..pruning.shrink import shrinks_of
from .accounting import Meter
from .conditions import LOW_RES, Asked
from .costs import training_cost
from .pretrained import refuse_pipeline
from .regions import region_folder
from .sampling import draw_images, drawn_about, passes
from .stages import Tick, Work, needed
from .stretch import network_at
from .world import World

__all__ = [
    "ARMS",
    "arm_network",
    "arms_of",
    "judge",
    "judged",
    "judgement",
    "judging",
    "judging_one",
    "macs_per_image",
    "saved_network",
]

ARMS = ("tickets", "dense")


def arms_of(world: World) -> tuple[str, ...]:
    """The arms that the main job trains and judges."""
    return ARMS if world.config.evaluate.control else ARMS[:1]


def judging(world: World, region_macs: list[float]) -> list[Work]:
    """The work of judging: forward passes only."""
    e, T = world.config.evaluate, world.partition.T
    mean = {
        "dense": world.plan.macs(),
        "tickets": sum(m * len(r) / T for m, r in zip(region_macs, world.partition, strict=True)),
    }
    works = []
    for mark in e.marks:
        for arm in arms_of(world):
            macs = mean[arm] if mark else world.plan.macs()
            images = _images(world, mark)
            total = macs * (e.loss_bins * e.loss_per_bin + images * world.config.sample.steps * passes(world))
            works.append(Work(_name(arm, mark), total, note=f"{images} images" if images else "held-out loss"))
    return works


def judging_one(world: World, network: Any) -> Work:
    """The work of judging one network."""
    e, macs = world.config.evaluate, macs_per_image(world, network)
    images = _images(world, 1.0)
    total = macs["uniform"] * e.loss_bins * e.loss_per_bin + macs["sampler"] * images * world.config.sample.steps
    return Work("judge", total, note=f"{images} images by {world.config.sample.steps} steps, and the held-out loss")


def judge(world: World, arm: str, mark: float) -> Iterator[Tick]:
    """Judge one arm at one mark; the result is evaluation/<arm>-<mark>.json. At once where that exists."""
    name, path = _name(arm, mark), judged(world.out, arm, mark)
    if path.exists():
        yield Tick(name, 0, "already there", before=True)
        return
    facts: dict[str, Any] = {"arm": arm, "mark": mark, "training_cost": training_cost(world, arm, mark).to_json()}
    images: list[Tensor] = []
    for tick in judgement(world, arm_network(world, arm, mark), name, _images(world, mark), facts, images):
        yield replace(tick, kept=False)
    if images:
        write_tensors(path.with_suffix(".safetensors"), {"grid": _grid(world, torch.cat(images))})
    write_json(path, facts)
    yield Tick(name, 0, "judged")


def judgement(
    world: World, network: Any, name: str, count: int, facts: dict[str, Any], images: list[Tensor]
) -> Iterator[Tick]:
    """Judge any network, leaving what was found in `facts` and the images in `images`.

    Args:
        network: network(x, t), with what it is told.
        name: of the stage, for the ticks.
        count: how many images to draw and score; 0 for the held-out loss alone.
    """
    e, meter, network = world.config.evaluate, Meter(world.device.type), network.to(world.device)
    profile = loss_per_bin(
        Asked(network),
        world.data.test,
        world.scheduler,
        bins=e.loss_bins,
        per_bin=e.loss_per_bin,
        seed=world.config.seed,
        told=world.held_out_conditions.of,
    )
    macs = macs_per_image(world, network)
    yield Tick(name, macs["uniform"] * e.loss_bins * e.loss_per_bin, f"held-out loss {profile.total:.4f}")
    about = drawn_about(world, count, world.config.seed)
    for batch in draw_images(world, network, about, world.config.seed):
        images.append(batch)
        yield Tick(name, macs["sampler"] * world.config.sample.steps * len(batch), "drawing images")
    scores = None
    if images and world.extractor is not None:
        scores = asdict(evaluate(world.held_out, torch.cat(images), world.extractor))
    if images and LOW_RES in world.told_about(about[:1]):
        facts["likeness"] = _likeness(world, about, torch.cat(images))
    loss = {**asdict(profile), "total": profile.total}
    facts |= {"loss": loss, "scores": scores, "macs_per_image": macs, "cost": meter.read().to_json()}


def _grid(world: World, images: Tensor) -> Tensor:
    """The first images, by label where they have one."""
    about = drawn_about(world, min(len(images), world.config.sample.grid), world.config.seed)
    labels = world.told_about(about).get("class_labels")
    return images[: len(about)] if labels is None else images[labels.argsort(stable=True)]


def _likeness(world: World, about: Tensor, images: Tensor) -> dict[str, dict[str, float]]:
    """How like the held-out images those drawn are, and those of low resolution, scaled up again."""
    shown = {"drawn": images, "low_res": to_uint8(world.told_about(about)[LOW_RES])}
    return {name: likeness(world.data.test[about], each) for name, each in shown.items()}


def judged(out: Path, arm: str, mark: float) -> Path:
    """Where the result is."""
    return out / "evaluation" / f"{arm}-{mark:g}.json"


def _images(world: World, mark: float) -> int:
    """How many images are drawn at this mark. Without an extractor, for the grid only, at the end."""
    e = world.config.evaluate
    if mark not in e.score_marks:
        return 0
    if e.extractor == "none":
        return world.config.sample.grid if mark == 1 else 0
    return e.samples


def _name(arm: str, mark: float) -> str:
    return f"judge {arm} at {mark:g}"


def arm_network(world: World, arm: str, mark: float = 1.0) -> Any:
    """The network of an arm at a mark, with EMA weights: a router over the regions, the search's, or the control's.

    Raises:
        EbdiffError: no such arm, or it is not trained yet.
    """
    if arm not in ARMS:
        raise EbdiffError("--arm", expected=" or ".join(ARMS), got=arm, remedy="choose one")
    if arm not in arms_of(world):
        raise EbdiffError("no dense control", expected="evaluate.control=true", got="false", remedy="use --arm tickets")
    if arm == "dense":
        needed(world.out / "dense", "ebdiff run")
        return load(network_at(world.out / "dense", mark))
    if mark == 0:
        needed(world.out / "search", "ebdiff find")
        return load(network_at(world.out / "search", mark))
    networks = []
    for number in range(len(world.partition)):
        needed(region_folder(world.out, number), f"ebdiff train --region {number}")
        networks.append(load(network_at(region_folder(world.out, number), mark)))
    return TimestepRouter(world.partition, networks)


def saved_network(world: World, folder: Path) -> Any:
    """Any saved network, to be judged on the images of this run.

    Raises:
        EbdiffError: the folder holds none, or one whose config has other channels.
    """
    refuse_pipeline(folder)
    network = load(folder).float()
    got = getattr(getattr(network, "config", None), "in_channels", None)
    by = world.config.conditional.by if world.config.conditional else None
    wanted = world.image_shape[0] * (2 if by == LOW_RES else 1)
    if got not in (None, wanted):
        expected, remedy = f"{wanted} channels in, those of this run", "pass a network for such images"
        raise EbdiffError(f"the network in {folder}", expected=expected, got=str(got), remedy=remedy)
    return network


def macs_per_image(world: World, network: Any) -> dict[str, float]:
    """MACs of an image: of a forward pass, averaged over all timesteps ("uniform"), and of a step of the sampler."""
    if not isinstance(network, TimestepRouter):
        return {"uniform": _macs(world, network), "sampler": _macs(world, network) * passes(world)}
    each = torch.tensor([_macs(world, net) for net in network.nets], dtype=torch.float64)
    sizes = torch.tensor([len(region) for region in network.partition], dtype=torch.float64)
    visited = network.partition.of_t(torch.as_tensor(world.sampling_scheduler().timesteps))
    return {
        "uniform": float((each * sizes / sizes.sum()).sum()),
        "sampler": float(each[visited].mean()) * passes(world),
    }


def _macs(world: World, network: Any) -> float:
    """Of one image's forward pass. A network shrunken twice knows its last mask in the plan of the first shrink."""
    masks = shrinks_of(network)
    return masks[-1].plan.macs(masks[-1]) if masks else world.plan.macs()
