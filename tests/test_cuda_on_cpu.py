"""The CUDA kernels, compiled by g++ and run on the CPU: the real index arithmetic and values, but no GPU.

What that finds and what it does not is said in cuda_on_cpu/emulator.cpp. Tensors and tables lie in front of memory that
must not be touched, and results are compared over whole storages, so that a stray access does not go unnoticed.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import Emulator, build
from cuda_on_cpu.memory import behind_wall, closed, sparse
from op_cases import FLOATS, LAYOUTS, OTHERS, STYLES, cases, keep_of, same, same_bytes, tensor_of, values
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.ops import adamw, channel_mask, channel_mask_reference, cuda_table, native, native_cuda, serve
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, masked_adamw_, scatter_back

TILE = 1024  # kTile with the 64 threads of the emulated blocks
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.05, "step": 3, "ema_decay": 0.9}
NUMBERS = (1 - 0.9, 0.98, 1 - 0.98, 1 - 3e-3 * 0.05, (1 - 0.98**3) ** -0.5, 1e-8, 3e-3 / (1 - 0.9**3), 1 - 0.9)

pytestmark = pytest.mark.skipif(
    os.name == "nt" or shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is None, reason="no g++"
)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def emulator(machine: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """CPU tensors are served by ebdiff.ops.native_cuda and the emulated kernels."""

    def not_here(*arguments: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(native, "module", lambda: machine.module)
    for module in (serve, channel_mask, adamw):
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda tensor: native_cuda)
    for name in ("apply_mask_", "compact", "scatter_back_", "masked_adamw_", "channel_sums", "mask_distance"):
        monkeypatch.setattr(channel_mask_reference, name, not_here)
    for module in (cuda_table, native_cuda):
        monkeypatch.setattr(module, "stream_of", lambda device: 0)
    monkeypatch.setattr(cuda_table, "is_capturing", lambda device: False)
    monkeypatch.setattr(cuda_table, "upload", lambda table, device: behind_wall(bytes_of(table)))
    cuda_table._tables.clear()
    machine.launches()
    yield machine
    machine.order(0)
    machine.blocks()
    machine.fail("")


def bytes_of(table: Any) -> Tensor:
    return torch.frombuffer(bytearray(table), dtype=torch.uint8)


def fenced(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [behind_wall(tensor) for tensor in tensors]


def removed_of(tensor: Tensor, masks: dict[int, Tensor]) -> Tensor:
    """bool, True where a channel is removed."""
    removed = torch.zeros(tensor.shape, dtype=torch.bool)
    for dim, keep in masks.items():
        removed |= ~keep.view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return removed


def masks_of(axes: Axes, count: int) -> list[dict[int, Tensor]]:
    masks: list[dict[int, Tensor]] = [{} for _ in range(count)]
    for keep, i, dim in zip(axes.keep, axes.owner, axes.dims, strict=True):
        masks[i][dim] = keep
    return masks


def cut(tensor: Tensor, masks: dict[int, Tensor]) -> Tensor:
    for dim, keep in masks.items():
        tensor = tensor.index_select(dim, keep.nonzero()[:, 0])
    return tensor


def sized(shapes: Sequence[Sequence[int]], dtype: torch.dtype, style: str = "some") -> tuple[list[Tensor], Axes]:
    """Contiguous tensors, every dimension masked."""
    tensors = [values(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    masks = [{d: keep_of(n, style, 5 * i + d) for d, n in enumerate(shape)} for i, shape in enumerate(shapes)]
    return tensors, Axes.of(masks)


# Around the sizes of vectors, words of bits and tiles; rows shorter than a vector; tiles of many and of few rows
SHAPES = [*product((1, 2, 33), (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 65)), (9, TILE - 1), (9, TILE), (9, TILE + 1)]
SHAPES += [(4, 4 * TILE + 8), (700, 5), (1500, 1), (3, 3, 70, 9), (TILE,), (TILE + 1,), (3 * TILE,), (0, 4), (4, 0)]


def check_masks(tensors: list[Tensor], axes: Axes) -> None:
    """apply_mask_, compact and scatter_back against indexing."""
    masks = masks_of(axes, len(tensors))
    ours = fenced(tensors)
    apply_mask_(ours, axes)
    small = compact(fenced(tensors), axes)
    into = [tensor.fill_(1) for tensor in fenced(tensors)]
    scatter_back([behind_wall(part.clone()) for part in small], axes, tensors, into=into)
    for i, tensor in enumerate(tensors):
        expected = behind_wall(tensor)
        expected[removed_of(tensor, masks[i])] = 0
        assert same_bytes(ours[i], expected), f"apply_mask_: {tensor.shape}, {tensor.stride()}, {list(masks[i])}"
        assert torch.equal(small[i], cut(tensor, masks[i])), f"compact: {tensor.shape}, {tensor.stride()}"
        expected = behind_wall(tensor)
        expected[removed_of(tensor, masks[i])] = 1
        assert same_bytes(into[i], expected), f"scatter_back: {tensor.shape}, {tensor.stride()}, {list(masks[i])}"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS])
def test_masks_and_compaction_in_every_layout(emulator: Emulator, dtype: torch.dtype, style: str) -> None:
    _, tensors, axes = cases(dtype, style)
    check_masks(tensors, axes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_masks_and_compaction_in_every_size(emulator: Emulator, dtype: torch.dtype) -> None:
    check_masks(*sized(SHAPES, dtype))


def test_gaps_of_arenas_are_zero(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, axes = sized([(5, 7), (1,), (3, 3, 3), (0,), (40, 40)], torch.bfloat16)
    monkeypatch.setattr(channel_mask, "_new_arenas", lambda *a: [torch.full((1024,), float("nan")).bfloat16()])
    small = compact(tensors, axes)
    arena = small[0].as_strided((1024,), (1,), 0)
    spots = [(part.storage_offset(), part.numel()) for part in small]
    for start, count in spots:
        assert (arena[start + count : start + -(-count // 32) * 32] == 0).all()
    assert arena[spots[-1][0] + -(-spots[-1][1] // 32) * 32 :].isnan().all()


def expected_adamw(lists: list[Tensor], removed: Tensor, maximize: bool) -> list[Tensor]:
    """In the compute type, each operation rounded once."""
    c1, b2, c2, decay, inverse, eps, step_size, ce = NUMBERS
    wide = torch.promote_types(lists[0].dtype, torch.float32)
    p, g, m, v, e = (tensor.to(wide) for tensor in lists)
    g = -g if maximize else g
    # numpy: the root of MKL, which torch calls, is not always the nearest
    root = torch.from_numpy(np.asarray(np.sqrt((v * b2 + (g * g) * c2).double().numpy()))).to(wide)
    m = m + (g - m) * c1
    v = v * b2 + (g * g) * c2
    p = p * decay - (m / (root * inverse + eps)) * step_size
    stored = p.to(lists[0].dtype)
    e = e - (e - stored.to(wide)) * ce
    results = [stored, *(tensor.to(stored.dtype) for tensor in (m, v, e))]
    return [tensor.masked_fill(removed, 0) for tensor in results]


def state(tensors: list[Tensor], seed: int = 0) -> list[list[Tensor]]:
    """p, g, m, v, e of the layout of `tensors`: removed places hold NaN too."""
    lists = [[behind_wall(tensor) for tensor in tensors] for _ in range(5)]
    for k, tensors in enumerate(lists):
        for i, tensor in enumerate(tensors):
            tensor.copy_(values(tensor.shape, tensor.dtype, seed=seed + 10 * i + k))
    for tensor in lists[3]:
        tensor.abs_()
    return lists


def check_adamw(tensors: list[Tensor], axes: Axes, *, ema: bool = True, maximize: bool = False) -> None:
    lists, masks = state(tensors), masks_of(axes, len(tensors))
    for tensor, own in zip(lists[1], masks, strict=True):
        tensor[removed_of(tensor, own)] = float("nan")
    before = [[tensor.clone() for tensor in part] for part in lists]
    masked_adamw_(*lists[:4], lists[4] if ema else [], axes, **SETTINGS, maximize=maximize)
    for i, tensor in enumerate(tensors):
        expected = expected_adamw([part[i] for part in before], removed_of(tensor, masks[i]), maximize)
        if not ema:
            expected[3] = before[4][i]
        for name, ours, theirs in zip("pmve", (lists[0], *lists[2:]), expected, strict=True):
            assert same(ours[i], theirs), f"{name} of {tensor.shape}, {tensor.stride()}, {list(masks[i])}"
        assert same(lists[1][i], before[1][i])


@pytest.mark.parametrize("style", ["some", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_adamw_in_every_layout(emulator: Emulator, dtype: torch.dtype, style: str) -> None:
    _, tensors, axes = cases(dtype, style)
    check_adamw(tensors, axes)


@pytest.mark.parametrize(("ema", "maximize"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_adamw_in_every_size(emulator: Emulator, dtype: torch.dtype, ema: bool, maximize: bool) -> None:
    check_adamw(*sized(SHAPES, dtype), ema=ema, maximize=maximize)


def test_adamw_reads_its_numbers_from_the_device(emulator: Emulator) -> None:
    tensors, axes = sized([(7, 33), (65,)], torch.bfloat16)
    by_value, by_address = state(tensors), state(tensors)
    masked_adamw_(*by_value, axes, **SETTINGS, maximize=True)
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)
    native_cuda.masked_adamw_(*by_address, axes.keep, axes.owner, axes.dims, numbers, True)
    for left, right in zip(by_value, by_address, strict=True):
        assert all(map(same_bytes, left, right))


def terms_of(x: Tensor, y: Tensor | None, kind: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # the product is rounded once, in the compute type
    value = x.to(wide) * (y.to(wide) if y is not None else x.to(wide) if kind == "square" else 1)
    return value.abs() if "absolute" in kind else value


@pytest.mark.parametrize("kind", ["square", "absolute", "product", "absolute product"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_channel_sums(emulator: Emulator, dtype: torch.dtype, kind: Any) -> None:
    tensors = [tensor_of(layout, dtype) for layout in LAYOUTS]
    tensors += [values(shape, dtype) for shape in (*SHAPES, (70, 600), (300, 4, 3, 3), (2, 5, 9, 9))]
    y = [behind_wall(tensor).mul_(-1.5) for tensor in tensors] if "product" in kind else []
    places = [(i, d) for i, tensor in enumerate(tensors) for d in range(tensor.dim())]
    owner, dims = [i for i, _ in places], [d for _, d in places]
    sums = channel_sums(fenced(tensors), y, owner, dims, kind)
    # At most 4 + 5 additions in the compute type one after another: within a row, across a warp; 8 down a column.
    bound = 10 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for part, (i, d) in zip(sums.split([tensors[i].shape[d] for i, d in places]), places, strict=True):
        terms = terms_of(tensors[i], y[i] if y else None, kind).double()
        others = [k for k in range(terms.dim()) if k != d]
        exact, size = (t.sum(others) if others else t for t in (terms, terms.abs()))
        assert ((part - exact).abs() <= bound * size).all(), f"{tensors[i].shape}, {tensors[i].stride()}, {d}"
    for order in (1, 2):
        emulator.order(order)
        assert torch.equal(channel_sums(tensors, y, owner, dims, kind), sums)


@pytest.mark.parametrize("width", [0, 1, 3, 4, 29, 64, 1000, 1001])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_mask_distance(emulator: Emulator, width: int, order: int) -> None:
    emulator.order(order)
    for lead in (0, 1):
        bits = behind_wall(torch.randint(0, 256, (lead + 6 * width,), dtype=torch.uint8))[lead:].view(6, width)
        differ = bits ^ bits[4]
        expected = sum(((differ >> k) & 1).sum(1) for k in range(8))
        assert torch.equal(mask_distance(bits, 4), expected)


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
