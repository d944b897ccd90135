"""What Triton makes of the timestep loss kernels, without a GPU: no spills, 128-bit accesses, no float atomics.

As in test_group_norm_aot.py. `python tests/test_timestep_loss_aot.py` writes the table anew, after a change to them.
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
from timestep_loss_cases import Case
from triton_offline import ABOUT, ARCHITECTURES, Found, Launch, compiled, needs_tools, recorded

from ebdiff.ops import timestep_loss_cuda

TABLE = Path(__file__).with_suffix(".json")

pytestmark = [pytest.mark.slow, needs_tools]


class Variant(NamedTuple):
    """A case.

    Args:
        dtype, images, totals: dtypes of the prediction, of what its target is made of, and of the statistics.
        stack: bytes; ptxas may park two numbers there to fit twice as many programs.
    """

    case: Case
    dtype: torch.dtype
    images: torch.dtype
    totals: torch.dtype = torch.float32
    stack: int = 0

    @property
    def is_aligned(self) -> bool:
        return torch.Size(self.case.shape[1:]).numel() % 8 == 0


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CIFAR, LATENT, PIXELS = torch.Size((128, 3, 32, 32)), torch.Size((16, 4, 64, 64)), torch.Size((64, 3, 256, 256))
VARIANTS = {
    "CIFAR, a target": Variant(Case(CIFAR, source="target"), FP32, FP32),
    "CIFAR, v from a seed, bfloat16": Variant(Case(CIFAR, "v_prediction", "seed", table=True), BF16, FP32),
    "latent, epsilon, float16": Variant(Case(LATENT, "epsilon", "noise"), FP16, FP16),
    "pixels, epsilon from a seed": Variant(Case(PIXELS, "epsilon", "seed"), FP32, FP32, torch.float64),
    "pixels, v, a mask, Huber": Variant(Case(PIXELS, "v_prediction", "noise", "float", "each"), FP32, FP32),
    "pixels, flow from a seed, a mask, Huber, bfloat16": Variant(
        Case(PIXELS, "flow", "seed", "bool", "one", True), BF16, BF16, stack=8
    ),
    "pixels, x0, bfloat16": Variant(Case(PIXELS, "sample"), BF16, BF16),
    "odd sizes, v from a seed": Variant(Case(torch.Size((5, 3, 17, 13)), "v_prediction", "seed"), BF16, BF16, stack=8),
}
IMAGES = {"PRED", "TARGET", "X0", "NOISE", "GRAD", "OUT"}


def launches_of(variant: Variant) -> list[Launch]:
    """Of noised, and of a loss with its gradient, by either way, and its statistics."""
    pred, terms = variant.case.arguments(variant.dtype, "meta")
    images = {"target": terms.target, "x0": terms.x0, "noise": terms.noise}
    terms = terms._replace(**{name: x if x is None else x.to(variant.images) for name, x in images.items()})
    with recorded("timestep_loss_passes") as launches:
        if terms.x0 is not None:
            timestep_loss_cuda.noised(terms.x0, terms.noise, terms.seed, terms.table, terms.row)
        loss, per_sample, grad = timestep_loss_cuda.forward(pred, terms, True)
        timestep_loss_cuda.scale_(grad, loss)
        timestep_loss_cuda.backward(loss, pred, terms)
        buckets = torch.empty(1000, dtype=torch.int64, device="meta")
        totals = torch.empty(3, 32, dtype=variant.totals, device="meta")
        timestep_loss_cuda.add_losses_(totals, buckets, buckets[: len(pred)], per_sample)
    return launches


def everything(name: str, architecture: int) -> dict[str, tuple[Launch, Found]]:
    """{kernel: how it is launched and what it was compiled to}; the loss's kernel serves both passes."""
    found = {}
    for launch in launches_of(VARIANTS[name]):
        kernel = launch.kernel.__name__
        if kernel == "loss_kernel" and launch.constants.get("PART", ...) is None:
            kernel += ", backward"
        found[kernel] = launch, compiled(launch, architecture)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_kernels(name: str, architecture: int) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found = everything(name, architecture)
    for kernel, (launch, made) in found.items():
        assert made.stack <= VARIANTS[name].stack, f"{kernel} spills {made.stack} bytes"
        assert ".f64" not in made.ptx or launch.types.get("TOTALS") == "*fp64", kernel
        # The programs of a launch are counted; nothing is added up by chance.
        counts = ["atom.global.gpu.acq_rel.add.u32"] if kernel == "loss_kernel" else []
        assert re.findall(r"\b(?:atom|red)\.[\w.]+", made.ptx) == counts, kernel
        if VARIANTS[name].is_aligned and IMAGES & launch.types.keys():
            assert made.loads > 0, kernel
            assert made.stores > 0, kernel
        if table["triton"] == triton.__version__:
            made.check_row(table["kernels"][name][kernel][f"sm_{architecture}"])


@pytest.mark.parametrize("name", VARIANTS)
def test_launches(name: str) -> None:
    """Whatever the size: one forward, one backward, one for noise and one for statistics."""
    names = [launch.kernel.__name__ for launch in launches_of(VARIANTS[name])]
    noised = [] if VARIANTS[name].case.source == "target" else ["noised_kernel"]
    assert names == [*noised, "loss_kernel", "scale_kernel", "loss_kernel", "totals_kernel"]


def write_table() -> None:
    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name in VARIANTS:
        for architecture in ARCHITECTURES:
            for kernel, (_, made) in everything(name, architecture).items():
                kernels.setdefault(name, {}).setdefault(kernel, {})[f"sm_{architecture}"] = made.row()
                if made.stack:
                    print(name, kernel, architecture, made[:5])
    table = {"about": ABOUT, "triton": triton.__version__, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_table())
