"""The CUDA kernels, compiled by g++ and run on the CPU: the real index arithmetic and values, but no GPU.

What that finds and what it does not is said in cuda_on_cpu/emulator.cpp. Tensors and tables lie in front of memory that
must not be touched, and results are compared over whole storages, so that a stray access does not go unnoticed. More in
test_cuda_on_cpu_limits.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import Emulator, needs_compiler
from cuda_on_cpu.memory import behind_wall, fenced
from op_cases import FLOATS, LAYOUTS, OTHERS, STYLES, cases, keep_of, same, same_bytes, strided, tensor_of, values
from torch import Tensor

from ebdiff.ops import native_cuda
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, masked_adamw_, scatter_back
from ebdiff.ops.channel_mask_reference import Lists

TILE = 1024  # kTile with the 64 threads of the emulated blocks
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.05, "step": 3, "ema_decay": 0.9}
NUMBERS = (1 - 0.9, 0.98, 1 - 0.98, 1 - 3e-3 * 0.05, (1 - 0.98**3) ** -0.5, 1e-8, 3e-3 / (1 - 0.9**3), 1 - 0.9)

pytest_plugins = ["cuda_on_cpu.served"]
pytestmark = needs_compiler


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


# (shape, strides) of slices whose rows are or are not multiples of 16 bytes apart; rows of one and of two strides
PITCHES = [((9, 64), (72, 1)), ((9, 64), (65, 1)), ((9, 64), (66, 1)), ((9, 63), (64, 1)), ((9, 128), (144, 1))]
PITCHES += [((3, 4, 64), (600, 72, 1)), ((3, 4, 64), (601, 72, 1)), ((40, 30, 16), (544, 16, 1)), ((9, 16), (40, 2))]


def pitched(dtype: torch.dtype) -> tuple[list[Tensor], Axes]:
    """Slices of wider tensors: unmasked, and masked along the first, the last and all dimensions."""
    tensors, masks = [], []
    for shape, strides in PITCHES:
        for dims in ((), (0,), (len(shape) - 1,), range(len(shape))):
            tensors.append(strided(shape, strides, dtype))
            masks.append({d: keep_of(shape[d], "some", len(tensors) + d) for d in dims})
    return tensors, Axes.of(masks)


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
    check_masks(*pitched(dtype))


def test_gaps_of_arenas_are_zero(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, axes = sized([(5, 7), (1,), (3, 3, 3), (0,), (40, 40)], torch.bfloat16)
    monkeypatch.setattr(Tensor, "new_empty", lambda *_, dtype: torch.full((4096,), float("nan"), dtype=dtype))
    small = compact(tensors, axes)
    arena = small[0].as_strided((4096,), (1,), 0)
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
    check_adamw(*pitched(dtype), ema=ema, maximize=maximize)


def test_adamw_reads_its_numbers_from_the_device(emulator: Emulator) -> None:
    tensors, axes = sized([(7, 33), (65,)], torch.bfloat16)
    by_value = state(tensors)
    masked_adamw_(*by_value, axes, **SETTINGS, maximize=True)
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)
    for order in (0, 1):  # threads hand each other the numbers
        by_address = state(tensors)
        emulator.order(order)
        native_cuda.masked_adamw_(Lists(*by_address), axes, numbers, True)
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
    tensors += [strided(shape, strides, dtype) for shape, strides in PITCHES]
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


def test_channel_sums_of_several_dtypes(emulator: Emulator) -> None:
    tensors = [values((40, 70), dtype, seed=i) for i, dtype in enumerate([*FLOATS, *FLOATS])]
    apart = [channel_sums([tensor], [], [0, 0], [1, 0], "absolute") for tensor in tensors]
    emulator.launches()
    together = channel_sums(tensors, [], [i // 2 for i in range(16)], [1, 0] * 8, "absolute")
    assert torch.equal(together, torch.cat(apart))
    assert emulator.launches() == 4 + 1


@pytest.mark.parametrize("width", [0, 1, 3, 4, 29, 64, 1000, 1001])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_mask_distance(emulator: Emulator, width: int, order: int) -> None:
    emulator.order(order)
    for lead in (0, 1):
        bits = behind_wall(torch.randint(0, 256, (lead + 6 * width,), dtype=torch.uint8))[lead:].view(6, width)
        differ = bits ^ bits[4]
        expected = sum(((differ >> k) & 1).sum(1) for k in range(8))
        assert torch.equal(mask_distance(bits, 4), expected)
