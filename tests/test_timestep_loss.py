"""noised and weighted_timestep_loss: as exact as torch's own, the same bits from any threads, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from norm_cases import LAYOUTS
from op_cases import by_threads, needs_native
from timestep_loss_cases import CASES, Case, check, compare, exact
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops import PhiloxNoise, native, noised, weighted_timestep_loss
from ebdiff.ops import timestep_loss as module
from ebdiff.ops import timestep_loss_cpu as cpu
from ebdiff.ops import timestep_loss_reference as reference

NARROW = [torch.float32, torch.bfloat16, torch.float16]
LARGE = {
    "some pieces, the last one short": Case(shape=(3, 5, 80, 90), kind="v_prediction", source="seed", table=True),
    "many samples": Case(shape=(128, 3, 8, 8), kind="flow", mask="float", huber="each"),
    "one long sample": Case(shape=(1, 70001), kind="epsilon"),
}


@pytest.fixture(autouse=True)
def taken() -> Iterator[None]:
    """With a compiled part, nothing in this file falls back to the reference unnoticed."""
    module.fallbacks.clear()
    yield
    assert native.module() is None or not module.fallbacks


@needs_native
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", CASES | LARGE)
def test_the_compiled_part_is_the_specification_to_rounding(name: str, dtype: torch.dtype) -> None:
    pred, terms = (CASES | LARGE)[name].arguments(dtype)
    check(cpu, pred, terms)
    for other in NARROW:  # x0, noise and target may have another dtype than the prediction
        mixed = terms._replace(
            **{k: v.to(other) for k, v in terms._asdict().items() if k in ("target", "x0", "noise") and v is not None}
        )
        check(cpu, pred, mixed)


@needs_native
@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_have_the_bits_of_the_specification(dtype: torch.dtype) -> None:
    """Where nothing is rounded differently: without Huber's root, and without logarithms of noise."""
    for case in (CASES | LARGE).values():
        pred, terms = case.arguments(dtype)
        if terms.seed is None and terms.huber_c is None:
            dloss = torch.tensor(0.7)
            assert torch.equal(cpu.backward(dloss, pred, terms), reference.backward(dloss, pred, terms))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (5, 4, 7, 9), (1, 1)])
def test_errors_are_no_larger_than_torchs_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Than those of mse_loss in float32, as training scripts call it, but for the order of additions."""
    pred, terms = Case(shape=shape, source="target").arguments(dtype)
    target, weight = terms.target, terms.weight
    assert target is not None

    def theirs(pred: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
        pred = pred.detach().requires_grad_()
        per_sample = F.mse_loss(pred if pred.dtype == torch.float64 else pred.float(), target, reduction="none")
        per_sample = per_sample.flatten(1).mean(1)
        loss = (per_sample * weight).mean()
        return [loss.detach(), per_sample.detach(), *torch.autograd.grad(loss, pred)]

    mine = pred.requires_grad_()
    found = weighted_timestep_loss(mine, target, torch.zeros(shape[0], dtype=torch.int64), weight, "epsilon")
    ours = [*(x.detach() for x in found), *torch.autograd.grad(found.loss, mine)]
    truth = theirs(pred.double(), target.double(), weight.double())
    for name, a, b, true in zip(("loss", "per_sample", "grad"), ours, theirs(pred, target, weight), truth, strict=True):
        compare(name, a, b, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noising_is_rounded_once(dtype: torch.dtype) -> None:
    """alpha x0 + sigma noise in float32, to the last bit."""
    x0, noise = (torch.randn(5, 3, 9, 11).to(dtype) for _ in range(2))
    profile, t = Tables(), torch.tensor([0, 3, 8, 2, 3])
    x_t, given = noised(x0, t, profile, noise)
    alpha, sigma = profile.table[:, t, None, None, None]
    assert given is noise
    assert torch.equal(x_t, (alpha * x0.float() + sigma * noise.float()).to(dtype))


class Tables:
    """A profile of nine timesteps, the last without signal."""

    def __init__(self) -> None:
        alpha_bar = torch.linspace(0.999, 0, 9)
        self.table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.table, t

    def cells(self, t: Tensor) -> Tensor:
        return t


# Every layout, every number of threads --------------------------------------------------------------------------------


def results(images: dict[str, Tensor], kind: str, seed: bool) -> list[Tensor]:
    """What both functions return, and the gradient."""
    t, profile = torch.tensor([1, 8, 4]), Tables()
    noise = PhiloxNoise(torch.tensor([5, 6])) if seed else images["noise"]
    x_t, _ = noised(images["x0"], t, profile, noise)
    pred = images["pred"].detach().requires_grad_()
    target = (images["x0"], noise)
    weight = torch.linspace(0.1, 2, 9)
    found = weighted_timestep_loss(pred, target, t, weight, kind, profile=profile, mask=images["mask"])
    return [x_t, *(x.detach() for x in found), *torch.autograd.grad(found.loss, pred)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NARROW)
def test_every_layout_is_kept_and_is_the_reference(dtype: torch.dtype, layout: str) -> None:
    """Also where the images do not lie alike."""
    torch.manual_seed(0)
    plain = {name: torch.randn(3, 4, 5, 6).to(dtype) for name in ("pred", "x0", "noise", "mask")}
    laid = {name: LAYOUTS[layout](x) for name, x in plain.items()}
    mixed = [laid, *(plain | {name: laid[name]} for name in laid)]
    for images in mixed:
        for kind in reference.PREDICTIONS:
            for seed in (False, True):
                ours = results(images, kind, seed)
                with patch.object(native, "module", return_value=None):
                    expected = results(images, kind, seed)
                assert ours[0].stride() == torch.empty_like(images["x0"]).stride()
                assert ours[3].stride() == torch.empty_like(images["pred"]).stride()
                for mine, other in zip(ours, expected, strict=True):
                    rtol = 2 * torch.finfo(mine.dtype).eps
                    torch.testing.assert_close(mine, other, rtol=max(rtol, 2e-6), atol=1e-5 if seed else 1e-7)
    module.fallbacks.clear()


@needs_native
@pytest.mark.parametrize("dtype", NARROW)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    for case in LARGE.values():
        pred, terms = case.arguments(dtype)
        first, *others = by_threads(
            lambda pred=pred, terms=terms: [x for x in cpu.forward(pred, terms, True) if x is not None]  # type: ignore[misc]
        )
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other channel"])
@pytest.mark.parametrize("dtype", NARROW)
def test_all_memory_is_written_and_none_is_read_before(dtype: torch.dtype, layout: str) -> None:
    images = {name: LAYOUTS[layout](torch.randn(3, 4, 5, 7).to(dtype)) for name in ("pred", "x0", "noise", "mask")}
    expected = results(images, "v_prediction", True)
    empty_like, empty = torch.empty_like, torch.Tensor.new_empty
    with (
        patch.object(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan"))),
        patch.object(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan"))),
    ):
        assert all(map(torch.equal, results(images, "v_prediction", True), expected))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_images(shape: tuple[int, ...]) -> None:
    """As torch's own: the mean of nothing is no number, its gradient is empty."""
    pred, t = torch.zeros(shape, requires_grad=True), torch.zeros(shape[0], dtype=torch.int64)
    loss, per_sample = weighted_timestep_loss(pred, torch.zeros(shape), t, torch.ones(shape[0]), "sample")
    loss.backward()
    assert loss.isnan()
    assert per_sample.shape == shape[:1]
    assert pred.grad is not None
    assert pred.grad.shape == shape
    assert noised(torch.zeros(shape), t, Tables())[0].shape == shape


def test_float64_is_computed_in_float64_by_the_reference() -> None:
    pred, terms = Case(kind="v_prediction", huber="each").arguments(torch.float64)
    assert terms.table is not None
    wide = exact(terms)._replace(table=terms.table)
    loss, per_sample = torch.ops.ebdiff.weighted_timestep_loss(pred, *wide)
    assert loss.dtype == per_sample.dtype == torch.float64
    assert torch.equal(loss, reference.loss_of(pred, wide)[0])
    module.fallbacks.clear()
