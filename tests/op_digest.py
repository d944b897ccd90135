"""A subprocess of test_channel_mask.py: prints the instruction set in use and a digest of what all operators return."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from norm_cases import LAYOUTS, Case
from op_cases import FLOATS, keep_of, only, strided, twins, values
from torch import Tensor

from ebdiff.ops import native, timestep_loss_ops
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, masked_adamw_, scatter_back
from ebdiff.ops.timestep_loss_reference import Terms

SHAPES = [
    ((130, 97), (97, 1)),
    ((9, 6, 3, 3), (54, 1, 18, 6)),
    ((5, 80), (160, 2)),
    ((4, 7, 64), (448, 64, 1)),
    ((77,), (1,)),
]


def digest_of(offset: int) -> str:
    """Of all dtypes; the first elements lie `offset` elements behind the start of their memory."""
    digest = hashlib.sha256()
    with only("native"):
        for dtype in [*FLOATS, torch.uint8, torch.complex128]:
            tensors = [strided(shape, strides, dtype, offset) for shape, strides in SHAPES]
            for i, tensor in enumerate(tensors):
                tensor.copy_(values(tensor.shape, dtype, seed=i))
            for result in results(tensors):
                digest.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def results(tensors: Sequence[Tensor]) -> list[Tensor]:
    axes = Axes.of([{d: keep_of(t.shape[d], "some", d + 1) for d in range(min(t.dim(), 2))} for t in tensors])
    masked = twins(tensors)
    apply_mask_(masked, axes)
    small = compact(tensors, axes)
    found = [*masked, *small, *scatter_back(small, axes, tensors)]
    if tensors[0].dtype in FLOATS:
        found += [channel_sums(tensors, tensors, axes.owner, axes.dims, "absolute product")]
        p, m, v, e = (twins(tensors) for _ in range(4))
        for x in v:
            x.abs_()
        numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        masked_adamw_(p, tensors, m, v, e, axes, **numbers, ema_decay=0.9)  # type: ignore[arg-type]
        found += [*p, *m, *v, *e, *norms(tensors[0].dtype), *losses(tensors[0].dtype)]
    if tensors[0].dtype == torch.uint8:
        found += [mask_distance(tensors[0].contiguous())]
    return found


def norms(dtype: torch.dtype) -> list[Tensor]:
    """group_norm_silu and its gradients, on planes and on rows that end within a vector or are no more than a few."""
    cases = [
        Case((2, 87, 13, 9), [0, 4, 4, 51, 87], dtype=dtype, keep=[2, 50]),
        Case((2, 19, 23, 21), [0, 4, 19], dtype=dtype, first=1000.0),
    ]
    for positions in (1, 4, 10, 12, 16, 17, 24, 32, 48, 64):
        cases += [
            Case((2, 19, positions), [0, 4, 5, 19], dtype=dtype, keep=[7], mean=100.0),
            Case((2, 19, positions), [0, 4, 5, 19], dtype=dtype, only=("weight", "bias"), std=3.0),
        ]
    found = []
    for case in cases:
        for layout in ("contiguous", "channels last"):
            case.x = LAYOUTS[layout](case.x)
            found += case.results(case.ours)
    return found


def losses(dtype: torch.dtype) -> list[Tensor]:
    """noised and weighted_timestep_loss with its gradient, on samples that end within a vector."""
    x0, pred, mask = (values((3, 5, 9, 31), dtype, seed=i) for i in range(3))
    table, row, seed = values((2, 7), seed=3), torch.tensor([0, 6, 2]), torch.tensor([-4, 1 << 40])
    weight, c = values((3,), seed=4), values((3,), seed=5).abs()
    found = [timestep_loss_ops.noised(x0, None, seed, table, row)]
    for huber_c, counts in ((None, None), (c, None), (None, mask), (c, mask)):
        terms = Terms(None, x0, None, seed, table, row, weight, None, huber_c, counts, 1)
        found += timestep_loss_ops.forward(pred, terms, True)
    return found


if __name__ == "__main__":
    print(native.module().isa(), *map(digest_of, (0, 1, 3)))  # type: ignore[union-attr]
