"""The tables and pictures of benchmarks/evidence, of cells made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_evidence import cell

from benchmarks.evidence import plots, rates
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.counting import reached_in_macs
from benchmarks.evidence.rates import Tried
from benchmarks.evidence.suite import Suite
from benchmarks.evidence.table import costs, headlines, markdown, settled, strayed


@pytest.fixture
def results() -> dict[str, list[dict[str, Any]]]:
    def spread(arm: str, curve: list[tuple[float, float]], seeds: int, **options: Any) -> list[dict[str, Any]]:
        return [cell(arm, [(s, fid * (1 + seed / 10)) for s, fid in curve], seed, **options) for seed in range(seeds)]

    return {
        "dense": spread("dense", [(25.0, 40.0), (50.0, 30.0), (100.0, 20.0)], 3),
        "eb-speed-50": spread("eb-speed-50", [(20.0, 30.0), (40.0, 20.0), (90.0, 15.0)], 3, search=10.0),
        "regions-30-60-80": spread("regions-30-60-80", [(20.0, 50.0), (90.0, 25.0)], 1, search=10.0, regions=3),
        "prune-taylor-50": spread("prune-taylor-50", [(5.0, 30.0), (10.0, 22.0)], 2, search=4.0, before=100.0),
    }


def test_the_page_of_a_suite(results: dict[str, list[dict[str, Any]]]) -> None:
    page = markdown(Suite.load("fashion16"), results, ["dense, seed 9: no result"], None, {"curves": "curves.png"})
    assert "| eb-speed-50 | 3 | 0.50 ± 0.00 |" in page
    assert "| regions-30-60-80 | 1 * | not reached |" in page
    assert "| prune-taylor-50 | 2 * | not reached | - | - | - | 23.10 ± 1.56 |" in page
    assert "| prune-taylor-50 | 114 ± 0 | 104 ± 0 | 228 ± 0 |" in page
    assert "7/no/no" in page
    assert "- dense, seed 9: no result" in page
    assert "![curves](curves.png)" in page
    assert "{" not in page


def test_rows_are_about_the_seeds_that_the_dense_arm_has(results: dict[str, list[dict[str, Any]]]) -> None:
    results["dense"] = results["dense"][:1]
    results["prune-taylor-50"] = [cell("prune-taylor-50", [(5.0, 30.0)], seed=4, before=100.0)]
    rows = {row[0]: row for row in headlines(results, "fid", None)}
    scores = ["-", "20.00", "15.00", "15.00", "0.1500", "0.50, 0.25"]
    assert rows["eb-speed-50"] == ["eb-speed-50", "1 *", "0.50", *scores, "0.50"]
    assert rows["prune-taylor-50"] == ["prune-taylor-50", "0 *", *["-"] * 6, "-, -", "-"]


def test_costs_are_means_over_seeds(results: dict[str, list[dict[str, Any]]]) -> None:
    short, long = (cell("eb-speed-50", [(90.0, 15.0)], seed, search=10.0 * (seed + 1)) for seed in (0, 1))
    long["parameters"] = {"dense": 2e6, "stored": 1.2e6, "active": 5e5}
    (row,) = costs({"eb-speed-50": [short, long]}, None)
    assert row[4:7] == ["4 + 90", "4.500 / 1.000", "1.10M (55%)"]


def test_macs_are_named_as_in_the_report(results: dict[str, list[dict[str, Any]]]) -> None:
    page = markdown(Suite.load("fashion16"), results, [], None, {})
    assert "| MACs of an image per sampler step | per training step, timesteps uniform |" in page


def test_what_starts_from_another_network_has_no_score_at_a_share_of_its_device_seconds() -> None:
    dense = [cell("dense", [(25.0, 40.0), (100.0, 20.0)])]
    cheap = [cell("prune-taylor-50", [(5.0, 30.0), (10.0, 22.0)], before=50.0)]
    rows = headlines({"dense": dense, "prune-taylor-50": cheap}, "fid", None)
    assert rows[0][5] == "20.00"
    assert rows[1][3:7] == ["-", "-", "-", "22.00"]


def test_a_ticket_is_drawn_once_where_a_trained_network_is_pruned(results: dict[str, list[dict[str, Any]]]) -> None:
    assert settled([cell("prune-diff-pruning-30", [(5.0, 30.0)], before=100.0)]) == "drawn once"
    assert settled(results["prune-taylor-50"]) == "drawn once"  # its search takes gradients only
    assert settled(results["dense"]) == "no search"
    assert settled(results["regions-30-60-80"]) == "7/no/no"
    assert settled(results["eb-speed-50"]) == "7, 7, 7"


def test_on_a_clock_what_cells_took_has_a_column_of_its_own() -> None:
    seeds = [cell("eb-speed-50", [(seconds, 15.0)], seed, search=8.0) for seed, seconds in enumerate((90.0, 90.0))]
    for facts, took in zip(seeds, (80.0, 100.0), strict=True):
        facts["curve"][-1]["stages"]["region 0"]["device_seconds"] = took
    clock = {"eb-speed-50": {"search": 5.0, "region 0": 2.0}}
    (own,), (timed,) = costs({"eb-speed-50": seeds}, None), costs({"eb-speed-50": seeds}, clock)
    assert own[1:3] == ["98 ± 14", "8 ± 0"]
    assert timed[1:5] == ["200", "98 ± 14", "20", "200"]
    (other,) = costs({"eb-speed-50": seeds}, {"dense": {"search": 1.0, "region 0": 1.0}})
    assert other[1:3] == ["98 ± 14", "98 ± 14"]  # on the clock, yet not this arm


def test_what_is_not_on_the_clock_has_no_headlines(results: dict[str, list[dict[str, Any]]]) -> None:
    clock = {"dense": {"search": 1.0, "region 0": 1.0}, "eb-speed-50": {"search": 5.0, "region 0": 1.0}}
    rows = {row[0]: row for row in headlines(results, "fid", clock)}
    assert "-" not in rows["dense"]
    assert rows["eb-speed-50"][2] != "-"
    assert rows["regions-30-60-80"][:7] == ["regions-30-60-80", "1 *", *["-"] * 4, "25.00"]
    assert rows["prune-taylor-50"][2:6] == ["-"] * 4
    results["prune-taylor-30"] = [cell("prune-taylor-30", [(5.0, 30.0)], before=100.0)]
    clock["prune-taylor-30"] = {"region 0": 1.0}
    page = markdown(Suite.load("fashion16"), results, [], clock, {})
    names = "regions-30-60-80, prune-taylor-50, prune-taylor-30"
    assert f"compared of {names} (not on the clock yet: run --clock); their costs are those of their own" in page
    (row,) = costs({"prune-taylor-30": results["prune-taylor-30"]}, clock)
    assert row[1:3] == ["105", "105"]
    page = markdown(Suite.load("fashion16"), {"dense": results["dense"]}, [], clock, {})
    assert "not on the clock" not in page


def test_searches_that_end_apart_are_apart_on_the_clock() -> None:
    seeds = [cell("eb-speed-50", [(90.0, 15.0)], seed, search=search) for seed, search in enumerate((4.0, 24.0))]
    (row,) = costs({"eb-speed-50": seeds}, {"eb-speed-50": {"search": 5.0, "region 0": 2.0}})
    assert row[1] == "215 ± 35"


def test_rows_have_as_many_cells_as_titles(results: dict[str, list[dict[str, Any]]]) -> None:
    clock = {"dense": {"search": 1.0, "region 0": 1.0}}
    for given in (None, clock):
        lines = markdown(Suite.load("fashion16"), results, [], given, {}).splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("| arm | device-seconds |"))
        assert len({line.count("|") for line in lines[first : first + 6]}) == 1
        assert ("measured in its own cell" in lines[first]) == (given is not None)


def test_the_page_says_how_far_spending_strayed(results: dict[str, list[dict[str, Any]]]) -> None:
    assert strayed(results, None) == (
        "By the seconds of their own cells arms spent 1.00 of the dense arm's device-seconds; the columns at 25, 50 "
        "and 100% compare at equal ones."
    )
    results["eb-speed-30"] = [cell("eb-speed-30", [(137.0, 15.0)])]
    clock = {arm: {"before": 9.0, "search": 5.0, "region 0": 1.0} for arm in results if "regions" not in arm}
    assert strayed(results, clock).startswith("By this clock arms spent 1.15 to 1.37 of the dense")  # of two arms
    del clock["dense"]
    assert strayed(results, clock) == ""
    clock["dense"] = {"search": 5.0, "region 0": 1.0}
    assert strayed({"dense": results["dense"], "prune-taylor-50": results["prune-taylor-50"]}, None) == ""
    assert strayed(results, clock) in markdown(Suite.load("fashion16"), results, [], clock, {})


def tried(arm: str, *scores: tuple[float, float, float | None]) -> list[Tried]:
    """An arm's (learning rate, held-out loss, FID)."""
    return [Tried(lr, arm, loss, fid) for lr, loss, fid in scores]


TICKET = tried("eb-speed-50", (5e-4, 0.0532, 16.17), (1e-3, 0.0519, 14.41), (2e-3, 0.0521, 16.61))
TUNING = tried("dense", (5e-4, 0.0585, 18.26), (1e-3, 0.05796, 18.59), (2e-3, 0.0595, 19.43)) + TICKET


def test_the_page_says_how_the_learning_rate_was_chosen(results: dict[str, list[dict[str, Any]]]) -> None:
    page = markdown(Suite.load("fashion16"), results, [], None, {}, TUNING)
    assert "tried for the dense arm and for a ticket of half the channels alike" in page
    section = page.partition("## Learning rate\n\n")[2]
    assert "350 dense steps" in section
    assert "| 0.001 | dense | 0.0580 | 18.59 |" in section
    assert (
        "Arms train at 0.001, where they do not say otherwise. Best of those tried, "
        "for dense: 0.001 by held-out loss (0.0580), 0.0005 by FID "
        "(18.26); for eb-speed-50: 0.001 by held-out loss (0.0519), 0.001 by FID (14.41)."
    ) in section
    assert "follows the rule: the rate that is best for the ticket by FID and for the dense arm by held-out loss" in (
        section
    )
    untuned = markdown(Suite.load("fashion16"), results, [], None, {})
    assert "not tuned yet" in untuned
    assert "## Learning rate" not in untuned


def test_a_rate_that_follows_no_rule_claims_none() -> None:
    for other in (
        tried("dense", (5e-4, 0.05, 18.0), (1e-3, 0.06, 17.0)) + TICKET,  # the dense arm's loss
        tried("dense", (5e-4, 0.06, 18.0), (1e-3, 0.05, 17.0))
        + tried("eb-speed-50", (5e-4, 0.06, 9), (1e-3, 0.05, 9.1)),
    ):
        assert "rule" not in rates.chosen(1e-3, other)
        assert "Arms train at 0.001, where" in rates.chosen(1e-3, other)
    assert "rule" in rates.chosen(1e-3, TUNING)
    assert "rule" not in rates.chosen(2e-3, TUNING)


def test_rates_are_compared_as_numbers_and_without_images_by_the_loss() -> None:
    tens = tried("dense", (9e-5, 0.05001, None), (1e-4, 0.05004, None))
    both = tens + tried("eb-speed-50", (9e-5, 0.04, None), (1e-4, 0.05, 7.0))
    text = rates.chosen(9e-5, both)
    assert "for dense: 9e-05 by held-out loss (0.0500); for eb-speed-50: 9e-05 by held-out loss (0.0400)" in text
    assert "FID" not in text  # one score is compared with nothing
    assert "best for the ticket and for the dense arm by held-out loss" in text
    assert "| 9e-05 | dense | 0.0500 | - |" in rates.tabled("own", 9, tens)


def test_the_page_names_commits_and_what_ran_from_uncommitted_code(results: dict[str, list[dict[str, Any]]]) -> None:
    results["dense"][1]["machine"] |= {"commit": "aaa+", "torch": "2.14.0"}
    results["eb-speed-50"][0]["machine"]["commit"] = "aaa, bbb+"
    page = markdown(Suite.load("fashion16"), results, [], None, {})
    head, _, section = page.partition("## Provenance\n\n")
    assert "9 cells of 2 commits, 2 of them from uncommitted library code in part" in head
    assert "9 cells of 2 commits (aaa, bbb), torch 2.13.0, 2.14.0." in section
    assert "dense-1 (aaa+), eb-speed-50-0 (aaa, bbb+)" in section
    assert "9 cells kept no fingerprint of the images" in section
    for found in results.values():
        for facts in found:
            facts["machine"]["commit"] = "aaa"
            facts["data"] = {"fingerprint": "of the images"}
    page = markdown(Suite.load("fashion16"), results, [], None, {})
    assert "9 cells of 1 commit (aaa)" in page
    assert "uncommitted" not in page
    assert "fingerprint" not in page


def test_the_page_says_what_device_seconds_are(results: dict[str, list[dict[str, Any]]]) -> None:
    assert "are CPU seconds of the process;" in markdown(Suite.load("fashion16"), results, [], None, {})
    results["dense"][0]["config"]["device"] = "auto"  # where it ran, the machine says
    results["dense"][0]["machine"]["device"] = "NVIDIA H200"
    assert "are wall-clock of the GPU;" in markdown(Suite.load("fashion16"), results, [], None, {})


def test_a_page_by_the_held_out_loss(results: dict[str, list[dict[str, Any]]]) -> None:
    for facts in (facts for found in results.values() for facts in found):
        for point in facts["curve"]:
            point["fid"] = None
    page = markdown(Suite.load("fashion16"), results, [], None, {})
    assert "| held-out loss at 25% |" in page
    assert "LOSS" not in page


def test_without_a_dense_cell_nothing_is_compared(results: dict[str, list[dict[str, Any]]]) -> None:
    del results["dense"]
    assert "No dense arm is finished" in markdown(Suite.load("fashion16"), results, [], None, {})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures instead of files."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "write", lambda figure, path: figures.append(figure))
    return figures


def test_macs_count_the_search_as_well() -> None:
    dense = [cell("dense", [(100.0, 20.0)])]  # 60,000 MACs
    arm = [cell("eb-speed-50", [(10.0, 40.0), (40.0, 20.0)], search=4.0)]  # 2,400 of the search, then 24,000
    assert reached_in_macs(arm, dense, "fid").values == pytest.approx((0.44,))
    assert reached_in_macs([cell("eb-speed-50", [(10.0, 40.0)])], dense, "fid").text() == "-"


def arm_of(name: str) -> list[dict[str, Any]]:
    """A seed of any arm; what it starts from took 100 s."""
    return [cell(name, [(25.0, 40.0), (100.0, 20.0)], before=100.0 if ARMS[name].after else None)]


def test_no_two_arms_of_a_panel_share_a_colour(drawn: list[Any]) -> None:
    plots.curves({name: arm_of(name) for name in ARMS}, "fid", None, Path("unused"))
    panels = {axes.get_title(): axes for axes in drawn[0].axes if axes.get_visible()}
    assert set(panels) == {arm.family for arm in ARMS.values()}
    for axes in panels.values():
        handles = axes.get_legend_handles_labels()[0]
        assert len({handle.get_color() for handle in handles}) == len(handles)
        assert axes.get_legend().handlelength == 3


@pytest.mark.parametrize(("last", "labels"), [(25.0, {"26", "30", "34"}), (5.0, {"5", "20"})])
def test_a_short_axis_has_its_numbers_and_a_long_one_room(drawn: list[Any], last: float, labels: set[str]) -> None:
    arms = {name: [cell(name, [(25.0, 38.0), (100.0, last)])] for name in ("dense", "eb-speed-50")}
    plots.curves(arms, "fid", None, Path("unused"))
    drawn[0].draw_without_rendering()
    found = {label.get_text() for label in drawn[0].axes[0].get_yticklabels(which="both")}
    assert labels <= found
    assert ("30" in found) == (last == 25)


def test_what_starts_from_scratch_has_a_panel_apart_and_pruned_curves_one_of_their_finetuning(drawn: list[Any]) -> None:
    names = ("dense", "prune-taylor-50", "prune-random-30", "scratch-50")
    plots.curves({name: arm_of(name) for name in names}, "fid", None, Path("unused"))
    pruned, scratch = drawn[0].axes
    assert (pruned.get_title(), scratch.get_title()) == ("pruned", "from scratch")
    assert (pruned.get_xscale(), scratch.get_xscale()) == ("linear", "log")
    left, right = pruned.get_xlim()
    assert 90 < left < 100  # the dense arm ends there, and finetuning at 200
    assert 200 < right < 210


def test_a_bar_that_is_missing_says_how_many_seeds_got_there(drawn: list[Any]) -> None:
    goals = [cell("dense", [(25.0, 40.0), (100.0, 20.0)], seed) for seed in range(3)]
    some = [cell("eb-speed-50", [(25.0, 40.0), (50.0, fid)], seed) for seed, fid in enumerate((10.0, 10.0, 30.0))]
    none = [cell("prune-taylor-50", [(5.0, 30.0)], before=100.0)]
    elsewhere = [cell("control-fresh", [(5.0, 30.0)], seed=7)]
    results = {"dense": goals, "eb-speed-50": some, "prune-taylor-50": none, "control-fresh": elsewhere}
    plots.bars(results, "fid", None, Path("unused"))
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts if text.get_position()[0] < 0.1] == [
        "2 of 3 seeds",
        "not reached",
        "-",
    ]
    assert {text.get_text() for text in axes.texts} >= {"1/3: the aim", "1: the dense arm"}
    assert "a dot is a seed" in axes.get_xlabel()


def test_what_is_not_on_the_clock_has_no_bar_and_says_so_beside_its_curve(drawn: list[Any]) -> None:
    results = {name: arm_of(name) for name in ("dense", "eb-speed-50", "eb-speed-30")}
    clock = {name: {"search": 1.0, "region 0": 1.0} for name in ("dense", "eb-speed-50")}
    for draw in (plots.bars, plots.curves):
        draw(results, "fid", clock, Path("unused"))
    bars, curves = (figure.axes[0] for figure in drawn)
    assert len(bars.patches) == 2
    assert [text.get_text() for text in bars.texts if text.get_position()[0] < 0.1] == ["-"]
    names = curves.get_legend_handles_labels()[1]
    assert [name for name in names if "not on the clock" in name] == ["eb-speed-30 (1 seed), not on the clock"]


def test_pictures(results: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    plots.curves(results, "fid", None, tmp_path / "curves.png")
    results["control-fresh"] = [cell("control-fresh", [(90.0, 15.0)], seed=4)]
    plots.bars(results, "fid", None, tmp_path / "bars.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "bars"))
