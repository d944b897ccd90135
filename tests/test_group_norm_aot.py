"""What Triton makes of the group normalisation kernels, without a GPU: no spills, 128-bit accesses, no float64.

The launcher runs on meta tensors; what it would launch is compiled for each architecture with what the JIT would have
noticed about the arguments. `python tests/test_group_norm_aot.py` writes the table anew, after a change to the kernels.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")

import triton
from triton_offline import ABOUT, ARCHITECTURES, Found, Launch, compiled, needs_tools, recorded

from ebdiff.ops import group_norm_cuda
from ebdiff.ops.group_norm_reference import Norm

TABLE = Path(__file__).with_suffix(".json")

pytestmark = [pytest.mark.slow, needs_tools]


class Variant(NamedTuple):
    """A norm of [n, c, hw], and whether its rows are aligned, so that loads can be 128 bits wide."""

    shape: tuple[int, int, int]
    groups: int | tuple[int, ...]
    dtype: torch.dtype
    last: bool
    everything: bool
    aligned: bool = True

    def norm(self) -> tuple[Tensor, Norm]:
        n, c, hw = self.shape
        size = (n, hw, c) if self.last else (n, c, hw)
        x = torch.empty(size, dtype=self.dtype, device="meta")
        small = [torch.empty(s, device="meta") for s in ((c,), (c,), (n, c), (n, c), (n, c))]
        keep = torch.empty(c, dtype=torch.bool, device="meta") if self.everything else None
        rest = small if self.everything else [*small[:2], None, None, None]
        ends = tuple(range(0, c + 1, c // self.groups)) if isinstance(self.groups, int) else self.groups
        return x.movedim(-1, 1) if self.last else x, Norm(*rest, keep, ends, 1e-5, True)


BF16, FP32 = torch.bfloat16, torch.float32
VARIANTS = {
    "held, NCHW": Variant((128, 128, 1024), 32, BF16, False, False),
    "held, channels last, everything": Variant((128, 128, 256), 32, BF16, True, True),
    "held, 16384 elements, channels last, everything": Variant((128, 128, 1024), 32, BF16, True, True),
    "held, 16384 elements, float32, NCHW, everything": Variant((8, 512, 1024), 32, FP32, False, True),
    "ragged 88 channels, channels last": Variant((128, 88, 256), (0, 8, 11, 24, 29, 32, 70, 88), BF16, True, False),
    "87 channels, channels last, everything": Variant((128, 87, 1024), 29, BF16, True, True, False),
    "a channel a group, one position": Variant((256, 512, 1), 512, BF16, False, True, False),
    "cached, NCHW, everything": Variant((8, 320, 4096), 32, BF16, False, True),
    "cached, channels last": Variant((8, 1280, 1024), 32, BF16, True, False),
    "two passes, NCHW": Variant((8, 128, 65536), 32, BF16, False, False),
    "two passes, channels last, everything": Variant((8, 128, 65536), 32, BF16, True, True),
    "two passes, float32, channels last, everything": Variant((8, 128, 65536), 32, FP32, True, True),
}

# Bytes that a kernel spills on an architecture with one version of Triton, and with no other that was tried.
SPILLS = {("3.9.0", "held, 16384 elements, channels last, everything", "backward_kernel", 90): 8}


def launches_of(variant: Variant) -> list[Launch]:
    """Of one forward and one backward pass."""
    x, norm = variant.norm()
    with recorded("group_norm_one_pass", "group_norm_two_pass") as launches:
        y, mean, rstd = group_norm_cuda.forward(x, norm)
        group_norm_cuda.backward(y, x, mean, rstd, norm, [True] * 6)
    return launches


def everything(name: str, architecture: int) -> dict[str, tuple[Launch, Found]]:
    """{kernel: how it is launched and what it was compiled to}."""
    launches = {launch.kernel.__name__: launch for launch in launches_of(VARIANTS[name])}
    return {kernel: (launch, compiled(launch, architecture)) for kernel, launch in launches.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_kernels(name: str, architecture: int) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    expected = table["kernels"][name]
    found = everything(name, architecture)
    for kernel, (launch, made) in found.items():
        # ptxas may park two numbers to fit twice as many programs; where rows are not aligned it does.
        parked = 0 if VARIANTS[name].aligned else 8
        allowed = SPILLS.get((triton.__version__, name, kernel, architecture), parked)
        assert made.stack <= allowed, f"{kernel} spills {made.stack} bytes"
        assert ".f64" not in made.ptx, kernel
        assert not re.search(r"\b(atom|red)\.", made.ptx), kernel
        if VARIANTS[name].aligned and "X" in launch.types:
            assert made.loads > 0, kernel
            assert made.stores > 0 or not {"Y", "DX"} & launch.types.keys(), kernel
        if table["triton"] == triton.__version__:
            made.check_row(expected[kernel][f"sm_{architecture}"])


def write_table() -> None:
    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name in VARIANTS:
        for architecture in ARCHITECTURES:
            for kernel, (launch, made) in everything(name, architecture).items():
                kernels.setdefault(name, {}).setdefault(kernel, {})[f"sm_{architecture}"] = made.row()
                if made.stack or ("X" in launch.types and not made.loads):
                    print(name, kernel, architecture, made[:5], f"{launch.warps} warps")
    table = {"about": ABOUT, "triton": triton.__version__, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_table())
