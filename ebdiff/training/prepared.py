"""The network as the loop calls it: laid out, accelerated, compiled, distributed; parameters keep their names."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import EbdiffError
from ..nn.replace import accelerate
from ..nn.replace.layout import to_channels_last
from .state import TrainConfig

__all__ = ["compiled", "prepared"]

# Relative difference of all gradients together that rounding can make: 1e-6 in float32, 1e-3 in tf32, 1e-2 in bf16.
ALLOWED = {"no": 1e-2, "bf16": 1e-1}
_CAN_ISOLATE = "isolate_recompiles" in signature(torch.compile).parameters  # not yet in torch 2.11
_DROPOUT = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d


def prepared(
    model: nn.Module, config: TrainConfig, accelerator: Accelerator, backward: Callable[[nn.Module], object]
) -> nn.Module:
    """What to call instead of `model`, whose parameters it shares.

    Args:
        model: on its device.
        config: how to train.
        accelerator: of the loop.
        backward: adds the gradients of the coming step to those of the parameters, by the network it is given.

    Raises:
        EbdiffError: compiled, the network has other gradients.
    """
    if config.accelerate:
        accelerate(model, channels_last=config.channels_last, verbose=False)
    elif config.channels_last:
        to_channels_last(model, True)
    network = model
    if config.compile:
        network = compiled(model, config.compile)
        _check_gradients(model, network, config.precision, accelerator, backward)
    return accelerator.prepare_model(network) if accelerator.num_processes > 1 else network


def compiled(model: nn.Module, how: bool | str) -> Any:
    """torch.compile with random numbers from torch's own generators, which the loop seeds.

    Args:
        how: True, or "reduce-overhead" for CUDA graphs, too.
    """
    options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": how == "reduce-overhead"}
    if next(model.parameters()).device.type == "cpu":  # else torch 2.13 loses gradients behind a nearest upsampling
        options["layout_optimization"] = False
    # Else networks of one class count together, and the ninth of a run is not compiled.
    apart: dict[str, Any] = {"isolate_recompiles": True} if _CAN_ISOLATE else {}
    return torch.compile(model, dynamic=False, options=options, **apart)


def _check_gradients(
    model: nn.Module,
    network: nn.Module,
    precision: str,
    accelerator: Accelerator,
    backward: Callable[[nn.Module], object],
) -> None:
    """Compilers err (torch 2.13 by two thirds, for a plain UNet of two levels in another layout on the CPU)."""
    difference, allowed = _difference(model, network, accelerator, backward), ALLOWED[precision]
    dropouts = [module for module in model.modules() if isinstance(module, _DROPOUT) and module.p]
    if not difference <= allowed and dropouts:  # drawn in the order of memory, which is the compiler's to choose
        shares = [module.p for module in dropouts]
        for module in dropouts:
            module.p = 0.0
        difference = _difference(model, network, accelerator, backward)
        for module, share in zip(dropouts, shares, strict=True):
            module.p = share
    if not difference <= allowed:
        raise EbdiffError(
            "torch.compile changes the gradients of this network",
            expected=f"a relative difference of at most {allowed:g}",
            got=f"{difference:.2g}, by torch {torch.__version__}",
            remedy="train with compile=False; in a run train.compile=false, into another --out",
        )


def _difference(
    model: nn.Module, network: nn.Module, accelerator: Accelerator, backward: Callable[[nn.Module], object]
) -> float:
    """Of the gradients of all parameters together, relative to those of the plain model.

    The largest of all processes, since all take part in `backward` and have to decide alike.
    """
    wanted, found = (_gradients(model, each, backward) for each in (model, network))
    relative = (found - wanted).norm() / wanted.norm().clamp(min=1e-30)
    return float(accelerator.gather(relative[None]).max())


def _gradients(model: nn.Module, network: nn.Module, backward: Callable[[nn.Module], object]) -> Tensor:
    """All in one vector; neither they nor what the forward passes did to buffers is left behind."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    network.train()
    model.zero_grad(set_to_none=True)
    backward(network)
    gradients = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return gradients
