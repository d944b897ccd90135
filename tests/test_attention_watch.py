"""Block masks drawn from where a network looks: the mass by hand, top blocks, settling, and resuming.

Together with the channels of a search: test_attention_search.py.
"""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from ebdiff import Partition
from ebdiff.errors import EbdiffError
from ebdiff.nn import SparseAttention
from ebdiff.tickets import attention as module
from ebdiff.tickets.attention import Attention, BlockHistory, Grid, attention_mass
from ebdiff.tickets.attention_watch import AttentionWatch
from ebdiff.tickets.settings import Pace

HALVES = Partition(0, 500, 1000)
SMALL = {"block": 16, "tokens": 1, "every": 1}


def probabilities(query, key, mask=None, causal=False, scale=None):
    """As torch itself computes them."""
    value = torch.eye(key.shape[-2], dtype=query.dtype).expand(*query.shape[:2], -1, -1)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def averaged(p, block):
    """[B, H, Sq, Sk] -> the sums over each block of keys, averaged over each block of queries and the samples."""
    rows = [part.mean(2) for part in p.split(block, 2)]
    columns = [torch.stack([part.sum(-1) for part in row.split(block, -1)], -1) for row in rows]
    return torch.stack(columns, 2).mean(0)


def test_the_mass_of_two_heads_by_hand():
    # Head 0 looks everywhere alike. Head 1: queries 0 to 15 only at key 0, queries 16 to 19 only at key 19.
    q, k = torch.zeros(1, 2, 20, 2), torch.zeros(1, 2, 20, 2)
    q[0, 1, :16, 0], q[0, 1, 16:, 1] = 100, 100
    k[0, 1, 0, 0], k[0, 1, 19, 1] = 100, 100
    expected = [[[0.8, 0.2], [0.8, 0.2]], [[1.0, 0.0], [0.0, 1.0]]]
    torch.testing.assert_close(attention_mass(q, k, 16), torch.tensor(expected))


@pytest.mark.parametrize("held", [1, 1 << 12, 1 << 24])
@pytest.mark.parametrize("kind", ["plain", "bool", "added", "causal", "scale", "shared keys"])
def test_the_mass_is_that_of_torchs_attention_however_it_is_cut(held, kind, monkeypatch):
    monkeypatch.setattr(module, "_HELD", {"cpu": held, "cuda": held})
    torch.manual_seed(0)
    keys = 2 if kind == "shared keys" else 4
    q, k = torch.randn(2, 4, 70, 8), torch.randn(2, keys, 70 if kind == "causal" else 37, 8)
    options = {"mask": None, "causal": kind == "causal", "scale": 0.1 if kind == "scale" else None}
    if kind == "bool":
        options["mask"] = torch.rand(2, 1, 1, 37) < 0.7
    if kind == "added":
        options["mask"] = torch.randn(70, 37)
    mass = attention_mass(q, k, 16, **options)
    torch.testing.assert_close(mass, averaged(probabilities(q, k, **options), 16))
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, 5))


@given(st.integers(0, 10**6), st.floats(0.01, 1), st.floats(0.01, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_density_never_drops_a_block_and_every_row_keeps_one(seed, less, more, own):
    less, more = sorted((less, more))
    grid = Grid(3, 70, 70 if own else 41, 16)
    mass = torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed))
    few, many = (grid.top(mass, density).kept[0] for density in (less, more))
    assert not (few & ~many).any()
    assert few.any(-1).all()
    blocks = few.shape[-2] * few.shape[-1]
    assert few.sum((-1, -2)).tolist() == [max(few.shape[-2], round(less * blocks))] * 3
    if own:
        assert few.diagonal(dim1=-2, dim2=-1).all()


def test_distances_of_block_masks_are_those_of_their_bits():
    grids = {"a": Grid(2, 40, 40, 16), "b": Grid(1, 33, 50, 16)}
    history, masks = BlockHistory(grids, keep=3), []
    for step in range(5):
        torch.manual_seed(step)
        masks.append({name: grid.top(torch.rand(grid.shape), 0.5) for name, grid in grids.items()})
        history.add(step, masks[-1])
    assert [history[i] for i in range(4)] == [masks[0], *masks[2:]]
    bits = torch.stack([torch.cat([m[n].kept.flatten() for n in grids]) for m in (masks[0], *masks[2:])]).double()
    assert history.distances() == pytest.approx([float((row != bits[-1]).double().mean()) for row in bits[:-1]])
    removed = 1 - (bits[0].mean() + bits[-1].mean()) / 2
    chance = 2 * removed * (1 - removed)
    assert history.distances(corrected=True)[0] == pytest.approx(float((bits[0] != bits[-1]).double().mean() / chance))


# The watch ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers that attend to 48 tokens; how they look follows from `turn`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = SparseAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x, x, x, need_weights=False)[0]


def batch(step, tokens=48):
    return 3 * torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(step))


def train(net, watch, steps, region=lambda step: None):
    for step in range(watch.steps, steps):
        net.zero_grad()
        net(batch(step)).square().mean().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.05 * p.grad
        watch.step(region(step))
    return watch


def test_a_look_leaves_the_model_and_its_gradients_as_they_were():
    plain, watched = Net(), Net()
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in watched.named_modules()}
    watch = AttentionWatch(watched, Attention(0.5, **SMALL), Pace.of(window=1000))
    x = batch(0)
    a, b = plain(x), watched(x)
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    watch.step()
    watch.detach()
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in watched.named_modules()} == before
    assert watch.mass().keys() == {"first", "second"}


def test_the_mass_of_a_layer_is_the_mean_over_the_steps_of_what_its_queries_and_keys_hold():
    net = Net()
    watch = AttentionWatch(net, Attention(0.5, **SMALL), Pace.of(window=10**9))
    expected = []
    for step in range(3):
        x = batch(step)
        net(x)
        with torch.no_grad():
            net(batch(99))  # without gradients: an evaluation in between
        q, k = (to(x).unflatten(-1, (2, 4)).transpose(1, 2) for to in (net.first.to_q, net.first.to_k))
        expected.append(averaged(probabilities(q, k), 16))
        watch.step()
    torch.testing.assert_close(watch.mass()["first"], torch.stack(expected).mean(0).double())


@pytest.mark.parametrize("samples", [(2, 3), (3,), (1, 3), (2, 1)], ids=str)
def test_a_mask_by_sample_counts_also_where_samples_have_two_dimensions(samples):
    class Masked(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    torch.manual_seed(0)
    mask = torch.rand(*samples, 1, 1, 40) < 0.7
    x = torch.randn(2, 3, 4, 40, 8)
    watch = AttentionWatch(Masked(), Attention(0.5, **SMALL))
    watch.model(x)
    watch.step()
    whole, flat = mask.expand(2, 3, 1, 1, 40).flatten(0, 1), x.flatten(0, 1)
    torch.testing.assert_close(watch.mass()[""], averaged(probabilities(flat, flat, whole), 16).double())


def test_an_interrupted_forward_leaves_nothing_behind_once_the_watch_lets_go():
    def interrupted(module, args):
        raise KeyboardInterrupt

    net = Net()
    watch = AttentionWatch(net, Attention(0.5, **SMALL))
    hook = net.second.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        net(batch(0))
    hook.remove()
    watch.detach()
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    masses = []
    for net in (Net(), Checkpointed()):
        watch = AttentionWatch(net, Attention(0.5, **SMALL))
        net(batch(0).requires_grad_()).sum().backward()
        watch.step()
        masses.append(watch.mass())
    assert all(torch.equal(masses[0][name], masses[1][name]) for name in masses[0])


def test_what_a_region_looks_at_stays_with_the_region():
    net = Net()
    watch = AttentionWatch(net, Attention(0.5, **SMALL), Pace.of(window=8, every=2, eta=1e-9, regions=HALVES))
    only = AttentionWatch(net, Attention(0.5, **SMALL), Pace.of(window=10**9))
    for step in range(6):
        net(batch(step % 2))
        watch.step(step % 2)
        only.step()
    for region in (0, 1):
        alone = AttentionWatch(net, Attention(0.5, **SMALL))
        net(batch(region))
        alone.step()
        assert watch.mass(region).keys() == alone.mass().keys()
        for name, mass in alone.mass().items():
            torch.testing.assert_close(watch.mass(region)[name], mass)
    with pytest.raises(EbdiffError, match="search by region"):
        watch.step()
    drawn = [watch.history(region).steps for region in (0, 1)]
    for _ in range(6):
        net(batch(1))
        watch.step(1)
    assert watch.history(0).steps == drawn[0], "nothing new was seen there"
    assert len(watch.history(1)) > len(drawn[1])


def test_masks_settle_as_those_of_channels_do_and_the_watch_lets_go():
    net, pace = Net(), Pace.of(window=8, every=1, eta=0.2)
    watch = AttentionWatch(net, Attention(0.4, **SMALL), pace)
    assert watch.found() is None
    for step in range(60):
        net(batch(0) if step < 6 else -2 * batch(1))  # looks elsewhere from step 6 on
        watch.step()
        if watch.settled:
            break
    found = watch.found()
    assert found.settled
    assert found.step == watch.steps == watch.history().steps[-1]
    assert 6 + pace.window <= found.step < 40
    assert found.blocks == watch.history()[-1]
    net(batch(5, tokens=20))  # nobody looks any more
    watch.step()
    assert watch.found() is found


def test_what_never_moves_never_settles_and_is_drawn_at_the_end():
    net = Net()
    watch = AttentionWatch(net, Attention(0.4, **SMALL), Pace.of(window=8, every=1, regions=HALVES))
    with pytest.raises(EbdiffError, match="no attention was looked at in region 0"):
        watch.finish()
    for step in range(40):
        net(batch(step % 2))
        watch.step(step % 2)
    assert watch.found() is None
    watch.finish()
    assert [watch.found(i).settled for i in (0, 1)] == [False, False]
    both = watch.found().blocks
    for name, mask in both.items():
        assert torch.equal(mask.kept, watch.found(0).blocks[name].kept | watch.found(1).blocks[name].kept)


@pytest.mark.parametrize("stop", [1, 6, 13])
def test_an_interrupted_watch_ends_as_an_uninterrupted_one(stop):
    def fresh(net):
        pace = Pace.of(window=12, every=3, eta=0.15, regions=HALVES)
        return AttentionWatch(net, Attention(0.4, 16, 1, every=2), pace)

    def region(step):
        return step // 2 % 2

    net = Net()
    whole = train(net, fresh(net), 40, region).state_dict()
    net = Net()
    first = train(net, fresh(net), stop, region)
    state = {"tensors": {k: t.clone() for k, t in first.state_dict()["tensors"].items()}}
    state["facts"] = json.loads(json.dumps(first.state_dict()["facts"]))
    first.detach()
    again = fresh(net)
    again.load_state_dict(state)
    ours = train(net, again, 40, region).state_dict()
    assert ours["facts"] == whole["facts"]
    assert ours["tensors"].keys() == whole["tensors"].keys()
    assert all(torch.equal(ours["tensors"][name], whole["tensors"][name]) for name in whole["tensors"])
    damaged = {**state, "tensors": {}}
    if state["facts"]["grids"]:
        with pytest.raises(EbdiffError, match="damaged"):
            again.load_state_dict(damaged)
    with pytest.raises(EbdiffError, match="another density"):
        AttentionWatch(net, Attention(0.5, 16, 1, every=2)).load_state_dict(state)


class Twice(nn.Module):
    """Attends to its own tokens, and then to few others."""

    def __init__(self, net):
        super().__init__()
        self.net, self.others = net, nn.Parameter(torch.randn(2, 2, 5, 4))

    def forward(self, x):
        q = self.net(x).unflatten(-1, (2, 4)).transpose(1, 2)
        own, to_others = (F.scaled_dot_product_attention(q, other, other) for other in (q, self.others))
        return own + to_others


def test_a_layer_of_several_sizes_in_one_forward_stays_dense():
    """Whether short calls are watched or not: its mask would refuse one of the two."""
    for tokens in (1, 10):
        net = Twice(Net())
        watch = AttentionWatch(net, Attention(0.5, 16, tokens, every=1))
        for step in range(2):
            net(batch(step))
            watch.step()
        assert set(watch.mass()) == {"net.first", "net.second"}
    alone = Twice(nn.Identity())
    watch = AttentionWatch(alone, Attention(0.5, **SMALL))
    alone(batch(0))
    with pytest.raises(EbdiffError, match="got only layers of several sizes in one forward: the model"):
        watch.step()


def test_what_cannot_be_watched_is_refused_with_the_reason():
    for wrong in ({"density": 0.0}, {"density": 0.5, "block": 48}, {"density": 0.5, "every": 0}):
        with pytest.raises(EbdiffError, match="expected"):
            Attention(**wrong)
    assert asdict(AttentionWatch(Net(), 0.25).attention)["tokens"] == 2048
    net = Net()
    watch = AttentionWatch(net, Attention(0.5, every=1))
    net(batch(0))
    with pytest.raises(EbdiffError, match="at least 2048 queries and keys, got at most 48 tokens"):
        watch.step()
    watch = AttentionWatch(net, Attention(0.5, **SMALL))
    with pytest.raises(EbdiffError, match="no such call while this module ran"):
        watch.step()
    net(batch(0))
    watch.step()
    net(batch(0, tokens=64))
    with pytest.raises(EbdiffError, match=r"first changes its size.*48 queries.*64 queries"):
        watch.step()
