"""Block masks in the main job: watched in the search, kept by every ticket, and in every network after it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import found, run, same, tiny, weights

from ebdiff import TimestepRouter, report
from ebdiff.config import resolve
from ebdiff.errors import EbdiffError
from ebdiff.nn import blocks_of
from ebdiff.pruning.blocks import of_kept_heads
from ebdiff.pruning.save import load
from ebdiff.training import diff_pruning, job
from ebdiff.training.regions import joint, joint_ticket, region, ticket_of
from ebdiff.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

BIG = (  # 2304 tokens, and as little else as there can be
    "model.sample_size=48",
    "model.down_block_types=[AttnDownBlock2D, DownBlock2D]",
    "model.up_block_types=[UpBlock2D, AttnUpBlock2D]",
    "model.attention_head_dim=4",
    "data.size=48",
    "data.limit=8",
    "train.batch_size=1",
    "train.checkpoint_every=2",
    "regions.bounds=[0, 440, 1000]",
    "regions.steps=[1, 2]",
    "search.ratios=[0.3, 0.5]",
    "search.steps=3",
    "search.attention=0.25",
    "sample.steps=1",
    "sample.grid=1",
    "evaluate.marks=[1.0]",
    "evaluate.extractor=none",
    "evaluate.loss_bins=2",
    "evaluate.loss_per_bin=1",
    "evaluate.control=false",
)
JOINT = (*BIG, "regions.branch_at=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    world = tiny(tmp_path_factory.mktemp("finished"), *JOINT)
    run(world)
    return world


def test_every_network_computes_the_blocks_of_its_ticket(finished: World) -> None:
    router = TimestepRouter.from_pretrained(finished.out / "router")
    for number, net in enumerate(router.nets):
        ticket = ticket_of(finished, number)
        assert len(ticket.blocks) == 3
        assert ticket.achieved["blocks"] == pytest.approx(0.25, abs=0.01)
        left = of_kept_heads(ticket.blocks, ticket.mask)
        assert any(left[name].kept.shape[1] < mask.kept.shape[1] for name, mask in ticket.blocks.items()), "heads went"
        own = load(finished.out / "regions" / str(number) / "nets" / "1")
        assert blocks_of(region(finished, number).start().model) == blocks_of(own) == blocks_of(net) == left
    report.write(finished)
    assert "| attention blocks kept |" in (finished.out / "report.md").read_text()


def test_the_joint_network_computes_the_blocks_of_all_regions(finished: World) -> None:
    """Where these are more than half of all, dense attention is faster, and the layer stays dense."""
    ticket, tickets = joint_ticket(finished), [ticket_of(finished, number) for number in range(2)]
    for name, mask in ticket.blocks.items():
        first, second = (each.blocks[name].kept for each in tickets)
        assert torch.equal(mask.kept, first | second)
        assert not torch.equal(first, second)
    within = of_kept_heads(ticket.blocks, ticket.mask)
    paying = {name: mask for name, mask in within.items() if ticket.blocks[name].density <= 0.5}
    assert paying
    assert blocks_of(joint(finished).start().model) == paying


def test_it_goes_on_to_the_same_networks_after_interruptions(finished: World, tmp_path: Path) -> None:
    for after, trained in ((2, 3), (0, None)):
        world = found(tmp_path, *JOINT, after=after)
        list(islice(job.train(world, range(2)), trained))
    job.merge(world)
    theirs = {name: tensor for name, tensor in weights(finished.out).items() if "evaluation" not in name}
    assert same(weights(tmp_path), theirs)


@pytest.mark.parametrize("other", ["auto", "diff-pruning"])
def test_blocks_do_not_depend_on_how_channels_are_drawn(
    other: str, finished: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"auto": ("search.ratios=auto", "search.macs=0.6"), "diff-pruning": ("search.criterion=diff-pruning",)}
    monkeypatch.setattr(diff_pruning, "PASSES", 4)
    world = found(tmp_path, *BIG, *drawn[other])
    for number in range(2):
        assert ticket_of(world, number).blocks == ticket_of(finished, number).blocks


@pytest.mark.parametrize(("overrides", "got"), [(BIG[1:4], "at most 256 tokens"), ((), "no such call")])
def test_a_network_without_such_attention_is_refused(overrides: tuple[str, ...], got: str, tmp_path: Path) -> None:
    world = tiny(tmp_path / "out", *overrides, "search.attention=0.25")
    with pytest.raises(EbdiffError, match=rf"search\.attention.*{got}"):
        job.prepare(world)
    assert not world.out.exists()


def test_it_is_watched_in_a_search() -> None:
    with pytest.raises(EbdiffError, match="watched while it trains"):
        resolve("smoke", overrides=["search.attention=0.25", "search.steps=0", "search.criterion=magnitude"])


def test_a_search_too_short_to_look_in_every_region_is_refused(tmp_path: Path) -> None:
    """With a window of 1000 it looks every fifth step."""
    short = (*BIG, "search.criterion=magnitude", "search.window=1000")
    with pytest.raises(EbdiffError, match=r"too short to see \[\d+, \d+\): .* search.steps=\d+"):
        tiny(tmp_path / "run", *short).check()
    tiny(tmp_path / "run", *short, "search.steps=100").check()
