"""What the operators of the timestep loss refuse. Kernels take raw addresses, so nothing may pass unchecked."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import EbdiffError
from .timestep_loss_reference import PREDICTIONS, Terms

__all__ = [
    "check_dloss",
    "check_losses",
    "check_noised",
    "check_terms",
    "constant",
    "like_pred",
    "place_of",
    "positive",
    "present",
    "refuse_place",
]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LOSS = "weighted_timestep_loss"
_HOW = {name: f"see ebdiff.ops.{name}" for name in ("noised", _LOSS, "LossStatistics")}


def check_noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> None:
    """Refuse arguments of `noised` that do not belong together."""
    op = "noised"
    _check_images(op, "x0", x0)
    _check_noise(op, x0, noise, seed)
    _check_table(op, x0, table, row)


def check_terms(pred: Tensor, terms: Terms) -> None:
    """Refuse terms that are not of this prediction, or of nothing."""
    _check_images(_LOSS, "pred", pred)
    if not 0 <= terms.prediction < len(PREDICTIONS):
        _refuse(_LOSS, "prediction", f"a place in {PREDICTIONS}", str(terms.prediction))
    if (terms.target is None) == (terms.x0 is None):
        _refuse(_LOSS, "target", "a tensor, or x0 and noise", "both" if terms.x0 is not None else "none")
    if terms.target is not None:
        _check_like(_LOSS, "target", terms.target, pred)
    if terms.x0 is not None:
        _check_like(_LOSS, "x0", terms.x0, pred)
        _check_noise(_LOSS, pred, terms.noise, terms.seed)
        if PREDICTIONS[terms.prediction] == "v_prediction":
            _check_table(_LOSS, pred, terms.table, terms.row)
    _check_counts(pred, terms)
    if terms.mask is not None:
        mask = terms.mask
        if mask.shape != pred.shape or not (mask.is_floating_point() or mask.dtype == torch.bool):
            _refuse(_LOSS, "mask", f"bool or floating {list(pred.shape)}", f"{mask.dtype} {list(mask.shape)}")
        _check_device(_LOSS, "mask", mask, pred)


def check_dloss(dloss: Tensor, pred: Tensor) -> None:
    """Refuse what is no gradient of the loss of pred."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    if dloss.shape != () or dloss.dtype != wide:
        _refuse(_LOSS, "dloss", f"{wide} []", f"{dloss.dtype} {list(dloss.shape)}")
    _check_device(_LOSS, "dloss", dloss, pred)


def check_losses(totals: Tensor, buckets: Tensor, cell: Tensor, per_sample: Tensor) -> None:
    """Refuse losses that cannot be added to these totals."""
    op = "LossStatistics"
    if totals.dim() != 2 or len(totals) != 3 or totals.dtype not in (torch.float32, torch.float64):
        _refuse(op, "totals", "float32 or float64 [3, K]", f"{totals.dtype} {list(totals.shape)}")
    _check_vector(op, "buckets", buckets, totals)
    _check_vector(op, "cell", cell, totals, len(per_sample))
    if per_sample.dim() != 1 or per_sample.dtype not in _FLOATS:
        _refuse(op, "per_sample", "floating [B]", f"{per_sample.dtype} {list(per_sample.shape)}")
    _check_device(op, "per_sample", per_sample, totals)


def place_of(prediction_type: str) -> int:
    """Its place in `PREDICTIONS`."""
    if prediction_type not in PREDICTIONS:
        _refuse(_LOSS, "prediction_type", f"one of {', '.join(PREDICTIONS)}", repr(prediction_type))
    return PREDICTIONS.index(prediction_type)


def positive(huber_c: float) -> float:
    """This number, if it is one and positive."""
    if not huber_c >= torch.finfo(torch.float32).tiny:
        _refuse(_LOSS, "huber_c", "a positive number that float32 holds", str(huber_c))
    return float(huber_c)


def constant(name: str, x: Tensor) -> Tensor:
    """This argument, if nobody expects a gradient of it."""
    if x.requires_grad and torch.is_grad_enabled():
        _refuse(_LOSS, name, "no gradient asked for: there is none, detach it", "requires_grad")
    return x


def present(profile: Any) -> Any:
    """This profile, if there is one."""
    if profile is None:
        _refuse(_LOSS, "profile", "one, out of which a target for v is made", "none")
    return profile


def like_pred(mask: Tensor, pred: Tensor) -> Tensor:
    """The mask, broadcast."""
    try:
        return mask.expand(pred.shape)
    except RuntimeError:
        _refuse(_LOSS, "mask", f"what broadcasts to {list(pred.shape)}", str(list(mask.shape)))


def refuse_place() -> EbdiffError:
    """For an index that lies outside of a table."""
    expected = "t that the profile has, and a place in the table of weights for each"
    return EbdiffError("timestep loss: t", expected=expected, got="others", remedy=_HOW[_LOSS])


def _check_images(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS or x.dim() < 2 or x.layout is not torch.strided:
        _refuse(op, name, "[B, *], floating, strided", f"{x.dtype} {list(x.shape)}, {x.layout}")


def _check_like(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape or x.dtype not in _FLOATS or x.layout is not torch.strided:
        _refuse(op, name, f"floating {list(like.shape)}", f"{x.dtype} {list(x.shape)}, {x.layout}")
    _check_device(op, name, x, like)


def _check_noise(op: str, x: Tensor, noise: Tensor | None, seed: Tensor | None) -> None:
    if (noise is None) == (seed is None):
        _refuse(op, "noise", "a tensor, or a seed", "both" if noise is not None else "none")
    if noise is not None:
        _check_like(op, "noise", noise, x)
    if seed is not None:
        _check_vector(op, "seed", seed, x, 2)


def _check_table(op: str, x: Tensor, table: Tensor | None, row: Tensor | None) -> None:
    if table is None or row is None:
        _refuse(op, "profile", "the coefficients of each timestep", "none")
    if table.dim() != 2 or table.shape[0] != 2 or table.dtype != torch.float32:
        _refuse(op, "the table of alpha and sigma", "float32 [2, K]", f"{table.dtype} {list(table.shape)}")
    _check_device(op, "the table of alpha and sigma", table, x)
    _check_vector(op, "t", row, x, x.shape[0])


def _check_counts(pred: Tensor, terms: Terms) -> None:
    """One number for each sample."""
    weight, huber_c = terms.weight, terms.huber_c
    length = pred.shape[0] if terms.cell is None else len(weight) if weight.dim() else -1
    if weight.shape != (length,) or not weight.is_floating_point():
        _refuse(_LOSS, "weight", f"floating [{pred.shape[0]}], or a table", f"{weight.dtype} {list(weight.shape)}")
    _check_device(_LOSS, "weight", weight, pred)
    if terms.cell is not None:
        _check_vector(_LOSS, "t", terms.cell, pred, pred.shape[0])
    if huber_c is not None:
        if huber_c.shape not in ((1,), (pred.shape[0],)) or not huber_c.is_floating_point():
            _refuse(_LOSS, "huber_c", f"floating [{pred.shape[0]}] or [1]", f"{huber_c.dtype} {list(huber_c.shape)}")
        _check_device(_LOSS, "huber_c", huber_c, pred)


def _check_vector(op: str, name: str, x: Tensor, like: Tensor, length: int | None = None) -> None:
    if x.dim() != 1 or x.dtype != torch.int64 or (length is not None and x.shape[0] != length):
        shape = "[T]" if length is None else f"[{length}]"
        _refuse(op, name, f"int64 {shape}", f"{x.dtype} {list(x.shape)}")
    _check_device(op, name, x, like)


def _check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        _refuse(op, name, f"on {like.device}", str(x.device))


def _refuse(op: str, what: str, expected: str, got: str) -> NoReturn:
    raise EbdiffError(f"{op}: {what}", expected=expected, got=got, remedy=_HOW[op])
