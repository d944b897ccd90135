"""A search declares tickets never too early, and keeps regions apart."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from toys import hidden, mlp, rank
from unets import unet

import ebdiff
from ebdiff import ChannelMask, EarlyBird, Partition, Region, importance
from ebdiff.errors import EbdiffError
from ebdiff.tickets import early_bird
from ebdiff.tickets.scores import RunningScores, gradient_scores

HALVES = Partition(0, 500, 1000)
UP, DOWN = [float(c + 1) for c in range(20)], [float(20 - c) for c in range(20)]  # masks at 0.5: complements
NAN = float("nan")


def gradients(model, batch=None):
    model.zero_grad()
    model(torch.ones(4, 1) if batch is None else batch).square().mean().backward()


# The search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "every"), [(40, e) for e in (1, 2, 5, 10, 25, 40, None)] + [(150, 1), (3, 7)])
def test_a_mask_that_jumps_once_settles_one_window_after_the_jump(window, every):
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5,), window=window, every=every)
    for step in range(1, 400):
        if step == 12:
            rank(model, DOWN)
        watch.step()
        if watch.settled:
            break
    ticket, every = watch.tickets[0.5], every or 2
    assert ticket.step == step
    assert 12 + window <= ticket.step < 12 + window + 5 * every
    assert ticket.settled
    assert ticket.mask["h1"].tolist() == [True] * 10 + [False] * 10
    rank(model, UP)
    for _ in range(10 * every):
        watch.step()
    assert watch.finish()[0.5] is ticket
    assert watch.history(0.5).steps[-1] == ticket.step


def test_a_mask_that_never_moves_never_settles_and_is_drawn_at_the_end():
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5, 0.8), window=8)
    for _ in range(50):
        watch.step()
    assert watch.tickets[0.5] is None
    assert not watch.settled
    tickets = watch.finish()
    assert not watch.settled
    assert [tickets[r].settled for r in (0.5, 0.8)] == [False, False]
    assert tickets[0.8].step == 50
    assert tickets[0.8].mask.removed == 0.8
    assert watch.finish()[0.8] is tickets[0.8]


def test_a_drift_that_is_slow_between_draws_but_not_over_the_window_does_not_settle():
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5,), window=40, every=1)
    for step in range(1, 80):
        rank(model, [1.0 if (c - step // 4) % 20 < 10 else 0.1 for c in range(20)])  # 0.1 further every four steps
        watch.step()
        if step % 4 == 0 and step > 1:
            assert watch.history(0.5).distances()[-1] <= 0.1
    assert watch.tickets[0.5] is None


def test_random_masks_settle_nowhere_at_one_half():
    model, plan = mlp(1, 200, 1)
    watch = EarlyBird(model, plan, ratios=(0.5,), criteria=("random",), window=4, every=1, seed=3)
    for _ in range(30):
        watch.step()
    _, map_ = watch.heatmap(0.5)
    assert map_[~torch.eye(len(map_), dtype=torch.bool)].min() > 0.3
    assert not watch.finish()[0.5].settled


def test_magnitude_masks_are_those_of_importance():
    model = unet("AttnDownBlock2D", "AttnUpBlock2D")
    plan = ebdiff.trace(model, torch.randn(1, 2, 8, 8), torch.tensor([3]))
    watch = EarlyBird(model, plan, criteria=("magnitude", "magnitude-l1"))
    for criterion in ("magnitude", "magnitude-l1"):
        expected = importance(model, plan, criterion)
        torch.testing.assert_close(watch.scores(criterion), expected)
        for ratio in (0.3, 0.6, 0.8):
            mask = ChannelMask.draw(expected, plan=plan, ratio=ratio)
            assert watch.history((criterion, ratio))[0] == mask


def test_taylor_scores_of_one_batch_are_those_of_importance_and_batches_are_averaged_without_sign():
    model = unet("AttnDownBlock2D", "AttnUpBlock2D")
    plan = ebdiff.trace(model, torch.randn(1, 2, 8, 8), torch.tensor([3]))
    x = torch.randn(2, 2, 8, 8)

    def loss():
        return model(x, torch.tensor([3, 500])).sample.square().mean()

    watch = EarlyBird(model, plan, criteria=("taylor",), window=10, taylor_every=1)
    loss().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    watch.step()
    expected = importance(model, plan, "taylor", [loss()])
    torch.testing.assert_close(watch.scores("taylor"), expected)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    for p in model.parameters():
        p.grad.neg_()
    watch.step()
    torch.testing.assert_close(watch.scores("taylor"), expected)


def test_raw_taylor_scores_predict_the_change_of_the_loss_by_hand():
    model, plan = mlp(1, 2, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [-3.0]]))
        model[1].weight.copy_(torch.tensor([[5.0, 7.0]]))
    model(torch.ones(1)).sum().backward()  # y = 2 * 5 - 3 * 7: without a channel, its term is gone
    watch = EarlyBird(model, plan, criteria=("taylor",))
    watch.step()
    assert watch.scores("taylor", raw=True)["h1"].tolist() == [10.0, 21.0]
    torch.testing.assert_close(watch.scores("taylor")["h1"], torch.tensor([10.0, 21.0]) / 15.5)


def test_taylor_masks_follow_a_change_within_one_window():
    model, plan = hidden(*[1.0] * 20)
    watch = EarlyBird(model, plan, ratios=(0.5,), criteria=("taylor",), window=40)
    for step in range(140):
        model.zero_grad()
        h = model[0](torch.ones(1, 1)) * (torch.arange(20) // 10 == step // 100)
        model[1](h).square().sum().backward()
        watch.step()
    assert watch.history(0.5)[0]["h1"].tolist() == [True] * 10 + [False] * 10
    assert watch.history(0.5)[-1]["h1"].tolist() == [False] * 10 + [True] * 10


def test_regions_share_the_reading_of_gradients(monkeypatch):
    count = []
    monkeypatch.setattr(early_bird, "gradient_scores", lambda *a: count.append(1) or gradient_scores(*a))
    by_region(60, taylor_every=3)
    assert 18 <= len(count) <= 22


def test_running_scores_fade():
    running = RunningScores(1, horizon=10)
    assert running.mean is None
    for step, score in ((5, 1.0), (15, 3.0), (15, 5.0)):
        running.add(step, torch.tensor([score], dtype=torch.float64))
    e = 0.36787944117144233
    assert float(running.mean) == pytest.approx((1 * e + 3 + 5) / (e + 2))


def by_region(steps, **options):
    """A search in which the loss of region 0 depends on the first ten channels and that of region 1 on the others."""
    model, plan = hidden(*[1.0] * 20)
    options = {"ratios": (0.5,), "criteria": ("taylor", "magnitude"), "window": 8, **options}
    watch = EarlyBird(model, plan, regions=HALVES, **options)
    for step in range(steps):
        model.zero_grad()
        h = model[0](torch.ones(1, 1)) * (torch.arange(20) // 10 == step % 2)
        (model[1](h).square().sum() * (1 + step)).backward()
        watch.step(step % 2)
    return watch


def test_regions_keep_the_channels_that_matter_to_them():
    tickets = by_region(40).finish()
    for region in (0, 1):
        ticket = tickets["taylor", 0.5, region]
        assert ticket.mask["h1"].tolist() == [c // 10 == region for c in range(20)]
        assert ticket.region == HALVES[region]
        assert tickets["taylor", 0.5, HALVES[region]] == ticket
        assert tickets["magnitude", 0.5, region].region == HALVES[region]
        assert tickets["magnitude", 0.5, region].mask == tickets["magnitude", 0.5].mask
    assert tickets["magnitude", 0.5].region is None
    assert sorted(map(str, tickets)) == ["('magnitude', 0.5, None)", "('taylor', 0.5, 0)", "('taylor', 0.5, 1)"]


def test_a_region_without_new_gradients_draws_no_mask():
    watch = by_region(40, every=2, taylor_every=1)
    steps = watch.history(("taylor", 0.5, 0)).steps
    for _ in range(30):
        watch.step(1)
    assert watch.history(("taylor", 0.5, 0)).steps == steps
    assert watch.history(("taylor", 0.5, 1)).steps[-1] == 70
    assert watch.finish()["taylor", 0.5, 0].step == steps[-1]


def test_each_region_may_be_watched_at_its_own_ratio():
    watch = by_region(20, ratios=None, region_ratios=(0.3, 0.8))
    assert len(watch.tickets) == 4
    tickets = watch.finish()
    assert tickets[0.8].region == HALVES[1]
    assert tickets[0.3].region == HALVES[0]
    assert tickets["magnitude", 0.3, 0].mask.removed == pytest.approx(0.3)
    with pytest.raises(EbdiffError, match="nothing is watched"):
        tickets["taylor", 0.3, 1]


@pytest.mark.parametrize(
    "key", [0.7, ("magnitude", 0.5), ("taylor", 0.5, 7), ("taylor", 0.5, 0, 0), "taylor", (), None]
)
def test_keys_that_are_not_watched_are_refused_by_naming_those_that_are(key):
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5,), criteria="taylor", regions=HALVES)
    with pytest.raises(EbdiffError, match=r"0\.5, 0.*0\.5, 1|0 to 1"):
        watch.tickets[key]


def test_a_key_that_means_several_regions_is_refused():
    with pytest.raises(EbdiffError, match=r"several regions.*\[\"taylor\", 0.5, 0\]"):
        by_region(2).tickets[0.5]


def test_missing_gradients_are_refused_before_anything_changes():
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, criteria=("taylor",), window=4)
    with pytest.raises(EbdiffError, match=r"got none; call step\(\) after backward.*before zero_grad"):
        watch.step()
    gradients(model)
    model.zero_grad(set_to_none=False)
    with pytest.raises(EbdiffError, match="got zeros"):
        watch.step()
    assert watch.steps == 0
    with pytest.raises(EbdiffError, match="no Taylor scores"):
        watch.finish()
    with pytest.raises(EbdiffError, match="regions=Partition"):
        watch.step(1)
    gradients(model)
    watch.step()
    assert watch.finish()[0.3].step == 1


def test_a_search_by_region_must_be_told_the_region():
    watch = by_region(2)
    for region in (None, 2, -1, Region(0, 3)):
        with pytest.raises(EbdiffError, match="region"):
            watch.step(region)
    assert watch.steps == 2
    model, plan = hidden(*UP)
    EarlyBird(model, plan, regions=HALVES).step()  # magnitudes need no region


def test_gradients_of_a_step_that_overflowed_do_not_count():
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, criteria=("taylor",), window=4)
    gradients(model)
    watch.step()
    before = watch.scores("taylor")
    for p in model.parameters():
        p.grad.fill_(NAN)
    watch.step()
    torch.testing.assert_close(watch.scores("taylor"), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, AveragedModel, lambda m: SimpleNamespace(shadow_params=[p.data for p in m.parameters()])]
)
def test_magnitudes_come_from_the_ema_where_there_is_one(wrap):
    (model, plan), (ema, _) = hidden(*UP), hidden(*DOWN)
    watch = EarlyBird(model, plan, ratios=(0.5,), ema=wrap(ema))
    assert watch.history(0.5)[0]["h1"].tolist() == [True] * 10 + [False] * 10
    for foreign in (wrap(hidden(1, 2, 3)[0]), object()):
        with pytest.raises(EbdiffError, match="EMA is not of this model"):
            EarlyBird(model, plan, ema=foreign)


@pytest.mark.parametrize("whole", [int, np.int64, torch.tensor])
def test_the_region_of_a_timestep_is_its_number_whatever_type_holds_it(whole):
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5,), criteria=("taylor",), regions=HALVES, window=1)
    assert type(HALVES.index(whole(700))) is int
    gradients(model)
    watch.step(whole(1))
    assert watch.scores("taylor", 1)


@pytest.mark.parametrize(
    "options",
    [
        {"ratios": (1.0,)},
        {"ratios": (0.5, 0.5)},
        {"ratios": (NAN,)},
        {"ratios": (), "criteria": ()},
        {"ratios": ()},
        {"ratios": 0.5},
        {"ratios": "0.5"},
        {"ratios": ("a",)},
        {"regions": (0, 500, 1000)},
        {"regions": (0, 500, 1000), "criteria": ("taylor",)},
        {"region_ratios": 0.5, "regions": HALVES},
        {"criteria": ("beauty",)},
        {"window": 0},
        {"window": "100"},
        {"window": 2.5},
        {"every": "5"},
        {"eta": "0.1"},
        {"attention": "0.25"},
        {"multiple_of": "8"},
        {"multiple_of": 2.5},
        {"every": 0},
        {"fifo": 1},
        {"eta": 0.0},
        {"region_ratios": (0.5, 0.6)},
        {"region_ratios": (0.5,), "regions": HALVES},
        {"ratios": (0.5,), "region_ratios": (0.5, 0.6), "regions": HALVES},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    model, plan = hidden(*UP)
    with pytest.raises(EbdiffError):
        EarlyBird(model, plan, **options)


def test_a_wrapped_or_foreign_or_changed_model_is_refused():
    (model, plan), (other, _) = hidden(*UP), hidden(1, 2, 3)
    with pytest.raises(EbdiffError, match="wrapped in DataParallel"):
        EarlyBird(torch.nn.DataParallel(model), plan)
    with pytest.raises(EbdiffError, match="another architecture"):
        EarlyBird(other, plan)
    watch = EarlyBird(model, plan, criteria=("magnitude", "taylor"), every=1)
    model[0], model[1] = other[0], other[1]
    gradients(model)
    with pytest.raises(EbdiffError, match="another architecture"):
        watch.step()


def test_eta_defaults_to_the_papers_and_to_its_share_of_chance():
    model, plan = hidden(*UP)
    assert EarlyBird(model, plan).settings.eta == 0.1
    assert EarlyBird(model, plan, corrected=True).settings.eta == pytest.approx(0.1 / (2 * 0.5 * 0.5))
