"""The report's sentence follows from its rule, and its arithmetic can be done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ebdiff import plots
from ebdiff.report_tables import table
from ebdiff.report_verdict import equal_seconds, interpolated, verdict, winner


def facts(dense: list[tuple[float, float]], tickets: list[tuple[float, float]], margin: float = 0.05) -> dict[str, Any]:
    """Marks of both arms from (device-seconds, FID)."""

    def mark(seconds: float, fid: float, macs: float) -> dict[str, Any]:
        return {
            "cost": {"device_seconds": seconds},
            "scores": {"fid": fid},
            "loss": {"total": fid / 100},
            "macs_per_image": {"sampler": macs},
        }

    arms = {"dense": [mark(*p, 100.0) for p in dense], "tickets": [mark(*p, 20.0) for p in tickets]}
    return {"config": {"evaluate": {"margin": margin}}, "marks": arms}


@pytest.mark.parametrize(
    ("dense", "tickets", "better", "words"),
    [
        ([(10, 20), (20, 10)], [(10, 15), (20, 8)], "tickets", "Better here: the set of tickets; FID 8.00"),
        ([(10, 20), (20, 10)], [(10, 30), (20, 12)], "dense", "Better here: the dense control;"),
        ([(10, 20), (20, 10)], [(10, 20), (20, 9.9)], None, "Neither is better here"),
        ([(10, 20), (20, 10)], [(20, 30), (40, 8)], None, "It depends: the set of tickets is better at equal MACs"),
        (
            [(10, 20), (20, 10)],
            [(20, 10.1), (40, 8)],
            "tickets",
            "10.10 (tickets) against 10.00 (dense) at 20.0 device",
        ),
        ([(10, 20), (20, 10)], [(30, 30), (40, 9.9)], None, "costs the tickets 20% of the dense MACs"),
    ],
)
def test_the_rule(dense: list[Any], tickets: list[Any], better: str | None, words: str) -> None:
    found = verdict(facts(dense, tickets))
    assert found["better"] == better
    assert words in found["sentence"]
    assert found["sentence"].count(".") == found["sentence"].rstrip(".").count(".") + 1
    assert "one seed" in found["sentence"]


def test_without_an_extractor_the_loss_decides() -> None:
    both = facts([(10, 20), (20, 10)], [(10, 15), (20, 8)])
    for marks in both["marks"].values():
        for mark in marks:
            mark["scores"] = None
    found = verdict(both)
    assert (found["measure"], found["better"]) == ("held-out loss", "tickets")
    assert "FID" not in found["sentence"]


def test_a_difference_within_the_margin_is_none() -> None:
    assert winner({"dense": 100.0, "tickets": 95.1}, 0.05) is None
    assert winner({"dense": 100.0, "tickets": 94.9}, 0.05) == "tickets"
    assert winner({"dense": 94.9, "tickets": 100.0}, 0.05) == "dense"
    assert winner({"dense": 3.0, "tickets": 3.0}, 0.0) is None


def test_equal_device_seconds_are_interpolated_not_extrapolated() -> None:
    assert interpolated([(0, 10), (10, 20), (20, 0)], 5) == 15
    assert interpolated([(0, 10), (10, 20), (20, 0)], 15) == 10
    assert interpolated([(0, 10)], 0) == 10
    assert equal_seconds(facts([(10, 4), (20, 2)], [(10, 8), (40, 2)]), "FID") == (20, {"dense": 2, "tickets": 6})
    assert equal_seconds(facts([(10, 4), (20, 2)], [(30, 8), (40, 2)]), "FID") == (20, {})


def test_tables_are_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_pictures_take_grey_and_colour_and_odd_counts(tmp_path: Path) -> None:
    plots.grid({"": torch.zeros(5, 3, 4, 6, dtype=torch.uint8)}, tmp_path / "colour.png")
    plots.grid({"a": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, tmp_path / "grey.png")
    plots.lines([plots.Panel("t", "x", "y", {"tickets": [(1, 2)], "dense control": []})], tmp_path / "lines.png")
    plots.heatmaps([("one", [0], [[0.0]])], 1.0, tmp_path / "map.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_images_lie_row_by_row() -> None:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    assert plots._tiled(images, gap=1).tolist() == [[0, 255, 1], [255, 255, 255], [2, 255, 255]]
