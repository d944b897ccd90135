"""Block masks in a search: tickets that hold channels and blocks, wait for both, and resume."""

import json

import pytest
import torch
from test_attention_watch import HALVES, Net, batch, train

from ebdiff import EarlyBird, trace
from ebdiff.errors import EbdiffError
from ebdiff.tickets.attention import Attention, union


def searching(net, **options):
    defaults = {"ratios": (0.5,), "criteria": ("magnitude", "taylor"), "window": 12, "every": 3, "eta": 0.3}
    attention = Attention(0.4, 16, 1, every=2)
    return EarlyBird(net, trace(net, batch(0)), **{**defaults, "attention": attention, **options})


def test_tickets_hold_the_blocks_of_their_region_and_wait_for_both():
    net = Net()
    watch = train(net, searching(net, regions=HALVES), 4, lambda step: step % 2)
    assert watch.tickets["taylor", 0.5, 1] is None
    train(net, watch, 90, lambda step: step % 2)
    tickets = watch.finish()
    for region in (0, 1):
        found = watch.attention.found(region)
        ticket = tickets["taylor", 0.5, region]
        assert ticket.blocks == found.blocks
        assert ticket.step >= found.step
        assert tickets["magnitude", 0.5, region].blocks == found.blocks
    assert tickets["magnitude", 0.5].blocks == union([watch.attention.found(i).blocks for i in (0, 1)])
    assert all(ticket.blocks.keys() == {"first", "second"} for _, ticket in tickets.items())
    assert "of the blocks in 2 attention layers" in str(ticket)


def test_channels_that_settle_wait_for_blocks_that_do_not():
    net = Net()
    watch = searching(net, criteria=("magnitude",), every=1, window=8)
    removed = ~watch.history(0.5)[0]["second.in_proj_weight.head"].repeat_interleave(4)
    for step in range(60):
        net(batch(0))  # looks at the same at every step: blocks that never move never settle
        with torch.no_grad():
            net.second.in_proj_weight[16:][removed] *= 10 if step == 10 else 1  # its values
        watch.step()
    assert watch.history(0.5).steps[-1] < 30, "the channels have settled"
    assert watch.tickets[0.5] is None
    assert not watch.settled
    ticket = watch.finish()[0.5]
    assert not ticket.settled
    assert ticket.step >= 59


@pytest.mark.parametrize("stop", [1, 6, 13])
def test_an_interrupted_search_ends_as_an_uninterrupted_one(stop):
    def region(step):
        return step // 2 % 2

    net = Net()
    whole = train(net, searching(net, regions=HALVES), 40, region)
    net = Net()
    first = train(net, searching(net, regions=HALVES), stop, region)
    saved = first.state_dict()
    state = {"tensors": {k: t.clone() for k, t in saved["tensors"].items()}}
    state["facts"] = json.loads(json.dumps(saved["facts"]))
    first.attention.detach()
    again = searching(net, regions=HALVES)
    again.load_state_dict(state)
    train(net, again, 40, region)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert ours["facts"] == theirs["facts"]
    assert all(torch.equal(ours["tensors"][name], theirs["tensors"][name]) for name in theirs["tensors"])
    assert [t for _, t in again.finish().items()] == [t for _, t in whole.finish().items()]
    with pytest.raises(EbdiffError, match="another attention"):
        searching(net, regions=HALVES, attention=None).load_state_dict(state)
