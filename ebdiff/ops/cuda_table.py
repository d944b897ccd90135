"""What is static about lists of CUDA tensors and their masks, on their device: uploaded once, found by contents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from . import native
from .mask_axes import Axes
from .native_cpu import NotTaken, is_lazy, layout_of

__all__ = ["Table", "table_of"]

_MOST = 64
_tables: OrderedDict[tuple[Any, ...], Table] = OrderedDict()
_captured: dict[int, Table] = {}
_lock = Lock()


@dataclass(frozen=True)
class Table:
    """Where tensors and their masks lie.

    Attributes:
        layout: `_C.Layout`.
        compiled: `_C.CudaTable`.
        memory: its bytes, uint8 on the device.
        overlaps: elements of a tensor share memory.
        stream: the stream that the memory belongs to.
    """

    layout: Any
    compiled: Any
    memory: Tensor
    overlaps: bool
    stream: int

    def where(self) -> tuple[Any, int, int, int]:
        """The first arguments of `_C`'s functions: table, its address, number of the device, current stream."""
        device, address = self.memory.device, self.memory.data_ptr()
        stream = stream_of(device)
        if is_capturing(device):
            _captured[id(self)] = self  # a graph that is replayed reads it: it has to stay
        elif stream != self.stream:
            self.memory.record_stream(torch.cuda.current_stream(device))
        return self.compiled, address, device.index or 0, stream


def table_of(tensors: Sequence[Tensor], axes: Axes, *, indexed: bool = False, written: bool = True) -> Table:
    """The table of these tensors and masks; arguments as `native_cpu.layout_of`.

    One that is not on the device yet is uploaded, which waits for the current stream.

    Raises:
        NotTaken: as `layout_of`.
        EbdiffError: a CUDA graph is being captured, which forbids the upload.
    """
    if is_lazy(tensors):
        raise NotTaken
    device = tensors[0].device
    # Contents, not identities: other masks may say the same, and memory is used again.
    sizes = [mask.shape[0] for mask in axes.keep]
    masks = native.module().cuda_mask_bytes([mask.data_ptr() for mask in axes.keep], sizes)  # type: ignore[union-attr]
    places = tuple((tensor.shape, tensor.stride()) for tensor in tensors)
    key = (device, indexed, places, axes.owner, axes.dims, masks)
    with _lock:
        table = _tables.get(key)
        if table is not None:
            _tables.move_to_end(key)
    if table is None:
        table = _make(layout_of(tensors, axes, indexed=indexed, written=False), device)
        with _lock:
            _tables[key] = table
            if len(_tables) > _MOST:
                _tables.popitem(last=False)
    if written and table.overlaps:
        raise NotTaken
    return table


def _make(layout: Any, device: torch.device) -> Table:
    if is_capturing(device):
        raise EbdiffError(
            "masks and tensors that were not seen before, in a CUDA graph",
            expected="one call with them before the capture, which copies their table to the device",
            got="none",
            remedy="run a step before capturing it, as torch.cuda.graph asks for anyway",
        )
    compiled = native.module().cuda_table(layout)  # type: ignore[union-attr]
    return Table(layout, compiled, upload(compiled, device), layout.any_overlaps(), stream_of(device))


def upload(compiled: Any, device: torch.device) -> Tensor:
    """The bytes of a `_C.CudaTable` on a device. From pageable memory: it is there when this returns."""
    return torch.frombuffer(bytearray(compiled), dtype=torch.uint8).to(device)


def stream_of(device: torch.device) -> int:
    """The cudaStream_t that is current on a device."""
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Is a CUDA graph being captured on the current stream of a device?"""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
