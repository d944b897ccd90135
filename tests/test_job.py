"""The main job: equal MACs, one search for all regions; a resumed run is the run that was not interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, found, run, same, tiny, weights

from ebdiff import report
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json, write_json
from ebdiff.nn.router import TimestepRouter
from ebdiff.pruning.save import load
from ebdiff.pruning.shrink import shrinks_of
from ebdiff.report_text import markdown
from ebdiff.training import job, loop
from ebdiff.training.accounting import Cost, Meter
from ebdiff.training.judge import judged, macs_per_image
from ebdiff.training.log import read_log
from ebdiff.training.regions import joint_ticket, region, ticket_of
from ebdiff.training.search import control_steps
from ebdiff.training.stages import Work
from ebdiff.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run from start to end."""
    torch.set_num_threads(1)
    world = tiny(tmp_path_factory.mktemp("finished"))
    run(world)
    report.write(world)
    return world


def without_times(value: Any) -> Any:
    """JSON values without what a clock says."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith("_seconds") and k != "verdict"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_the_control_gets_equal_macs(finished: World) -> None:
    facts = read_json(finished.out / "report.json")
    per_step = 3 * 4 * finished.plan.macs()
    for dense, tickets in zip(facts["marks"]["dense"], facts["marks"]["tickets"], strict=True):
        assert abs(dense["cost"]["macs"] - tickets["cost"]["macs"]) <= per_step / 2
    spent = facts["cost"]["search"]["macs"] + sum(cost["macs"] for cost in facts["cost"]["regions"])
    assert facts["marks"]["tickets"][-1]["cost"]["macs"] == spent
    shares = [ticket_of(finished, k).achieved["macs"] for k in range(3)]
    by_hand = 20 + sum(share * steps for share, steps in zip(shares, (5, 4, 6), strict=True))
    assert control_steps(finished, 1.0) == round(by_hand)
    assert control_steps(finished, 0.0) == 20


def test_the_report_has_what_a_mark_had_cost_once(finished: World, tmp_path: Path) -> None:
    """Also of marks judged before they said it."""
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    told = read_json(finished.out / "report.json")["marks"]
    for arm, marks in told.items():
        for mark in marks:
            own = read_json(judged(tmp_path, arm, mark["mark"]))
            assert (mark["cost"], mark["judging"]) == (own.pop("training_cost"), own["cost"])
            assert mark.keys() == {*own, "judging"}
            write_json(judged(tmp_path, arm, mark["mark"]), own)
    assert report.gather(tiny(tmp_path))["marks"] == told


def test_the_report_says_that_a_search_of_no_steps_may_cost(finished: World) -> None:
    facts = read_json(finished.out / "report.json")
    names = dict.fromkeys(("curves", "timesteps", "mask-distance", "loss-per-timestep"), "picture.png")
    assert "Diff-Pruning" not in markdown(facts, names)
    facts["config"]["search"]["criterion"] = "diff-pruning"
    assert "The search includes Diff-Pruning's passes." in markdown(facts, names)


def test_plan_says_what_is_done(finished: World) -> None:
    planned = {work.stage: work for work in job.work(finished)}
    facts = read_json(finished.out / "report.json")
    for stage, cost in {"search": facts["cost"]["search"], "dense control": facts["cost"]["dense"]}.items():
        assert (planned[stage].steps, planned[stage].macs) == pytest.approx((cost["steps"], cost["macs"]), rel=0.05)
    for number, cost in enumerate(facts["cost"]["regions"]):
        assert planned[f"region {number}"].macs == pytest.approx(cost["macs"])


def test_the_router_is_made_of_the_regions_networks(finished: World) -> None:
    router = TimestepRouter.from_pretrained(finished.out / "router")
    assert router.partition == finished.partition
    for number, net in enumerate(router.nets):
        (mask,) = shrinks_of(net)
        assert mask == ticket_of(finished, number).mask
        own = load(finished.out / "regions" / str(number) / "nets" / "1")
        assert same(dict(net.state_dict()), dict(own.state_dict()))


def test_macs_of_a_router_follow_the_samplers_timesteps(finished: World) -> None:
    router = TimestepRouter.from_pretrained(finished.out / "router")
    each = [finished.plan.macs(ticket_of(finished, k).mask) for k in range(3)]
    visited = finished.sampling_scheduler().timesteps.tolist()
    expected = sum(each[finished.partition.index(t)] for t in visited) / len(visited)
    assert macs_per_image(finished, router)["sampler"] == pytest.approx(expected)
    uniform = 0.24 * each[0] + 0.2 * each[1] + 0.56 * each[2]
    assert macs_per_image(finished, router)["uniform"] == pytest.approx(uniform)


def test_running_again_changes_nothing(finished: World) -> None:
    before = {path: path.read_bytes() for path in finished.out.rglob("*") if path.is_file()}
    ticks = run(tiny(finished.out))
    assert all(tick.before for tick in ticks)
    assert before == {path: path.read_bytes() for path in finished.out.rglob("*") if path.is_file()}


def test_another_configuration_is_refused_in_this_folder(finished: World) -> None:
    with pytest.raises(EbdiffError, match=r"regions\.overlap=20, got 10"):
        run(tiny(finished.out, "regions.overlap=10"))


@pytest.mark.parametrize("ticks", [17, 23, 37, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 20, 26, 52))])
def test_an_abandoned_run_goes_on_to_the_same_weights(finished: World, ticks: int, tmp_path: Path) -> None:
    world = tiny(tmp_path)
    job.prepare(world)
    assert len(list(islice(job.run(world), ticks))) == ticks
    run(tiny(tmp_path))
    assert same(weights(tmp_path), weights(finished.out))
    report.write(world)
    ours, theirs = (without_times(read_json(out / "report.json")) for out in (tmp_path, finished.out))
    assert ours == theirs
    assert [r["step"] for r in read_log(tmp_path / "search")] == list(range(2, 21, 2))


@pytest.mark.slow
def test_killed_at_any_time_the_same_command_ends_the_same(finished: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ebdiff", "run", "--preset", "smoke", "--out", str(tmp_path), *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sign in ("search/checkpoints/step-*", "regions/1/metrics.jsonl", "dense/nets/0", "evaluation/*"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "report.md").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert same(weights(tmp_path), weights(finished.out))
    ours, theirs = (without_times(read_json(out / "report.json")) for out in (tmp_path, finished.out))
    assert ours == theirs


def test_a_region_trains_on_its_own_timesteps_and_the_overlap(finished: World) -> None:
    stages = [region(finished, number) for number in range(3)]
    for stage, (lo, hi) in zip(stages, [(0, 260), (240, 460), (440, 1000)], strict=True):
        drawn = stage.sampler.pmf().nonzero()[:, 0]
        assert (int(drawn.min()), int(drawn.max())) == (lo, hi - 1)
    assert len({stage.seed for stage in stages} | {finished.config.seed}) == 4


@pytest.mark.slow
def test_regions_side_by_side_are_the_same_networks(finished: World, tmp_path: Path) -> None:
    world = tiny(tmp_path)
    job.prepare(world)
    list(job.run(world, parallel=3))
    assert same(weights(tmp_path), weights(finished.out))


def test_regions_differ_in_which_channels_they_keep(finished: World) -> None:
    between = read_json(finished.out / "search" / "done.json")["between_regions"]
    assert len(between["pairs"]) == 3
    assert min(between["at_common_ratio"]) > 0


def test_magnitude_gives_all_regions_the_same_ranking(tmp_path: Path) -> None:
    world = found(tmp_path, "search.criterion=magnitude", "search.ratios=[0.5, 0.5, 0.5]")
    assert ticket_of(world, 0).mask == ticket_of(world, 2).mask
    assert ticket_of(world, 2).region == world.partition[2]
    assert max(read_json(tmp_path / "search" / "done.json")["between_regions"]["tickets"]) == 0


def test_auto_splits_one_budget(tmp_path: Path) -> None:
    world = found(tmp_path, "search.ratios=auto", "search.macs=0.4")
    masks = [ticket_of(world, number).mask for number in range(3)]
    asked = [mask.asked["macs"] for mask in masks]
    assert sum(a * len(r) for a, r in zip(asked, world.partition, strict=True)) / 1000 == pytest.approx(0.4)
    assert all(world.plan.macs(m) <= a * world.plan.macs() for m, a in zip(masks, asked, strict=True))


def test_branches_grow_from_a_joint_ticket(tmp_path: Path) -> None:
    world = found(tmp_path, "regions.branch_at=3")
    list(job.train(world, range(3)))
    assert read_json(tmp_path / "joint" / "done.json")["cost"]["steps"] == 3
    for number in range(3):
        net = load(tmp_path / "regions" / str(number) / "nets" / "1")
        outer, inner = shrinks_of(net)
        assert outer == joint_ticket(world).mask
        assert inner.plan.macs(inner) == world.plan.macs(ticket_of(world, number).mask)


def test_merge_wants_a_tiling(finished: World, tmp_path: Path) -> None:
    folders = [finished.out / "regions" / str(number) for number in range(3)]
    assert job.merge(tiny(tmp_path), folders[::-1]).name == "router"
    with pytest.raises(EbdiffError, match=r"gap \[240, 440\)"):
        job.merge(tiny(tmp_path / "gap"), [folders[0], folders[2]])
    with pytest.raises(EbdiffError, match="overlap"):
        job.merge(tiny(tmp_path / "twice"), [*folders, folders[1]])
    with pytest.raises(EbdiffError, match="tile the schedule"):
        job.merge(tiny(tmp_path / "short"), folders[:2])
    assert not list(tmp_path.glob("*/router"))


def test_merge_leaves_a_router_of_other_regions_alone(finished: World, tmp_path: Path) -> None:
    folders = [finished.out / "regions" / str(number) for number in range(3)]
    assert job.merge(finished, folders[::-1]) == finished.out / "router"
    shutil.copytree(folders[1], tmp_path / "1")
    shutil.copytree(tmp_path / "1" / "nets" / "0.5", tmp_path / "1" / "nets" / "1", dirs_exist_ok=True)
    with pytest.raises(EbdiffError, match="router of other regions"):
        job.merge(finished, [folders[0], tmp_path / "1", folders[2]])


def test_stages_out_of_order_name_the_command(tmp_path: Path) -> None:
    world = tiny(tmp_path)
    with pytest.raises(EbdiffError, match="ebdiff find"):
        list(job.train(world, [0]))
    with pytest.raises(EbdiffError, match="train --region 0"):
        job.merge(world)


def test_merge_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    world = tiny(tmp_path)
    with pytest.raises(EbdiffError, match=r"no such folder: .*typo; check the path"):
        job.merge(world, [tmp_path / "typo"])
    for name, command in {"7": "`ebdiff train --region 7`", "mine": "`ebdiff train`"}.items():
        (tmp_path / name).mkdir()
        with pytest.raises(EbdiffError, match=f"{name} is not finished.*run {command} first"):
            job.merge(world, [tmp_path / name])


def test_costs_go_on_after_an_interruption() -> None:
    before = Cost(2, 8, 100.0, 5.0, 7.0)
    cost = Meter("cpu", before).read(steps=1, images=4, macs=50.0)
    assert (cost.steps, cost.images, cost.macs) == (3, 12, 150.0)
    assert cost.device_seconds >= 5
    assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost
    on_gpu = Meter("cuda").read()
    assert on_gpu.device_seconds == on_gpu.wall_seconds


def test_a_loss_that_is_not_finite_names_the_last_good_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written every 3 steps; what the search resumes from is there, with what watches."""
    real, calls = loop._backward, 0

    def diverge(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, *rest = real(*arguments)
        return loss * float("nan") if calls == 8 else loss, *rest

    monkeypatch.setattr(loop, "_backward", diverge)
    world = tiny(tmp_path)
    job.prepare(world)
    with pytest.raises(EbdiffError, match=r"stopped at step 8: expected a finite loss.*checkpoint of step 6 is whole"):
        list(job.find(world))
    folders = sorted(path.name for path in (tmp_path / "search" / "checkpoints").iterdir())
    assert folders == ["step-00000003", "step-00000006"]
    again = next(job.find(world))
    assert again.note == "resumed at step 6"


def test_work_is_named_once(finished: World) -> None:
    names = [work.stage for work in job.work(finished)]
    assert len(set(names)) == len(names)
    assert all(isinstance(work, Work) and work.macs > 0 for work in job.work(finished))


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    world = tiny(tmp_path)
    job.prepare(world)
    first = job.run(world)
    next(first)
    with pytest.raises(EbdiffError, match="another process works in"):
        next(job.run(world))
    first.close()
    assert next(job.run(world)).stage == "search"
