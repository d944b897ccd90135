"""The Triton kernels of group_norm_silu, interpreted on the CPU: every variant against the specification in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import norm_cases as norms
import pytest
import torch
from test_group_norm_silu import HARD
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")

from triton_offline import interpreting, places

from ebdiff.ops import group_norm_cuda
from ebdiff.ops import group_norm_reference as reference
from ebdiff.ops.group_norm_reference import Norm

operator = importlib.import_module("ebdiff.ops.group_norm")
EVERY = [True] * 6
NAMES = ("x", "weight", "bias", "scale", "shift", "time_bias")


class Kernels(NamedTuple):
    """The launcher's module and the plan's, of kernels that are interpreted."""

    silu: Any
    plan: Any


@contextmanager
def interpreted_kernels() -> Iterator[Kernels]:
    with interpreting("group_norm"):
        yield Kernels(*(importlib.import_module(f"ebdiff.kernels.group_norm_{name}") for name in ("silu", "plan")))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Kernels]:
    with interpreted_kernels() as kernels:
        yield kernels


@pytest.fixture(params=["held", "cached", "two passes"])
def variant(request: pytest.FixtureRequest, interpreted: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Kernels that choose one way of working for every shape, in tiles so small that there are several."""
    monkeypatch.setattr(group_norm_cuda, "_triton", lambda: interpreted.silu)
    monkeypatch.setattr(operator.FAMILY, "kernels", lambda x: group_norm_cuda)
    monkeypatch.setattr(interpreted.plan, "_reads_well", lambda *shape: True)
    interpreted.plan.plan_of.cache_clear()
    if request.param != "held":
        monkeypatch.setattr(interpreted.plan, "_HELD", 0)
        monkeypatch.setattr(interpreted.plan, "_TILE", 256)
        monkeypatch.setattr(interpreted.plan, "_WIDEST", 32)
        monkeypatch.setattr(interpreted.plan, "PROGRAMS", 0)
    if request.param == "two passes":
        monkeypatch.setattr(interpreted.plan, "_CACHED", 0)
    yield interpreted
    interpreted.plan.plan_of.cache_clear()


def laid_out(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


class Case(NamedTuple):
    """[n, c, *] in groups; which of the optional arguments there are, what is removed, and what x's mean is."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    given: str = "weight bias scale shift time_bias"
    mean: float = 0.0
    removed: tuple[int, ...] = ()
    silu: bool = True

    def tensors(self, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor, Norm]:
        """x, dy, and the rest in float32."""
        torch.manual_seed(0)
        n, c = self.shape[:2]
        x = laid_out((torch.randn(self.shape) + self.mean).to(dtype), last)
        dy = laid_out(torch.randn(self.shape).to(dtype), last)
        sizes = ((c,), (c,), (n, c), (n, c), (n, c))
        rest = [torch.randn(size) for size in sizes]
        rest = [tensor if name in self.given.split() else None for name, tensor in zip(NAMES[1:], rest, strict=True)]
        keep = torch.tensor([channel not in self.removed for channel in range(c)]) if self.removed else None
        return x, dy, Norm(*rest, keep, self.offsets, 1e-5, self.silu)


CASES = {
    "everything, 87 channels": Case(
        (2, 87, 5, 7), (0, 3, 3, 10, 11, 40, 72, 72, 86, 87), removed=(0, 4, 5, 10, 50, 86)
    ),
    "thirds of 87": Case((1, 87, 3, 5), tuple(range(0, 88, 3)), "weight bias"),
    "nothing": Case((2, 16, 8, 8), (0, 8, 16), "", silu=False),
    "aligned": Case((2, 16, 8, 8), (0, 2, 8, 16), "weight bias time_bias"),
    "mean 1000": Case((2, 12, 9, 9), (0, 4, 8, 12), "weight bias", mean=1000.0),
    "mean and embedding cancel": Case((2, 6, 5), (0, 3, 6), "bias shift time_bias", mean=30.0),
    "one pixel": Case((3, 24), (0, 8, 24), "weight scale"),
    "one channel a group": Case((2, 40, 2, 3, 2), tuple(range(41)), "bias"),
    "one group, empty ones around": Case((2, 5, 1, 9), (0, 0, 5, 5), removed=(1, 3)),
    "all of a group removed": Case((1, 3, 4, 4), (0, 1, 2, 3), removed=(1,)),
}
NARROW = Case((2, 24, 6, 4), (0, 8, 11, 11, 24), mean=3.0, removed=(1, 8, 9, 10, 20))


def doubled(norm: Norm) -> Norm:
    return Norm(*(None if t is None else t.double() for t in norm.tensors), *norm[5:])


def both(x: Tensor, dy: Tensor, norm: Norm, module: Any, needs: Sequence[bool] = EVERY) -> dict[str, Tensor]:
    """y, mean, rstd and all gradients, by their names."""
    y, mean, rstd = module.forward(x, norm)
    gradients = module.backward(dy, x, mean, rstd, norm, needs)
    found = {"y": y, "mean": mean, "rstd": rstd} | {f"d{n}": g for n, g in zip(NAMES, gradients, strict=True)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check(x: Tensor, dy: Tensor, norm: Norm, mean: float = 0.0, rounding: float = 0.0) -> None:
    """No more than 1.2 times the specification's own error in this dtype, and what the order of additions decides.

    Args:
        mean: of x, whose last digit is in every difference from it.
        rounding: of the store, relative: the interpreter cuts bfloat16 off where a GPU rounds to nearest.
    """
    truth = both(x.double(), dy.double(), doubled(norm), reference)
    ours, theirs = both(x, dy, norm, group_norm_cuda), both(x, dy, norm, reference)
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        mine, other = ours[name], theirs[name]
        assert mine.dtype == other.dtype
        assert mine.stride() == other.stride()
        order = (4 + mean) * torch.finfo(torch.float32).eps * true.abs().max().clamp(min=1.0)
        stored = 0.0 if mine.dtype == torch.float32 else rounding
        allowed = 1.2 * (other - true).abs().max() + order + stored * true.abs()
        assert ((mine - true).abs() <= allowed).all(), f"{name}: {(mine - true).abs().max()} of {true.abs().max()}"


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_specification(variant: Kernels, name: str, last: bool) -> None:
    check(*CASES[name].tensors(torch.float32, last), mean=CASES[name].mean)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("same", [False, True], ids=["float32 weights", "same dtype"])
def test_narrow_dtypes(variant: Kernels, dtype: torch.dtype, last: bool, same: bool) -> None:
    x, dy, norm = NARROW.tensors(dtype, last)
    if same:
        norm = Norm(*(t.to(dtype) for t in norm.tensors if t is not None), *norm[5:])
    check(x, dy, norm, mean=NARROW.mean, rounding=torch.finfo(dtype).eps)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
def test_what_removed_channels_hold_changes_no_bit(variant: Kernels, last: bool) -> None:
    x, dy, norm = NARROW.tensors(torch.float32, last)
    assert norm.keep is not None
    removed = ~norm.keep
    x[:, removed], dy[:, removed] = 0.0, 0.0
    zeros = both(x, dy, norm, group_norm_cuda)
    x[:, removed], dy[:, removed] = float("nan"), float("inf")
    found = both(x, dy, norm, group_norm_cuda)
    assert all(torch.equal(found[name], zeros[name]) for name in zeros)
    assert not found["y"][:, removed].any()
    assert not found["dx"][:, removed].any()


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
def test_every_number_is_written_and_no_other_memory(
    variant: Kernels, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is allocated lies between NaNs and is NaN; x and dy lie between NaNs."""
    guarded: list[Tensor] = []

    def guard(size: Sequence[int], dtype: torch.dtype, fill: Tensor | float = float("nan")) -> Tensor:
        guarded.append(torch.full((torch.Size(size).numel() + 256,), float("nan"), dtype=dtype))
        inside = guarded[-1][128:-128].view(torch.Size(size))
        return inside.copy_(fill) if isinstance(fill, Tensor) else inside

    def allocate(like: Tensor, **_: Any) -> Tensor:
        moved = like.movedim(1, -1) if last and like.dim() > 2 else like
        found = guard(moved.shape, like.dtype)
        return found.movedim(-1, 1) if moved is not like else found

    x, dy, norm = NARROW.tensors(torch.float32, last)
    expected = both(x, dy, norm, group_norm_cuda)
    if last:
        x, dy = (guard(t.movedim(1, -1).shape, t.dtype, t.movedim(1, -1)).movedim(-1, 1) for t in (x, dy))
    else:
        x, dy = (guard(t.shape, t.dtype, t) for t in (x, dy))
    plain = Tensor.new_empty  # the interpreter has a use for that of its own
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda t, n, **k: plain(t, n, **k) if n == 0 else guard(n, k["dtype"]))
        patch.setattr(torch, "empty_like", allocate)
        found = both(x, dy, norm, group_norm_cuda)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for whole in guarded:
        assert whole[:128].isnan().all()
        assert whole[-128:].isnan().all()
        assert not whole[128:-128].isnan().any()


def test_gradients_that_are_not_needed_change_no_other(variant: Kernels) -> None:
    x, dy, norm = NARROW.tensors(torch.float32, True)
    _, mean, rstd = group_norm_cuda.forward(x, norm)
    whole = group_norm_cuda.backward(dy, x, mean, rstd, norm, EVERY)
    for only in range(6):
        needs = [place == only for place in range(6)]
        found = group_norm_cuda.backward(dy, x, mean, rstd, norm, needs)
        assert [gradient is not None for gradient in found] == needs
        assert torch.equal(found[only], whole[only])  # type: ignore[arg-type]


def test_rows_of_wider_tensors_and_gradients_without_strides(variant: Kernels) -> None:
    """As adaptive norms hand over scale and shift, and as .sum() hands back a gradient."""
    x, _, norm = NARROW.tensors(torch.float32, False)
    scale, shift = torch.randn(2, 48).chunk(2, 1)
    given = norm._replace(scale=scale, shift=shift, time_bias=torch.randn(24, 2).t(), weight=torch.randn(48)[::2])
    dense = Norm(*(t if t is None else t.contiguous() for t in given[:6]), *given[6:])
    dy = torch.tensor(0.5).expand(x.shape)
    found, expected = both(x, dy, given, group_norm_cuda), both(x, dy.contiguous(), dense, group_norm_cuda)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:11],
        lambda x: x[..., 1:],
        lambda x: x.to(memory_format=torch.channels_last)[:, 3:11],
        lambda x: x.transpose(2, 3),
        lambda x: x.expand(4, -1, -1, -1),
        lambda x: x[:, :, 0, 0],
    ],
    ids=["channels", "columns", "channels of channels last", "transposed", "expanded", "two dimensions"],
)
def test_any_strides(interpreted: Kernels, monkeypatch: pytest.MonkeyPatch, view: Callable[[Tensor], Tensor]) -> None:
    monkeypatch.setattr(group_norm_cuda, "_triton", lambda: interpreted.silu)
    torch.manual_seed(0)
    x = view(torch.randn(1, 16, 4, 5))
    norm = Norm(*(None,) * 6, (0, 3, x.shape[1]), 1e-5, True)
    check(x, torch.randn(x.shape), norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_reaches_them_and_falls_back_for_float64_alone(variant: Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 3, 3, dtype=dtype, requires_grad=True)
    before = operator.fallbacks.copy()
    operator.group_norm_silu(x, None, None, 2).sum().backward()
    assert operator.fallbacks == before
    operator.group_norm_silu(x.double(), None, None, 2)
    assert operator.fallbacks - before == {"float64 on a GPU": 1}


FEW = {
    "one pixel": norms.Case((4, 16, 1, 1), 16),
    "one pixel, bfloat16": norms.Case((4, 16, 1, 1), 16, dtype=torch.bfloat16),
    "one pixel, mean 1000": norms.Case((4, 16, 1, 1), 16, mean=1000.0),
    "two positions": norms.Case((4, 16, 1, 2), 16),
    "two positions, mean 30": norms.Case((4, 16, 1, 2), 16, mean=30.0),
}
MANY = {
    "mean 100000": norms.Case((8, 12, 16, 16), 4, mean=1e5),
    "mean 100000, no embedding": norms.Case((8, 12, 16, 16), 4, mean=1e5, only=("weight", "bias")),
    "constant": norms.Case((2, 12, 8, 8), 4, mean=1000.3, std=0.0, only=("weight", "bias")),
}


class Error(NamedTuple):
    """The largest error of one result: ours and torch's, and one rounding of the result's largest number."""

    name: str
    ours: float
    torchs: float
    rounding: float


def errors(case: norms.Case) -> Iterator[Error]:
    truth, theirs, ours = case.results(case.torchs, torch.float64), case.results(case.torchs), case.results(case.ours)
    for name, true, *results in zip(["y", "x", *case.small], truth, ours, theirs, strict=True):
        yield Error(
            name,
            *(float((result - true).abs().max()) for result in results),
            torch.finfo(results[0].dtype).eps * float(true.abs().max()),
        )


def errs_no_more_than_torch(case: norms.Case, roundings: int = 1) -> None:
    """But for so many roundings of the result."""
    for name, ours, torchs, rounding in errors(case):
        assert ours <= 1.2 * torchs + roundings * rounding, name


@pytest.mark.parametrize("variant", ["held"], indirect=True)
@pytest.mark.parametrize("name", FEW)
def test_groups_of_a_few_elements_err_no_more_than_torchs(variant: Kernels, name: str) -> None:
    """Groups so small are held whatever the shape: a law of test_group_norm_plan.py."""
    errs_no_more_than_torch(FEW[name])


@pytest.mark.parametrize("name", MANY)
def test_means_at_which_float32_is_short_err_no_more_than_torchs(variant: Kernels, name: str) -> None:
    errs_no_more_than_torch(MANY[name])


@pytest.mark.parametrize("name", HARD)
def test_what_is_hard_errs_by_four_roundings_more_than_torchs_at_most(
    variant: Kernels, name: str, request: pytest.FixtureRequest
) -> None:
    """What is left to chance in one draw of numbers: the order of additions is another than torch's."""
    case = norms.Case(**HARD[name])  # type: ignore[arg-type]
    if request.node.callspec.params["variant"] != "held":
        if case.x.shape[2:].numel() <= 4:
            pytest.skip("no plan leads here")
        if case.x.numel() > 50_000:
            pytest.skip("half a minute in tiles so small")
    errs_no_more_than_torch(case, roundings=4)


@pytest.mark.parametrize("variant", ["held"], indirect=True)
@pytest.mark.parametrize("name", ["removed", "volumes"])
def test_in_the_mean_of_many_draws_it_errs_no_more_than_torch(variant: Kernels, name: str) -> None:
    """But for one rounding. Errors as shares of each draw's rounding."""
    draws = [list(errors(norms.Case(**HARD[name], draw=draw))) for draw in range(8)]  # type: ignore[arg-type]
    for results in zip(*draws, strict=True):
        ours, torchs = (sum(e[place] / e.rounding for e in results) / len(results) for place in (1, 2))
        assert ours <= 1.2 * torchs + 1, results[0].name


def test_the_interpreter_leaves_triton_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are compiled later in this process have to find it whole."""
    before = [dict(vars(place)) for place in places()]
    with interpreted_kernels() as kernels:
        monkeypatch.setattr(group_norm_cuda, "_triton", lambda: kernels.silu)
        check(*CASES["nothing"].tensors(torch.float32, False))
    assert [dict(vars(place)) for place in places()] == before
