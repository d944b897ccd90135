"""Replace what can be replaced in a model, say so, and undo it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ...errors import EbdiffError
from .classes import give, plain_class, take_back
from .deferred import ACCELERATED, find_kernels
from .known import is_bare, learn, norm_settings
from .layout import contiguous_again, to_channels_last
from .optimizer import exchange, put_back
from .report import Report
from .rewrite import Rewriting, cuts, rewriting_of

__all__ = ["accelerate", "fuse", "restore"]


def accelerate(
    model: nn.Module, optimizer: Any = None, *, channels_last: bool | None = None, verbose: bool = True
) -> Report:
    """Run every group norm that SiLU follows as one operator with it, forward and backward, in any model.

    A method with such norms also leaves out passes that change nothing: over a sum that is divided by 1, and to make
    contiguous what is channels_last and goes to a convolution.

    Args:
        model: changed in place, by giving modules subclasses of their classes with the same names. Parameters,
            state dict, attributes, `isinstance`, hooks, copies and saved files stay what they are.
        optimizer: the one that trains it. A torch.optim.AdamW becomes an ebdiff.optim.AdamW, and stays the same object
            with the same state and settings.
        channels_last: lay the weights of 2-D convolutions out in this order. None: if they are on CUDA, in 16 bits.
            True is for training under autocast there, and on the CPU.
        verbose: print the report.

    Returns:
        What was replaced, what was left, and why. On the CPU a norm of torch's runs as it was in calls with fewer than
        256 positions. Outputs and gradients agree with the original's to the error of the dtype; `ebdiff.restore`
        undoes it. A second call takes in what has changed since: else, nothing.
    """
    if not isinstance(model, nn.Module):
        raise EbdiffError("accelerate", expected="a torch.nn.Module", got=type(model).__name__, remedy="pass the model")
    fused, left, modulated = fuse(model)
    changed = "" if optimizer is None else exchange(optimizer)
    kinds = Counter[str]()
    for name, norms in fused.items():
        kinds[type(model.get_submodule(name)).__name__] += len(norms)
    layout = to_channels_last(model, channels_last)
    kernels = _without_kernels(model) if fused else ""
    report = Report(fused, left, changed, layout, dict(kinds), kernels, modulated)
    if verbose:
        print(report)
    return report


def restore(model: nn.Module, optimizer: Any = None) -> None:
    """Undo `accelerate`: the very classes again, and outputs equal bit for bit. Of a plain model, nothing.

    What has been put around a module since (a hook, a class made of the fused one) stays; the original runs in it.

    Args:
        model: changed in place.
        optimizer: the one that was given to `accelerate`: torch.optim.AdamW again, with the state it has by now.
    """
    for module in model.modules():
        take_back(module)
        contiguous_again(module)
    if optimizer is not None:
        put_back(optimizer)


def fuse(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, str], int]:
    """Give every module in which a norm goes to SiLU its fused class.

    Returns:
        {module: norms}, {norm: why it is left}, and how many of the fused ones have scale or shift in between.
    """
    find_kernels()
    for module in model.modules():
        learn(module)
    names = {id(m): name for name, m in model.named_modules() if isinstance(m, nn.GroupNorm) or norm_settings(m)}
    # All classes are made before the first is given.
    found = {name: rewriting_of(m) for name, m in model.named_modules() if not norm_settings(m) and not _own_forward(m)}
    fused: dict[str, tuple[str, ...]] = {}
    done: set[int] = set()
    left: dict[int, str] = {}
    modulated = 0
    for name, rewriting in found.items():
        module = model.get_submodule(name)
        stays = _give(model, name, rewriting)
        whole = tuple(path for path in rewriting.fused if path not in stays)
        if whole:
            fused[name] = whole
        done |= {id(module.get_submodule(path)) for path in whole}
        modulated += len(rewriting.modulated.intersection(whole))
        for path, why in stays.items():
            left.setdefault(id(module.get_submodule(path)), why)
    return fused, {name: _why(model, name, left.get(key)) for key, name in names.items() if key not in done}, modulated


def _give(model: nn.Module, name: str, found: Rewriting) -> dict[str, str]:
    """Give a module its class; {norm that it calls: why it still runs as it was}."""
    module = model.get_submodule(name)
    if not found.fused:
        take_back(module)  # what an earlier call has given, if its class has other methods since
        return found.left
    refused = give(module, found.kind)
    if refused is not None:
        return found.left | dict.fromkeys(found.fused, refused)
    return {**found.left, **_apart(model, name, found), **_hooked(module, found)}


def _own_forward(module: nn.Module) -> str | None:
    """Why the methods of its class are not simply what runs; what was put around fused ones does not count."""
    if ACCELERATED in vars(module):
        return None
    if isinstance(module, GraphModule):
        return f"{type(module).__name__} writes its methods itself (torch.fx)"
    if "forward" in vars(module):
        return f"the forward of this {type(module).__name__} was replaced on the instance"
    return f"{type(module).__name__} has parametrizations" if hasattr(module, "parametrizations") else None


def _apart(model: nn.Module, name: str, found: Rewriting) -> dict[str, str]:
    """The pairs of a Sequential that its parent takes apart, and by which method."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    if not child or not isinstance(module, nn.Sequential):
        return {}
    places = {path: list(module._modules).index(path) + 1 for path in found.fused if path in module._modules}
    cut = cuts(model.get_submodule(parent), child)
    return {path: f"{cut[n]} takes the Sequential apart behind it" for path, n in places.items() if n in cut}


def _hooked(module: nn.Module, found: Rewriting) -> dict[str, str]:
    """The pairs that run as they were for as long as there are hooks."""
    left: dict[str, str] = {}
    for path, acts in found.fused.items():
        called = [module.get_submodule(path), *acts]
        names = [type(one).__name__ for one in called if isinstance(one, nn.Module) and not is_bare(one)]
        if names:
            left[path] = f"hooks on {names[0]}, or all modules: it runs as it was while they are there"
    return left


def _without_kernels(model: nn.Module) -> str:
    devices = {p.device.type for p in model.parameters()} - find_kernels() - {"meta"}
    return f"none on {', '.join(sorted(devices))}: norms run there as they were" if devices else ""


def _why(model: nn.Module, name: str, found: str | None) -> str:
    """Why a norm is left."""
    if found is not None:
        return found
    norm = model.get_submodule(name)
    if norm_settings(norm) is None:
        return f"{type(norm).__name__} has a forward of its own"
    owner, called = _owner(model, name)
    return _own_forward(owner) or f"no method of {plain_class(type(owner)).__name__} calls it as self.{called}(x)"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Whose methods could call a norm, and by which name: "blocks.0.norms.1" -> (the block, "norms[1]")."""
    parent, _, called = name.rpartition(".")
    owner = model.get_submodule(parent)
    while parent and isinstance(owner, nn.ModuleList | nn.ModuleDict):
        parent, _, container = parent.rpartition(".")
        called = f"{container}[{called}]"
        owner = model.get_submodule(parent)
    return owner, called
