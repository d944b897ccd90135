"""The main job's other arms: no search, no control, other first weights; each resumes to the same weights."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import NO_SEARCH, TWO, found, run, same, tiny, weights

from ebdiff import ChannelMask, importance, report, shrink
from ebdiff.config import resolve
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json
from ebdiff.pruning.save import load
from ebdiff.training import job, regions
from ebdiff.training.accounting import Cost
from ebdiff.training.costs import cost_at
from ebdiff.training.judge import arm_network, judged
from ebdiff.training.log import read_log
from ebdiff.training.loop import TrainState
from ebdiff.training.regions import joint_ticket, region, side_by_side, ticket_of
from ebdiff.training.search import control_steps, search
from ebdiff.training.stretch import Stretch, cost_per_step
from ebdiff.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

# What an arm had cost -------------------------------------------------------------------------------------------------


def test_a_judgement_says_what_its_network_had_cost(tmp_path: Path) -> None:
    """By hand: 8 dense steps of 4 images, 2 of the joint network, then half or all of 4 and 6 steps of the regions."""
    budget = ("search.steps=8", "regions.steps=[4, 6]", "regions.branch_at=2")
    world = tiny(tmp_path, *TWO, *budget)
    run(world)
    each = [world.plan.macs(ticket_of(world, number).mask) for number in range(2)]
    before, both = 8 * world.plan.macs(), 2 * world.plan.macs(joint_ticket(world).mask)
    by_hand = {
        0.0: (8, before),
        0.5: (8 + 2 + 5, before + both + 2 * each[0] + 3 * each[1]),
        1.0: (8 + 2 + 10, before + both + 4 * each[0] + 6 * each[1]),
    }
    seconds = []
    for mark, (steps, macs) in by_hand.items():
        cost = cost_at(world, mark)
        assert (cost.steps, cost.images) == (steps, 4 * steps)
        assert cost.macs == pytest.approx(3 * 4 * macs)
        assert read_json(judged(world.out, "tickets", mark))["training_cost"] == cost.to_json()
        dense = Cost.from_json(read_json(judged(world.out, "dense", mark))["training_cost"])
        assert dense.steps == control_steps(world, mark)
        assert dense.macs == pytest.approx(cost.macs, abs=3 * 4 * world.plan.macs() / 2)
        seconds.append(cost.device_seconds)
    assert 0 < seconds[0] < seconds[1] < seconds[2]


# No search -----------------------------------------------------------------------------------------------------------


def test_without_a_search_masks_are_of_the_network_before_its_first_step(tmp_path: Path) -> None:
    world = tiny(tmp_path / "whole", *NO_SEARCH)
    run(world)
    scores = importance(world.network(), world.plan, "magnitude")
    for number, ratio in enumerate((0.3, 0.6)):
        ticket = ticket_of(world, number)
        assert ticket.mask == ChannelMask.draw(scores, plan=world.plan, ratio=ratio)
        assert (ticket.step, ticket.settled) == (0, False)
        assert (world.out / "search" / "nets" / "0").is_dir()
    assert read_json(world.out / "search" / "done.json")["cost"]["macs"] == 0
    assert control_steps(world, 0.0) == 0
    first = [dict(load(world.out / stage / "nets" / "0").state_dict()) for stage in ("search", "dense")]
    assert same(first[0], first[1])
    assert same(first[0], dict(world.network().state_dict()))
    report.write(world)
    text = (world.out / "report.md").read_text()
    assert "by magnitude, step 0" in text
    assert "mask-distance" not in text
    assert not (world.out / "mask-distance.png").exists()


@pytest.mark.parametrize("criterion", ["taylor", "auto"])
def test_without_a_search_there_are_no_gradients(criterion: str) -> None:
    auto = ["search.ratios=auto", "search.macs=0.5"] if criterion == "auto" else []
    with pytest.raises(EbdiffError, match="taylor reads the gradients of training"):
        resolve("smoke", overrides=["search.steps=0", *auto])


# No control -----------------------------------------------------------------------------------------------------------


def test_a_dense_arm_is_a_ticket_that_removes_nothing(tmp_path: Path) -> None:
    """One region, ratio 0, no search, no control: the dense network on all timesteps, judged and reported alone."""
    alone = ("search.ratios=[0.0]", "regions.bounds=[0, 1000]", "regions.overlap=0", "regions.steps=[4]")
    world = tiny(tmp_path, *NO_SEARCH, *alone, "evaluate.control=false")
    run(world)
    assert not (tmp_path / "dense").exists()
    assert sorted(path.name for path in (tmp_path / "evaluation").glob("*.json")) == [
        "tickets-0.5.json",
        "tickets-0.json",
        "tickets-1.json",
    ]
    assert not any("dense" in work.stage for work in job.work(world))
    state = region(world, 0).start()
    assert same(dict(state.model.named_parameters()), dict(world.network().named_parameters()))
    end = read_json(judged(tmp_path, "tickets", 1.0))
    assert end["training_cost"]["macs"] == 4 * cost_per_step(world, world.plan.macs())
    assert end["macs_per_image"]["sampler"] == world.plan.macs()
    _, sentence = report.write(world)
    assert sentence.startswith(f"No dense control was trained; FID {end['scores']['fid']:.2f} after ")
    assert "an image costs 100% of the dense MACs" in sentence
    text = (tmp_path / "report.md").read_text()
    assert not any(
        word in text for word in ("control:", "Both arms", "equal MACs", "| dense control", "masks are from")
    )
    assert (tmp_path / "samples.png").exists()
    with pytest.raises(EbdiffError, match=r"no dense control.*evaluate\.control=true"):
        arm_network(world, "dense")


# Until settled --------------------------------------------------------------------------------------------------------

SETTLES = (*TWO, "search.criterion=magnitude", "search.eta=0.2", "search.until=settled", "search.steps=40")


def test_a_search_ends_when_its_tickets_have_settled(tmp_path: Path) -> None:
    world, short = tiny(tmp_path / "settles", *SETTLES), found(tmp_path / "short", *SETTLES, "search.steps=10")
    job.prepare(world)
    ticks = list(job.find(world))
    facts = read_json(world.out / "search" / "done.json")
    assert [(ticket["step"], ticket["settled"]) for ticket in facts["tickets"]] == [(6, True), (10, True)]
    assert (facts["cost"]["steps"], facts["cost"]["images"]) == (10, 40)
    assert sum(tick.macs for tick in ticks) == pytest.approx(job.work(world)[0].macs)
    assert control_steps(world, 0.0) == region(world, 0).start().step == 10
    assert same(weights(world.out), weights(short.out))
    for after in (5, 11):
        again = found(tmp_path / str(after), *SETTLES, after=after)
        assert same(weights(again.out), weights(world.out))
        assert read_json(again.out / "search" / "done.json")["cost"]["steps"] == 10


# What regions start from ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search."""
    torch.set_num_threads(1)
    return found(tmp_path_factory.mktemp("searched"), *TWO, "search.steps=8").out


def of_search(searched: Path, *overrides: str) -> World:
    """A world whose search is that one."""
    return tiny(searched, *TWO, "search.steps=8", *overrides)


def test_regions_start_by_default_with_all_that_the_search_left(searched: Path) -> None:
    state = region(of_search(searched), 1).start()
    assert state.step == state.ema.optimization_step == 8
    assert state.optimizer.state


def test_rewound_weights_are_those_before_the_first_step_cut_by_the_ticket(searched: Path) -> None:
    world = of_search(searched, "regions.start=initial")
    state = region(world, 1).start()
    cut = shrink(world.network(), ticket_of(world, 1))
    assert same(dict(state.model.named_parameters()), dict(cut.named_parameters()))
    assert all(torch.equal(*pair) for pair in zip(state.ema.shadow_params, state.model.parameters(), strict=True))
    assert (state.step, dict(state.optimizer.state), state.ema.optimization_step) == (0, {}, 0)


def test_weights_from_scratch_are_drawn_at_the_widths_of_the_ticket(searched: Path) -> None:
    """torch draws the weights of a layer with n inputs from [-1/sqrt(n), 1/sqrt(n)]: fewer inputs, larger weights."""
    world = of_search(searched, "regions.start=fresh")
    first, second = (region(world, number).start() for number in range(2))
    dense = dict(world.network().named_parameters())
    wider = 0
    for name, weight in second.model.named_parameters():
        if weight.dim() > 1:
            bound, of_dense = (w[0].numel() ** -0.5 for w in (weight, dense[name]))
            largest = float(weight.detach().abs().max())
            assert largest <= bound
            wider += largest > of_dense
        elif "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight"))))
    assert wider > 10
    assert (second.step, dict(second.optimizer.state)) == (0, {})
    alike = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(*map(parts, (first, second)), strict=True)]
    assert not any(alike)
    assert same(dict(second.model.named_parameters()), dict(region(world, 1).start().model.named_parameters()))


@pytest.mark.parametrize("start", ["search", "initial", "fresh"])
def test_tickets_train_at_a_rate_of_their_own(start: str, searched: Path) -> None:
    world, as_before = (of_search(searched, f"regions.start={start}", *more) for more in (["regions.lr=0.02"], []))
    assert rates(region(world, 0)) == {0.02}
    assert rates(search(world)) == rates(region(as_before, 0)) == {world.config.train.lr}


def rates(stretch: Stretch) -> set[float]:
    return {group["lr"] for group in stretch.start().optimizer.param_groups}


def test_joint_and_region_tickets_train_at_their_rate_and_go_on_at_it(tmp_path: Path) -> None:
    world = found(tmp_path, *TWO, "regions.branch_at=2", "regions.lr=0.02", "train.log_every=1")
    list(islice(job.train(world, [1]), 4))
    list(job.train(world, [1]))
    for folder, rate in (("search", world.config.train.lr), ("joint", 0.02), ("regions/1", 0.02)):
        assert {record["lr"] for record in read_log(tmp_path / folder)} == {rate}


def parts(state: TrainState) -> list[torch.Tensor]:
    return [weight for weight in state.model.parameters() if weight.dim() > 1]


@pytest.mark.parametrize("start", ["initial", "fresh"])
def test_regions_with_other_first_weights_go_on_after_an_interruption(start: str, tmp_path: Path) -> None:
    for out, after in (("whole", 0), ("again", 3)):
        world = found(tmp_path / out, *NO_SEARCH, f"regions.start={start}", "train.checkpoint_every=2")
        list(islice(job.train(world, [1]), after))
        list(job.train(world, [1]))
    assert same(weights(tmp_path / "again"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("start", ["search", "fresh"])
def test_progress_of_a_region_counts_from_its_own_first_step(start: str, tmp_path: Path) -> None:
    world = found(tmp_path, *SETTLES, f"regions.start={start}")
    list(islice(job.train(world, [1]), 3))
    tick = next(side_by_side(world, 2))
    written = 2  # the log is written at even steps, and the search ended after 10
    assert tick.macs == written * cost_per_step(world, world.plan.macs(ticket_of(world, 1).mask))
    assert (tick.stage, tick.before) == ("region 1", True)


def test_processes_are_all_told_to_end_before_one_is_waited_for(
    searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its step and writes a checkpoint first: one after another that is as long as all of them together."""
    world, heard = of_search(searched), list[str]()
    process = SimpleNamespace(
        poll=lambda: None, terminate=lambda: heard.append("end"), wait=lambda: heard.append("wait")
    )
    monkeypatch.setattr(regions, "_spawn", lambda *given: heard.append("begin") or process)
    monkeypatch.setattr(regions, "done", lambda folder: "begin" in heard)
    ticks = side_by_side(world, 2)
    assert not next(ticks).before
    ticks.close()
    assert heard == ["begin", "begin", "end", "end", "wait", "wait"]


@pytest.mark.parametrize("start", ["initial", "fresh"])
def test_only_what_the_search_made_has_branches(start: str) -> None:
    with pytest.raises(EbdiffError, match=f"branch_at.*start: {start}"):
        resolve("smoke", overrides=["regions.branch_at=3", f"regions.start={start}"])
