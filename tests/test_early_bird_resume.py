"""A search that was interrupted ends as one that was not."""

import json

import pytest
import torch
from toys import hidden, mlp

from ebdiff import EarlyBird, Partition
from ebdiff.errors import EbdiffError

HALVES = Partition(0, 500, 1000)
UP = [float(c + 1) for c in range(20)]


def search(model, plan, steps, watch=None):
    """Train on noise that depends on the step alone, from where `watch` is."""
    options = {"criteria": ("magnitude", "taylor", "random"), "regions": HALVES, "window": 6, "eta": 0.3, "every": 2}
    watch = watch or EarlyBird(model, plan, ratios=(0.3, 0.5), **options)
    for step in range(watch.steps, steps):
        g = torch.Generator().manual_seed(step)
        model.zero_grad()
        model(torch.randn(8, 1, generator=g) + step % 2).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad + 0.05 * torch.randn(p.shape, generator=g)
        watch.step(step % 2)
    return watch


@pytest.mark.parametrize("stop", [1, 7, 22])
def test_an_interrupted_search_ends_as_an_uninterrupted_one(stop):
    model, plan = mlp(1, 20, 1)
    whole = search(model, plan, 40)
    model, plan = mlp(1, 20, 1)
    first = search(model, plan, stop)
    state = first.state_dict()
    state = {
        "tensors": {k: t.clone() for k, t in state["tensors"].items()},
        "facts": json.loads(json.dumps(state["facts"])),
    }
    saved = EarlyBird(model, plan, ratios=(0.3, 0.5), **options_of(first))
    saved.load_state_dict(state)
    again = search(model, plan, 40, saved)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert ours["facts"] == theirs["facts"]
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    assert all(torch.equal(ours["tensors"][name], theirs["tensors"][name]) for name in ours["tensors"])
    found = [ticket for _, ticket in again.tickets.items()]
    assert found == [ticket for _, ticket in whole.tickets.items()]
    assert None in found, "random never settles"
    assert any(found), "something does"


def options_of(watch):
    s = watch.settings
    return {name: getattr(s, name) for name in ("criteria", "regions", "window", "eta", "every")}


def test_a_state_of_another_search_is_refused_and_changes_nothing():
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5,), window=40)
    for _ in range(5):
        watch.step()
    before = watch.state_dict()["facts"]
    others = ({"window": 20}, {"ratios": (0.6,)}, {"ema": model}, {"criteria": ("random",)}, {"scope": "cost"})
    for options in others:
        other = EarlyBird(model, plan, **{"ratios": (0.5,), "window": 40, **options})
        with pytest.raises(EbdiffError, match="had another"):
            watch.load_state_dict(other.state_dict())
    damaged = EarlyBird(model, plan, ratios=(0.5,), window=40).state_dict()
    damaged["tensors"]["masks.0"] = damaged["tensors"]["masks.0"][:, :1]
    with pytest.raises(EbdiffError, match="state of a mask history"):
        watch.load_state_dict(damaged)
    del damaged["tensors"]["masks.0"]
    with pytest.raises(EbdiffError, match="damaged state"):
        watch.load_state_dict(damaged)
    for nothing in ({}, None, {"tensors": {}, "facts": 3}):
        with pytest.raises(EbdiffError, match="no state of a search"):
            watch.load_state_dict(nothing)
    assert watch.state_dict()["facts"] == before


def test_a_state_from_before_there_were_scopes_is_taken():
    model, plan = hidden(*UP)
    watch = EarlyBird(model, plan, ratios=(0.5,), window=40)
    watch.step()
    state = watch.state_dict()
    del state["facts"]["settings"]["scope"]
    again = EarlyBird(model, plan, ratios=(0.5,), window=40)
    again.load_state_dict(state)
    assert again.steps == 1


def test_masks_are_drawn_in_the_scope_that_was_asked():
    model, plan = mlp(960, 64, 64, 64)
    watch = EarlyBird(model, plan, ratios=(0.5,), window=2, every=1, scope="cost")
    for _ in range(3):
        watch.step()
    (ticket,) = [ticket for _, ticket in watch.finish().items()]
    assert {name: int(kept.sum()) for name, kept in ticket.mask.keep.items()} == {"h1": 21, "h2": 43}
