"""Early-bird tickets for diffusion models: find them early, shrink physically, train each timestep region small.

The names below are the whole public interface. They are resolved on first use, so that `import ebdiff` loads neither
diffusers nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nn as nn
    from . import ops as ops
    from . import optim as optim
    from . import timesteps as timesteps
    from .errors import EbdiffError as EbdiffError
    from .nn.replace import accelerate as accelerate
    from .nn.replace import restore as restore
    from .nn.router import TimestepRouter as TimestepRouter
    from .pruning.importance import importance as importance
    from .pruning.mask import ChannelMask as ChannelMask
    from .pruning.mask import distance as distance
    from .pruning.masked import masked as masked
    from .pruning.plan import ChannelPlan as ChannelPlan
    from .pruning.save import load as load
    from .pruning.save import save as save
    from .pruning.shrink import shrink as shrink
    from .pruning.shrink import shrink_ as shrink_
    from .pruning.trace import trace as trace
    from .tickets.early_bird import EarlyBird as EarlyBird
    from .tickets.history import MaskHistory as MaskHistory
    from .tickets.ticket import Ticket as Ticket
    from .timesteps.profile import NoiseProfile as NoiseProfile
    from .timesteps.region import Partition as Partition
    from .timesteps.region import Region as Region
    from .timesteps.sampler import Stratified as Stratified
    from .timesteps.sampler import Uniform as Uniform
    from .timesteps.sampler import Within as Within
    from .timesteps.speed import SpeeD as SpeeD
    from .training.loop import StepReport as StepReport
    from .training.loop import train as train

__version__ = "0.1.0"

_HOME = {
    "EbdiffError": "errors",
    "accelerate": "nn.replace",
    "restore": "nn.replace",
    "TimestepRouter": "nn.router",
    "ChannelMask": "pruning.mask",
    "ChannelPlan": "pruning.plan",
    "distance": "pruning.mask",
    "importance": "pruning.importance",
    "load": "pruning.save",
    "masked": "pruning.masked",
    "nn": "nn",  # rooms: ebdiff.nn.GroupNormSiLU, ebdiff.ops.group_norm_silu, ebdiff.optim.AdamW
    "ops": "ops",
    "optim": "optim",
    "save": "pruning.save",
    "shrink": "pruning.shrink",
    "shrink_": "pruning.shrink",
    "trace": "pruning.trace",
    "EarlyBird": "tickets.early_bird",
    "MaskHistory": "tickets.history",
    "Ticket": "tickets.ticket",
    "NoiseProfile": "timesteps.profile",
    "Partition": "timesteps.region",
    "Region": "timesteps.region",
    "Stratified": "timesteps.sampler",
    "Uniform": "timesteps.sampler",
    "Within": "timesteps.sampler",
    "SpeeD": "timesteps.speed",
    "timesteps": "timesteps",
    "StepReport": "training.loop",
    "train": "training.loop",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        home = import_module(f".{_HOME[name]}", __name__)
        value = home if _HOME[name] == name else getattr(home, name)
    elif name.startswith("Shrunk"):  # ebdiff.ShrunkUNet2DModel and its like: made on demand from the diffusers class
        from .pruning.save import shrunk_class_named

        value = shrunk_class_named(name)
    elif name == "ModelMixin":  # not public: diffusers' loader looks for it in the module of a pipeline's part
        value = import_module("diffusers").ModelMixin
    else:
        raise AttributeError(f"module 'ebdiff' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
