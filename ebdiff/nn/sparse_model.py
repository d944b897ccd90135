"""Block masks put into the attention layers of any model, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

import ebdiff

from ..errors import EbdiffError
from ..ops.block_mask import BlockMask
from .attention_calls import AttentionCall, AttentionCalls
from .replace.classes import plain_class
from .replace.rewrite import reclass
from .sparse_attention import Attend, SparseAttention, SparseAttnProcessor

__all__ = [
    "ALWAYS",
    "BREAK_EVEN",
    "BreakEven",
    "SparseReport",
    "blocks_of",
    "densify",
    "paying",
    "sparsify",
    "taken_out",
]

# diffusers' attention processors that SparseAttnProcessor can stand in for.
_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "PinnedScaleProcessor")


class BreakEven(NamedTuple):
    """Where attention by blocks begins to pay: from so many queries and keys on, up to this density."""

    tokens: int
    density: float


ALWAYS = BreakEven(0, 1.0)
# Otherwise dense attention is as fast (the CPU: measured; CUDA: what those who have built it for H100 report).
BREAK_EVEN = {"cuda": BreakEven(2048, 0.5), "cpu": BreakEven(512, 0.5)}


@dataclass(frozen=True)
class SparseReport:
    """What became of the layers that block masks were given for.

    Args:
        sparse: {layer: what answers its attention calls}.
        dense: {layer: why it computes all blocks}.
    """

    sparse: Mapping[str, Attend]
    dense: Mapping[str, str]

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """{layer: {why its mask was written out for torch's attention: in how many calls}}, up to now."""
        return {name: dict(attend.fallbacks) for name, attend in self.sparse.items() if attend.fallbacks}

    def __str__(self) -> str:
        lines = [f"{len(self.sparse)} attention layers by blocks, {len(self.dense)} dense"]
        for name, attend in self.sparse.items():
            lines.append(f"  {name or '(itself)'}: {attend.blocks}")
            lines += [f"    {count} calls through torch: {why}" for why, count in attend.fallbacks.items()]
        return "\n".join([*lines, *(f"  {name or '(itself)'}: dense, {why}" for name, why in self.dense.items())])


def sparsify(
    model: nn.Module,
    blocks: Any,
    break_even: BreakEven | None = None,
    *,
    written_out: bool = False,
) -> SparseReport:
    """Let attention layers compute only the blocks that masks keep. In place; `densify` undoes it.

    Where that is not faster, the layer stays as it is and computes all blocks: the report says so. What is decided here
    holds on every device and is saved with the network, so the network computes the same wherever it runs. A layer
    refuses to run at another number of tokens than its mask's: a mask means nothing at another resolution.

    Layers are `SparseAttention`, diffusers' Attention, and every module whose forward calls
    scaled_dot_product_attention (Flux, SD3, Wan, CogVideoX and nn.MultiheadAttention do); a forward that turns out not
    to call it raises. A diffusers model becomes an ``ebdiff.Shrunk<Class>``, whose save_pretrained keeps the masks.

    Args:
        model: the model; masks that it has already are taken out first.
        blocks: {name of a module: mask}, or an `ebdiff.Ticket`, whose mask of channels is not looked at.
        break_even: where a mask begins to pay. By default what was measured for the model's device; `ALWAYS` for all.
        written_out: compute the masks with torch's attention: the same function, slower. For comparisons.

    Raises:
        EbdiffError: a name that is no module of the model, two names of the same one, or a mask for another number of
            heads. Nothing is changed.
    """
    masks: Mapping[str, BlockMask] = getattr(blocks, "blocks", blocks)
    layers = {name: _layer(model, name, mask) for name, mask in masks.items()}
    if len(set(map(id, layers.values()))) < len(layers):
        raise EbdiffError(
            "several block masks of one layer",
            expected="one name of each layer that is used in several places",
            got=", ".join(layers),
            remedy="leave the other names out: the mask holds wherever the layer is used",
        )
    attends = {name: Attend(mask, name, written_out) for name, mask in masks.items()}
    densify(model)
    dense = {name: why for name, mask in masks.items() if (why := _why_dense(mask, break_even or _limit(model)))}
    sparse = {name: attend for name, attend in attends.items() if name not in dense}
    for name, attend in sparse.items():
        _install(layers[name], attend)
    for root in _roots(model) if sparse else ():
        if not _is_ours(root):
            reclass(root, getattr(ebdiff, f"Shrunk{plain_class(type(root)).__name__}"))
    return SparseReport(sparse, dense)


def densify(model: nn.Module) -> dict[str, BlockMask]:
    """Take all block masks out, so that the model is as it was before `sparsify`; returns them."""
    taken = _take_out(model)
    for root in _roots(model) if taken else ():
        if _is_ours(root) and not vars(root).get("_ebdiff_shrinks"):
            reclass(root, plain_class(type(root)).__mro__[1])
    return {name: attend.blocks for name, attend in taken.items()}


@contextmanager
def taken_out(model: nn.Module) -> Iterator[dict[str, BlockMask]]:
    """The block masks of a model, which runs without them meanwhile."""
    taken = _take_out(model)
    try:
        yield {name: attend.blocks for name, attend in taken.items()}
    finally:
        for name, attend in taken.items():
            _install(model.get_submodule(name), attend)


def _take_out(model: nn.Module) -> dict[str, Attend]:
    taken = {}
    for name, module, attend in list(_sparse(model)):
        taken[name] = attend
        if isinstance(module, SparseAttention):
            module.attend = None
        elif isinstance(vars(module).get("forward"), _Forward):
            vars(module).pop("forward").leave(module)
        else:
            module.processor = module.processor.replaced
    return taken


def blocks_of(model: nn.Module) -> dict[str, BlockMask]:
    """{name of a module: its block mask}, of all layers that have one."""
    return {name: attend.blocks for name, _, attend in _sparse(model)}


def _sparse(model: nn.Module) -> Iterator[tuple[str, Any, Attend]]:
    for name, module in model.named_modules():
        for place in (module, vars(module).get("forward"), getattr(module, "processor", None)):
            if isinstance(place, SparseAttention | _Forward | SparseAttnProcessor) and place.attend is not None:
                yield name, module, place.attend


def _roots(model: nn.Module) -> list[nn.Module]:
    """The diffusers models that are saved: this one, or those it routes to."""
    networks = getattr(model, "nets", None)
    roots = list(networks) if isinstance(networks, nn.ModuleList) else [model]
    return [root for root in roots if hasattr(type(root), "load_config")]


def _is_ours(root: nn.Module) -> bool:
    return plain_class(type(root)).__module__ == "ebdiff"


def _layer(model: nn.Module, name: str, mask: BlockMask) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise EbdiffError(
            "block mask of an unknown layer",
            expected=f"the name of a module of {type(model).__name__}",
            got=repr(name),
            remedy="use the masks of this model's own search",
        ) from None
    heads = layer.heads if isinstance(layer, SparseAttention) or _has_plain_processor(layer) else mask.kept.shape[1]
    if heads != mask.kept.shape[1]:
        raise EbdiffError(
            f"block mask of {name}",
            expected=f"{heads} heads",
            got=str(mask.kept.shape[1]),
            remedy="shrink(model, ticket) keeps the masks of the heads that stay",
        )
    return layer


def _has_plain_processor(layer: nn.Module) -> bool:
    """Is it diffusers' Attention, with a processor that SparseAttnProcessor can stand in for?"""
    kind = type(getattr(layer, "processor", None)).__name__
    return kind in (*_PLAIN, SparseAttnProcessor.__name__) and hasattr(layer, "spatial_norm")


def paying(model: nn.Module, blocks: Mapping[str, BlockMask]) -> dict[str, BlockMask]:
    """Those of the masks that make their layers faster on the model's device: what `sparsify` would put in."""
    return {name: mask for name, mask in blocks.items() if _why_dense(mask, _limit(model)) is None}


def _limit(model: nn.Module) -> BreakEven:
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    return BREAK_EVEN.get(device, BREAK_EVEN["cuda"])


def _why_dense(mask: BlockMask, limit: BreakEven) -> str | None:
    tokens = min(mask.q_len, mask.k_len)
    if mask.density == 1:
        return "every block is kept"
    if tokens < limit.tokens:
        return f"{tokens} tokens: blocks pay from {limit.tokens} on"
    if mask.density > limit.density:
        return f"{mask.density:.1%} of the blocks are kept: blocks pay up to {limit.density:.0%}"
    return None


def _install(layer: Any, attend: Attend) -> None:
    if isinstance(layer, SparseAttention):
        layer.attend = attend
    elif _has_plain_processor(layer):
        # AttnProcessor reads attn.scale, AttnProcessor2_0 does not.
        of_its_own = type(layer.processor).__name__ == "AttnProcessor"
        scale = layer.scale if of_its_own else getattr(layer.processor, "scale", None)
        layer.processor = SparseAttnProcessor(attend, scale, layer.processor)
    else:
        layer.forward = _Forward(layer, attend)


class _Forward:
    """Stands in for a module's forward, with its attention calls answered by blocks."""

    def __init__(self, module: nn.Module, attend: Attend) -> None:
        self.forward, self.own = module.forward, "forward" in vars(module)
        self.attend, self.answered, self._learns = attend, 0, False
        self._calls = AttentionCalls(self._answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.answered, self._learns = 0, torch.is_grad_enabled()
        with self._calls:
            result = self.forward(*args, **kwargs)
        if not self.answered:
            raise EbdiffError(
                f"the block mask of {self.attend.name} had no effect",
                expected="a forward that calls scaled_dot_product_attention",
                got="none",
                remedy="choose torch's native attention for this layer, or take the mask out: ebdiff.nn.densify(model)",
            )
        return result

    def _answer(self, call: AttentionCall) -> Any:
        if self._learns and not torch.is_grad_enabled():  # the pass that is run again is run without this mask
            raise EbdiffError(
                f"activation checkpointing inside {self.attend.name or 'a layer'}, which has a block mask",
                expected="checkpoints around the whole layer",
                got="attention without gradients in a forward with",
                remedy="checkpoint the layer's own caller, or take the mask out: ebdiff.nn.densify(model)",
            )
        self.answered += 1
        return self.attend(call)

    def leave(self, module: nn.Module) -> None:
        """Give the module back what it had."""
        if self.own:
            module.forward = self.forward
