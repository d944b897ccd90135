"""Plain arrays out of .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["arrays_of", "read_npz"]


def arrays_of(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a .npz file; nothing is unpickled.

    Raises:
        EbdiffError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception as error:  # a damaged archive raises nearly anything, a single array has no names
        raise EbdiffError(
            f"{path} is damaged",
            expected="a whole .npz file of plain arrays",
            got=str(error),
            remedy="copy or write it again",
        ) from None


def read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The arrays of a .npz file as tensors, and its single values as words: what `read_tensors` gives of safetensors.

    Raises:
        EbdiffError: the file is missing or damaged, or holds what is no number.
    """
    arrays = arrays_of(path)
    try:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items() if array.ndim}
    except TypeError as error:
        raise EbdiffError(f"{path} holds what is no number", got=str(error), remedy="write numbers") from None
    return tensors, {name: str(array) for name, array in arrays.items() if not array.ndim}
