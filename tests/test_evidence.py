"""The counting of benchmarks/evidence, by hand; its suites and arms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import suite as suites
from benchmarks.evidence.__main__ import cells_of
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.counting import (
    Spread,
    curve,
    headline,
    measure_of,
    reached,
    score_at,
    seconds_at,
    wall_seconds,
)
from benchmarks.evidence.suite import NAMES, Suite
from ebdiff.config import resolve
from ebdiff.errors import EbdiffError
from ebdiff.training.regions import steps_of
from ebdiff.training.world import World


def stage(steps: int, seconds: float, macs: float) -> dict[str, Any]:
    return {"steps": steps, "images": 4 * steps, "macs": macs, "device_seconds": seconds, "wall_seconds": 2 * seconds}


def cell(
    arm: str,
    curve: list[tuple[float, float | None]],
    seed: int = 0,
    search: float = 0.0,
    before: float | None = None,
    regions: int = 1,
) -> dict[str, Any]:
    """A finished cell from (device-seconds of its regions, FID), one per step.

    Its search takes 4 s a step and the MACs of two dense ones, since importance takes passes, too.
    """
    points: list[dict[str, Any]] = []
    for number, (seconds, fid) in enumerate(curve, 1):
        stages = {} if before is None else {"before": stage(10, before, 1e6)}
        stages["search"] = stage(int(search / 4), search, 100.0 * 3 * 4 * search / 2)
        for k in range(regions):
            mine = seconds * (k + 1) / sum(range(1, regions + 1))
            stages[f"region {k}"] = stage(int(mine), mine, 600 * mine)
        scores = {"loss": (fid or 50) / 100, "fid": fid, "kid": 0.01, "precision": 0.5, "recall": 0.25}
        points.append({"share": number / len(curve), "stages": stages, **scores})
    return {
        "arm": arm,
        "seed": seed,
        "config": {
            "device": "cpu",
            "train": {"batch_size": 4, "accumulate": 1, "lr": 1e-3, "ema_decay": 0.9},
            "evaluate": {"samples": 10},
            "sample": {"steps": 5},
        },
        "machine": {"device": "cpu", "threads": "1 thread", "cpu": "one", "torch": "2.13.0", "commit": "aaa"},
        "curve": points,
        "parameters": {"dense": 2e6, "stored": 1e6, "active": 5e5},
        "macs_per_image": {"uniform": 50.0, "sampler": 25.0, "dense": 100.0},
        "tickets": [{"settled": k == 0, "step": 7 + k} for k in range(regions)],
    }


def test_between_marks_scores_follow_the_logarithm_of_device_seconds() -> None:
    points = [(1.0, 40.0), (4.0, 20.0), (16.0, 20.0), (64.0, 10.0)]
    assert score_at(points, 2.0) == pytest.approx(30.0)
    assert score_at(points, 4.0) == 20.0
    assert reached(points, 30.0) == pytest.approx(2.0)
    assert reached(points, 15.0) == pytest.approx(32.0)
    assert reached(points, 20.0) == pytest.approx(4.0)


def test_what_is_never_reached_and_what_was_never_measured_are_none() -> None:
    points = [(1.0, 40.0), (4.0, 20.0)]
    assert reached(points, 19.0) is None
    assert reached([], 19.0) is None
    assert score_at(points, 0.5) is None


def test_the_first_mark_may_be_good_enough_and_the_last_network_stays() -> None:
    points = [(1.0, 40.0), (4.0, 20.0)]
    assert reached(points, 45.0) == 1.0
    assert score_at(points, 400.0) == 20.0


def test_a_curve_that_rises_again_reached_where_it_first_came_down() -> None:
    assert reached([(1.0, 40.0), (4.0, 20.0), (16.0, 30.0), (64.0, 10.0)], 20.0) == pytest.approx(4.0)


def test_search_and_the_network_it_started_from_count() -> None:
    assert curve(cell("prune-taylor-50", [(1.0, 9.0), (2.0, 8.0)], search=4.0, before=100.0), "fid") == [
        (105.0, 9.0),
        (106.0, 8.0),
    ]


def test_marks_without_a_score_are_passed_over() -> None:
    facts = cell("dense", [(1.0, None), (2.0, 8.0)])
    assert curve(facts, "fid") == [(2.0, 8.0)]
    assert [point[0] for point in curve(facts, "loss")] == [1.0, 2.0]
    assert measure_of({"dense": [facts]}) == "fid"
    assert measure_of({"dense": [facts], "eb-speed-50": [cell("eb-speed-50", [(1.0, None)])]}) == "loss"


def test_on_a_clock_steps_count_its_seconds() -> None:
    facts = cell("regions-30-60-80", [(30.0, 9.0)], search=4.0, before=100.0, regions=2)  # regions take 10 and 20 steps
    clock = {"regions-30-60-80": {"before": 7.0, "search": 5.0, "region 0": 3.0, "region 1": 2.0}}
    assert seconds_at(facts, facts["curve"][-1], clock) == {
        "before": 70.0,  # 10 dense steps
        "search": 10.0,  # its MACs are those of two dense steps
        "region 0": 30.0,
        "region 1": 40.0,
    }
    for other in ({"dense": {"region 0": 7.0}}, {"regions-30-60-80": {"region 0": 7.0}}):
        assert seconds_at(facts, facts["curve"][-1], other)["region 1"] == 20.0


def test_what_a_network_had_cost_counts_on_a_clock() -> None:
    dense = [cell("dense", [(25.0, 40.0), (100.0, 20.0)])]
    arm = [cell("prune-taylor-50", [(5.0, 30.0), (10.0, 22.0)], before=100.0)]
    after = {"before": 9.0, "search": 9.0, "region 0": 1.0}
    found = headline(arm, dense, "fid", {"dense": {"search": 1.0, "region 0": 1.0}, "prune-taylor-50": after})
    assert found.at[0.25].values == ()
    assert found.at[1.0].values == (22.0,)


WHOLE, HALF = {"search": 1.0, "region 0": 1.0}, {"search": 5.0, "region 0": 0.5}


@pytest.mark.parametrize(
    ("clock", "timed"),
    [
        (None, True),
        ({"dense": WHOLE, "eb-speed-50": HALF}, True),
        ({"dense": WHOLE}, False),
        ({"eb-speed-50": HALF}, False),
        ({"dense": WHOLE, "eb-speed-50": {"region 0": 0.5}}, False),  # not of all its stages
        ({}, False),
    ],
)
def test_seconds_of_two_clocks_are_not_compared(clock: Any, timed: bool) -> None:
    dense = [cell("dense", [(25.0, 40.0), (100.0, 20.0)])]
    arm = [cell("eb-speed-50", [(20.0, 30.0), (80.0, 10.0)], search=4.0)]
    found = headline(arm, dense, "fid", clock)
    assert found.timed == timed
    assert {bool(spread.values) for spread in (found.reached, *found.at.values())} == {timed}
    assert (found.seeds, found.final.values) == (1, (10.0,))


def test_with_a_device_for_each_region_the_slowest_counts() -> None:
    facts = cell("regions-30-60-80", [(30.0, 9.0)], search=4.0, regions=2)
    assert wall_seconds(facts) == 2 * (4.0 + 20.0)
    clock = {"regions-30-60-80": {"search": 5.0, "region 0": 3.0, "region 1": 1.0}}
    assert wall_seconds(facts, clock) == 10.0 + 30.0
    assert wall_seconds(facts, {"regions-30-60-80": {"search": 5.0}}) == wall_seconds(facts)


def test_headlines_go_seed_by_seed() -> None:
    dense = [cell("dense", [(25.0, 40.0), (100.0, 20.0)]), cell("dense", [(50.0, 40.0), (200.0, 10.0)], seed=1)]
    arm = [
        cell("eb-speed-50", [(10.0, 30.0), (40.0, 20.0)], search=10.0),  # at 50 s as good as the dense one at 100
        cell("eb-speed-50", [(40.0, 30.0), (190.0, 12.0)], seed=1, search=10.0),
        cell("eb-speed-50", [(40.0, 1.0)], seed=2),  # has no dense one
    ]
    found = headline(arm, dense, "fid")
    assert found.seeds == 2
    assert found.reached.values == (pytest.approx(0.5),)
    assert found.final.values == (20.0, 12.0)
    assert found.at[0.25].values == (pytest.approx(30 - 10 * math.log(25 / 20) / math.log(50 / 20)), 30.0)
    assert found.at[1.0].values == (20.0, 12.0)
    assert headline(dense, dense, "fid").reached.values == pytest.approx((1.0, 1.0))
    late = [cell("eb-speed-50", [(90.0, 1.0)]), cell("eb-speed-50", [(20.0, 9.0)], seed=1)]
    assert headline(late, dense, "fid").at[0.25].values == ()  # not of one seed alone
    assert headline(late, dense, "fid").at[1.0].values == (1.0, 9.0)


def test_a_share_is_that_of_the_dense_arms_steps_at_its_own_mark() -> None:
    dense = [cell("dense", [(25.1, 40.0), (50.0, 30.0), (75.0, 25.0), (100.0, 20.0)])]
    assert headline(dense, dense, "fid").at[0.25].values == (40.0,)
    later = [cell("dense-speed", [(25.5, 35.0), (100.0, 20.0)])]
    assert headline(later, dense, "fid").at[0.25].values == (35.0,)
    too_late = [cell("dense-speed", [(25.7, 35.0), (100.0, 20.0)])]
    assert headline(too_late, dense, "fid").at[0.25].values == ()


def test_spread_over_seeds() -> None:
    assert Spread((1.0, 3.0)).text() == "2.00 ± 1.41"
    assert Spread((1.5,)).text(".1f") == "1.5"
    assert Spread(()).text() == "-"


@pytest.mark.parametrize("name", NAMES)
def test_arms_spend_what_the_dense_one_does(name: str) -> None:
    suite = Suite.load(name).on(None if name == "fashion16" else "images.npz")
    branching = "regions-30-60-80-speed-budgeted-branch-25"
    for arm in ("scratch-50", "eb-speed-30", "eb-cost-speed", "regions-30-60-80", branching):
        config = suite.config(ARMS[arm].overrides(suite), 0)
        steps = steps_of(World(config, Path("nowhere")))
        s = config.search
        small = sum(n * suite.price(r, s.scope) for n, r in zip(steps, s.ratios, strict=True))
        spent = config.search.steps + config.regions.branch_at + small
        assert spent == pytest.approx(suite.steps, rel=0.01)


def test_the_suite_for_a_gpu_has_the_presets_network() -> None:
    assert Suite.load("gpu-cifar32").base["model"] == resolve("cifar10").model


def test_every_arm_says_what_it_is() -> None:
    assert all(arm.about and "\n" not in arm.about for arm in ARMS.values())
    assert len({arm.about for arm in ARMS.values()}) == len(ARMS)


def test_a_suite_of_ones_own_is_read_as_a_configuration_is(tmp_path: Path) -> None:
    path, text = tmp_path / "own.yaml", (Path(suites.__file__).parent / "fashion16.yaml").read_text()
    path.write_text(text.replace("lr: 1.0e-3", "lr: 1e-3").replace("train: {", "train: {precision: no, "))
    suite = Suite.load(str(path))
    assert suite.lr == 1e-3
    assert suite.config(ARMS["dense"].overrides(suite), 0).train.precision == "no"
    for old, new, message in (
        ("steps: 1400", "stops: 1400", "stops"),
        ("steps: 1400", "", "steps"),
        ("most: 300", "moist: 300", "moist"),
        ("lrs: [", "lrs: [[", "no YAML"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(EbdiffError, match=message):
            Suite.load(str(path))
    path.write_text(text.replace("ema_decay", "ema_dekay"))
    with pytest.raises(EbdiffError, match=r"did you mean train\.ema_decay"):
        Suite.load(str(path)).config(ARMS["dense"].overrides(suite), 0)


def test_a_suite_from_before_costs_decided_has_all_other_arms(tmp_path: Path) -> None:
    path, text = tmp_path / "own.yaml", (Path(suites.__file__).parent / "fashion16.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("cost_of_step_by_cost"))
    path.write_text(text.replace(line, ""))
    suite = Suite.load(str(path))
    left_out = {name for name in ARMS if name.startswith("eb-cost-")}
    assert {cell.arm.name for cell in cells_of(suite, ["*"], "0", Path(), Path())} == ARMS.keys() - left_out
    assert {cell.arm.name for cell in cells_of(suite, ["eb-*"], "0", Path(), Path())}.isdisjoint(left_out)
    for patterns in (["eb-cost-*"], ["dense", "eb-cost-speed"]):
        with pytest.raises(EbdiffError, match=r"leaves eb-cost-speed.* out: expected cost_of_step_by_cost"):
            cells_of(suite, patterns, "0", Path(), Path())
    for value in ("{0.44: 0.27, 0.5: 0.2}", "{}", "[0.44]", "0.44", "null"):
        path.write_text(text.replace(line, f"cost_of_step_by_cost: {value}"))
        if value == "{}":
            assert len(cells_of(Suite.load(str(path)), ["*"], "0", Path(), Path())) == len(ARMS) - len(left_out)
        else:
            with pytest.raises(EbdiffError, match="cost_of_step_by_cost"):
                Suite.load(str(path))
