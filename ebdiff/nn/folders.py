"""Diffusers models from folders: whole, in the dtypes that they were saved in, and never from a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..errors import EbdiffError

__all__ = ["dtype_named", "from_folder", "model_class"]


def model_class(name: str) -> Any:
    """The class of this name in diffusers, or a user's own model of diffusers that is imported.

    Raises:
        AttributeError: there is none.
    """
    import diffusers

    found = getattr(diffusers, name, None) if name else None
    if found is None:
        found = next((each for each in _below(diffusers.ModelMixin) if each.__name__ == name), None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise AttributeError(f"no class {name!r} in diffusers, and none of its models that is imported")
    return found


def _below(kind: type) -> Iterator[type]:
    """All subclasses, the latest definition first."""
    classes: list[type] = kind.__subclasses__()
    for each in reversed(classes):
        yield from (each, *_below(each))


def from_folder(kind: Any, folder: Path, **options: Any) -> Any:
    """A diffusers model's from_pretrained, which must find the weights of this very architecture, and no pickle.

    Args:
        kind: the class.
        folder: local.
        options: torch_dtype, device_map, variant, ...: for from_pretrained. The dtype may be a name; with "auto" every
            tensor has the one that it was saved in.

    Raises:
        EbdiffError: weights that are missing, damaged, or another architecture's, or no such dtype.
    """
    saved: Mapping[str, torch.dtype] = {}
    try:
        if kind.__module__ == "ebdiff":
            return kind.from_pretrained(str(folder), **options)
        asked = options.pop("dtype", None) or options.pop("torch_dtype", None)
        if asked == "auto":
            saved = _dtypes_in(folder, options.get("variant"))
        options["torch_dtype"] = _widest(saved.values()) if asked == "auto" else dtype_named(asked)
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


def dtype_named(wanted: torch.dtype | str | None) -> torch.dtype | None:
    """By its name, too; None for "auto"."""
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if isinstance(found, torch.dtype):
        return found
    if wanted in (None, "auto"):
        return None
    raise EbdiffError("torch_dtype", expected='a torch.dtype, its name, or "auto"', got=repr(wanted), remedy="name one")


def _dtypes_in(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """{name: dtype} of the tensors in the files that diffusers would read: one, or those of the index beside them."""
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

    stem, _, ending = SAFETENSORS_WEIGHTS_NAME.partition(".")
    middle = f"{variant}." if variant else ""
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.{middle}json"
    named = {f"{stem}.{middle}{ending}"}
    if index.is_file():
        named = set(files.read_object(index).get("weight_map", {}).values())
    found: dict[str, torch.dtype] = {}
    for name in sorted(named):
        found |= files.dtypes_in(folder / name)
    return found


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What holds the floating-point ones without rounding; float32 holds every one of 8 bits."""
    floating = [torch.float32 if dtype.itemsize == 1 else dtype for dtype in dtypes if dtype.is_floating_point]
    return reduce(torch.promote_types, floating) if floating else torch.float32
