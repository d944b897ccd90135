"""What Triton makes of the block-sparse attention kernels, without a GPU: tensor cores, no spills, 128-bit accesses.

The launcher runs on meta tensors; what it would launch is compiled for each architecture with what the JIT would have
noticed about the arguments. `python tests/test_block_sparse_attention_aot.py` writes the table anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
from triton_offline import ABOUT, ARCHITECTURES, Found, Launch, compiled, needs_tools, recorded

from ebdiff.ops import sparse_attention_cuda
from ebdiff.ops.sparse_attention_reference import Pattern

TABLE = Path(__file__).with_suffix(".json")
# Instructions of tensor cores, where the rows of a tile fill those of an architecture.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Bytes that a kernel spills on an architecture, with some versions of Triton: two numbers that ptxas parks.
SPILLS = {
    ("head_dim 64, blocks of 64, shorter last ones, keys for several heads", "dkdv_kernel", 100): 8,
    ("head_dim 88, blocks of 128", "dkdv_kernel", 80): 8,
    ("float32, head_dim 256", "dq_kernel", 80): 8,
}

pytestmark = [pytest.mark.slow, needs_tools]


class Variant(NamedTuple):
    """Attention of 8 heads, laid out as [B, S, H, D]: head_dim, tokens of a block, heads of keys, tokens."""

    width: int
    block: int
    dtype: torch.dtype = torch.bfloat16
    shared: int = 8
    tokens: int = 4096

    def pattern(self) -> Pattern:
        blocks = -(-self.tokens // self.block)
        rows = torch.empty(8 * blocks + 1, dtype=torch.int32, device="meta")
        kept = torch.empty(1, 8, blocks, blocks, dtype=torch.bool, device="meta")
        return Pattern(kept, rows, rows, rows, rows, self.block)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = {
    "head_dim 40, blocks of 64": Variant(40, 64),
    "head_dim 64, blocks of 128": Variant(64, 128),
    "head_dim 64, blocks of 64, shorter last ones, keys for several heads": Variant(64, 64, FP16, 2, 4000),
    "head_dim 64, blocks of 16": Variant(64, 16),
    "head_dim 72, blocks of 64": Variant(72, 64),
    "head_dim 88, blocks of 128": Variant(88, 128),
    "head_dim 87, blocks of 64": Variant(87, 64),
    "head_dim 128, blocks of 128": Variant(128, 128),
    "head_dim 128, blocks of 64": Variant(128, 64),
    "head_dim 256, blocks of 64": Variant(256, 64),
    "float32, head_dim 64": Variant(64, 64, FP32),
    "float32, head_dim 128": Variant(128, 64, FP32),
    "float32, head_dim 256": Variant(256, 64, FP32),
}


def launches_of(variant: Variant) -> list[Launch]:
    """Of one forward and one backward pass."""
    q, k = (
        torch.empty(2, variant.tokens, heads, variant.width, dtype=variant.dtype, device="meta").transpose(1, 2)
        for heads in (8, variant.shared)
    )
    pattern, scale = variant.pattern(), variant.width**-0.5
    with recorded("block_sparse_attention") as launches:
        o, log_sum = sparse_attention_cuda.forward(q, k, k, pattern, scale)
        sparse_attention_cuda.backward(o, q, k, k, o, log_sum, pattern, scale, [True] * 3)
    return launches


def everything(name: str, architecture: int) -> dict[str, tuple[Launch, Found]]:
    """{kernel: how it is launched and what it was compiled to}."""
    return {launch.kernel.__name__: (launch, compiled(launch, architecture)) for launch in launches_of(VARIANTS[name])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_kernels(name: str, architecture: int) -> None:
    variant, table = VARIANTS[name], json.loads(TABLE.read_text(encoding="utf-8"))
    found = everything(name, architecture)
    assert len(found) == 4
    for kernel, (launch, made) in found.items():
        assert made.stack <= SPILLS.get((name, kernel, architecture), 0), f"{kernel} spills {made.stack} bytes"
        assert ".f64" not in made.ptx, kernel
        assert ".tf32" not in made.ptx, kernel
        assert not re.search(r"\b(atom|red)\.", made.ptx), kernel
        assert made.loads > 0, kernel
        assert kernel == "delta_kernel" or made.copies > 0, kernel
        assert kernel == "delta_kernel" or made.stores > 0, kernel
        if kernel != "delta_kernel" and variant.dtype != FP32:
            rows = launch.constants["TN" if kernel == "dkdv_kernel" else "TM"]
            assert made.matrix[MATRIX[architecture] if rows >= 64 else "HMMA"] > 0, f"{kernel}: {made.matrix}"
        if table["triton"] == triton.__version__:
            made.check_row(table["kernels"][name][kernel][f"sm_{architecture}"])


def write_table() -> None:
    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name in VARIANTS:
        for architecture in ARCHITECTURES:
            for kernel, (launch, made) in everything(name, architecture).items():
                kernels.setdefault(name, {}).setdefault(kernel, {})[f"sm_{architecture}"] = made.row()
                print(name, kernel, architecture, made[:5], made.matrix, f"{launch.warps} warps", flush=True)
    table = {"about": ABOUT, "triton": triton.__version__, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_table())
