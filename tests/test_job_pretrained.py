"""A run that starts from a trained network: its weights everywhere, and nothing else in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tiny import NO_SEARCH, TWO, found, same, tiny, weights

import ebdiff
from ebdiff import ChannelMask, importance, shrink
from ebdiff.errors import EbdiffError
from ebdiff.pruning.save import load
from ebdiff.training import job
from ebdiff.training.regions import region, ticket_of
from ebdiff.training.search import control
from ebdiff.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with a network of the tiny run, of other weights."""
    folder = tmp_path / "trained"
    ebdiff.save(tiny(tmp_path).new_network(99), folder)
    return folder


def of(trained: Path, out: str, *overrides: str) -> World:
    return tiny(trained.parent / out, f"pretrained={trained}", *overrides)


def found_from(trained: Path, out: str, *overrides: str, after: int = 0) -> World:
    return found(trained.parent / out, f"pretrained={trained}", *overrides, after=after)


def test_search_control_and_regions_start_from_its_weights(trained: Path) -> None:
    world, network = found_from(trained, "out", *NO_SEARCH, "regions.start=initial"), load(trained)
    assert same(dict(load(world.out / "search" / "nets" / "0").state_dict()), dict(network.state_dict()))
    scores = importance(network, world.plan, "magnitude")
    for number, ratio in enumerate((0.3, 0.6)):
        mask = ticket_of(world, number).mask
        assert mask == ChannelMask.draw(scores, plan=world.plan, ratio=ratio)
        state = region(world, number).start()
        assert same(dict(state.model.named_parameters()), dict(shrink(network, mask).named_parameters()))
    list(job.train(world, range(2)))
    state = control(world).start()
    assert same(dict(state.model.named_parameters()), dict(network.named_parameters()))
    assert all(torch.equal(*pair) for pair in zip(state.ema.shadow_params, network.parameters(), strict=True))


def test_weights_drawn_anew_are_not_its_weights(trained: Path) -> None:
    fresh = found_from(trained, "fresh", *NO_SEARCH, "regions.start=fresh")
    cut = shrink(load(trained), ticket_of(fresh, 0))
    pairs = zip(region(fresh, 0).start().model.parameters(), cut.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.dim() > 1)


def test_it_goes_on_after_an_interruption_but_not_with_other_weights(trained: Path) -> None:
    overrides = (*TWO, "search.steps=5")
    for out, after in (("whole", 0), ("again", 4)):
        found_from(trained, out, *overrides, after=after)
    assert same(weights(trained.parent / "again"), weights(trained.parent / "whole"))
    tensors = load_file(trained / WEIGHTS)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, trained / WEIGHTS, {"format": "pt"})
    with pytest.raises(EbdiffError, match="results of other pretrained weights"):
        job.prepare(of(trained, "again", *overrides))


def changed(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def spoil(folder: Path, how: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    if how == "another argument":
        changed(folder, norm_eps=0.25)
    elif how == "another class":
        changed(folder, _class_name="UNet1DModel")
    elif how == "told labels":
        changed(folder, num_class_embeds=11)
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "a pickle":
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
        (folder / WEIGHTS).unlink()
    elif how == "no weights of a layer":
        save_file({name: t for name, t in tensors.items() if name != "conv_in.bias"}, folder / WEIGHTS)
    elif how == "cut short":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("another argument", r"expected model\.norm_eps=1e-05, got 0\.25"),
        ("another class", "expected UNet2DModel, got UNet1DModel"),
        ("told labels", r"expected model\.num_class_embeds=None, got 11"),
        ("no config", "no pretrained network"),
        ("a pickle", r"expected safetensors, no pickle, got diffusion_pytorch_model\.bin"),
        ("no weights of a layer", r"do not fit.*missing: conv_in\.bias"),
        ("cut short", "cannot be loaded"),
    ],
)
def test_what_is_no_network_of_this_architecture_is_refused(how: str, words: str, trained: Path) -> None:
    spoil(trained, how)
    world = of(trained, "out", *NO_SEARCH)
    with pytest.raises(EbdiffError, match=words):
        job.prepare(world)
    assert not world.out.exists()


def test_a_shrunken_network_is_refused(trained: Path) -> None:
    world = of(trained, "out", *NO_SEARCH)
    network = UNet2DModel.from_pretrained(trained)
    ebdiff.save(shrink(network, world.example_masks[0]), trained.parent / "small")
    with pytest.raises(EbdiffError, match="expected UNet2DModel, got ShrunkUNet2DModel"):
        job.prepare(of(trained.parent / "small", "out", *NO_SEARCH))
