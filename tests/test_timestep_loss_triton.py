"""The Triton kernels of the timestep loss, interpreted on the CPU: each against the specification in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")

from timestep_loss_cases import CASES, Case, Looked, check, compare, everything, exact
from triton_offline import interpreting

from ebdiff.ops import timestep_loss_cuda
from ebdiff.ops import timestep_loss_ops as operators
from ebdiff.ops import timestep_loss_reference as reference
from ebdiff.ops.native_cpu import NotTaken
from ebdiff.ops.timestep_loss_reference import Terms

operator = importlib.import_module("ebdiff.ops.timestep_loss")


class Kernels(NamedTuple):
    """Modules of kernels that are interpreted: the launcher, the plan and the counters."""

    loss: Any
    plan: Any
    counter: Any


@pytest.fixture(scope="module")
def imported() -> Iterator[Kernels]:
    with interpreting("timestep_loss"):
        names = "timestep_loss", "timestep_loss_plan", "timestep_loss_counter"
        yield Kernels(*(importlib.import_module(f"ebdiff.kernels.{name}") for name in names))


@pytest.fixture
def interpreted(imported: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """They leave the counters as they have to."""
    monkeypatch.setattr(timestep_loss_cuda, "_triton", lambda: imported.loss)
    yield imported
    assert not any(place.any() for counters in imported.counter._known.values() for place in counters.places)


@pytest.fixture(params=["a program", "programs", "programs of several blocks"])
def kernels(request: pytest.FixtureRequest, interpreted: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """One program for each sample, or several."""
    interpreted.plan.plan_of.cache_clear()
    if request.param != "a program":
        monkeypatch.setattr(interpreted.plan, "_BLOCK", 32)
        monkeypatch.setattr(interpreted.plan, "_SMALL", 32)
    if request.param == "programs of several blocks":
        monkeypatch.setattr(interpreted.plan, "PROGRAMS", 1)
    yield interpreted
    interpreted.plan.plan_of.cache_clear()


def test_the_variants_are_what_they_say(kernels: Kernels, request: pytest.FixtureRequest) -> None:
    plan = kernels.plan.plan_of(3, 140)
    variant = request.node.callspec.params["kernels"]
    assert (plan.chunks > 1, plan.steps > 1) == {
        "a program": (False, False),
        "programs": (True, False),
        "programs of several blocks": (True, True),
    }[variant]


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_specification(kernels: Kernels, name: str) -> None:
    check(timestep_loss_cuda, *CASES[name].arguments())


@pytest.mark.parametrize("name", ["v from a seed, channels last", "v, Huber of each, a mask", "a target, squared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("same", [False, True], ids=["float32 images", "same dtype"])
def test_narrow_dtypes(kernels: Kernels, name: str, dtype: torch.dtype, same: bool) -> None:
    pred, terms = CASES[name].arguments(dtype)
    if same:
        narrow = (t.to(dtype) if t is not None and t.is_floating_point() else t for t in terms[:-1])
        terms = Terms(*narrow, terms.prediction)._replace(table=terms.table)
    check(timestep_loss_cuda, pred, terms, rounding=torch.finfo(dtype).eps)


def test_without_a_gradient_the_losses_are_the_same(kernels: Kernels) -> None:
    pred, terms = CASES["x0, Huber"].arguments()
    loss, per_sample, grad = timestep_loss_cuda.forward(pred, terms, False)
    assert grad is None
    expected = timestep_loss_cuda.forward(pred, terms, True)
    assert torch.equal(loss, expected[0])
    assert torch.equal(per_sample, expected[1])


def test_every_run_gives_the_same_bits(kernels: Kernels) -> None:
    """And so does the same loss after another: the counters are 0 again."""
    arguments = CASES["flow from a seed, a mask"].arguments()
    first = everything(timestep_loss_cuda, *arguments)
    everything(timestep_loss_cuda, *CASES["many small ones"].arguments())
    again = everything(timestep_loss_cuda, *arguments)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_what_lies_under_a_mask_changes_no_bit(kernels: Kernels) -> None:
    pred, terms = CASES["v, Huber of each, a mask"].arguments()
    assert terms.mask is not None
    assert terms.x0 is not None
    before = everything(timestep_loss_cuda, pred, terms)
    pred[terms.mask == 0], terms.x0[terms.mask == 0] = float("inf"), float("nan")
    found = everything(timestep_loss_cuda, pred, terms)
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert not found["grad"][terms.mask == 0].any()


def test_what_is_not_asked_for_is_not_read(interpreted: Kernels) -> None:
    """The prediction of x0 needs no noise, that of the noise no x0; and no timestep but that of v."""
    pred, terms = CASES["epsilon"].arguments()
    expected = everything(timestep_loss_cuda, pred, terms)
    assert terms.x0 is not None
    x0 = torch.full_like(terms.x0, float("nan"), dtype=torch.float64)  # which would not be taken
    without = terms._replace(x0=x0, row=torch.full_like(terms.row, 1 << 40))
    found = everything(timestep_loss_cuda, pred, without)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("place", [-1, 9, 20, 1 << 40])
def test_a_timestep_that_is_none_is_seen_and_reads_nothing(interpreted: Kernels, place: int) -> None:
    """A check on the host would have to wait for the device."""
    pred, terms = CASES["v from a seed, channels last"].arguments()
    assert terms.row is not None
    assert terms.cell is not None
    name = "cell" if place == 20 else "row"
    wrong = getattr(terms, name).clone()
    wrong[1] = place
    loss, _, grad = timestep_loss_cuda.forward(pred, terms._replace(**{name: wrong}), True)
    assert loss.isnan()
    assert grad is not None
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice": lambda x: torch.cat([x, x + 1], 2)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
    "an offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.mark.parametrize("images", ["contiguous", "channels last", "a slice"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["target", "seed"])
def test_any_strides(interpreted: Kernels, layout: str, images: str, source: str) -> None:
    """Noise from a seed is numbered in the order of x0's memory, whatever the prediction's is."""
    pred, terms = Case(kind="v_prediction", source=source, mask="bool").arguments()
    names = ("target", "mask") if source == "target" else ("x0", "mask")
    laid = {name: LAYOUTS[images](getattr(terms, name)) for name in names}
    check(timestep_loss_cuda, LAYOUTS[layout](pred), terms._replace(**laid))


def test_vectors_with_gaps(interpreted: Kernels) -> None:
    pred, terms = CASES["v, Huber of each, a mask"].arguments()
    gaps = {
        name: torch.stack([value, value], -1)[..., 0]
        for name in ("table", "row", "weight", "cell", "huber_c")
        if (value := getattr(terms, name)) is not None
    }
    found = everything(timestep_loss_cuda, pred, terms._replace(**gaps))
    expected = everything(timestep_loss_cuda, pred, terms)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_noised_is_the_specification(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    _, terms = CASES[name]._replace(source="seed" if "seed" in name else "noise").arguments()
    assert terms.x0 is not None
    assert terms.table is not None
    assert terms.row is not None
    x0, noise = terms.x0.to(dtype), terms.noise if terms.noise is None else terms.noise.to(dtype)
    truth = exact(terms._replace(x0=x0, noise=noise))
    assert truth.x0 is not None
    rest = terms.seed, terms.table, terms.row
    mine, theirs = (module.noised(x0, noise, *rest) for module in (timestep_loss_cuda, reference))
    true = reference.noised(truth.x0, truth.noise, None, *rest[1:])
    compare("x_t", mine, theirs, true, 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_the_loss_draws_the_noise_again(kernels: Kernels) -> None:
    """A prediction of v made from x_t and x0 alone has no loss but rounding."""
    _, terms = CASES["v from a seed, channels last"].arguments()
    assert terms.x0 is not None
    assert terms.table is not None
    assert terms.row is not None
    x_t = timestep_loss_cuda.noised(terms.x0, None, terms.seed, terms.table, terms.row)
    alpha, sigma = terms.table[:, terms.row, None, None, None]
    v = alpha * (x_t - alpha * terms.x0) / sigma - sigma * terms.x0
    loss, _, _ = timestep_loss_cuda.forward(v, terms, False)
    assert loss < 1e-8


# The factor, and statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (5, 3, 17, 31), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_scaled(interpreted: Kernels, shape: tuple[int, ...], dtype: torch.dtype, factor: float) -> None:
    grad = torch.randn(shape).to(dtype)
    expected = grad.float() * torch.tensor(factor)
    assert timestep_loss_cuda.scale_(grad, torch.tensor(factor)) is grad
    exact, info = dtype == torch.float32 or factor == 1.0, torch.finfo(dtype)
    rounding = 0.0 if exact else info.eps * expected.abs() + info.smallest_normal * info.eps
    assert ((grad.float() - expected).abs() <= rounding).all()


def test_a_factor_of_one_writes_nothing(interpreted: Kernels) -> None:
    """Not even a signalling NaN is touched, which any arithmetic makes a quiet one."""
    bits = torch.full((8,), 0x7F800001, dtype=torch.int32)
    timestep_loss_cuda.scale_(bits.view(torch.float32), torch.tensor(1.0))
    assert (bits == 0x7F800001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(5, 50, 300), (33, 1000, 7), (1, 1, 1)], ids=str)
def test_losses_by_bucket(interpreted: Kernels, sizes: Sequence[int], dtype: torch.dtype) -> None:
    many, cells, samples = sizes
    torch.manual_seed(0)
    buckets, per_sample = torch.randint(many, (cells,)), torch.rand(samples)
    found, expected = torch.zeros(3, many, dtype=dtype), torch.zeros(3, many, dtype=torch.float64)
    for _ in range(2):
        cell = torch.randint(cells, (samples,))
        assert timestep_loss_cuda.add_losses_(found, buckets, cell, per_sample) is found
        reference.add_losses_(expected, buckets, cell, per_sample)
    torch.testing.assert_close(found.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0.0)
    assert torch.equal(found[2].double(), expected[2])


def test_losses_of_no_cell_count_nowhere(interpreted: Kernels) -> None:
    """Whatever lies before and behind the table of buckets."""
    totals, buckets = torch.zeros(3, 2), torch.tensor([0, 0, 1, 1, 0])[1:-1]
    cell = torch.tensor([-1, 0, 3, 1 << 40])
    timestep_loss_cuda.add_losses_(totals, buckets, cell, torch.tensor([3.0, 5.0, 7.0, 9.0]))
    assert totals.tolist() == [[5.0, 0.0], [25.0, 0.0], [1.0, 0.0]]


# Memory, operators, and what is not taken -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v, Huber of each, a mask", "epsilon from a seed, odd", "v from a seed, channels last"]
)
def test_every_number_is_written_and_no_other_memory(
    kernels: Kernels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is allocated lies between NaNs and is NaN; so do the images."""
    guarded: list[Tensor] = []
    empty_like, new_empty = torch.empty_like, Tensor.new_empty  # the interpreter has a use for the second of its own

    def guard(like: Tensor, dtype: torch.dtype) -> Tensor:
        guarded.append(torch.full((like.numel() + 256,), float("nan"), dtype=dtype))
        return guarded[-1].as_strided(like.shape, like.stride(), 128)

    def guarded_like(x: Tensor) -> Tensor:
        return empty_like(x) if x.is_meta else guard(empty_like(x, device="meta"), x.dtype)

    def guarded_empty(x: Tensor, size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return new_empty(x, size, **rest) if size == 0 else guard(torch.empty(size, device="meta"), dtype or x.dtype)

    pred, terms = CASES[name].arguments()
    expected = everything(timestep_loss_cuda, pred, terms)
    inside = [t if t is None or t.shape != pred.shape else guarded_like(t).copy_(t) for t in terms[:-1]]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", guarded_empty)
        patch.setattr(torch, "empty_like", guarded_like)
        found = everything(timestep_loss_cuda, guarded_like(pred).copy_(pred), Terms(*inside, terms.prediction))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for whole in guarded:
        assert whole[:128].isnan().all()
        assert whole[-128:].isnan().all()
        assert not whole[128:-128].isnan().any()


@pytest.mark.parametrize(
    ("dtype", "functions"),
    [
        (torch.float32, ["noised", "forward", "add_losses_", "scale_"]),
        (torch.float16, ["noised", "forward", "add_losses_", "backward"]),
    ],
)
def test_the_operators_reach_them(
    interpreted: Kernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, functions: list[str]
) -> None:
    called: list[str] = []

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: called.append(name) or function(*arguments)

    for name in timestep_loss_cuda.__all__:
        monkeypatch.setattr(timestep_loss_cuda, name, note(name, getattr(timestep_loss_cuda, name)))
    monkeypatch.setattr(operators.FAMILY, "kernels", lambda x: timestep_loss_cuda)
    pred, terms = CASES["v from a seed, channels last"].arguments(dtype)
    x0, t, profile = terms.x0, terms.row, Looked(terms.table)
    statistics = operator.LossStatistics(torch.arange(20) // 7)
    before = operator.fallbacks.copy()
    x_t, noise = operator.noised(x0, t, profile, operator.PhiloxNoise(terms.seed))
    loss, _ = operator.weighted_timestep_loss(
        pred.requires_grad_(), (x0, noise), t, terms.weight, "v_prediction", profile=profile, statistics=statistics
    )
    loss.backward(torch.tensor(0.25))
    assert called == functions
    assert operator.fallbacks == before
    expected = reference.backward(torch.tensor(0.25), pred.detach(), terms._replace(cell=t))
    torch.testing.assert_close(pred.grad, expected)
    assert x_t.shape == pred.shape
    assert statistics.count.sum() == len(pred)


def test_what_is_not_taken(interpreted: Kernels) -> None:
    pred, terms = CASES["epsilon"].arguments()
    with pytest.raises(NotTaken, match="float64"):
        timestep_loss_cuda.forward(pred.double(), terms, True)
    with pytest.raises(NotTaken, match="negated"):
        timestep_loss_cuda.forward(torch._neg_view(pred), terms, True)
    with pytest.raises(NotTaken, match="2\\^31"):
        timestep_loss_cuda.forward(pred[:1, :1, :1, :1].expand(1, 1, 1 << 16, 1 << 15), terms, True)
    with pytest.raises(NotTaken, match="gaps"):
        timestep_loss_cuda.scale_(pred[..., ::2], torch.tensor(2.0))
    with pytest.raises(NotTaken, match="gaps"):
        timestep_loss_cuda.add_losses_(torch.zeros(3, 4)[:, ::2], *terms[5:6] * 2, torch.zeros(3))
