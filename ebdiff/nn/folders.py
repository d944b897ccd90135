"""Diffusers models from folders: whole, in the dtypes that they were saved in, and never from a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import EbdiffError

__all__ = ["from_folder"]


def from_folder(kind: Any, folder: Path, **options: Any) -> Any:
    """A diffusers model's from_pretrained, which must find the weights of this very architecture, and no pickle.

    Args:
        kind: the class.
        folder: local.
        options: torch_dtype, device_map, variant, ...: for from_pretrained. Without a dtype every tensor has the one
            that it was saved in.

    Raises:
        EbdiffError: weights that are missing, damaged, or another architecture's.
    """
    try:
        if kind.__module__ == "ebdiff":
            return kind.from_pretrained(str(folder), **options)
        saved = {} if _dtype_of(options) else _dtypes_in(folder, options.get("variant"))
        if saved:
            options["torch_dtype"] = _widest(saved.values())
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, about = kind.from_pretrained(str(folder), **options)
    except EbdiffError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise EbdiffError(
            f"{folder} holds no whole {kind.__name__}", got=" ".join(str(error).split()), remedy="save it again"
        ) from None
    for keys in ("missing", "unexpected"):
        if about[f"{keys}_keys"]:
            got = f"{keys}: {sorted(about[f'{keys}_keys'])[0]}"
            raise EbdiffError(
                f"weights in {folder} do not fit", expected=f"a {kind.__name__}'s", got=got, remedy="save it again"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(saved.get(name, tensor.dtype))
    return model


def _dtype_of(options: Mapping[str, Any]) -> Any:
    """The dtype that was asked for, under either name as in diffusers."""
    return options.get("torch_dtype") or options.get("dtype")


def _dtypes_in(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """{name: dtype} of the saved tensors, in however many files: name.VARIANT-00001-of-00002.safetensors."""
    found: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        middle = path.name.split(".")[1:-1]
        if [part.partition("-")[0] for part in middle] == ([variant] if variant else []):
            found |= files.dtypes_in(path)
    return found


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What holds the floating-point ones without rounding."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return reduce(torch.promote_types, floating) if floating else torch.float32
