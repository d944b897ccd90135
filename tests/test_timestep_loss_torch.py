"""The timestep loss within torch: opcheck, torch.compile, torch.func, derivatives; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timestep_loss_cases import CASES, Case, exact
from torch import Tensor
from torch.autograd import forward_ad

from ebdiff import EbdiffError
from ebdiff.ops import LossStatistics, PhiloxNoise, noised, weighted_timestep_loss
from ebdiff.ops.timestep_loss_reference import Terms
from ebdiff.timesteps.profile import NoiseProfile

OPS = torch.ops.ebdiff


class Tables:
    """A profile of ten timesteps."""

    table = torch.stack([torch.linspace(1, 0, 10).sqrt(), torch.linspace(0.01, 1, 10).sqrt()])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.table, t

    def cells(self, t: Tensor) -> Tensor:
        return t


def double(case: Case) -> tuple[Tensor, Terms]:
    """In float64, but for the table of alpha and sigma."""
    pred, terms = case.arguments(torch.float64)
    return pred, exact(terms)._replace(table=terms.table)


@pytest.mark.parametrize("name", ["a target, squared", "v from a seed, channels last", "v, Huber of each, a mask"])
def test_the_operators_pass_opcheck(name: str) -> None:
    pred, terms = CASES[name].arguments()
    for with_grad in (True, False):
        torch.library.opcheck(OPS.timestep_loss_forward.default, (pred, *terms, with_grad))
    torch.library.opcheck(OPS.timestep_loss_backward.default, (torch.tensor(0.5), pred, *terms))
    weight = terms.weight if terms.cell is not None else terms.weight.clone().requires_grad_()
    torch.library.opcheck(OPS.weighted_timestep_loss.default, (pred.requires_grad_(), *terms._replace(weight=weight)))


def test_the_other_operators_pass_opcheck() -> None:
    x0, row = torch.randn(3, 4, 5, requires_grad=True), torch.tensor([0, 9, 3])
    for noise, seed in ((torch.randn(3, 4, 5), None), (None, torch.tensor([1, 2]))):
        torch.library.opcheck(OPS.noised.default, (x0, noise, seed, Tables.table, row))
        torch.library.opcheck(OPS.noised.default, (x0.detach(), noise, seed, Tables.table, row))
    totals, buckets = torch.zeros(3, 2, dtype=torch.float64), torch.arange(10) // 5
    torch.library.opcheck(OPS.timestep_loss_statistics_.default, (totals, buckets, row, torch.rand(3)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_training_step_compiles_without_graph_breaks(backend: str) -> None:
    x0, t, w = torch.randn(4, 3, 5, 5), torch.tensor([0, 9, 5, 5]), torch.rand(10)
    scale, seed = torch.randn(3, 1, 1, requires_grad=True), torch.tensor([1, 2])

    def step(statistics: LossStatistics) -> tuple[Tensor, ...]:
        x_t, noise = noised(x0, t, Tables(), PhiloxNoise(seed))
        return weighted_timestep_loss(
            x_t * scale, (x0, noise), t, w, "v_prediction", profile=Tables(), huber_c=0.5, statistics=statistics
        )

    def results(step: Callable[[LossStatistics], tuple[Tensor, ...]]) -> list[Tensor]:
        statistics = LossStatistics(torch.arange(10) // 4)
        loss, per_sample = step(statistics)
        return [*torch.autograd.grad(loss * 2, scale), loss.detach(), per_sample, statistics.totals]

    torch._dynamo.reset()
    found = results(torch.compile(step, fullgraph=True, backend=backend))
    torch.testing.assert_close(found, results(step))


def test_transforms_of_torch_func() -> None:
    pred, terms = double(Case(kind="flow", huber="each", mask="bool"))
    call = lambda p: OPS.weighted_timestep_loss(p, *terms)[0]  # noqa: E731
    given = pred.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(given), given)
    torch.testing.assert_close(torch.func.grad(call)(pred), expected)
    _, slope = torch.func.jvp(call, (pred,), (torch.ones_like(pred),))
    torch.testing.assert_close(slope, expected.sum())
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(pred, torch.ones_like(pred)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_function(name: str) -> None:
    pred, terms = double(CASES[name])
    pred, weight = pred[:, :2].contiguous().requires_grad_(), terms.weight.requires_grad_()
    cut = {k: v[:, :2] for k, v in terms._asdict().items() if k in ("target", "x0", "noise", "mask") and v is not None}
    inputs = [pred, weight]
    if terms.target is not None:
        inputs.append(cut["target"].clone().requires_grad_())

    def loss(pred: Tensor, weight: Tensor, *target: Tensor) -> Tensor:
        given = cut | {"weight": weight} | ({"target": target[0]} if target else {})
        return OPS.weighted_timestep_loss(pred, *terms._replace(**given))[0]

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_gradients_of_noising_are_those_of_the_function() -> None:
    inputs = [torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    row = torch.tensor([0, 9, 4])
    assert torch.autograd.gradcheck(lambda x, e: OPS.noised(x, e, None, Tables.table, row), inputs)


def test_many_gradients_at_once() -> None:
    pred, terms = double(Case(shape=(2, 3)))
    jacobian = torch.autograd.functional.jacobian
    call = lambda p: OPS.weighted_timestep_loss(p, *terms)[0] * torch.ones(2)  # noqa: E731
    torch.testing.assert_close(jacobian(call, pred, vectorize=True), jacobian(call, pred))


def test_what_eager_calls_may_not_pass_by() -> None:
    """Without the dispatcher in between: lazily negated memory, zeros without memory, traces."""
    pred, target, t, w = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(3)
    call = lambda p: weighted_timestep_loss(p, target, t, w, "epsilon").loss  # noqa: E731
    torch.testing.assert_close(call(torch._neg_view(pred)), call(-pred))
    torch.testing.assert_close(call(torch._efficientzerotensor((3, 4))), call(torch.zeros(3, 4)))
    torch.testing.assert_close(torch.jit.trace(call, (pred,), check_trace=False)(pred + 1), call(pred + 1))
    given = pred.clone().requires_grad_()
    call(given).backward(torch._efficientzerotensor(()))
    assert given.grad is not None
    assert not given.grad.any()


def test_autocast_changes_nothing() -> None:
    pred, target, t, w = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(3)
    plain = weighted_timestep_loss(pred.bfloat16(), target, t, w, "epsilon")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weighted_timestep_loss(pred.bfloat16(), target, t, w, "epsilon").loss, plain.loss)


def test_activations_may_be_checkpointed_and_offloaded() -> None:
    pred, target, t, w = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(3)

    def loss(pred: Tensor) -> Tensor:
        return weighted_timestep_loss(pred * 2, target, t, w, "epsilon").loss

    given = pred.requires_grad_()
    (expected,) = torch.autograd.grad(loss(given), given)
    again = torch.utils.checkpoint.checkpoint(loss, given, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        moved = loss(given)
    for found in (again, moved):
        torch.testing.assert_close(torch.autograd.grad(found, given)[0], expected)


@pytest.mark.parametrize("all_of_it", [False, True])
def test_what_was_made_in_inference_mode_serves_training(all_of_it: bool) -> None:
    """A validation before the first step makes what is remembered; latents are often made there too."""
    pred, weight, t = torch.randn(3, 4, requires_grad=True), torch.rand(10), torch.tensor([0, 9, 3])

    def loss(profile: NoiseProfile, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        noised(x0, t, profile, noise)
        target = x0, noise
        return weighted_timestep_loss(pred, target, t, weight, "v_prediction", profile=profile, huber_c=0.12345).loss

    arguments = NoiseProfile.from_alphas_cumprod(torch.linspace(0.99, 0, 10)), *torch.randn(2, 3, 4), weight
    with torch.inference_mode():
        loss(*arguments)
        made = [x.clone() for x in arguments[1:]]
    (found,) = torch.autograd.grad(loss(arguments[0], *(made if all_of_it else arguments[1:])), pred)
    (expected,) = torch.autograd.grad(loss(*arguments), pred)
    assert torch.equal(found, expected)


# Refusals -------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "one dimension": ("pred", lambda a: a.update(pred=torch.randn(3))),
    "whole numbers": ("pred", lambda a: a.update(pred=torch.ones(3, 4, dtype=torch.int64))),
    "sparse": ("pred", lambda a: a.update(pred=torch.ones(3, 4).to_sparse())),
    "another shape": ("target", lambda a: a.update(target=torch.randn(3, 5))),
    "x0 of another shape": ("x0", lambda a: a.update(target=(torch.randn(4, 4), torch.randn(3, 4)))),
    "noise of another shape": ("noise", lambda a: a.update(target=(torch.randn(3, 4), torch.randn(3, 1)))),
    "no profile": ("profile", lambda a: a.update(profile=None, prediction_type="v_prediction")),
    "an unknown kind": ("prediction_type", lambda a: a.update(prediction_type="noise")),
    "a weight of two dimensions": ("weight", lambda a: a.update(weight=torch.ones(3, 1))),
    "whole-number weights": ("weight", lambda a: a.update(weight=torch.ones(3, dtype=torch.int64))),
    "another device": ("weight", lambda a: a.update(weight=torch.ones(3, device="meta"))),
    "no c": ("huber_c", lambda a: a.update(huber_c=0.0)),
    "c is no number": ("huber_c", lambda a: a.update(huber_c=float("nan"))),
    "c of other samples": ("huber_c", lambda a: a.update(huber_c=torch.ones(2))),
    "c that float32 does not have": ("huber_c", lambda a: a.update(huber_c=1e-46)),
    "c that asks for a gradient": ("huber_c", lambda a: a.update(huber_c=torch.ones(3, requires_grad=True))),
    "a mask that asks for a gradient": ("mask", lambda a: a.update(mask=torch.ones(3, 4, requires_grad=True))),
    "a learned table without t": (
        "t",
        lambda a: a.update(weight=torch.ones(9, requires_grad=True), t=torch.tensor([0, -1, 1])),
    ),
    "a learned table that is too short": ("t", lambda a: a.update(weight=torch.ones(2, requires_grad=True))),
    "a learned number for a weight": ("weight", lambda a: a.update(weight=torch.tensor(1.0, requires_grad=True))),
    "a mask of another shape": ("mask", lambda a: a.update(mask=torch.ones(3, 5))),
    "a whole-number mask": ("mask", lambda a: a.update(mask=torch.ones(3, 4, dtype=torch.int64))),
    "t of other samples": (
        "t",
        lambda a: a.update(t=torch.zeros(2, dtype=torch.int64), prediction_type="v_prediction"),
    ),
    "t beyond the profile": ("t", lambda a: a.update(t=torch.tensor([0, 10, 1]), prediction_type="v_prediction")),
    "t before the profile": ("t", lambda a: a.update(t=torch.tensor([0, -1, 1]), prediction_type="v_prediction")),
    "t beyond the weights": ("t", lambda a: a.update(weight=torch.ones(7), t=torch.tensor([0, 7, 1]))),
    "t beyond the timesteps that have weights": (
        "t",
        lambda a: a.update(
            weight=torch.ones(7),
            t=torch.tensor([0, 7, 1]),
            profile=NoiseProfile.from_alphas_cumprod(torch.linspace(0.99, 0, 7)),
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    what, spoil = WRONG[name]
    arguments: dict[str, Any] = {
        "pred": torch.randn(3, 4),
        "target": (torch.randn(3, 4), torch.randn(3, 4)),
        "t": torch.tensor([1, 2, 3]),
        "weight": torch.ones(3),
        "prediction_type": "flow",
        "profile": Tables(),
    }
    spoil(arguments)
    with pytest.raises(EbdiffError, match=what):
        weighted_timestep_loss(**arguments)


def test_noising_refuses_what_does_not_fit() -> None:
    x0, t = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for what, arguments in [
        ("x0", (torch.randn(3), t, Tables())),
        ("noise", (x0, t, Tables(), torch.randn(3, 5))),
        ("t", (x0, t[:2], Tables())),
        ("t", (x0, t + 8, Tables())),
    ]:
        with pytest.raises(EbdiffError, match=what):
            noised(*arguments)  # type: ignore[arg-type]


def test_statistics_refuse_cells_that_they_do_not_have() -> None:
    statistics = LossStatistics(torch.tensor([0, 0, 1]))
    for cell, losses in [(torch.tensor([3]), torch.ones(1)), (torch.tensor([0, 1]), torch.ones(1))]:
        with pytest.raises(EbdiffError):
            statistics.add(cell, losses)
    assert not statistics.totals.any()


def test_a_gradient_of_something_else_is_refused() -> None:
    pred, terms = CASES["epsilon"].arguments()
    with pytest.raises(EbdiffError, match="dloss"):
        OPS.timestep_loss_backward(torch.ones(2), pred, *terms)
