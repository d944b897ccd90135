"""Masks hold what was asked: exact, monotone, feasible; distances as computed by hand."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import joined, mlp
from unets import unet

import ebdiff
from ebdiff import ChannelMask, ChannelPlan, distance
from ebdiff.errors import EbdiffError
from ebdiff.pruning.mask import distances
from ebdiff.pruning.plan import ChannelSpace, Member, Norm

RATIO = st.floats(0, 0.99)
SIZES = st.lists(st.integers(2, 40), min_size=1, max_size=3)
seeded = settings(derandomize=True, max_examples=60, deadline=None)


def plan_of(sizes):
    return mlp(3, *sizes, 2)[1]


def scores_of(plan, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {space.name: torch.rand(space.size, generator=g) for space in plan}


def widths(mask):
    return {name: int(kept.sum()) for name, kept in mask.keep.items()}


def mask_of(*bits):
    plan = mlp(1, len(bits), 1)[1]
    return ChannelMask(plan, {"h1": torch.tensor(bits, dtype=torch.bool)})


# Drawing --------------------------------------------------------------------------------------------------------------


@seeded
@given(SIZES, RATIO)
def test_a_ragged_mask_removes_exactly_what_was_asked(sizes, ratio):
    plan = plan_of(sizes)
    for space, kept in zip(
        plan, widths(ChannelMask.draw(scores_of(plan), plan=plan, ratio=ratio)).values(), strict=True
    ):
        assert kept >= 1
        assert abs(kept - space.size * (1 - ratio)) <= 0.5 or (kept == 1 and space.size * (1 - ratio) < 0.5)


@seeded
@given(SIZES, RATIO, RATIO, st.sampled_from([1, 4, 8]), st.sampled_from(["local", "global", "cost"]))
def test_asking_for_more_never_removes_fewer(sizes, ratio, other, multiple_of, scope):
    plan, (low, high) = plan_of(sizes), sorted((ratio, other))
    drawn = [
        ChannelMask.draw(scores_of(plan), plan=plan, ratio=r, multiple_of=multiple_of, scope=scope) for r in (low, high)
    ]
    for space in plan:
        assert (drawn[0][space.name] | ~drawn[1][space.name]).all(), "what the larger ratio keeps, the smaller keeps"
        assert drawn[1][space.name].any()


@seeded
@given(SIZES, st.floats(0.5, 1), st.floats(0.5, 1), st.sampled_from(["local", "global", "cost"]))
def test_a_macs_budget_is_met_and_monotone(sizes, budget, other, scope):
    plan, (low, high) = plan_of(sizes), sorted((budget, other))
    drawn = [ChannelMask.draw(scores_of(plan), plan=plan, macs=m, scope=scope) for m in (low, high)]
    for mask, asked in zip(drawn, (low, high), strict=True):
        assert plan.macs(mask) <= asked * plan.macs() * (1 + 1e-9)
    assert all(widths(drawn[0])[s.name] <= widths(drawn[1])[s.name] for s in plan)


def test_a_macs_budget_is_used_up():
    plan = plan_of([40, 30])
    reached = plan.macs(ChannelMask.draw(scores_of(plan), plan=plan, macs=0.4))
    finer = [plan.macs(ChannelMask.draw(scores_of(plan), plan=plan, ratio=r / 500)) for r in range(500)]
    assert reached == max(m for m in finer if m <= 0.4 * plan.macs())


def test_a_macs_budget_below_the_smallest_network_is_refused():
    plan = plan_of([4])  # 5 MACs per channel; one of four channels is a quarter
    assert widths(ChannelMask.draw(scores_of(plan), plan=plan, macs=0.25)) == {"h1": 1}
    with pytest.raises(EbdiffError, match=r"at least 0\.250.*0\.2;"):
        ChannelMask.draw(scores_of(plan), plan=plan, macs=0.2)


def test_the_highest_scores_stay_and_of_equal_ones_the_first():
    plan = plan_of([5])
    mask = ChannelMask.draw({"h1": torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])}, plan=plan, ratio=0.6)
    assert mask["h1"].tolist() == [False, True, False, True, False]
    mask = ChannelMask.draw({"h1": torch.ones(5)}, plan=plan, ratio=0.6)
    assert mask["h1"].tolist() == [True, True, False, False, False]


def test_global_scope_ranks_the_channels_of_all_spaces_together():
    plan = plan_of([4, 4])
    scores = {"h1": torch.tensor([4.0, 1.0, 2.0, 3.0]), "h2": torch.tensor([10.0, 0.5, 20.0, 30.0])}
    mask = ChannelMask.draw(scores, plan=plan, ratio=0.375, scope="global")
    assert mask["h1"].tolist() == [True, False, False, True]
    assert mask["h2"].tolist() == [True, False, True, True]
    mask = ChannelMask.draw(scores, plan=plan, ratio=0.75, scope="global")
    assert widths(mask) == {"h1": 1, "h2": 1} or mask.removed == 0.75
    assert mask["h1"][0], "the best channel of a space is out of reach"


def test_cost_scope_removes_more_where_channels_cost_more():
    _, plan = mlp(960, 64, 64, 64)  # layers of 61440, 4096 and 4096 MACs: around h1 on average eight times those of h2
    for ratio, kept in ((0, (64, 64)), (0.25, (32, 64)), (0.5, (21, 43)), (0.8, (9, 17))):  # eight to the 1/3 is two
        assert widths(ChannelMask.draw(scores_of(plan), plan=plan, ratio=ratio, scope="cost")) == dict(
            zip(("h1", "h2"), kept, strict=True)
        )
    alike = plan_of([40, 40])
    by_cost = ChannelMask.draw(scores_of(alike), plan=alike, ratio=0.5, scope="cost")
    assert widths(by_cost) == {"h1": 20, "h2": 20}
    with pytest.raises(EbdiffError, match="scope='local'"):
        ChannelMask.draw(scores_of(plan), plan=plan, ratio={"*": 0.5}, scope="cost")


def test_multiple_of_rounds_kept_widths_where_a_space_is_large_enough():
    plan = plan_of([40, 6])
    for ratio in (0.1, 0.3, 0.5, 0.7, 0.95):
        kept = widths(ChannelMask.draw(scores_of(plan), plan=plan, ratio=ratio, multiple_of=8))
        assert kept["h1"] % 8 == 0
        assert kept["h1"] > 0
    assert kept["h2"] == 1, "a space of 6 cannot hold a multiple of 8 and is not skipped"


def test_ratios_by_name_leave_the_other_spaces_whole():
    plan = plan_of([10, 10])
    assert widths(ChannelMask.draw(scores_of(plan), plan=plan, ratio={"h2": 0.7})) == {"h1": 10, "h2": 3}
    with pytest.raises(EbdiffError, match="h9"):
        ChannelMask.draw(scores_of(plan), plan=plan, ratio={"h9": 0.7})


def test_head_dims_stay_unless_asked_for():
    spaces = (ChannelSpace("q.head_dim", 4, (Member("q", 0, outer=2, period=4),), "head_dim"),)
    plan = ChannelPlan(spaces, (), {"q": (8, 3)})
    scores = {"q.head_dim": torch.rand(4)}
    assert ChannelMask.draw(scores, plan=plan, ratio=0.5).removed == 0
    assert ChannelMask.draw(scores, plan=plan, ratio=0.5, head_dim=True).removed == 0.5


@seeded
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6]), RATIO)
def test_balanced_masks_fill_every_group_equally(a, b, groups, ratio):
    plan = joined(a * groups, b * groups, groups)
    mask = ChannelMask.draw(scores_of(plan), plan=plan, ratio=ratio, norm="balanced")
    members = mask.groups_of(plan.norms[0])
    assert len(set(torch.bincount(members[members >= 0], minlength=groups).tolist())) == 1
    assert all(kept >= 1 for kept in widths(mask).values())


def test_a_space_in_several_norms_balances_them_all():
    spaces = (ChannelSpace("s", 12, (Member("two.weight", 0), Member("three.weight", 0), Member("w", 0))),)
    shapes = {"two.weight": (12,), "three.weight": (12,), "w": (12, 1)}
    plan = ChannelPlan(spaces, (), shapes, norms=(Norm("three", (4, 4, 4)), Norm("two", (6, 6))))
    for ratio, kept in ((0.2, 12), (0.4, 6), (0.9, 6)):
        drawn = ChannelMask.draw(scores_of(plan), plan=plan, ratio=ratio, norm="balanced")
        assert widths(drawn) == {"s": kept}


def test_groups_of_ragged_and_balanced_masks_by_hand():
    plan = joined(4, 4, 2)
    keep = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([False, False, False, True])}
    ragged, balanced = ChannelMask(plan, keep), ChannelMask(plan, keep, norm="balanced")
    assert ragged.groups_of(plan.norms[0]).tolist() == [0, -1, 0, 0, -1, -1, -1, 1]
    assert balanced.groups_of(plan.norms[0]).tolist() == [0, -1, 0, 1, -1, -1, -1, 1]
    assert balanced.regrouped() == ["norm"]
    assert ragged.regrouped() == []
    with pytest.raises(EbdiffError, match=r"2 groups.*5 kept"):
        ChannelMask(plan, {"a": keep["b"]}, norm="balanced")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"ratio": 0.5, "macs": 0.5}, "ratio and macs"),
        ({}, "none"),
        ({"latency": 1.5, "measure": len}, "latency"),
        ({"latency": 0.5}, "only latency"),
        ({"ratio": 0.5, "measure": len}, "only measure"),
        ({"macs": 0.0}, "macs"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of"),
        ({"ratio": 0.5, "multiple_of": "8"}, "multiple_of"),
        ({"ratio": 0.5, "multiple_of": 2.5}, "multiple_of"),
        ({"ratio": "0.5"}, "ratio"),
        ({"macs": "0.5"}, "macs"),
        ({"ratio": 0.5, "scope": "everywhere"}, "scope"),
        ({"ratio": 0.5, "norm": "both"}, "norm"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(change, match):
    plan = plan_of([4])
    with pytest.raises(EbdiffError, match=match):
        ChannelMask.draw(scores_of(plan), plan=plan, **change)


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")]), torch.rand(3), None]
)
def test_scores_that_are_none_are_refused(bad):
    plan = plan_of([2])
    with pytest.raises(EbdiffError, match="scores of h1"):
        ChannelMask.draw({} if bad is None else {"h1": bad}, plan=plan, ratio=0.5)


# The mask itself ------------------------------------------------------------------------------------------------------


def test_a_mask_cannot_be_wrong_or_changed():
    plan = plan_of([4, 4])
    for keep, match in (
        ({"h1": torch.zeros(4, dtype=torch.bool)}, "empties"),
        ({"h1": torch.ones(4)}, "bool"),
        ({"h1": torch.ones(5, dtype=torch.bool)}, "bool"),
        ({"h7": torch.ones(4, dtype=torch.bool)}, "unknown"),
    ):
        with pytest.raises(EbdiffError, match=match):
            ChannelMask(plan, keep)
    given_ = torch.tensor([True, True, False, True])
    mask = ChannelMask(plan, {"h1": given_})
    given_[0] = False
    mask["h1"][1] = False
    assert mask["h1"].tolist() == [True, True, False, True]
    assert mask["h2"].all()
    assert (mask.size, mask.removed) == (8, 1 / 8)


def test_a_mask_says_what_was_asked_and_what_was_achieved():
    plan = mlp(2, 10, 2)[1]
    text = str(ChannelMask.draw(scores_of(plan), plan=plan, ratio=0.33))
    assert "ratio 0.33" in text
    assert "30.0% of the channels removed" in text
    assert "70.0% of the MACs" in text
    assert "70.0% of the parameters" in text


# Distances ------------------------------------------------------------------------------------------------------------


def test_distances_by_hand():
    a, b = mask_of(1, 1, 0, 0, 1), mask_of(1, 0, 1, 0, 1)
    assert distance(a, b) == pytest.approx(2 / 5)
    assert distance(a, b, corrected=True) == pytest.approx(2 / 5 / (2 * 0.4 * 0.6))
    assert distance(a, a) == distance(a, a, corrected=True) == 0
    whole = mask_of(1, 1, 1, 1, 1)
    assert distance(whole, whole, corrected=True) == 0
    plan = plan_of([2, 4])
    c = ChannelMask(plan, {"h1": torch.tensor([True, False])})
    d = ChannelMask(plan, {"h1": torch.tensor([False, True])})
    assert distance(c, d) == pytest.approx(2 / 6)
    assert distances(c, d) == {"h1": 1, "h2": 0}
    assert distances(c, d, corrected=True) == {"h1": 2, "h2": 0}
    with pytest.raises(EbdiffError, match="different architectures"):
        distance(a, c)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_independent_masks_are_one_chance_apart_whatever_the_ratio(ratio):
    plan = mlp(1, 20000, 1)[1]
    a, b = (ChannelMask.draw(scores_of(plan, seed), plan=plan, ratio=ratio) for seed in (1, 2))
    assert distance(a, b) == pytest.approx(2 * ratio * (1 - ratio), rel=0.1)
    assert distance(a, b, corrected=True) == pytest.approx(1, abs=0.1)


# The plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_survives_json():
    traced = ebdiff.trace(unet("AttnDownBlock2D", "AttnUpBlock2D"), torch.randn(1, 2, 8, 8), torch.tensor([3]))
    odd = replace(joined(4, 8, 4), aliases={"tied": "a.weight"}, buffers=frozenset({"norm.weight"}))
    for plan in (traced, odd):
        again = ChannelPlan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert again.fingerprint() == plan.fingerprint()
    with pytest.raises(EbdiffError, match="damaged"):
        ChannelPlan.from_json({"spaces": []})


def test_a_space_must_fit_its_parameter():
    with pytest.raises(EbdiffError, match="inside its parameter"):
        ChannelPlan((ChannelSpace("s", 5, (Member("w", 0),)),), (), {"w": (4, 4)})
