"""Rules per module class: which integers a forward reads, and how they follow the shrunken parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isclose
from typing import Any

from torch import Tensor, nn

from ..errors import EbdiffError
from ..nn.group_norm import RaggedGroupNorm
from ..nn.multihead import MultiheadAttention, unnest
from .diffusers_classes import adapt_attention, is_attention, is_diffusers
from .integers import read, write
from .mask import ChannelMask
from .plan import Norm

__all__ = [
    "adapt",
    "adapt_modules",
    "adapt_statistics",
    "keeps_sizes",
    "refuse_wrapped",
    "replace",
    "replace_multihead",
    "sizes_read_by",
]

_REMEDIES = {
    "DistributedDataParallel": "pass model.module and wrap the result again",
    "DataParallel": "pass model.module and wrap the result again",
    "FullyShardedDataParallel": "pass the module as it was before FSDP and wrap the result again",
    "OptimizedModule": "pass model._orig_mod and compile the result again",
}
# What norms call the number of their channels.
_WIDTHS = ("normalized_shape", "dim", "dims", "size", "hidden_size", "features", "num_features", "num_channels")


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model inside DistributedDataParallel, FSDP or torch.compile, whose wrapper would keep the old shapes."""
    name = type(model).__name__
    if name in _REMEDIES:
        raise EbdiffError(
            f"the model is wrapped in {name}", expected="the module itself", got=name, remedy=_REMEDIES[name]
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise EbdiffError(
            "the model was compiled in place",
            expected="a plain module",
            got="model.compile()",
            remedy="compile it afterwards",
        )


def sizes_read_by(module: nn.Module, side: str) -> tuple[str, ...]:
    """Attributes in which a module keeps the channels (dimension 1) of its "input" or its "output"."""
    resampling = is_diffusers(
        module, "Upsample1D", "Downsample1D", "Upsample2D", "Downsample2D", "FirUpsample2D", "FirDownsample2D"
    )
    if resampling:
        return ("channels",) if side == "input" else ("out_channels",)
    if is_diffusers(module, "ResnetBlock2D", "ResnetBlockCondNorm2D"):
        return ("in_channels",) if side == "input" else ("out_channels",)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and side == "input":
        return ("num_features",) if module.weight is None and module.running_mean is None else ()
    return ()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with this name, wherever else it is used too."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = module


def adapt(model: nn.Module, mask: ChannelMask) -> None:
    """After `model` was sliced by `mask`: install the norms and update every integer that a forward reads."""
    plan = mask.plan
    widths = {name: int(kept.sum()) for name, kept in mask.keep.items()}
    replace_multihead(model, mask)
    for norm in plan.norms:
        if mask.regroups(norm) and norm.kind == "statistics":
            adapt_statistics(model.get_submodule(norm.module), norm, mask)
        elif mask.regroups(norm):
            _adapt_norm(model, norm.module, mask.groups_of(norm))
    adapt_modules(model.named_modules(), mask)
    for size in plan.sizes:
        module = model.get_submodule(size.module)
        if read(module, size.attribute) is not None:
            write(module, size.attribute, round(plan.value(size.terms, widths)))


def adapt_modules(named: Iterable[tuple[str, nn.Module]], mask: ChannelMask) -> None:
    """Update what modules of known classes keep about their sliced parameters."""
    for name, module in named:
        _adapt_torch(module)
        if is_attention(module):
            adapt_attention(module, name, mask)


def keeps_sizes(module: nn.Module) -> bool:
    """Is there anything that `adapt_modules` updates in this module?"""
    return isinstance(module, tuple(_SIZES)) or is_attention(module)


def replace_multihead(model: nn.Module, mask: ChannelMask) -> None:
    """Put modules that can be pruned, and that torch's fused encoder layers pass by, in the place of torch's own."""
    for name, module in list(model.named_modules()):
        held = (f"{name}.{own}" if name else own for own, _ in module.named_parameters())
        if MultiheadAttention.stands_for(module) and any(mask.kept(mask.plan.aliases.get(p, p)) for p in held):
            replace(model, name, MultiheadAttention(module))
            unnest(model)


def _adapt_norm(model: nn.Module, name: str, groups: Any) -> None:
    norm: Any = model.get_submodule(name)
    sizes = groups[groups >= 0].bincount(minlength=1).tolist()
    sizes = [size for size in sizes if size]
    if len(set(sizes)) == 1 and isinstance(norm, nn.GroupNorm):
        norm.num_channels, norm.num_groups = sum(sizes), len(sizes)
        return
    place: Any = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    ragged = RaggedGroupNorm(sizes, norm.eps, **place, silu=getattr(norm, "silu", False))
    ragged.weight, ragged.bias = norm.weight, norm.bias
    ragged.train(norm.training)
    replace(model, name, ragged)


def adapt_statistics(module: nn.Module, norm: Norm, mask: ChannelMask) -> None:
    """Update what a shrunken norm keeps about its channels: their number, and a factor of its square root."""
    _adapt_torch(module)
    for kept in mask.kept_along(norm.inputs).values() if norm.inputs == norm.outputs else ():
        dense, left = len(kept), int(kept.sum())
        for key, value in list(vars(module).items()):
            if key in _WIDTHS and isinstance(value, int | tuple | list) and value in (dense, (dense,), [dense]):
                setattr(module, key, left if isinstance(value, int) else type(value)([left]))  # type: ignore[misc]
            elif key == "scale" and isinstance(value, float):
                power = next((p for p in (0.5, -0.5) if isclose(value, dense**p, rel_tol=1e-9)), 0)
                setattr(module, key, left**power if power else value)


def _adapt_torch(module: nn.Module) -> None:
    sized = next((update for kind, update in _SIZES.items() if isinstance(module, kind)), None)
    if sized is not None:
        sized(module)


def _size_linear(module: Any) -> None:
    weight = _weight_of(module)
    if weight is not None:
        module.out_features, module.in_features = weight.shape


def _size_embedding(module: Any) -> None:
    module.embedding_dim = module.weight.shape[1]


def _size_bilinear(module: Any) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _size_prelu(module: Any) -> None:
    module.num_parameters = len(module.weight)


def _size_norm(module: Any) -> None:
    known = module.weight if module.weight is not None else module.running_mean
    module.num_features = module.num_features if known is None else len(known)


def _size_convolution(module: Any) -> None:
    weight = _weight_of(module)
    if weight is None:
        return
    first, second = weight.shape[:2]
    if module.groups == module.in_channels == module.out_channels:  # depthwise
        module.groups = first
    first, second = (second, first) if module.transposed else (first, second)
    scale_out, scale_in = (module.groups, 1) if module.transposed else (1, module.groups)
    module.out_channels, module.in_channels = first * scale_out, second * scale_in


# What keeps the shapes of its weights, and what updates them.
_SIZES: dict[type[nn.Module], Callable[[Any], None]] = {
    nn.Linear: _size_linear,
    nn.Embedding: _size_embedding,
    nn.Bilinear: _size_bilinear,
    nn.PReLU: _size_prelu,
    nn.modules.batchnorm._NormBase: _size_norm,
    nn.modules.conv._ConvNd: _size_convolution,
}


def _weight_of(module: nn.Module) -> Tensor | None:
    """A layer's weight, or the parameter of its shape that torch.nn.utils makes it from.

    Reading `module.weight` would run the parametrization, which may change its state.
    """
    names = ("weight", "weight_v", "weight_orig")  # of weight_norm and spectral_norm by hooks
    held = next((module._parameters[name] for name in names if module._parameters.get(name) is not None), None)
    made: Any = module._modules.get("parametrizations", {})
    if held is None and "weight" in made:
        held = getattr(made["weight"], "original1", getattr(made["weight"], "original", None))
    return held
