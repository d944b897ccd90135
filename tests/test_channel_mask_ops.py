"""The operators as torch sees them: what they refuse, opcheck, autograd, torch.compile, fuzzing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import FLOATS, OPS, keep_of, needs_native, strided, values
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ebdiff import EbdiffError
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, masked_adamw_, scatter_back

ROOT = Path(__file__).parent.parent
KEEP = torch.tensor([True, False, True])
ROWS = Axes((KEEP,), (0,), (0,))
ops = torch.ops.ebdiff
NUMBERS: dict[str, Any] = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1, "step": 3}

# What fits no tensor [3, 4]: (tensors, keep, owner, dims)
WRONG: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "no tensors": lambda x: ([], [KEEP], [0], [0]),
    "nothing at all": lambda x: ([], [], [], []),
    "an owner too high": lambda x: ([x], [KEEP], [1], [0]),
    "an owner below zero": lambda x: ([x], [KEEP], [-1], [0]),
    "a dimension too high": lambda x: ([x], [KEEP], [0], [2]),
    "a dimension below zero": lambda x: ([x], [KEEP], [0], [-2]),
    "fewer owners": lambda x: ([x], [KEEP], [], [0]),
    "fewer dimensions": lambda x: ([x], [KEEP], [0], []),
    "fewer masks": lambda x: ([x], [], [0], [0]),
    "two masks of a dimension": lambda x: ([x], [KEEP, KEEP], [0, 0], [0, 0]),
    "a mask too long": lambda x: ([x], [torch.ones(4).bool()], [0], [0]),
    "a mask of two dimensions": lambda x: ([x], [KEEP[:, None]], [0], [0]),
    "a mask of numbers": lambda x: ([x], [KEEP.to(torch.uint8)], [0], [0]),
    "a mask on meta": lambda x: ([x], [KEEP.to("meta")], [0], [0]),
    "another tensor on meta": lambda x: ([x, torch.ones(3, device="meta")], [KEEP], [0], [0]),
    "a sparse tensor": lambda x: ([x, torch.ones(3).to_sparse()], [KEEP], [0], [0]),
    "a vector where a matrix is meant": lambda x: ([x, torch.ones(3)], [KEEP], [1], [1]),
    "a scalar": lambda x: ([x, torch.ones(())], [KEEP[:1]], [1], [0]),
}


@pytest.mark.parametrize("name", WRONG)
def test_masks_that_fit_nothing_are_refused_and_nothing_changes(name: str) -> None:
    x = values([3, 4])
    tensors, keep, owner, dims = WRONG[name](x)
    before, small = x.clone(), [torch.zeros_like(t) for t in tensors]
    kept = [2] * len(keep)
    for call in (
        lambda: ops.apply_mask_(tensors, keep, owner, dims),
        lambda: ops.compact(tensors, keep, owner, dims, kept),
        lambda: ops.scatter_back_(tensors, small, keep, owner, dims),
        lambda: ops.masked_adamw_(tensors, small, small, small, [], keep, owner, dims, *[0.1] * 5, 1, 0.0, False),
    ):
        with pytest.raises((EbdiffError, NotImplementedError)):
            call()
    assert torch.equal(x, before)


def test_what_else_is_refused() -> None:
    x, expanded = values([3, 4]), torch.ones(1, 4).expand(3, 4)
    with pytest.raises(EbdiffError, match="no two elements in the same place"):
        apply_mask_([x, expanded], ROWS)
    with pytest.raises(EbdiffError, match="quint8"):
        apply_mask_([torch.quantize_per_tensor(x, 0.1, 10, torch.quint8)], ROWS)
    with pytest.raises(EbdiffError, match="number of True"):
        ops.compact([x], [KEEP], [0], [0], [3])
    with pytest.raises(EbdiffError, match="small tensor 0"):
        scatter_back([x], ROWS, [x])
    with pytest.raises(EbdiffError, match="small tensor 0"):
        scatter_back([x[:2].double()], ROWS, [x])
    with pytest.raises(EbdiffError, match="small tensors"):
        scatter_back([], ROWS, [x])
    with pytest.raises(EbdiffError, match="memory of their own"):
        scatter_back([x[1:]], ROWS, [x], into=[x])
    for arguments in (
        ([x], [], [0], [0], "cube"),
        ([x], [], [0], [0], "product"),
        ([x], [x], [0], [0], "square"),
        ([x], [x.t()], [0], [0], "product"),
        ([x.long()], [], [0], [0], "square"),
        ([x], [], [0, 0], [0, 0], "square"),
        ([x], [], [0], [2], "square"),
        ([x], [], [0], [], "square"),
        ([x], [x.to("meta")], [0], [0], "product"),
        ([], [x], [0], [0], "product"),
    ):
        with pytest.raises(EbdiffError):
            ops.channel_sums(*arguments)
    bits = torch.zeros(3, 4, dtype=torch.uint8)
    for wrong in ((bits, 3), (bits, -4), (bits.t(), 0), (bits[0], 0), (bits.bool(), 0), (bits[:0], 0)):
        with pytest.raises(EbdiffError):
            mask_distance(*wrong)


def test_one_small_tensor_may_be_put_back_in_several_places() -> None:
    small = values([2, 4])
    axes = Axes.of([{0: KEEP}, {0: KEEP.flip(0)}])
    grown = scatter_back([small, small], axes, [torch.ones(3, 4)] * 2)
    assert all(torch.equal(part[[0, 2]], small) and not part[1].any() for part in grown)


def test_tensors_that_share_memory_lose_what_any_of_them_loses() -> None:
    x = torch.ones(600, 600)
    masks = [keep_of(600, "some", seed) for seed in (1, 2)]
    apply_mask_([x, x, x[100:]], Axes((*masks, masks[0][100:]), (0, 1, 2), (0, 1, 0)))
    assert torch.equal(x.bool(), masks[0][:, None] & masks[1])


def test_meta_tensors_stay_meta() -> None:
    x = torch.ones(3, 4, device="meta")
    apply_mask_([x], ROWS)
    small = ops.compact([x], [KEEP], [0], [0], [2])
    assert [(part.device.type, part.shape) for part in small] == [("meta", (16,))]
    assert channel_sums([x], [], [0], [1], "square").device.type == "meta"


# autograd


def test_leaves_are_changed_without_a_graph() -> None:
    w = torch.nn.Parameter(values([3, 4]))
    loss = (w * w).sum()
    version = w._version
    apply_mask_([w], ROWS)
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    small = compact([w], ROWS)
    grown = scatter_back(small, ROWS, [w])
    into = scatter_back(small, ROWS, [w], into=[w])
    sums = channel_sums([w], [w], [0], [0], "product")
    assert into[0] is w
    assert w.is_leaf
    assert w.requires_grad
    for found in (*small, *grown, sums):
        assert not found.requires_grad
    state = [torch.zeros_like(w, requires_grad=False) for _ in range(3)]
    version = w._version
    masked_adamw_([w], [torch.ones(3, 4)], state[:1], state[1:2], state[2:], ROWS, **NUMBERS)
    assert w._version > version
    assert w.grad_fn is None
    (w * w).sum().backward()
    assert w.grad is not None


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        x = values([3, 4])
        apply_mask_([x], ROWS)
        assert not x[1].any()


# masks that are used again, and what goes past the dispatcher


def test_axes_hold_copies_of_their_masks() -> None:
    given, x = KEEP.clone(), torch.ones(3, 4)
    axes = Axes((given,), (0,), (0,))
    apply_mask_([x], axes)
    given.numpy()[:] = [False, True, False]  # unseen by version counters
    y = torch.ones(3, 4)
    apply_mask_([y], axes)
    assert torch.equal(x, y)
    assert axes.kept == [2]
    assert torch.equal(pickle.loads(pickle.dumps(axes)).keep[0], KEEP)
    gaps = Axes((torch.tensor([1, 0, 0, 0, 1, 0]).bool()[::2],), (0,), (0,))
    apply_mask_([y], gaps)
    assert y.sum(1).tolist() == [4, 0, 4]


def test_axes_fit_tensors_of_other_shapes_and_layouts_call_by_call() -> None:
    axes = Axes((KEEP, KEEP), (0, 1), (0, 1))
    for shapes in ([(3, 4), (2, 3)], [(3, 70), (5, 3)], [(3, 4), (2, 3)], [(3, 1), (0, 3)]):
        for turned in (False, True):
            x, y = (torch.ones(shape).t().contiguous().t() if turned else torch.ones(shape) for shape in shapes)
            apply_mask_([x, y], axes)
            assert not x[1].any()
            assert x[[0, 2]].all()
            assert not y[:, 1].any()
            assert y[:, [0, 2]].all()
            assert [part.shape[0] for part in compact([x, y], axes)] == [2, shapes[1][0]]
    for wrong in ([torch.ones(3, 4)], [torch.ones(3, 4), torch.ones(3, 2)], [torch.ones(4, 3), torch.ones(2, 3)]):
        with pytest.raises(EbdiffError):
            apply_mask_(wrong, axes)


class Seen(TorchDispatchMode):
    """Notes which operators torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op).removeprefix("ebdiff.").removesuffix(".default"))
        return op(*args, **(kwargs or {}))


def test_who_listens_to_the_dispatcher_hears_every_operator() -> None:
    x, y = values([3, 4]), values([3, 3], seed=1)
    axes, packed = Axes((KEEP, KEEP), (0, 1), (0, 1)), values([3, 5], torch.uint8)
    quiet = everything(x.clone(), y.clone(), axes, packed)
    with Seen() as seen:
        heard = everything(x.clone(), y.clone(), axes, packed)
    assert set(OPS) <= set(seen.names)
    assert all(map(torch.equal, quiet, heard))
    with torch.profiler.profile() as profile:
        everything(x.clone(), y.clone(), axes, packed)
    assert {f"ebdiff::{op}" for op in OPS} <= {event.name for event in profile.events()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        apply_mask_([fake], ROWS)
        assert [part.shape for part in compact([fake], ROWS)] == [(2, 4)]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.vmap(lambda part: apply_mask_([part], ROWS))(x.expand(2, 3, 4).clone())


def test_what_is_made_where_nothing_is_real_is_not_remembered() -> None:
    x = torch.ones(3, 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = Axes((KEEP,), (0,), (0,))
        apply_mask_([mode.from_tensor(x)], made)
    apply_mask_([x], made)
    assert x.sum(1).tolist() == [4, 0, 4]
    y = torch.ones(3, 4)
    torch.func.grad(lambda v: (apply_mask_([y], Axes((KEEP,), (0,), (0,))), v.sum())[1])(torch.ones(2))
    assert y.sum(1).tolist() == [4, 0, 4]


# opcheck and torch.compile


def samples(op: str) -> list[tuple[Any, ...]]:
    """Arguments that an operator takes."""
    x, y = values([3, 4]), strided((5, 3), (1, 5), torch.float64)
    vector = values([3], torch.float64)
    keep, owner, dims = [KEEP, KEEP], [0, 1], [0, 1]
    if op == "apply_mask_":
        return [([x, y, vector], keep, owner, dims), ([y.half()], [], [], [])]
    if op == "compact":
        return [([x, y, vector], keep, owner, dims, [2, 2]), ([x], [KEEP], [0], [0], [2])]
    if op == "scatter_back_":
        small = [x[[0, 2]].clone(), y[:, [0, 2]].clone()]
        return [([x, y], small, keep, owner, dims)]
    if op == "masked_adamw_":
        lists = [[values([3, 4], dtype, seed=k), values([3], dtype, k)] for dtype in FLOATS for k in range(5)]
        masks = ([KEEP, KEEP], [0, 1], [0, 0], 0.1, 0.9, 0.99, 1e-8, 0.1, 2, 0.9, False)
        return [(*lists[i : i + 5], *masks) for i in range(0, len(lists), 5)] + [(*lists[:4], [], *masks)]
    if op == "channel_sums":
        return [([x, y], [], [0, 0, 1], [0, 1, 1], "square"), ([x], [x + 1], [0], [1], "product")]
    return [(values([3, 5], torch.uint8), 1)]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    for arguments in samples(op):
        torch.library.opcheck(getattr(ops, op).default, arguments)


def everything(x: Tensor, y: Tensor, axes: Axes, packed: Tensor) -> tuple[Any, ...]:
    """All public functions, one after another."""
    x = x * 2
    small = compact([x, y], axes)
    grown = scatter_back([part + 1 for part in small], axes, [x, y])
    apply_mask_([x, y], axes)
    moments = [[torch.zeros_like(x), torch.zeros_like(y)] for _ in range(3)]
    masked_adamw_([x, y], grown, *moments, axes, **NUMBERS, ema_decay=0.5)  # type: ignore[misc, arg-type]
    sums = channel_sums([x, y], grown, [0, 1], [1, 0], "product")
    scatter_back(small, axes, [x, y], into=grown)
    return x, *small, *grown, *(moment for part in moments for moment in part), sums, mask_distance(packed)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_of_all_public_functions(backend: str, counted: bool) -> None:
    torch._dynamo.reset()
    axes, others = (Axes((KEEP, KEEP.flip(0)[:2]), (0, 1), (0, 1)) for _ in range(2))
    if counted:  # else in the graph, as unbacked integers
        assert axes.kept == [2, 1]
    x, y, packed = values([3, 4]), values([5, 2]), values([3, 4], torch.uint8)
    expected_y, compiled_y = y.clone(), y.clone()
    expected = everything(x, expected_y, others, packed)
    found = torch.compile(everything, fullgraph=True, backend=backend)(x, compiled_y, axes, packed)
    assert torch.equal(compiled_y, expected_y)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compile_again_with_another_mask_of_the_same_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, axes: compact([x], axes)[0], fullgraph=True, backend="aot_eager")
    x = values([3, 4])
    for flags in ([1, 0, 1], [0, 1, 0], [1, 1, 1]):
        axes = Axes((torch.tensor(flags, dtype=torch.bool),), (0,), (0,))
        assert axes.kept == [sum(flags)]
        assert torch.equal(compiled(x, axes), x[axes.keep[0]])


# subprocesses


def test_fuzz() -> None:
    """Valid and invalid arguments of all operators, mixed: never a crash, and never another result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "faulthandler", str(ROOT / "tests" / "fuzz_ops.py"), "0", "1200"]
    run = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@needs_native
def test_the_same_by_the_reference_alone() -> None:
    files = [
        "test_channel_mask.py",
        "test_channel_mask_laws.py",
        "test_channel_mask_ops.py",
        "test_masked_adamw.py",
        "test_slices.py",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in files)]
    environment = {**os.environ, "EBDIFF_NATIVE": "0"}
    chosen = ["-k", "not compile and not opcheck and not fuzz and not alone"]
    run = subprocess.run([*command, *chosen], text=True, capture_output=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert ".." in run.stdout
