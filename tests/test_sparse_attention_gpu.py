"""sparse_attention on a GPU, by the Triton kernels: torch's attention, the same bits, CUDA graphs, long sequences.

Never run on a GPU so far; the same kernels are interpreted in test_block_sparse_attention_triton.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from attention_cases import NAMES, Case, Tensors, errs_no_more, torchs, truth_of
from kernels_only import only_kernels_of
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops import BlockMask, sparse_attention

operator = importlib.import_module("ebdiff.ops.sparse_attention_ops")
pytestmark = pytest.mark.gpu

LARGE: dict[str, Any] = {"samples": 1, "density": 0.3}
CASES = {
    "blocks of 16": Case((200, 300), 40, block=16),
    "blocks of 64": Case((1000, 900), 64, block=64, heads=(4, 4), **LARGE),
    "blocks of 128": Case((1000, 900), 64, block=128, heads=(4, 4), **LARGE),
    "head_dim 72": Case((500, 500), 72, block=128, **LARGE),
    "head_dim 88": Case((500, 500), 88, block=64, **LARGE),
    "head_dim 128": Case((500, 500), 128, block=128, **LARGE),
    "head_dim 256": Case((300, 300), 256, block=64, **LARGE),
    "odd head_dim": Case((300, 200), 87, block=64),
    "other values": Case((300, 200), (24, 72), block=64),
    "a mask for each sample, keys for several heads": Case((300, 200), 64, heads=(6, 2), block=64, per_sample=True),
    "everything kept": Case((700, 500), 64, block=128, samples=1, density=1.0),
    "thirds of wider tensors": Case((300, 200), 40, block=64, laid="fused"),
    "huge scores": Case((1000, 900), 64, block=64, heads=(4, 4), size=30.0, **LARGE),
}
# Every dtype of every case would take minutes to compile.
OTHERS = [("blocks of 64", torch.float32), ("head_dim 128", torch.float32), ("head_dim 88", torch.float16)]


only_kernels = only_kernels_of(operator)


def by_the_operators(case: Tensors) -> dict[str, Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in case[:3]]
    o = sparse_attention(*inputs, case.mask, case.scale)
    return dict(zip(NAMES, (o, *torch.autograd.grad(o, inputs, case.do)), strict=True))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in CASES), *OTHERS], ids=str)
def test_it_errs_no_more_than_torch_with_a_dense_mask(name: str, dtype: torch.dtype) -> None:
    case = CASES[name].tensors(dtype, "cuda")
    errs_no_more(by_the_operators(case), torchs(case), truth_of(case))


@pytest.mark.parametrize("name", ["blocks of 128", "a mask for each sample, keys for several heads"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    case = CASES[name].tensors(torch.bfloat16, "cuda")
    first = by_the_operators(case)
    for _ in range(5):
        again = by_the_operators(case)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_tokens_without_partners_get_zeros_and_change_no_bit() -> None:
    case = CASES["blocks of 64"].tensors(torch.bfloat16, "cuda")
    dense = case.mask.dense()
    alone, unasked = (~dense.any(dim)[..., None] for dim in (-1, -2))
    clean = by_the_operators(case)
    for name, places in {"o": alone, "dq": alone, "dk": unasked, "dv": unasked}.items():
        assert not clean[name][places.expand_as(clean[name])].any(), name
    q, do = (torch.where(alone, torch.nan, t) for t in (case.q, case.do))
    k, v = (torch.where(unasked, torch.nan, t) for t in (case.k, case.v))
    dirty = by_the_operators(Tensors(q, k, v, do, *case[4:]))
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_replayed_from_a_cuda_graph() -> None:
    case = CASES["blocks of 128"].tensors(torch.bfloat16, "cuda")
    by_the_operators(case)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        by_the_operators(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = by_the_operators(case)
    case.q.mul_(0.5)
    graph.replay()
    expected = by_the_operators(case)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_compiled_without_graph_breaks() -> None:
    case = CASES["blocks of 64"].tensors(torch.bfloat16, "cuda")
    torch._dynamo.reset()
    call = torch.compile(lambda q, k, v: sparse_attention(q * 2, k, v, case.mask), fullgraph=True)
    torch.testing.assert_close(call(*case[:3]), sparse_attention(case.q * 2, case.k, case.v, case.mask))


def test_autocast() -> None:
    case = CASES["blocks of 64"].tensors(torch.float32, "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert sparse_attention(*case[:3], case.mask).dtype == torch.bfloat16


def test_past_two_to_the_31_elements() -> None:
    """The last sample is what it is alone."""
    b, heads, length, width = 2, 8, 1 << 20, 136
    if torch.cuda.mem_get_info()[0] < 5 * 2 * b * heads * length * width:
        pytest.skip("too little memory")
    x = torch.empty((b, length, heads, width), dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    kept = torch.eye(length // 128, dtype=torch.bool, device="cuda").expand(1, heads, -1, -1)
    mask = BlockMask(kept, 128, length, length)
    o = sparse_attention(x, x, x, mask)
    last = x[-1:, -1:, -128:]
    torch.testing.assert_close(
        o[-1:, -1:, -128:], F.scaled_dot_product_attention(last, last, last), rtol=0.02, atol=0.02
    )
