"""What cannot work is refused before anything is written; what just can is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import found, run, tiny

from ebdiff.errors import EbdiffError
from ebdiff.training import seen
from ebdiff.training.batches import region_at
from ebdiff.training.regions import ticket_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("regions.bounds=[0, 240, 1200]", "outside the schedule"),
        ("regions.bounds=[0, 240, 440]", "do not tile"),
        ("regions.bounds=[[0, 300], [240, 1000]]", "overlap"),
        ("regions.bounds=[0, 500, 1000]", "one value for each"),
        ("search.ratios=[0.5]", "one value for each"),
        ("search.ratios=[0.3, 0.6, 1.0]", r"a share removed in \[0, 1\), got 1.0"),
        ("search={ratios: auto, macs: 0.001}", "MACs budget cannot be met"),
        ("search.steps=2", r"too short to see \[\d+, \d+\): .* search.steps=\d+"),
        ("model.norm_groups=4", "did you mean model.norm_num_groups"),
        ("model.norm_num_groups=3", "UNet2DModel refuses"),
        ("model.in_channels=3", "does not predict images"),
        ("model.in_channels=grey", "model.in_channels: expected a whole number .* got grey"),
        ("model.sample_size=abc", "does not predict images: .* got sample_size abc"),
        ("model.sample_size=[16, 16, 16]", "does not predict images"),
        ("model.sample_size=-16", "does not predict images"),
        ("model.block_out_channels=[-8, 16]", "UNet2DModel refuses"),
        ("data.channels=3", "do not fit the model"),
        ("data.limit=4", "too few held-out images to score: expected at least 5, got 4; .*evaluate.extractor=none"),
        ("device=abacus", "no such device"),
        ("data.source=/nowhere", "no images there"),
    ],
)
def test_nothing_is_written_before_everything_is_checked(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(EbdiffError, match=words):
        run(tiny(tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_without_scores_any_number_of_held_out_images_will_do(tmp_path: Path) -> None:
    tiny(tmp_path, "data.limit=4", "evaluate.extractor=none").check()


@pytest.mark.parametrize("seed", [0, 3])
def test_a_search_that_sees_every_region_just_once_is_long_enough(seed: int, tmp_path: Path) -> None:
    """The number of steps that a refusal names is enough, and one less is not."""
    with pytest.raises(EbdiffError) as refusal:
        tiny(tmp_path, "search.steps=1", f"seed={seed}").check()
    steps = int(str(refusal.value).partition("which take ")[2].partition(",")[0])
    with pytest.raises(EbdiffError, match="too short to see"):
        tiny(tmp_path, f"search.steps={steps - 1}", f"seed={seed}").check()
    world = found(tmp_path, f"search.steps={steps}", f"seed={seed}")
    assert ticket_of(world, 2).region == world.partition[2]


@pytest.mark.parametrize(("attention", "about"), [("null", r"1\.7e\+07"), ("0.5", r"8\.3e\+07")])
def test_a_region_that_no_search_would_see_is_refused_at_once(
    attention: str, about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[0, 5) has 6e-8 of the steps; with a window of 1000 attention is looked at every fifth step."""
    never = ("train.sampler=logit-normal", "regions.bounds=[0, 5, 440, 1000]", "search.steps=100")
    world = tiny(tmp_path, *never, f"search.attention={attention}", "search.window=1000")

    def drawn(step: int, masses: torch.Tensor, seed: int) -> int:
        assert step < 20_000, "far beyond the search"
        return region_at(step, masses, seed)

    monkeypatch.setattr(seen, "region_at", drawn)
    with pytest.raises(EbdiffError, match=rf"too short to see \[0, 5\): .* about {about}, .*regions\.bounds"):
        seen.check_seen(world.config.search, world.partition, world.sampler, 0)
