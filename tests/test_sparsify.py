"""Block masks in the attention layers of any model: the same function as the mask written out, and out again."""

import copy
import pickle

import families
import pytest
import torch
import torch.nn.functional as F
from laws import tensors_of
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from ebdiff.errors import EbdiffError
from ebdiff.nn import SparseAttention, blocks_of, densify, sparsify
from ebdiff.nn.attention_calls import AttentionCall, AttentionCalls
from ebdiff.nn.sparse_attention import Attend
from ebdiff.nn.sparse_model import ALWAYS, BreakEven
from ebdiff.ops.block_mask import BlockMask

FAMILIES = ["SD1.5 UNet", "SD3.5", "Flux", "CogVideoX-5b"]  # whose tiny versions attend to more than one block


def random_blocks(heads, q_len, k_len, seed=0, block=16):
    """Some rows of blocks empty, one head full where there are several."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(1, heads, -(-q_len // block), -(-k_len // block), generator=generator) < 0.5
    kept[:, 0, 0, 0] = True
    if heads > 1:
        kept[:, -1] = True
    return BlockMask(kept, block, q_len, k_len)


def attention_of(model, arguments):
    """{name of the module: (heads, queries, keys)} of every call of torch's attention."""
    running, found = [], {}

    def serve(call):
        found[running[-1]] = (*call.query.shape[-3:-1], call.key.shape[-2])
        return call.run()

    hooks = [m.register_forward_pre_hook(lambda _m, _a, n=n: running.append(n)) for n, m in model.named_modules()]
    hooks += [m.register_forward_hook(lambda _m, _a, _o: running.pop() and None) for m in model.modules()]
    with AttentionCalls(serve), torch.no_grad():
        model(**arguments)
    for hook in hooks:
        hook.remove()
    return found


def outputs(model, arguments):
    return list(tensors_of(model(**arguments)))


def gradients(model, arguments):
    model.zero_grad()
    sum(tensor.square().mean() for tensor in outputs(model, arguments)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_by_blocks_is_the_mask_written_out_in_every_family(family):
    model, arguments = families.build(family)
    dense, masks = outputs(model, arguments), {}
    for number, (name, sizes) in enumerate(attention_of(model, arguments).items()):
        masks[name] = random_blocks(*sizes, seed=number)
    report = sparsify(model, masks, ALWAYS)
    sparse = {name: mask for name, mask in masks.items() if mask.density < 1}
    assert sparse
    assert blocks_of(model) == sparse
    ours, our_gradients = outputs(model, arguments), gradients(model, arguments)
    assert not report.fallbacks
    sparsify(model, masks, ALWAYS, written_out=True)
    torch.testing.assert_close(ours, outputs(model, arguments), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(our_gradients, gradients(model, arguments), rtol=1e-9, atol=1e-10)
    assert max((a - b).abs().max().item() for a, b in zip(ours, dense, strict=True)) > 1e-4, "the masks do something"
    assert densify(model) == sparse
    assert all(torch.equal(a, b) for a, b in zip(dense, outputs(model, arguments), strict=True))
    assert blocks_of(model) == {}


def test_full_masks_change_nothing():
    torch.manual_seed(0)
    layer, x = SparseAttention(24, 3).double(), torch.randn(2, 70, 24, dtype=torch.float64)
    dense = layer(x)
    report = sparsify(layer, {"": BlockMask.full(3, 70, 70, 16)}, ALWAYS)
    assert report.dense == {"": "every block is kept"}
    assert torch.equal(layer(x), dense)
    q, k, v = torch.randn(3, 2, 3, 70, 8, dtype=torch.float64)
    ours = Attend(BlockMask.full(3, 70, 70, 16))(AttentionCall(q, k, v))
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_a_layer_by_blocks_is_the_layer_with_minus_infinity_elsewhere():
    blocks = random_blocks(3, 70, 41, block=32)
    layer = SparseAttention(24, 3, head_dim=5, context_dim=7, blocks=blocks).double()
    x, context = torch.randn(2, 70, 24, dtype=torch.float64), torch.randn(2, 41, 7, dtype=torch.float64)
    q, k, v = (
        to(tokens).view(2, -1, 3, 5).transpose(1, 2)
        for to, tokens in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))
    )
    scores = (q @ k.mT / 5**0.5).masked_fill(~blocks.dense(), -torch.inf)
    expected = layer.to_out((scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, context), expected, rtol=1e-10, atol=1e-12)
    assert blocks_of(layer) == {"": blocks}
    assert densify(layer) == {"": blocks}
    whole = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, context), layer.to_out(whole), rtol=1e-12, atol=1e-12)
    with pytest.raises(EbdiffError, match="a divisor of 24"):
        SparseAttention(24, 5)


MASKS = {
    "an attention mask": {"attn_mask": torch.rand(2, 1, 1, 70, generator=torch.Generator().manual_seed(0)) < 0.8},
    "added": {"attn_mask": torch.randn(70, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("kind", MASKS)
def test_other_masks_hold_besides_the_blocks_and_are_counted(kind):
    blocks, given = random_blocks(4, 70, 70), MASKS[kind]
    attend = Attend(blocks)
    q, k, v = torch.randn(3, 2, 4, 70, 8, dtype=torch.float64)
    allowed = blocks.dense().tril() if kind == "causal" else blocks.dense()
    scores = q @ k.mT / 8**0.5
    if kind == "an attention mask":
        allowed = allowed & given["attn_mask"]
    if kind == "added":
        scores = scores + given["attn_mask"]
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0) @ v
    torch.testing.assert_close(attend(AttentionCall(q, k, v, **given)), expected, rtol=1e-10, atol=1e-12)
    assert attend.fallbacks == {"causal" if kind == "causal" else "an attention mask": 1}


@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("dims", [3, 4, 5])
def test_full_heads_by_torch_and_the_others_by_blocks_for_any_batch_shape(keys, dims):
    blocks = random_blocks(4, 40, 70)
    assert blocks.kept[0, -1].all()
    lead = (2, 3)[: dims - 3]
    q = torch.randn(*lead, 4, 40, 8, dtype=torch.float64)
    k, v = torch.randn(2, *lead, keys, 70, 8, dtype=torch.float64)
    call = AttentionCall(q, k, v, scale=0.3, enable_gqa=keys < 4)
    ours, theirs = Attend(blocks)(call), Attend(blocks, written_out=True)(call)
    assert ours.shape == q.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", ["key", "value"])
def test_keys_or_values_that_samples_share_go_through_torch(shared):
    torch.manual_seed(0)
    attend, call = Attend(random_blocks(4, 70, 70)), AttentionCall(*torch.randn(3, 2, 4, 70, 8))
    call = call._replace(**{shared: getattr(call, shared)[:1]})
    whole = call._replace(**{shared: getattr(call, shared).expand(2, -1, -1, -1)})
    torch.testing.assert_close(attend(call), attend(whole))
    assert attend.fallbacks == {"keys that samples share": 1}


def test_other_sizes_and_other_heads_are_refused_by_name():
    layer = nn.Sequential(SparseAttention(24, 3))
    sparsify(layer, {"0": random_blocks(3, 70, 70)}, ALWAYS)
    with pytest.raises(
        EbdiffError, match=r"block mask of 0 does not fit.*70 queries.*got 3 heads, 64 queries.*densify"
    ):
        layer(torch.randn(2, 64, 24))
    before = blocks_of(layer)
    for wrong, problem in (
        ({"1": random_blocks(3, 70, 70)}, "unknown layer"),
        ({"0": random_blocks(4, 70, 70)}, "3 heads"),
    ):
        with pytest.raises(EbdiffError, match=problem):
            sparsify(layer, wrong, ALWAYS)
    several = BlockMask(random_blocks(3, 70, 70).kept.repeat(2, 1, 1, 1), 16, 70, 70)
    with pytest.raises(EbdiffError, match="one for all samples"):
        sparsify(layer, {"0": several}, ALWAYS)
    assert blocks_of(layer) == before


def test_where_blocks_do_not_pay_the_layer_stays_dense_and_the_report_says_why():
    layers = nn.ModuleDict({name: SparseAttention(8, 2) for name in ("short", "crowded", "good")})
    good, crowded = (BlockMask.local(2, 160, 160, 16, window) for window in (8, 80))
    masks = {"short": BlockMask.local(2, 160, 40, 16, 8), "crowded": crowded, "good": good}
    report = sparsify(layers, masks, BreakEven(100, 0.5))
    assert blocks_of(layers) == {"good": good}
    assert report.dense == {
        "short": "40 tokens: blocks pay from 100 on",
        "crowded": f"{crowded.density:.1%} of the blocks are kept: blocks pay up to 50%",
    }
    assert "good: 2 heads, 160 x 160 tokens" in str(report)
    assert "1 attention layers by blocks, 2 dense" in str(report)
    assert sparsify(layers, masks).sparse == {}, "160 tokens are few by default"
    assert blocks_of(layers) == {}


class Written(nn.Module):
    """Attention as two matrix products."""

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def test_a_forward_that_does_not_use_its_mask_raises():
    layer = Written()
    sparsify(layer, {"": random_blocks(2, 70, 70)}, ALWAYS)
    with pytest.raises(EbdiffError, match="had no effect"):
        layer(torch.randn(2, 70, 8))
    densify(layer)
    assert "forward" not in vars(layer)


class Checkpointed(nn.Module):
    """Checkpoints its own attention."""

    def forward(self, x):
        return checkpoint(lambda x: F.scaled_dot_product_attention(x, x, x), x, use_reentrant=self.training)


def test_a_layer_that_runs_its_attention_again_without_its_mask_is_refused():
    layer, x = Checkpointed(), torch.randn(2, 3, 70, 8, requires_grad=True)
    sparsify(layer, {"": random_blocks(3, 70, 70)}, ALWAYS)
    with pytest.raises(EbdiffError, match=r"checkpointing inside.*around the whole layer"):
        layer(x)
    with torch.no_grad():
        layer(x)
    outside = checkpoint(layer.eval(), x, use_reentrant=False)
    with pytest.raises(CheckpointError):
        outside.sum().backward()


def test_two_masks_of_one_layer_are_refused_before_anything_changes():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"first": layer, "again": layer})
    mask = random_blocks(2, 70, 70)
    sparsify(model, {"first": mask}, ALWAYS)
    with pytest.raises(EbdiffError, match=r"several block masks of one layer.*got first, again"):
        sparsify(model, {"first": mask, "again": mask}, ALWAYS)
    assert blocks_of(model) == {"first": mask}


def test_a_pickled_layer_keeps_its_mask():
    layer, x = nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 70, 24)
    sparsify(layer, {"": random_blocks(3, 70, 70)}, ALWAYS)
    again = pickle.loads(pickle.dumps(layer))
    assert blocks_of(again) == blocks_of(layer)
    assert torch.equal(*(each(x, x, x, need_weights=False)[0] for each in (again, layer)))


@pytest.mark.parametrize("head", [False, True], ids=["all by blocks", "one head full"])
def test_without_samples_without_error(head):
    kept = random_blocks(3, 70, 70).kept
    x = torch.randn(0, 3, 70, 8)
    assert Attend(BlockMask(kept & (torch.arange(3) < 2 + head)[:, None, None], 16, 70, 70))(
        AttentionCall(x, x, x[..., :5])
    ).shape == (0, 3, 70, 5)


def test_a_forward_of_the_modules_own_comes_back():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    mine = layer.forward
    sparsify(layer, {"": random_blocks(2, 70, 70)}, ALWAYS)
    assert layer.forward is not mine
    densify(layer)
    assert layer.forward is mine


@pytest.mark.parametrize("train", [True, False])
def test_torchs_own_encoder_layer_uses_the_mask_also_without_gradients(train):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 16, dropout=0.0, batch_first=True).train(train)
    x = torch.randn(2, 70, 24)
    with torch.set_grad_enabled(train):
        dense = layer(x)
        mask = {"self_attn": random_blocks(3, 70, 70)}
        sparsify(layer, mask, ALWAYS)
        ours = layer(x)
        sparsify(layer, mask, ALWAYS, written_out=True)
        torch.testing.assert_close(ours, layer(x))
        assert (ours - dense).abs().max() > 1e-3
        densify(layer)
        assert torch.equal(layer(x), dense)


@pytest.mark.parametrize("family", ["SD1.5 UNet", "Flux"])
def test_copies_and_checkpointing_keep_the_masks(family):
    model, arguments = families.build(family, torch.float32)
    sizes = attention_of(model, arguments)
    sparsify(model, {name: random_blocks(*each, seed=1) for name, each in sizes.items()}, ALWAYS)
    expected = gradients(model, arguments)
    twin = copy.deepcopy(model)
    masks = densify(model)
    assert blocks_of(twin) == masks, "the copy has its own"
    for name, gradient in gradients(twin, arguments).items():
        assert torch.equal(gradient, expected[name])
    twin.train()
    twin.enable_gradient_checkpointing()
    for name, gradient in gradients(twin, arguments).items():
        torch.testing.assert_close(gradient, expected[name])


class Fused(nn.Module):
    """Somebody's attention, with one projection for all."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Torchs(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiles(fullgraph):
    torch.manual_seed(0)
    first = SparseAttention(24, 3) if fullgraph else Torchs(24, 3, batch_first=True)
    model, x = nn.Sequential(first, Fused()), torch.randn(2, 70, 24)
    sparsify(model, {"0": random_blocks(3, 70, 70), "1": random_blocks(3, 70, 70, seed=1)}, ALWAYS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
