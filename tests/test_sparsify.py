"""Block masks in the attention layers of any model: the same function as the mask written out, and out again."""

import families
import pytest
import torch
import torch.nn.functional as F
from laws import tensors_of

from ebdiff.nn import SparseAttention, blocks_of, densify, sparsify
from ebdiff.nn.attention_calls import AttentionCall, AttentionCalls
from ebdiff.nn.sparse_attention import Attend
from ebdiff.nn.sparse_model import ALWAYS
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
