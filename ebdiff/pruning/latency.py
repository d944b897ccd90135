"""How long a training step of a shrunken network takes, measured: the budget that a clock, not a formula, sets."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import EbdiffError
from ..numbers import as_whole
from .mask import ChannelMask
from .shrink import shrink

__all__ = ["Latency"]


class Latency:
    """Measures forward and backward of shrunken networks against the dense one.

    ``latency(mask)`` is the time of the shrunken network's step as a share of the dense network's. The two take turns,
    so that a machine that grows slower or faster meanwhile slows both. Copies do, so that nothing of the model changes,
    no running statistics and no hooks of parameters, and no random number is used up. For
    `ChannelMask.draw(latency=...)`, or alone.

    Args:
        model: the dense network, on the device and in the dtype, memory format and mode that it will train in.
        args, kwargs: what its forward takes, at the batch size that it will train with.
        rounds: steps of each network that are timed; the median counts.

    Raises:
        EbdiffError: rounds below 1, or nothing in the output that a gradient could come from.
    """

    def __init__(self, model: nn.Module, *args: Any, rounds: int = 5, **kwargs: Any) -> None:
        if (as_whole(rounds) or 0) < 1:
            raise EbdiffError("rounds", expected="a whole number, at least 1", got=repr(rounds), remedy="e.g. rounds=5")
        self.model, self.rounds = model, rounds
        self.args, self.kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def __call__(self, mask: ChannelMask) -> float:
        """Time of a step of ``shrink(model, mask)``, as a share of the dense step's."""
        nets = shrink(self.model, ChannelMask(mask.plan, {})), shrink(self.model, mask)  # both are copies
        times: list[list[float]] = [[], []]
        gpu = _device(self.model).type == "cuda"
        with torch.random.fork_rng([_device(self.model)] if gpu else []):
            for turn in range(-1, self.rounds):  # the first turn warms up
                for net, taken in zip(nets, times, strict=True):
                    seconds = self._step(net)
                    if turn >= 0:
                        taken.append(seconds)
        return statistics.median(times[1]) / statistics.median(times[0])

    def _step(self, net: nn.Module) -> float:
        net.zero_grad(set_to_none=True)
        wait = _wait(net)
        wait()
        start = perf_counter()
        with torch.enable_grad():
            loss = sum(t.float().square().mean() for t in _trained(net(*self.args, **self.kwargs)))
            if not isinstance(loss, Tensor):
                raise EbdiffError(
                    f"cannot time a training step of {type(net).__name__}",
                    expected="an output with a gradient",
                    got="none",
                    remedy="leave some parameters with requires_grad=True",
                )
            loss.backward()
        wait()
        return perf_counter() - start


def _wait(net: nn.Module) -> Callable[[], object]:
    device = _device(net)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _device(net: nn.Module) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def _trained(output: Any) -> list[Tensor]:
    """Every tensor of an output that has a gradient."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _trained(part)] if isinstance(output, list | tuple) else []
