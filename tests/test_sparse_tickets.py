"""Tickets with blocks of attention: on disk, in shrunken networks, in routers."""

import copy
import json

import families
import pytest
import torch
from laws import random_keep
from safetensors.torch import load_file, save_file
from test_law import assert_gradient_matches
from test_sparsify import Fused, attention_of, gradients, outputs, random_blocks
from torch import nn

import ebdiff
from ebdiff import ChannelMask, Partition, Region, Ticket, TimestepRouter, masked, shrink, shrink_, trace
from ebdiff.errors import EbdiffError
from ebdiff.nn import SparseAttention, blocks_of, densify, sparse_model, sparsify
from ebdiff.nn.sparse_model import ALWAYS
from ebdiff.ops.block_mask import BlockMask
from ebdiff.pruning.blocks import of_kept_heads
from ebdiff.pruning.plan import ChannelPlan, ChannelSpace, Member

FAMILIES = ["SD1.5 UNet", "SD3.5", "Flux", "CogVideoX-5b"]


@pytest.fixture(autouse=True)
def _blocks_pay_everywhere(monkeypatch):
    monkeypatch.setattr(sparse_model, "BREAK_EVEN", {"cpu": ALWAYS, "cuda": ALWAYS})


def ticket_for(model, arguments, seed=3, region=None):
    """A random ticket: channels, whole heads among them, and blocks of every layer that has more than one."""
    plan = trace(model, **arguments)
    blocks = {n: random_blocks(*s, seed=i) for i, (n, s) in enumerate(attention_of(model, arguments).items())}
    blocks = {name: mask for name, mask in blocks.items() if mask.density < 1}
    assert blocks
    mask = random_keep(plan, seed)
    return Ticket(mask, mask.removed, 7, "magnitude", region, blocks=blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_law_with_blocks_outputs_and_gradients_and_saved_and_loaded(family, tmp_path):
    model, arguments = families.build(family)
    before = outputs(model, arguments)
    ticket = ticket_for(model, arguments)
    small, dense = shrink(model, ticket), masked(model, ticket)
    assert blocks_of(dense) == ticket.blocks
    left = of_kept_heads(ticket.blocks, ticket.mask)
    assert blocks_of(small) == {name: mask for name, mask in left.items() if mask.density < 1}
    assert any(left[name].kept.shape[1] < mask.kept.shape[1] for name, mask in ticket.blocks.items()), "heads went"
    ours = outputs(small, arguments)
    torch.testing.assert_close(ours, outputs(dense, arguments), rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(outputs(model, arguments), before, rtol=0, atol=0)
    gradients(small, arguments), gradients(dense, arguments)
    slim = dict(small.named_parameters())
    for name, parameter in dense.named_parameters():
        assert_gradient_matches(ticket.plan, ticket.mask, name, parameter, slim[name], 8)
    without = shrink(model, ticket.mask)
    assert max((a - b).abs().max().item() for a, b in zip(ours, outputs(without, arguments), strict=True)) > 1e-5
    ebdiff.save(small, tmp_path)
    loaded = ebdiff.load(tmp_path)
    assert blocks_of(loaded) == blocks_of(small)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, arguments), ours, strict=True))


def test_in_place_with_optimizer_and_average_and_again():
    model, arguments = families.build("SD1.5 UNet")
    ticket, average = ticket_for(model, arguments), copy.deepcopy(model)
    expected = outputs(shrink(model, ticket), arguments)
    optimizer = torch.optim.AdamW(model.parameters())
    gradients(model, arguments)
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(average.state_dict())
    shrink_(model, ticket, optimizer=optimizer, ema=average)
    for network in (model, average):
        assert all(torch.equal(a, b) for a, b in zip(outputs(network, arguments), expected, strict=True))
    second = random_keep(trace(model, **arguments), 5)
    again, by_hand = shrink(model, second), masked(model, second)
    assert blocks_of(again)
    torch.testing.assert_close(outputs(again, arguments), outputs(by_hand, arguments), rtol=1e-9, atol=1e-8)
    gradients(model, arguments)
    optimizer.step()


def test_the_heads_that_stay_keep_their_own_blocks():
    layer = SparseAttention(8, 4)
    heads = ChannelSpace(
        "heads",
        4,
        (*(Member(f"to_{x}.weight", 0, inner=2) for x in "qkv"), Member("to_out.weight", 1, inner=2)),
        "head",
    )
    plan = ChannelPlan((heads,), (), {name: tuple(p.shape) for name, p in layer.named_parameters()})
    kept = torch.zeros(1, 4, 3, 3, dtype=torch.bool)
    for head in range(4):
        kept[0, head, :, head % 3] = True
    mask = ChannelMask(plan, {"heads": torch.tensor([False, True, False, True])})
    found = of_kept_heads({"": BlockMask(kept, 16, 40, 40)}, mask)[""]
    assert torch.equal(found.kept, kept[:, [1, 3]])
    with pytest.raises(EbdiffError, match="cannot be told"):
        of_kept_heads({"": BlockMask(kept.repeat(1, 2, 1, 1), 16, 40, 40)}, mask)


def test_of_heads_that_share_keys_all_go_with_their_keys():
    keys = ChannelSpace("kv", 2, (Member("q.weight", 0, inner=6), Member("k.weight", 0, inner=2)), "head")
    sharing = ChannelSpace("sharing", 3, (Member("q.weight", 0, outer=2, period=6, inner=2),), "head")
    plan = ChannelPlan((keys, sharing), (), {"q.weight": (12, 5), "k.weight": (4, 5)})
    kept = torch.eye(6, dtype=torch.bool).view(1, 6, 2, 3)
    mask = ChannelMask(plan, {"kv": torch.tensor([False, True]), "sharing": torch.tensor([True, False, True])})
    found = of_kept_heads({"attend": BlockMask(kept, 16, 32, 48)}, mask)["attend"]
    assert torch.equal(found.kept, kept[:, [3, 5]])


class Own(nn.Module):
    """A network that is no diffusers model."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([SparseAttention(24, 3), Fused(), nn.MultiheadAttention(24, 3, batch_first=True)])

    def forward(self, x):
        x = x + self.layers[0](x)
        x = x + self.layers[1](x)
        return x + self.layers[2](x, x, x, need_weights=False)[0]


def test_a_network_of_somebodys_own_is_saved_with_its_masks_which_stay_in(tmp_path):
    torch.manual_seed(0)
    model, x = Own().eval(), {"x": torch.randn(2, 70, 24)}
    report = sparsify(model, {f"layers.{i}": random_blocks(3, 70, 70, seed=i) for i in range(3)}, ALWAYS)
    expected, masks = outputs(model, x), blocks_of(model)
    assert len(masks) == 3
    ebdiff.save(model, tmp_path)
    loaded = ebdiff.load(tmp_path)
    assert blocks_of(loaded) == blocks_of(model) == masks
    assert torch.equal(outputs(loaded, x)[0], expected[0])
    assert torch.equal(outputs(model, x)[0], expected[0])
    assert not report.fallbacks
    facts = json.loads((tmp_path / "ebdiff.json").read_text())
    facts["blocks"]["layers.0"][0] = 32
    (tmp_path / "ebdiff.json").write_text(json.dumps(facts))
    with pytest.raises(EbdiffError, match="edited"):
        ebdiff.load(tmp_path)


def test_a_dense_diffusers_model_keeps_its_masks_when_saved_and_is_itself_again_without(tmp_path):
    model, arguments = families.build("SD1.5 UNet", torch.float32)
    kind, dense, plan = type(model), outputs(model, arguments), trace(model, **arguments)
    sparsify(model, ticket_for(model, arguments), ALWAYS)
    assert type(model).__name__ == f"Shrunk{kind.__name__}"
    assert trace(model, **arguments).fingerprint() == plan.fingerprint()
    assert blocks_of(model)
    sparse = outputs(model, arguments)
    model.save_pretrained(str(tmp_path))
    loaded = ebdiff.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, arguments), sparse, strict=True))
    densify(model)
    assert type(model) is kind
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, arguments), dense, strict=True))


def test_a_router_of_sparse_networks_saves_and_routes(tmp_path):
    model, arguments = families.build("SD1.5 UNet", torch.float32)
    nets = [shrink(model, ticket_for(model, arguments, seed)) for seed in (3, 4)]
    router = TimestepRouter(Partition(0, 5, 10), nets)
    rest = {name: value for name, value in arguments.items() if name != "timestep"}
    both = outputs(router, {**rest, "timestep": torch.tensor([3, 7])})[0]
    for row, net in enumerate(nets):
        alone = outputs(net, {**rest, "timestep": torch.tensor([3, 7])})[0][row]
        torch.testing.assert_close(both[row], alone)
    router.save_pretrained(tmp_path)
    loaded = TimestepRouter.from_pretrained(tmp_path)
    assert blocks_of(loaded) == blocks_of(router)
    assert len(blocks_of(router)) == 2 * len(blocks_of(nets[0]))
    assert torch.equal(outputs(loaded, {**rest, "timestep": torch.tensor([3, 7])})[0], both)


# On disk --------------------------------------------------------------------------------------------------------------


def toy():
    layer = SparseAttention(8, 2)
    space = ChannelSpace("heads", 2, tuple(Member(f"to_{x}.weight", 0, inner=4) for x in "qkv"), "head")
    plan = ChannelPlan((space,), (), {name: tuple(p.shape) for name, p in layer.named_parameters()})
    mask = ChannelMask(plan, {"heads": torch.tensor([True, False])})
    blocks = {"a.b": random_blocks(2, 70, 40), "": BlockMask.local(2, 128, 128, 64, 3)}
    return Ticket(mask, 0.5, 3, "taylor", Region(0, 500), True, blocks)


def test_a_ticket_with_blocks_comes_back_and_says_so(tmp_path):
    ticket = toy()
    ticket.save(tmp_path)
    loaded = Ticket.load(tmp_path)
    assert loaded == ticket
    assert loaded.blocks == ticket.blocks
    kept = sum(int(m.kept.sum()) for m in ticket.blocks.values()) / sum(m.kept.numel() for m in ticket.blocks.values())
    assert loaded.achieved["blocks"] == pytest.approx(kept)
    assert f"{kept:.1%} of the blocks in 2 attention layers" in str(loaded)


def test_a_ticket_without_blocks_is_written_as_before(tmp_path):
    whole = toy()
    ticket = Ticket(whole.mask, 0.5, 3, "taylor", whole.region)
    ticket.save(tmp_path)
    assert "blocks" not in (tmp_path / "ticket.json").read_text()
    assert load_file(tmp_path / "ticket.safetensors").keys() == {"heads"}
    assert Ticket.load(tmp_path).blocks == {}
    assert Ticket.load(tmp_path) == ticket
    assert ticket != whole


@pytest.mark.parametrize("what", ["a block", "a size", "a name", "all of them"])
def test_an_edited_ticket_is_refused(what, tmp_path):
    toy().save(tmp_path)
    facts = json.loads((tmp_path / "ticket.json").read_text())
    tensors = load_file(tmp_path / "ticket.safetensors")
    if what == "a block":
        tensors["blocks:a.b"][0, 0, 0, 0] ^= True
    if what == "a size":
        facts["blocks"]["a.b"][1] = 71
    if what == "a name":
        facts["blocks"]["c"] = facts["blocks"].pop("a.b")
    if what == "all of them":
        del facts["blocks"]
    save_file(tensors, tmp_path / "ticket.safetensors")
    (tmp_path / "ticket.json").write_text(json.dumps(facts))
    with pytest.raises(EbdiffError, match="edited ticket"):
        Ticket.load(tmp_path)
