"""How far masks are apart, tickets that survive the disk or are refused, and one budget for all regions."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import mlp

from ebdiff import ChannelMask, MaskHistory, Region, Ticket, distance
from ebdiff.errors import EbdiffError
from ebdiff.tickets.budget import _hull, split_budget

NAN = float("nan")


def mask_at(plan, *kept, size=20):
    bits = torch.zeros(size, dtype=torch.bool)
    bits[list(kept)] = True
    return ChannelMask(plan, {"h1": bits})


# History --------------------------------------------------------------------------------------------------------------


def test_a_history_gives_back_its_masks_and_their_distances():
    plan = mlp(1, 9, 7, 1)[1]
    history, masks = MaskHistory(plan, keep=3), []
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        scores = {s.name: torch.rand(s.size, generator=g) for s in plan}
        masks.append(ChannelMask.draw(scores, plan=plan, ratio=0.5))
        history.add(10 * step, masks[-1])
    kept = [masks[0], *masks[3:]]
    assert history.steps == (0, 30, 40, 50)
    assert [history[i] for i in range(4)] == kept
    assert history[-1].asked == {"ratio": 0.5}
    for corrected in (False, True):
        steps, map_ = history.heatmap(corrected)
        expected = [[distance(a, b, corrected) for b in kept] for a in kept]
        torch.testing.assert_close(map_, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        assert history.distances(corrected) == pytest.approx(expected[-1][:-1])
        assert steps == history.steps


def test_a_history_holds_one_plan_one_recipe_and_rising_steps():
    (_, plan), (_, other) = mlp(1, 4, 1), mlp(1, 5, 1)
    scores = {"h1": torch.arange(4.0)}
    history = MaskHistory(plan)
    history.add(3, ChannelMask.draw(scores, plan=plan, ratio=0.5))
    with pytest.raises(EbdiffError, match="one recipe"):
        history.add(4, ChannelMask.draw(scores, plan=plan, ratio=0.75))
    with pytest.raises(EbdiffError, match="one plan"):
        history.add(4, ChannelMask.draw({"h1": torch.arange(5.0)}, plan=other, ratio=0.5))
    with pytest.raises(EbdiffError, match="a step after 3"):
        history.add(3, ChannelMask.draw(scores, plan=plan, ratio=0.5))
    assert len(history) == 1


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 100), st.integers(2, 6))
def test_the_window_spans_what_it_must_however_often_masks_are_drawn(gaps, span, fifo):
    plan = mlp(1, 2, 1)[1]
    history, step = MaskHistory(plan, keep=1000), 0
    for gap in (0, *gaps):
        step += gap
        history.add(step, mask_at(plan, 0, size=2))
    window = history.window(span, fifo)
    steps = [history.steps[place] for place in window]
    if window:
        assert len(set(steps)) == fifo
        assert steps == sorted(steps, reverse=True)
        assert steps[0] == step
        assert steps[0] - steps[-1] >= span
        assert 0 not in window, "the initial mask is compared by itself"
    else:
        assert len(history) <= fifo or history.steps[-1] - history.steps[1] < span + 30 * fifo


def test_settling_by_hand():
    plan = mlp(1, 20, 1)[1]

    def settled(first, *later, eta=0.1, corrected=False):
        history = MaskHistory(plan)
        for step, kept in enumerate([first, *later]):
            history.add(step, mask_at(plan, *kept))
        return history.settled(2, eta=eta, fifo=3, corrected=corrected)

    a, b, c = range(10), [*range(9), 10], [*range(8), 10, 11]  # 0.1 from neighbour to neighbour, 0.2 from a to c
    far = range(10, 20)
    assert settled(far, a, a, a)
    assert settled(far, a, a, b), "0.1 is at most 0.1"
    assert not settled(far, a, b, c), "the newest is 0.2 from the oldest"
    assert settled(far, a, b, c, eta=0.2)
    assert not settled(far, a, b, c, eta=0.2, corrected=True), "at half the channels 0.2 is 0.4 of chance"
    assert settled(far, a, b, c, eta=0.4, corrected=True)
    assert not settled(a, a, a, a), "has not moved yet"
    assert not settled(c, b, a, a), "0.2 from the initial mask does not exceed twice 0.1"
    assert settled(c, a, a, a)
    assert not settled(far, a, a), "too short"


# Tickets on disk ------------------------------------------------------------------------------------------------------


def ticket_of(region=None, seed=0):
    _, plan = mlp(2, 10, 5, 2)
    torch.manual_seed(seed)
    mask = ChannelMask.draw({"h1": torch.rand(10), "h2": torch.rand(5)}, plan=plan, ratio=0.6)
    return Ticket(mask, 0.6, 120, "taylor", region, settled=False)


@pytest.mark.parametrize("region", [None, 2, Region(240, 440)])
def test_a_ticket_survives_the_disk(tmp_path, region):
    ticket = ticket_of(region)
    ticket.save(tmp_path)
    again = Ticket.load(tmp_path, ticket.plan)
    assert again == ticket
    assert again.mask.plan == ticket.plan
    assert again.mask.asked == {"ratio": 0.6}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ticket.json", "ticket.safetensors"]


def test_a_ticket_says_what_was_asked_and_what_was_reached():
    text = str(ticket_of(Region(240, 440)))
    assert "\n" not in text
    for part in ("taylor", "[240, 440)", "NOT settled", "step 120", "60.0% asked", "60.0% of the channels", "MACs"):
        assert part in text


def test_an_edited_or_foreign_ticket_is_refused_by_naming_both(tmp_path):
    ticket = ticket_of()
    ticket.save(tmp_path)
    text = (tmp_path / "ticket.json").read_text()
    other = mlp(2, 10, 6, 2)[1]
    with pytest.raises(EbdiffError, match=f"{other.fingerprint()}.*{ticket.plan.fingerprint()}"):
        Ticket.load(tmp_path, other)
    value = json.loads(text)
    value["plan"]["shapes"]["1.weight"] = [5, 11]
    (tmp_path / "ticket.json").write_text(json.dumps(value))
    with pytest.raises(EbdiffError, match=f"edited.*{value['digest']}.*got [0-9a-f]{{16}}"):
        Ticket.load(tmp_path)
    value["plan"]["shapes"]["1.weight"], value["fingerprint"] = [5, 10], "0" * 16
    (tmp_path / "ticket.json").write_text(json.dumps(value))
    with pytest.raises(EbdiffError, match=f"edited.*{'0' * 16}.*got {ticket.plan.fingerprint()}"):
        Ticket.load(tmp_path)
    for old, new in (
        ('"ratio": 0.6', '"ratio": 0.7'),
        ('"settled": false', '"settled": true'),
        ('"dim": 1', '"dim": 0'),
    ):
        assert old in text
        (tmp_path / "ticket.json").write_text(text.replace(old, new))
        with pytest.raises(EbdiffError, match="edited"):
            Ticket.load(tmp_path)
    (tmp_path / "ticket.json").write_text(text[: len(text) // 2])
    with pytest.raises(EbdiffError, match="damaged"):
        Ticket.load(tmp_path)
    (tmp_path / "ticket.json").write_text("[]")
    with pytest.raises(EbdiffError, match="no ticket"):
        Ticket.load(tmp_path)
    (tmp_path / "ticket.json").write_text(text)
    ticket_of(seed=1).save(tmp_path / "other")
    (tmp_path / "ticket.safetensors").write_bytes((tmp_path / "other" / "ticket.safetensors").read_bytes())
    with pytest.raises(EbdiffError, match="edited"):
        Ticket.load(tmp_path)
    (tmp_path / "ticket.safetensors").unlink()
    with pytest.raises(EbdiffError, match="missing"):
        Ticket.load(tmp_path)


# One budget for all regions -------------------------------------------------------------------------------------------


def kept_macs(plan, scores, shares):
    return [
        plan.macs(ChannelMask.draw(s, plan=plan, macs=m)) / plan.macs() for s, m in zip(scores, shares, strict=True)
    ]


def predicted(plan, scores, shares):
    """The summed first-order increase of the loss."""
    masks = [ChannelMask.draw(s, plan=plan, macs=m) for s, m in zip(scores, shares, strict=True)]
    return sum(float(s["h1"][~m["h1"]].sum()) for s, m in zip(scores, masks, strict=True))


def test_a_region_that_matters_little_is_pruned_more_and_the_budget_is_met():
    plan = mlp(2, 100, 2)[1]
    g = torch.Generator().manual_seed(0)
    scores = [{"h1": torch.rand(100, generator=g) * scale} for scale in (1.0, 1.0, 1e-3)]
    shares = split_budget(plan, scores, [1, 1, 2], 0.5)
    assert (shares[0] + shares[1] + 2 * shares[2]) / 4 == pytest.approx(0.5)
    assert shares[2] < 0.1 < 0.8 < min(shares[:2])
    reached = kept_macs(plan, scores, shares)
    assert 0.48 < (reached[0] + reached[1] + 2 * reached[2]) / 4 <= 0.5


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5, 0.8, 0.95])
def test_no_other_split_predicts_a_smaller_loss(budget):
    plan = mlp(2, 200, 2)[1]
    g = torch.Generator().manual_seed(1)
    scores = [{"h1": torch.rand(200, generator=g) ** power} for power in (0.5, 3.0)]
    best = predicted(plan, scores, split_budget(plan, scores, [1, 1], budget))
    others = [(a / 100, 2 * budget - a / 100) for a in range(6, 101) if 0.06 <= 2 * budget - a / 100 <= 1]
    assert best <= 1.02 * min(predicted(plan, scores, shares) for shares in others)
    assert best < predicted(plan, scores, [budget, budget])


def test_equal_regions_share_equally_and_a_whole_budget_prunes_nothing():
    plan = mlp(2, 40, 2)[1]
    scores = [{"h1": torch.arange(40.0)}] * 2
    assert split_budget(plan, scores, [1, 1], 1.0) == [1.0, 1.0]
    assert split_budget(plan, scores, [3, 1], 0.5) == pytest.approx([0.5, 0.5], abs=0.1)


def test_steps_that_cost_more_than_the_next_are_taken_together():
    points = [(1.0, 0.0), (0.9, 5.0), (0.9, 6.0), (0.8, 6.0), (0.5, 7.5), (0.4, 20.0), (0.1, 23.0)]
    assert _hull(points) == [(1.0, 0.0), (0.5, 7.5), (0.1, 23.0)]


def test_budgets_that_cannot_be_split_are_refused():
    plan = mlp(2, 40, 2)[1]
    scores = [{"h1": torch.arange(40.0)}] * 2
    for weights, macs in (([1], 0.5), ([1, -1], 0.5), ([0, 0], 0.5), ([1, NAN], 0.5), ([1, 1], 0.0), ([1, 1], 1.5)):
        with pytest.raises(EbdiffError):
            split_budget(plan, scores, weights, macs)
    with pytest.raises(EbdiffError, match=r"at least 0\.500"):
        split_budget(plan, scores, [1, 1], 0.4, ratios=(0.0, 0.5))
