"""Ratios by name, pattern and module, and budgets of measured time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import scores_of, widths
from torch import Tensor, nn
from toys import mlp

import ebdiff
from ebdiff import ChannelMask
from ebdiff.errors import EbdiffError
from ebdiff.pruning.latency import Latency
from ebdiff.pruning.plan import ChannelPlan, ChannelSpace, Member

PLAN = mlp(3, 10, 10, 20, 2)[1]


def drawn(ratio: dict[str, float]) -> list[int]:
    return list(widths(ChannelMask.draw(scores_of(PLAN), plan=PLAN, ratio=ratio)).values())


def tied() -> ChannelPlan:
    """Two blocks whose last layers add to one residual stream, and an own hidden width in each."""

    def space(name: str, *made_by: str) -> ChannelSpace:
        return ChannelSpace(name, 10, tuple(Member(f"{layer}.weight", 0) for layer in made_by))

    layers = ("one.a", "one.b", "two.a", "two.b")
    spaces = (space("one.a", "one.a"), space("one.b", "one.b", "two.b"), space("two.a", "two.a"))
    return ChannelPlan(spaces, (), {f"{layer}.weight": (10, 3) for layer in layers}, cost=((1.0, ("one.a",)),))


def test_ratios_by_pattern_and_for_the_rest() -> None:
    assert drawn({"h[12]": 0.7}) == [3, 3, 20]
    assert drawn({"*": 0.5, "h1": 0.1}) == [9, 5, 10]
    assert drawn({"*": 0.5}) == [5, 5, 10]


def test_a_module_stands_for_every_space_its_layers_make() -> None:
    plan = tied()
    scores = scores_of(plan)
    assert widths(ChannelMask.draw(scores, plan=plan, ratio={"one": 0.3})) == {"one.a": 7, "one.b": 7, "two.a": 10}
    assert widths(ChannelMask.draw(scores, plan=plan, ratio={"two": 0.3})) == {"one.a": 10, "one.b": 7, "two.a": 7}


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_makes_its_outputs(bias: bool) -> None:
    turned = nn.ConvTranspose2d(8, 6, 3, bias=bias)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), turned, nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1))
    plan = ebdiff.trace(model, torch.randn(1, 3, 4, 4))
    assert ebdiff.ChannelPlan.from_json(plan.to_json()) == plan
    mask = ChannelMask.draw(ebdiff.importance(model, plan), plan=plan, ratio={"0": 0.25, "1": 0.5})
    assert [conv.weight.shape[:2] for conv in ebdiff.shrink(model, mask)[:2]] == [(6, 3), (6, 3)]


@pytest.mark.parametrize("asked", [{"one": 0.1, "two": 0.9}, {"one.b": 0.1, "two": 0.9}, {"one*": 0.1, "one.b": 0.2}])
def test_contradictory_ratios_of_layers_that_shrink_together_are_refused(asked: dict[str, float]) -> None:
    plan = tied()
    with pytest.raises(EbdiffError, match=r"(?s)contradictory.*one\.b.*0\.[19]"):
        ChannelMask.draw(scores_of(plan), plan=plan, ratio=asked)
    same = dict.fromkeys(asked, 0.2)
    assert widths(ChannelMask.draw(scores_of(plan), plan=plan, ratio=same))["one.b"] == 8


def test_a_name_that_matches_nothing_is_refused() -> None:
    for key in ("one", "h9", "h*x"):
        with pytest.raises(EbdiffError, match="nothing of that name"):
            drawn({key: 0.5})


def as_macs(mask: ChannelMask) -> float:
    return mask.plan.macs(mask) / mask.plan.macs()


@given(share=st.floats(0.1, 1), other=st.floats(0.1, 1), scope=st.sampled_from(["local", "global"]))
@settings(derandomize=True, max_examples=40, deadline=None)
def test_a_latency_budget_is_met_and_monotone(share: float, other: float, scope: str) -> None:
    """The time is a stand-in that is known exactly: MACs."""

    def at(latency: float) -> ChannelMask:
        return ChannelMask.draw(
            scores_of(PLAN),
            plan=PLAN,
            latency=latency,
            measure=as_macs,
            scope=scope,  # type: ignore[arg-type]
        )

    less, more = sorted((share, other))
    assert as_macs(at(less)) <= less
    assert all(bool((at(less).keep[name] <= at(more).keep[name]).all()) for name in at(less))


def test_a_latency_budget_takes_few_trials_and_is_used_up() -> None:
    trials: list[float] = []

    def measure(mask: ChannelMask) -> float:
        trials.append(as_macs(mask))
        return trials[-1]

    mask = ChannelMask.draw(scores_of(PLAN), plan=PLAN, latency=0.4, measure=measure)
    assert 0.3 < as_macs(mask) <= 0.4
    assert len(trials) <= math.log2(32) + 2
    assert mask.asked == {"latency": 0.4}


def test_a_latency_budget_below_the_smallest_network_is_refused() -> None:
    with pytest.raises(EbdiffError, match=r"latency budget.*0\.700"):
        ChannelMask.draw(scores_of(PLAN), plan=PLAN, latency=0.5, measure=lambda mask: 0.7)


class _Watched(nn.Sequential):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        seen.append(tuple(self[0].weight.shape))
        return {"sample": super().forward(x)}


seen: list[tuple[int, ...]] = []


def test_latency_runs_both_networks_in_turn_and_leaves_the_model_alone() -> None:
    model = _Watched(*mlp(3, 6, 2)[0])
    x = torch.randn(4, 3)
    plan = ebdiff.trace(model, x)
    mask = ChannelMask(plan, {plan.spaces[0].name: torch.arange(6) < 2})
    model[0].weight.grad = torch.ones(6, 3)
    seen.clear()
    share = Latency(model, x, rounds=2)(mask)
    assert share > 0
    assert seen == [(6, 3), (2, 3)] * 3
    assert torch.equal(model[0].weight.grad, torch.ones(6, 3))
    assert model[1].weight.grad is None
    with pytest.raises(EbdiffError, match="output with a gradient"):
        Latency(model.requires_grad_(False), x)(mask)
    with pytest.raises(EbdiffError, match="rounds"):
        Latency(model, x, rounds=0)


def test_latency_changes_no_statistics_calls_no_hooks_of_parameters_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 2, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plan = ebdiff.trace(model, x)
    hooked: list[Tensor] = []
    model[0].weight.register_post_accumulate_grad_hook(hooked.append)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    Latency(model, x, rounds=1)(ChannelMask(plan, {plan.spaces[0].name: torch.arange(8) < 4}))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not hooked
    assert x.grad is None
