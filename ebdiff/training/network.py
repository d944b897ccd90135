"""The dense network as the configuration's `model` section says it, with a place for what it is told."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

from ..errors import EbdiffError
from .conditions import Told, ask

__all__ = ["build", "check_call", "in_channels", "in_tokens"]

DEFAULT = "UNet2DModel"
TOKENS = "encoder_hidden_states"
KEYWORDS = {"labels": "class_labels", "embeddings": TOKENS}


def build(model: Mapping[str, Any], by: str | None = None, size: int = 0) -> Any:
    """A new network, its weights from torch's generator.

    Args:
        model: the arguments of diffusers' UNet2DModel, or of the diffusers class that `class` names.
        by: what it is told about each image: its label, the embedding of its caption, or how it looks in low
            resolution; None for nothing.
        size: classes, numbers per token of an embedding, or channels of an image.

    Raises:
        EbdiffError: no such class, one that cannot be told so or has to be told more, or arguments that it refuses.
    """
    arguments = dict(model)
    kind = class_named(arguments.pop("class", DEFAULT))
    known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            raise EbdiffError(
                "unknown configuration key",
                expected=f"an argument of diffusers' {kind.__name__}",
                got=f"model.{name}",
                remedy=f"did you mean model.{close[0]}?" if close else f"known: {', '.join(known)}",
            )
    if by is not None:
        arguments |= _told(kind, known, arguments, by, size)
    _refuse_untold(kind, by)
    try:
        network = kind(**arguments)
    except (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EbdiffError(f"{kind.__name__} refuses its arguments", got=reason, remedy="correct `model`") from None
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # the loop drops labels, from (seed, step) and not from torch's generator
    return network


def class_named(name: str) -> Any:
    """The diffusers model of this name, called as network(x, t, ...)."""
    kind: Any = getattr(diffusers, str(name), None)
    known = isinstance(kind, type) and issubclass(kind, ModelMixin)
    if not known or [*inspect.signature(kind.forward).parameters][2:3] != ["timestep"]:
        raise EbdiffError(
            "model.class",
            expected="a model of diffusers that is called as network(x, timestep, ...)",
            got=str(name),
            remedy="UNet2DModel is the default; UNet2DConditionModel and DiTTransformer2DModel are others",
        )
    return kind


def in_channels(model: Mapping[str, Any]) -> int:
    """Channels of an image, before those of a low resolution are added.

    Raises:
        EbdiffError: no such class, or no number of channels.
    """
    default = inspect.signature(class_named(model.get("class", DEFAULT)).__init__).parameters["in_channels"].default
    channels = model.get("in_channels", default)
    if not isinstance(channels, int) or channels < 1:
        expected, got = "a whole number of at least 1", str(channels)
        raise EbdiffError(
            "model.in_channels", expected=expected, got=got, remedy="1 for grey, 3 for RGB, of latents theirs"
        )
    return channels


def check_call(network: Any, x: Tensor, t: Tensor, told: Told) -> None:
    """Refuse a network that does not answer an image and what it is told with an image of the same shape.

    Args:
        network: on the meta device, where calling it takes no memory.
        x: float [1, C, H, W], there too.
        t: int64 [1].
        told: one row each.

    Raises:
        EbdiffError: it fails, or its answer has another shape.
    """
    name, words = type(network).__name__, ", ".join(["x", "t", *told])
    try:
        with torch.no_grad():
            made = ask(network, x, t, told)
    except Exception as error:
        raise EbdiffError(
            f"{name} cannot be called with images of {x.shape[-1]}x{x.shape[-2]}",
            expected=f"an answer to ({words})",
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            remedy="choose sides that all its halvings and patches divide, and tell it what it needs (conditional)",
        ) from None
    if made.shape != x.shape:
        raise EbdiffError(
            f"what {name} predicts has another size than its images",
            expected=str(list(x.shape[1:])),
            got=str(list(made.shape[1:])),
            remedy="choose a model.sample_size that its patches divide",
        )


def in_tokens(model: Mapping[str, Any]) -> bool:
    """Is a network that is told labels told them as one-hot tokens, which it embeds and attends to?"""
    return _embeds_tokens(class_named(model.get("class", DEFAULT)))


def _embeds_tokens(kind: Any) -> bool:
    return "encoder_hid_dim" in inspect.signature(kind.__init__).parameters


def _refuse_untold(kind: Any, by: str | None) -> None:
    """Some networks cannot do without what they are told."""
    _, _, _, *further = inspect.signature(kind.forward).parameters.values()  # self, x, t
    needed = {p.name for p in further if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    tokens = by == "labels" and _embeds_tokens(kind)
    for missing in sorted(needed - {TOKENS if tokens else KEYWORDS.get(str(by))}):
        told = next((name for name, keyword in KEYWORDS.items() if keyword == missing), None)
        raise EbdiffError(
            f"{kind.__name__} cannot do without {missing}",
            expected=f"conditional.by={told}" if told else "a network that can",
            got=f"conditional.by={by}" if by else "no conditional",
            remedy="choose another model.class: UNet2DModel does with nothing and with labels",
        )


def _told(kind: Any, known: list[str], given: Mapping[str, Any], by: str, size: int) -> dict[str, Any]:
    """The arguments that make place for what the network is told; those that the user gave must agree."""
    if by == "low_res":
        return {"in_channels": 2 * size, "out_channels": given.get("out_channels", size)}
    # A row more for "no class": UNets count it among theirs, DiT's label embedding adds it by itself.
    wanted: dict[str, Any] = {
        "labels": {"num_class_embeds": size + 1, "num_embeds_ada_norm": size},
        "embeddings": {"cross_attention_dim": size},
    }[by]
    if by == "labels" and _embeds_tokens(kind):
        wanted = {"encoder_hid_dim": size + 1, "encoder_hid_dim_type": "text_proj"}  # an embedding of one-hot tokens
    place = {name: value for name, value in wanted.items() if name in known}
    for name, value in place.items():
        if given.get(name, value) != value:
            got, remedy = f"model.{name}={given[name]}", "leave it out"
            raise EbdiffError(
                f"the {by} do not fit the model", expected=f"model.{name}={value}", got=got, remedy=remedy
            )
    if not place or KEYWORDS[by] not in inspect.signature(kind.forward).parameters:
        expected = f"{' or '.join(wanted)}, and a forward with {KEYWORDS[by]}"
        remedy = "model.class=UNet2DConditionModel is told either, UNet2DModel and DiTTransformer2DModel labels"
        raise EbdiffError(f"{kind.__name__} takes no {by}", expected=expected, got=", ".join(known), remedy=remedy)
    return place
