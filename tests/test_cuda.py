"""The operators on a GPU: bit for bit those on the CPU, on the current stream, in CUDA graphs, past 2^31 elements.

benchmarks/sanitize_gpu.sh runs this file under compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from op_cases import FLOATS, LAYOUTS, OTHERS, STYLES, cases, keep_of, same, same_bytes, tensor_of, twins, values
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.ops import adamw, channel_mask_reference, cuda_table, native, native_cuda
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, masked_adamw_, scatter_back
from ebdiff.ops.channel_mask_reference import Lists

SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.05, "ema_decay": 0.9}


@pytest.fixture(autouse=True)
def only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA tensors are served by the kernels; a fall back to the reference is a failure."""
    if not native.has_cuda():
        pytest.skip(f"no CUDA part: {native.missing().get('cuda', native.why_not())}")
    for name in ("apply_mask_", "compact", "scatter_back_", "masked_adamw_", "channel_sums", "mask_distance"):
        plain = getattr(channel_mask_reference, name)
        monkeypatch.setattr(channel_mask_reference, name, lambda x, *rest, plain=plain: refuse_cuda(plain, x, *rest))


def refuse_cuda(plain: Any, x: Any, *rest: Any) -> Any:
    assert (x if isinstance(x, Tensor) else x[0]).device.type == "cpu", "the reference was called"
    return plain(x, *rest)


def moved(tensor: Tensor, device: str) -> Tensor:
    """The same values at the same places of a storage on another device."""
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).to(device)
    whole = storage.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(
        whole, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def cuda(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [moved(tensor, "cuda") for tensor in tensors]


def back(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [moved(tensor, "cpu") for tensor in tensors]


def state(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """p, g, m, v, e, laid out as `tensors`."""
    lists = [twins(tensors) for _ in range(5)]
    for k, part in enumerate(lists):
        for i, tensor in enumerate(part):
            tensor.copy_(values(tensor.shape, tensor.dtype, seed=10 * i + k))
    for tensor in lists[3]:
        tensor.abs_()
    return lists


def small_case(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Axes]:
    shapes = [(40, 30, 3, 3), (700, 520), (67,), (9, 5)]
    masks = [{d: keep_of(n, "some", 5 * i + d) for d, n in enumerate(shape[:2])} for i, shape in enumerate(shapes)]
    return [values(shape, dtype, seed=i) for i, shape in enumerate(shapes)], Axes.of(masks)


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS])
def test_masks_and_compaction_are_those_of_the_cpu(dtype: torch.dtype, style: str) -> None:
    names, tensors, axes = cases(dtype, style)
    theirs, ours = twins(tensors), cuda(tensors)
    apply_mask_(theirs, axes)
    apply_mask_(ours, axes)
    small, ours_small = compact(tensors, axes), compact(cuda(tensors), axes)
    into, ours_into = twins(tensors), cuda(tensors)
    for tensor in (*into, *ours_into):
        tensor.fill_(1)
    scatter_back(small, axes, tensors, into=into)
    scatter_back(ours_small, axes, tensors, into=ours_into)
    assert same_bytes(moved(ours_small[0], "cpu"), small[0])  # the whole arena
    for name, left, right in zip(names * 2, back([*ours, *ours_into]), [*theirs, *into], strict=True):
        assert same_bytes(left, right), name


@pytest.mark.parametrize(("ema", "maximize"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_adamw_is_that_of_the_cpu(dtype: torch.dtype, ema: bool, maximize: bool) -> None:
    names, tensors, axes = cases(dtype, "some")
    more, more_axes = small_case(dtype)
    shift = [i + len(tensors) for i in more_axes.owner]
    axes = Axes((*axes.keep, *more_axes.keep), (*axes.owner, *shift), (*axes.dims, *more_axes.dims))
    lists = state([*tensors, *more])
    ours = [cuda(part) for part in lists]
    for step in (1, 2, 3):
        for part in (lists, ours):
            masked_adamw_(*part[:4], part[4] if ema else [], axes, **SETTINGS, step=step, maximize=maximize)
    for part, theirs in zip(ours, lists, strict=True):
        for i, (left, right) in enumerate(zip(back(part), theirs, strict=True)):
            assert same(left, right), f"{names[i] if i < len(names) else 'larger'}"


@pytest.mark.parametrize("kind", ["square", "absolute", "product", "absolute product"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_channel_sums(dtype: torch.dtype, kind: Any) -> None:
    tensors = [tensor_of(layout, dtype) for layout in LAYOUTS] + small_case(dtype)[0]
    y = twins(tensors) if "product" in kind else []
    places = [(i, d) for i, tensor in enumerate(tensors) for d in range(tensor.dim())]
    owner, dims = [i for i, _ in places], [d for _, d in places]
    x, y = cuda(tensors), cuda(y)
    sums = channel_sums(x, y, owner, dims, kind)
    assert all(torch.equal(channel_sums(x, y, owner, dims, kind), sums) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    for part, (i, d) in zip(sums.split([tensors[i].shape[d] for i, d in places]), places, strict=True):
        value = tensors[i].to(wide)
        terms = (value if kind == "absolute" else value * value).double()  # y is x
        terms = terms.abs() if "absolute" in kind else terms
        others = [k for k in range(terms.dim()) if k != d]
        exact = terms.sum(others) if others else terms
        # 4 + 5 additions in the compute type one after another, in rows; 8 in columns
        assert ((part - exact).abs() <= 10 * torch.finfo(wide).eps * exact.abs()).all(), (tensors[i].shape, d)


def test_mask_distance() -> None:
    for width in (0, 1, 29, 64, 5001, 40000):
        bits = torch.randint(0, 256, (5, width), dtype=torch.uint8)
        assert torch.equal(mask_distance(bits.cuda(), 3).cpu(), mask_distance(bits, 3))


def test_opcheck() -> None:
    tensors, axes = small_case()
    ours, triples = cuda(tensors), (list(axes.keep), list(axes.owner), list(axes.dims))
    ops = torch.ops.ebdiff
    small = compact(ours, axes)
    lists = [cuda(part) for part in state(tensors)]
    numbers = (3e-3, 0.9, 0.98, 1e-8, 0.05, 3, 0.9, False)
    torch.library.opcheck(ops.apply_mask_.default, (ours, *triples))
    torch.library.opcheck(ops.compact.default, (ours, *triples, axes.kept))
    torch.library.opcheck(ops.scatter_back_.default, (ours, small, *triples))
    torch.library.opcheck(ops.masked_adamw_.default, (*lists, *triples, *numbers))
    torch.library.opcheck(ops.channel_sums.default, (ours, [], [0, 1], [0, 1], "square"))
    torch.library.opcheck(ops.mask_distance.default, (torch.zeros(3, 9, dtype=torch.uint8, device="cuda"), 1))


def test_nothing_waits_for_the_device() -> None:
    tensors, axes = small_case()
    ours, lists = cuda(tensors), [cuda(part) for part in state(tensors)]

    def everything() -> None:
        apply_mask_(ours, axes)
        scatter_back(compact(ours, axes), axes, ours, into=ours)
        masked_adamw_(*lists, axes, **SETTINGS, step=1)

    everything()  # uploads the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used() -> None:
    tensors, axes = small_case()
    expected = twins(tensors)
    apply_mask_(expected, axes)
    ours = cuda(tensors)
    sources = cuda(tensors)
    apply_mask_(cuda(tensors), axes)  # the table belongs to the default stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tensor in ours:
            tensor.zero_()
        torch.cuda._sleep(50_000_000)
        for tensor, source in zip(ours, sources, strict=True):
            tensor.copy_(source)
        apply_mask_(ours, axes)
    stream.synchronize()
    assert all(map(same_bytes, back(ours), expected))


def test_a_graph_takes_the_steps_it_was_captured_with() -> None:
    tensors, axes = small_case(torch.bfloat16)
    eager, captured = ([cuda(part) for part in state(tensors)] for _ in range(2))
    saved = [[tensor.clone() for tensor in part] for part in captured]
    masked_adamw_(*captured, axes, **SETTINGS, step=4)  # uploads the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked_adamw_(*captured, axes, **SETTINGS, step=4)
    torch._foreach_copy_([t for part in captured for t in part], [t for part in saved for t in part])
    cuda_table._tables.clear()  # the graph keeps its own
    for _ in range(3):
        graph.replay()
        masked_adamw_(*eager, axes, **SETTINGS, step=4)
    for left, right in zip(captured, eager, strict=True):
        assert all(map(same, back(left), back(right)))


def test_a_graph_can_read_its_numbers_from_the_device() -> None:
    tensors, axes = small_case()
    eager, captured = ([cuda(part) for part in state(tensors)] for _ in range(2))

    def numbers_of(step: int) -> Tensor:
        named = adamw._adamw_numbers(*(SETTINGS[name] for name in list(SETTINGS)[:5]), step, SETTINGS["ema_decay"])
        return torch.tensor([named[name] for name in native_cuda.NUMBERS], dtype=torch.float64)

    numbers = numbers_of(1).cuda()
    native_cuda.masked_adamw_(Lists(*(cuda(part) for part in state(tensors))), axes, numbers, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native_cuda.masked_adamw_(Lists(*captured), axes, numbers, False)
    for step in (1, 2, 3):
        numbers.copy_(numbers_of(step))
        graph.replay()
        masked_adamw_(*eager, axes, **SETTINGS, step=step)
    for left, right in zip(captured, eager, strict=True):
        assert all(map(same, back(left), back(right)))


def test_a_capture_with_new_masks_says_what_to_do() -> None:
    x = torch.ones(5, 3, device="cuda")
    keep = torch.tensor([True, False, False, True, True])
    y, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y += 1
        with pytest.raises(EbdiffError, match="before capturing"):
            apply_mask_([x], Axes((keep,), (0,), (0,)))


@pytest.mark.parametrize("pitch", [1024, 1028])
def test_past_2_to_the_31_elements(pitch: int) -> None:
    rows = 2**31 // 1024 + 3
    if torch.cuda.mem_get_info()[0] < 4 * rows * pitch * 2:
        pytest.skip("too little memory")
    x = torch.ones(rows, pitch, dtype=torch.bfloat16, device="cuda")[:, :1024]
    keep_rows, keep_columns = torch.ones(rows, dtype=torch.bool), torch.ones(1024, dtype=torch.bool)
    keep_rows[[0, -2]] = False
    keep_columns[[3, 1023]] = False
    axes = Axes((keep_rows, keep_columns), (0, 0), (0, 1))
    (small,) = compact([x], axes)
    assert small.shape == (rows - 2, 1022)
    assert bool((small == 1).all())
    apply_mask_([x], axes)
    assert int(x[-4:].sum()) == 3 * 1022
    assert int(x[:4].sum()) == 3 * 1022
    assert channel_sums([x], [], [0], [1], "absolute").tolist() == [(rows - 2.0) * k for k in keep_columns.tolist()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used_and_left_again() -> None:
    tensors, axes = small_case()
    expected = twins(tensors)
    apply_mask_(expected, axes)
    ours = [tensor.to("cuda:1") for tensor in tensors]
    apply_mask_(ours, axes)
    assert torch.cuda.current_device() == 0
    assert all(map(same_bytes, back(ours), expected))
