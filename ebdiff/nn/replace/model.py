"""Replace what can be replaced in a model, say so, and undo it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ...errors import EbdiffError
from .deferred import find_kernels, learn, norm_settings
from .layout import contiguous_again, to_channels_last
from .optimizer import exchange, put_back
from .report import Report
from .rewrite import Rewriting, cuts, plain_class, rewriting_of

__all__ = ["accelerate", "fuse", "restore"]


def accelerate(
    model: nn.Module, optimizer: Any = None, *, channels_last: bool | None = None, verbose: bool = True
) -> Report:
    """Run every group norm that SiLU follows as one operator with it, forward and backward, in any model.

    Args:
        model: changed in place, by giving modules subclasses of their classes with the same names. Parameters,
            state dict, attributes, `isinstance`, hooks, copies and saved files stay what they are.
        optimizer: the one that trains it. A torch.optim.AdamW becomes an ebdiff.optim.AdamW, and stays the same object
            with the same state and settings.
        channels_last: lay the weights of 2-D convolutions out in this order. None: if they are on CUDA, in 16 bits.
            True is for training under autocast there.
        verbose: print the report.

    Returns:
        What was replaced, what was left, and why. Outputs and gradients agree with the original's to the error of the
        dtype; `ebdiff.restore` undoes it. A second call changes nothing more.
    """
    if not isinstance(model, nn.Module):
        raise EbdiffError("accelerate", expected="a torch.nn.Module", got=type(model).__name__, remedy="pass the model")
    fused, left = fuse(model)
    changed = "" if optimizer is None else exchange(optimizer)
    kinds = Counter[str]()
    for name, norms in fused.items():
        kinds[type(model.get_submodule(name)).__name__] += len(norms)
    layout = to_channels_last(model, channels_last)
    report = Report(fused, left, changed, layout, dict(kinds), _without_kernels(model) if fused else "")
    if verbose:
        print(report)
    return report


def restore(model: nn.Module, optimizer: Any = None) -> None:
    """Undo `accelerate`: the very classes again, and outputs equal bit for bit. Of a plain model, nothing.

    Args:
        model: changed in place.
        optimizer: the one that was given to `accelerate`: torch.optim.AdamW again, with the state it has by now.
    """
    for module in model.modules():
        module.__class__ = plain_class(type(module))
    contiguous_again(model)
    if optimizer is not None:
        put_back(optimizer)


def fuse(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Give every module in which a norm goes to SiLU its fused class: ({module: norms}, {norm: why it is left})."""
    find_kernels()
    for module in model.modules():
        learn(module)
    names = {id(m): name for name, m in model.named_modules() if isinstance(m, nn.GroupNorm) or norm_settings(m)}
    fused: dict[str, tuple[str, ...]] = {}
    done: set[int] = set()
    left: dict[int, str] = {}
    for name, module in list(model.named_modules()):
        if norm_settings(module) or "forward" in vars(module) or hasattr(module, "parametrizations"):
            continue
        found = rewriting_of(module)
        whole, apart = _in_one_piece(model, name, found)
        module.__class__ = found.kind
        if whole:
            fused[name] = whole
            done |= {id(module.get_submodule(path)) for path in whole}
        for path, why in {**found.left, **apart}.items():
            left.setdefault(id(module.get_submodule(path)), why)
    return fused, {name: _why(model, name, left.get(key)) for key, name in names.items() if key not in done}


def _in_one_piece(model: nn.Module, name: str, found: Rewriting) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is fused, less the pairs of a Sequential that its parent takes apart; those, and by which method."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    if not child or not isinstance(module, nn.Sequential) or not found.fused:
        return found.fused, {}
    places = {path: list(module._modules).index(path) + 1 for path in found.fused if path in module._modules}
    cut = cuts(model.get_submodule(parent), child)
    apart = {path: f"{cut[n]} takes the Sequential apart behind it" for path, n in places.items() if n in cut}
    return tuple(path for path in found.fused if path not in apart), apart


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
    parent = model.get_submodule(name.rpartition(".")[0])
    if "forward" in vars(parent):
        return f"the forward of this {type(parent).__name__} was replaced on the instance"
    return f"not called by {type(parent).__name__} as self.{name.rpartition('.')[2]}(x)"
