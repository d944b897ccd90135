"""Memory for tensors that ends at a wall: a read or write behind it ends the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["behind_wall", "bytes_of", "closed", "fenced", "sparse"]

_PAGE = mmap.PAGESIZE
_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOTHING, _READ_WRITE, _NO_RESERVE = 0, 3, 0x4000


def closed(length: int) -> int:
    """The address of memory that may be neither read nor written."""
    return _map(length, _NOTHING)


def sparse(length: int) -> int:
    """The address of so much zeroed memory, of which only what is touched takes room."""
    return _map(length, _READ_WRITE)


def behind_wall(tensor: Tensor) -> Tensor:
    """A copy of a tensor and all of its storage, whose end (rounded up to 16 bytes) is the end of accessible memory."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    room = -(-max(len(content), 1) // 16) * 16
    length = -(-room // _PAGE) * _PAGE
    area = mmap.mmap(-1, length + _PAGE)  # given back with the tensor, which holds it
    memory = torch.frombuffer(area, dtype=torch.uint8, offset=length - room, count=room)
    assert _C.mprotect(memory.data_ptr() + room, _PAGE, _NOTHING) == 0, ctypes.get_errno()
    memory[: len(content)] = content
    memory[len(content) :] = 0xA5
    whole = memory.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())


def bytes_of(table: Any) -> Tensor:
    """Of a `_C.CudaTable`."""
    return torch.frombuffer(bytearray(table), dtype=torch.uint8)


def fenced(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in front of memory that must not be touched."""
    return [behind_wall(tensor) for tensor in tensors]


def _map(length: int, protection: int) -> int:
    # Never given back: few tests ask for it.
    address = _C.mmap(None, length, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1, 0)
    assert address != ctypes.c_void_p(-1).value, ctypes.get_errno()
    return int(address)
