"""What the operators of the timestep loss refuse. Kernels take raw addresses, so nothing may pass unchecked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EbdiffError
from .timestep_loss_reference import PREDICTIONS, Terms

__all__ = ["check_dloss", "check_losses", "check_noised", "check_prediction", "check_terms"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HOW = {name: f"see ebdiff.ops.{name}" for name in ("noised", "weighted_timestep_loss", "LossStatistics")}


def check_noised(x0: Tensor, noise: Tensor | None, seed: Tensor | None, table: Tensor, row: Tensor) -> None:
    """Refuse arguments of `noised` that do not belong together."""
    op = "noised"
    _check_images(op, "x0", x0)
    _check_noise(op, x0, noise, seed)
    _check_table(op, x0, table, row)


def check_terms(pred: Tensor, terms: Terms) -> None:
    """Refuse terms that are not of this prediction, or of nothing."""
    op = "weighted_timestep_loss"
    _check_images(op, "pred", pred)
    if not 0 <= terms.prediction < len(PREDICTIONS):
        _refuse(op, "prediction", f"a place in {PREDICTIONS}", str(terms.prediction))
    if (terms.target is None) == (terms.x0 is None):
        _refuse(op, "target", "a tensor, or x0 and noise", "both" if terms.x0 is not None else "none")
    if terms.target is not None:
        _check_like(op, "target", terms.target, pred)
    if terms.x0 is not None:
        _check_like(op, "x0", terms.x0, pred)
        _check_noise(op, pred, terms.noise, terms.seed)
        if PREDICTIONS[terms.prediction] == "v_prediction":
            _check_table(op, pred, terms.table, terms.row)
    _check_counts(op, pred, terms)
    if terms.mask is not None:
        mask = terms.mask
        if mask.shape != pred.shape or not (mask.is_floating_point() or mask.dtype == torch.bool):
            _refuse(op, "mask", f"bool or floating {list(pred.shape)}", f"{mask.dtype} {list(mask.shape)}")
        _check_device(op, "mask", mask, pred)


def check_dloss(dloss: Tensor, pred: Tensor) -> None:
    """Refuse what is no gradient of the loss of pred."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    if dloss.shape != () or dloss.dtype != wide:
        _refuse("weighted_timestep_loss", "dloss", f"{wide} []", f"{dloss.dtype} {list(dloss.shape)}")
    _check_device("weighted_timestep_loss", "dloss", dloss, pred)


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


def check_prediction(name: str) -> int:
    """Its place in `PREDICTIONS`."""
    if name not in PREDICTIONS:
        _refuse("weighted_timestep_loss", "prediction_type", f"one of {PREDICTIONS}", repr(name))
    return PREDICTIONS.index(name)


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
        return _refuse(op, "profile", "the coefficients of each timestep", "none")
    if table.dim() != 2 or len(table) != 2 or table.dtype != torch.float32:
        _refuse(op, "the table of alpha and sigma", "float32 [2, K]", f"{table.dtype} {list(table.shape)}")
    _check_device(op, "the table of alpha and sigma", table, x)
    _check_vector(op, "t", row, x, len(x))


def _check_counts(op: str, pred: Tensor, terms: Terms) -> None:
    """One number for each sample."""
    weight, huber_c = terms.weight, terms.huber_c
    length = len(pred) if terms.cell is None else len(weight) if weight.dim() else -1
    if weight.shape != (length,) or not weight.is_floating_point():
        _refuse(op, "weight", f"floating [{len(pred)}], or a table", f"{weight.dtype} {list(weight.shape)}")
    _check_device(op, "weight", weight, pred)
    if terms.cell is not None:
        _check_vector(op, "t", terms.cell, pred, len(pred))
    if huber_c is not None:
        if huber_c.shape not in ((1,), (len(pred),)) or not huber_c.is_floating_point():
            _refuse(op, "huber_c", f"floating [{len(pred)}] or [1]", f"{huber_c.dtype} {list(huber_c.shape)}")
        _check_device(op, "huber_c", huber_c, pred)


def _check_vector(op: str, name: str, x: Tensor, like: Tensor, length: int | None = None) -> None:
    if x.dim() != 1 or x.dtype != torch.int64 or (length is not None and len(x) != length):
        shape = "[T]" if length is None else f"[{length}]"
        _refuse(op, name, f"int64 {shape}", f"{x.dtype} {list(x.shape)}")
    _check_device(op, name, x, like)


def _check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        _refuse(op, name, f"on {like.device}", str(x.device))


def _refuse(op: str, what: str, expected: str, got: str) -> None:
    raise EbdiffError(f"{op}: {what}", expected=expected, got=got, remedy=_HOW[op])
