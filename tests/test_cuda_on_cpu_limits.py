"""The CUDA kernels run on the CPU (see test_cuda_on_cpu.py) where it is many, far, new or wrong."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cuda_on_cpu.build import Emulator, needs_compiler
from cuda_on_cpu.memory import behind_wall, bytes_of, closed, sparse
from test_cuda_on_cpu import TILE, check_adamw, check_masks, sized
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.ops import cuda_table
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums

pytest_plugins = ["cuda_on_cpu.served"]
pytestmark = needs_compiler


def test_few_launches(emulator: Emulator) -> None:
    tensors, axes = sized([(3, 5)] * 1600, torch.float32)
    check_adamw(tensors, axes)
    assert emulator.launches() == 3  # 776 tensors fit into the parameters of one
    mixed = [*tensors[:100], *sized([(3, 5)] * 100, torch.int8)[0]]
    axes = Axes.of([{0: torch.tensor([True, False, True])}] * 200)
    check_masks(mixed, axes)
    assert emulator.launches() == 3  # apply, compact, back: one each, for both dtypes
    check_masks(*sized([(2, 3)] * 4000, torch.float16))
    assert emulator.launches() == 2 + 3 + 3
    sums = channel_sums(tensors, [], range(1600), [1] * 1600, "square")
    assert torch.allclose(sums, torch.cat([t.double().square().sum(0) for t in tensors]), rtol=1e-6)
    assert emulator.launches() == 1 + 1
    apply_mask_([torch.zeros(0, 3)], Axes((torch.tensor([True, False, True]),), (0,), (1,)))
    assert emulator.launches() == 0


def test_tables_are_found_again_by_contents(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []
    upload = cuda_table.upload
    monkeypatch.setattr(cuda_table, "upload", lambda *a: uploads.append(1) or upload(*a))
    keep = torch.tensor([True, False, True])
    for _ in range(2):  # other tensors, equal masks elsewhere
        x = torch.ones(2, 3)
        apply_mask_([x], Axes((keep.clone(),), (0,), (1,)))
        assert x.tolist() == [[1, 0, 1]] * 2
    assert len(uploads) == 1
    keep[0] = False  # in place, with the tensor's address and identity as before
    for expected in ([0, 0, 1], [0, 0, 1]):
        x = torch.ones(2, 3)
        apply_mask_([x], Axes((keep,), (0,), (1,)))
        assert x.tolist() == [expected] * 2
    assert len(uploads) == 2
    x = torch.ones(3, 2).t()
    apply_mask_([x], Axes((keep,), (0,), (1,)))  # another layout
    y = torch.ones(2, 6)
    twice = Axes((keep, torch.cat([keep, keep])), (0, 1), (1, 1))
    apply_mask_([x, y], twice)
    assert y.tolist() == [[0, 0, 1] * 2] * 2
    assert len(uploads) == 4
    monkeypatch.setattr(cuda_table, "_MOST", 2)
    for count in range(1, 5):
        apply_mask_([torch.ones(3, count)], Axes((keep,), (0,), (0,)))
    assert len(cuda_table._tables) <= 4
    monkeypatch.setattr(cuda_table, "is_capturing", lambda device: True)
    with pytest.raises(EbdiffError, match="before capturing"):
        apply_mask_([torch.ones(3, 9)], Axes((keep,), (0,), (0,)))


def table_for(emulator: Emulator, shape: list[int], strides: list[int], masks: dict[int, Tensor]) -> tuple[Any, Tensor]:
    keep = [mask.data_ptr() for mask in masks.values()]
    layout = emulator.module.Layout([shape], [strides], [0] * len(keep), list(masks), keep, True)
    table = emulator.module.cuda_table(layout)
    return table, behind_wall(bytes_of(table))


def test_what_is_kept_is_neither_read_nor_written(emulator: Emulator) -> None:
    rows = torch.ones(64, dtype=torch.bool)
    columns = torch.ones(100, dtype=torch.bool)
    table, memory = table_for(emulator, [64, 100], [100, 1], {0: rows, 1: columns})
    emulator.blocks_run()
    for address in (closed(64 * 100 * 4), closed(64 * 100 * 4) + 4):
        emulator.module.apply_mask_cuda(table, memory.data_ptr(), 0, 0, [address], [2])
    assert emulator.blocks_run() > 0


def test_addresses_behind_2_to_the_32(emulator: Emulator) -> None:
    pitch = 2**32 + 8
    keep = {0: torch.tensor([True, True, False]), 1: torch.tensor([True, False, True, True, True])}
    table, memory = table_for(emulator, [3, 5], [pitch, 1], keep)
    start, small = sparse(4 * (2 * pitch + 8)), torch.zeros(16)
    rows = [(ctypes.c_float * 5).from_address(start + 4 * pitch * r) for r in range(3)]
    for r, row in enumerate(rows):
        row[:] = [10 * r + c + 1 for c in range(5)]
    where = (table, memory.data_ptr(), 0, 0)
    emulator.module.compact_cuda(*where, [start], [small.data_ptr()], [2])
    assert small.tolist() == [1, 3, 4, 5, 11, 13, 14, 15] + [0] * 8
    emulator.module.apply_mask_cuda(*where, [start], [2])
    assert [list(row) for row in rows] == [[1, 0, 3, 4, 5], [11, 0, 13, 14, 15], [0] * 5]
    small *= 2
    emulator.module.scatter_back_cuda(*where, [start], [small.data_ptr()], [2])
    assert [list(row) for row in rows] == [[2, 0, 6, 8, 10], [22, 0, 26, 28, 30], [0] * 5]


@pytest.mark.parametrize("columns", [2**21, 2**10 - 3])
def test_positions_behind_2_to_the_33(emulator: Emulator, columns: int) -> None:
    rows = 2**33 // columns + 5
    keep = torch.ones(columns, dtype=torch.bool)
    keep[[0, 5, columns - 1]] = False
    table, memory = table_for(emulator, [rows, columns], [columns, 1], {1: keep})
    count = rows * columns
    start = sparse(2 * count + 64)
    tail = torch.frombuffer(
        (ctypes.c_int16 * (4 * TILE)).from_address(start + 2 * (count - 4 * TILE)), dtype=torch.int16
    )
    tail.fill_(7)
    blocks = -(-count // TILE)
    emulator.blocks(blocks - 3, blocks)
    emulator.blocks_run()
    emulator.module.apply_mask_cuda(table, memory.data_ptr(), 0, 0, [start], [1])
    assert emulator.blocks_run() == 3
    at = torch.arange(count - 4 * TILE, count)
    expected = keep[at % columns] | (at < (blocks - 3) * TILE)
    assert torch.equal(tail, expected * tail.new_full((), 7))
    assert int((~expected).sum()) > 0


def test_failures_are_exceptions_that_name_the_call(emulator: Emulator) -> None:
    table, memory = table_for(emulator, [2, 3], [3, 1], {0: torch.tensor([True, False])})
    x = torch.ones(2, 3)
    emulator.fail("out of luck")
    with pytest.raises(RuntimeError, match="launch of apply_mask_kernel: out of luck"):
        emulator.module.apply_mask_cuda(table, memory.data_ptr(), 3, 0, [x.data_ptr()], [2])
    emulator.fail("")
    assert emulator.device() == 0  # back from device 3
    with pytest.raises(ValueError, match="not as long as the table"):
        emulator.module.apply_mask_cuda(table, memory.data_ptr(), 0, 0, [], [2])
    plain_layout = emulator.module.Layout([[2]], [[1]], [0], [0], [torch.tensor([True, False]).data_ptr()])
    unlisted = emulator.module.cuda_table(plain_layout)
    with pytest.raises(ValueError, match="no kept positions"):
        emulator.module.compact_cuda(unlisted, bytes_of(unlisted).data_ptr(), 0, 0, [x.data_ptr()], [x.data_ptr()], [2])


def test_the_emulator_notices_what_is_not_aligned(emulator: Emulator) -> None:
    table, _ = table_for(emulator, [2, 3], [3, 1], {0: torch.tensor([True, False])})
    shifted = torch.cat([torch.zeros(4, dtype=torch.uint8), bytes_of(table)])
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="misaligned"):
        emulator.module.apply_mask_cuda(table, shifted.data_ptr() + 4, 0, 0, [x.data_ptr()], [2])
