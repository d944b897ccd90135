"""The main job's other arms: no search, no control, other first weights; each resumes to the same weights."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from test_job import same, weights
from tiny import run, tiny

from ebdiff import ChannelMask, importance, report
from ebdiff.config import resolve
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json
from ebdiff.pruning.save import load
from ebdiff.training import job
from ebdiff.training.regions import ticket_of
from ebdiff.training.search import control_steps

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ("regions.bounds=[0, 440, 1000]", "search.ratios=[0.3, 0.6]", "regions.steps=[3, 4]")
UNTRAINED = (*TWO, "search.steps=0", "search.criterion=magnitude")


def goes_on(out: Path, after: int, *overrides: str) -> None:
    """Run into `out`, abandoned after so many ticks and begun again."""
    world = tiny(out, *overrides)
    job.prepare(world)
    assert len(list(islice(job.run(world), after))) == after
    run(tiny(out, *overrides))


# No search -----------------------------------------------------------------------------------------------------------


def test_without_a_search_masks_are_of_the_network_before_its_first_step(tmp_path: Path) -> None:
    world = tiny(tmp_path / "whole", *UNTRAINED)
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
    goes_on(tmp_path / "again", 2, *UNTRAINED)
    assert same(weights(tmp_path / "again"), weights(world.out))


@pytest.mark.parametrize("criterion", ["taylor", "auto"])
def test_without_a_search_there_are_no_gradients(criterion: str) -> None:
    auto = ["search.ratios=auto", "search.macs=0.5"] if criterion == "auto" else []
    with pytest.raises(EbdiffError, match="taylor reads the gradients of training"):
        resolve("smoke", overrides=["search.steps=0", *auto])
