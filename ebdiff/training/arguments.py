"""What `ebdiff.train` is handed: of the right kinds, and images with the channels that the network takes."""

from __future__ import annotations

from math import isnan
from typing import Any

from torch import Tensor, nn

from ..errors import EbdiffError
from ..numbers import as_real, as_whole
from ..timesteps.region import Partition
from ..timesteps.sampler import Sampler
from .checkpoint import Checkpoints
from .conditions import Conditions
from .state import TrainConfig, TrainState

__all__ = ["check_channels", "check_kinds", "check_steps"]

_KINDS: dict[str, tuple[type, str]] = {  # and how one is made
    "state": (TrainState, "TrainState.begin(model, config)"),
    "images": (Tensor, "torch.from_numpy, or ebdiff.data.load_images"),
    "sampler": (Sampler, "ebdiff.Uniform(1000), or another of ebdiff.timesteps"),
    "config": (TrainConfig, "TrainConfig(batch_size=64)"),
    "checkpoints": (Checkpoints, "Checkpoints(folder)"),
    "regions": (Partition, "ebdiff.Partition(0, 500, 1000)"),
    "conditions": (Conditions, "Conditions.of_labels(labels, classes)"),
}
_OPTIONAL = ("checkpoints", "regions", "conditions")


def check_kinds(scheduler: Any, **given: Any) -> None:
    """Refuse objects of other kinds: lists, paths, arrays.

    Args:
        scheduler: anything with a `config`.
        given: the others, by the names that `ebdiff.train` gives them.

    Raises:
        EbdiffError: the first that is none.
    """
    for name, value in given.items():
        kind, remedy = _KINDS[name]
        if not isinstance(value, kind) and not (value is None and name in _OPTIONAL):
            got = type(value).__name__
            raise EbdiffError(name, expected=f"a {kind.__name__}", got=got, remedy=f"make one: {remedy}")
    if not hasattr(scheduler, "config"):
        expected, got = "a scheduler of diffusers, or its like, with a config", type(scheduler).__name__
        raise EbdiffError("scheduler", expected=expected, got=got, remedy="make one: DDPMScheduler(1000)")


def check_steps(until: Any, checkpoint_every: Any) -> None:
    """Refuse what is no number of steps.

    Raises:
        EbdiffError: `until` is none, or `checkpoint_every` is neither None nor a whole number of at least 0.
    """
    steps = as_real(until)
    if steps is None or isnan(steps):
        raise EbdiffError("until", expected="a number of steps", got=repr(until), remedy="say at which step to stop")
    every = 0 if checkpoint_every is None else as_whole(checkpoint_every)
    if every is None or every < 0:
        expected, remedy = "a whole number of steps, 0 for none", "leave it out to write at the end only"
        raise EbdiffError("checkpoint_every", expected=expected, got=repr(checkpoint_every), remedy=remedy)


def check_channels(model: nn.Module, images: Tensor, conditions: Conditions | None) -> None:
    """Refuse images of other channels than a network of diffusers takes.

    A forward, or a hook before it or before its first layer, may add channels, so such a network is not judged.

    Raises:
        EbdiffError: its first layer, or else its config, has other `in_channels`.
    """
    wanted = getattr(getattr(model, "config", None), "in_channels", None)
    wanted = getattr(getattr(model, "conv_in", None), "in_channels", wanted)  # it may have been replaced
    hooked = any(getattr(part, "_forward_pre_hooks", ()) for part in (model, getattr(model, "conv_in", None)))
    plain = str(model.forward.__module__).startswith("diffusers.") and not hooked
    beside = conditions is not None and conditions.factor > 1
    channels = images.shape[1]
    if plain and isinstance(wanted, int) and wanted != channels * (2 if beside else 1):
        got = f"{channels} and as many of their low resolution" if beside else str(channels)
        remedy = "build the network for these images, or convert them"
        raise EbdiffError("images", expected=f"{wanted} channels, the network's", got=got, remedy=remedy)
