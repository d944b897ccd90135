"""A subprocess of test_channel_mask_ops.py: calls the operators with valid and invalid arguments, mixed at random.

Every call has to raise a Python exception and leave all tensors as they were, or to do what the reference does.
Usage: fuzz_ops.py SEED CALLS
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from op_cases import FLOATS, OPS, only, same, twin, values
from torch import Tensor

from ebdiff import EbdiffError

REFUSALS = (EbdiffError, RuntimeError, NotImplementedError, ArithmeticError, ValueError)
DTYPES = [*FLOATS, *FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64]
KINDS = ["square", "absolute", "product", "absolute product"]
HYPER = [0.0, 1.0, -1.0, 2.0, 1e-8, 1e300, -1e300, float("inf"), float("nan")]


class Maker:
    """Arguments at random; one in `wrong` is corrupted."""

    def __init__(self, seed: int, wrong: float) -> None:
        self.chance = random.Random(seed)
        self.wrong = wrong

    def corrupt(self) -> bool:
        return self.chance.random() < self.wrong

    def shape(self) -> list[int]:
        if self.chance.random() < 0.01:
            return [self.chance.choice([130, 700]), 500]
        dims = self.chance.choice([0, 1, 2, 2, 3, 3, 4, 4, 5, 9])
        return [self.chance.choice([0, 1, 1, 2, 3, 4, 5, 8, 70][: 9 if dims < 4 else 6]) for _ in range(dims)]

    def tensor(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Dense or with gaps, its dimensions in any order in memory."""
        order = self.chance.sample(range(len(shape)), len(shape))
        strides, step = [0] * len(shape), self.chance.choice([1, 1, 1, 2])
        for d in order:
            strides[d] = step
            step = step * max(shape[d], 1) + self.chance.choice([0, 0, 0, 3])
        offset = self.chance.choice([0, 0, 1])
        memory = values([step + offset + 4], dtype, seed=self.chance.randrange(1 << 30))
        if dtype.is_floating_point and self.chance.random() < 0.1:
            memory[:: self.chance.choice([2, 5])] = self.chance.choice([float("nan"), float("inf"), -0.0])
        x = memory.as_strided(shape, strides, offset)
        return self.odd(x) if self.corrupt() else x

    def odd(self, x: Tensor) -> Tensor:
        """What few people pass."""
        ways: list[Any] = [
            lambda: x.to("meta"),
            lambda: x.to_sparse(),
            lambda: x.new_ones([1] * x.dim()).expand(x.shape),
            lambda: x.new_ones(sum(x.shape) + 1).as_strided(x.shape, [1] * x.dim()),
            lambda: torch._neg_view(x) if x.dtype not in (torch.bool, torch.uint8) else x,
            lambda: x.conj(),
            lambda: x.requires_grad_() if x.dtype.is_floating_point else x,
            lambda: x.to(self.chance.choice(DTYPES)),
            lambda: x[None],
            lambda: x[..., :1],
        ]
        return self.chance.choice(ways)() if x.dim() else x

    def tensors(self, dtypes: list[torch.dtype]) -> list[Tensor]:
        found = [
            self.tensor(self.shape(), self.chance.choice(dtypes)) for _ in range(self.chance.choice([1, 1, 2, 4, 9]))
        ]
        if self.corrupt():
            found = self.chance.choice(
                [[], [*found, found[0]], [*found, found[0][1:] if is_plain(found[0]) and found[0].dim() else found[0]]]
            )
        return found

    def masks(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[int], list[int]]:
        keep, owner, dims = [], [], []
        for i, x in enumerate(tensors):
            for d in self.chance.sample(range(x.dim()), min(x.dim(), self.chance.choice([0, 1, 1, 2, 3]))):
                flags = [self.chance.random() < self.chance.choice([0.2, 0.7, 1.0]) for _ in range(x.shape[d])]
                keep.append(torch.tensor(flags, dtype=torch.bool))
                owner.append(i)
                dims.append(d)
        if keep and self.corrupt():
            k = self.chance.randrange(len(keep))
            keep[k] = self.chance.choice(
                [keep[k][1:], keep[k].float(), keep[k][None], keep[k].to("meta"), keep[k].repeat(2)[::2]]
            )
        for numbers in (owner, dims):
            if numbers and self.corrupt():
                numbers[self.chance.randrange(len(numbers))] += self.chance.choice(
                    [-1, 1, -9, 1 << 31, 1 << 40, -(1 << 62)]
                )
        if keep and self.corrupt():
            self.chance.choice([keep, owner, dims]).pop()
        return keep, owner, dims

    def like(self, x: Tensor) -> Tensor:
        """Another tensor of this shape and dtype, mostly in the same layout."""
        if x.device.type == "meta" or x.layout is not torch.strided or self.chance.random() < 0.1:
            return self.tensor(list(x.shape), x.dtype)
        fresh = twin(x.detach())
        return self.odd(fresh) if self.corrupt() else fresh

    def small(self, tensors: list[Tensor], keep: list[Tensor], owner: list[int], dims: list[int]) -> list[Tensor]:
        shapes = [list(x.shape) for x in tensors]
        for kept, i, d in zip(keep, owner, dims, strict=False):
            if 0 <= i < len(shapes) and 0 <= d < len(shapes[i]) and kept.device.type == "cpu":
                shapes[i][d] = int(kept.sum())
        found = [self.tensor(shape, x.dtype) for shape, x in zip(shapes, tensors, strict=True)]
        if found and self.corrupt():
            found[-1] = self.chance.choice([tensors[0], found[0], found[-1][:1] if found[-1].dim() else found[-1]])
        return found

    def hyper(self, usual: float) -> float:
        return self.chance.choice(HYPER) if self.corrupt() else usual

    def arguments(self, op: str) -> list[Any]:
        if op == "mask_distance":
            rows, width = self.chance.choice([0, 1, 3, 50]), self.chance.choice([0, 1, 7, 8, 33, 2000])
            bits = values([rows, width], torch.uint8, seed=self.chance.randrange(99))
            return [self.odd(bits) if self.corrupt() else bits, self.chance.randrange(-1, rows + 1)]
        tensors = self.tensors(FLOATS if op in ("masked_adamw_", "channel_sums") and not self.corrupt() else DTYPES)
        keep, owner, dims = self.masks(tensors)
        if op == "apply_mask_":
            return [tensors, keep, owner, dims]
        if op == "compact":
            kept = [int(k.sum()) if k.device.type == "cpu" else 1 for k in keep]
            if kept and self.corrupt():
                kept[-1] += self.chance.choice([1, -1, -99, 1 << 50])
            return [tensors, keep, owner, dims, kept]
        if op == "scatter_back_":
            return [tensors, self.small(tensors, keep, owner, dims), keep, owner, dims]
        if op == "channel_sums":
            kind = "cube" if self.corrupt() else self.chance.choice(KINDS)
            return [tensors, [self.like(x) for x in tensors] if "product" in kind else [], owner, dims, kind]
        lists = [tensors, *([self.like(x) for x in tensors] for _ in range(4))]
        if self.chance.random() < 0.3:
            lists[4] = []
        if self.corrupt() and all(lists):
            self.chance.choice(lists)[-1] = self.chance.choice(self.chance.choice(lists))
        usual = [self.hyper(x) for x in (0.01, 0.9, 0.99, 1e-8, 0.1)]
        step = (
            self.chance.choice([0, -3, 1 << 40, (1 << 63) - 1]) if self.corrupt() else self.chance.choice([1, 2, 900])
        )
        return [*lists, keep, owner, dims, *usual, step, self.hyper(0.5), self.chance.random() < 0.5]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from tensors_in(part)


def copied(value: Any, memory: dict[int, torch.UntypedStorage]) -> Any:
    """The same arguments in other memory; what shared some does so again."""
    if isinstance(value, list):
        return [copied(part, memory) for part in value]
    if not is_plain(value):
        return value
    storage = value.untyped_storage()
    if storage._cdata not in memory:
        memory[storage._cdata] = storage.clone()
    plain = torch.empty(0, dtype=value.dtype).set_(
        memory[storage._cdata], value.storage_offset(), value.shape, value.stride()
    )
    plain = torch._neg_view(plain) if value.is_neg() else plain.conj() if value.is_conj() else plain
    return plain.requires_grad_(value.requires_grad)


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout is torch.strided


def bytes_of(arguments: list[Any]) -> list[bytes]:
    plain = [x.detach() for x in tensors_in(arguments) if is_plain(x)]
    return [bytes(torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()) for x in plain]


def outcome(op: str, arguments: list[Any], server: str) -> tuple[str, list[Tensor]]:
    """("", results) or (what was raised, [])."""
    before = bytes_of(arguments)
    try:
        if server == "reference":
            with only("reference"):
                result = getattr(torch.ops.ebdiff, op)(*arguments)
        else:
            result = getattr(torch.ops.ebdiff, op)(*arguments)
    except REFUSALS as error:
        refused = f"{type(error).__name__}: {error}"
    else:
        return "", list(tensors_in(result if isinstance(result, list) else [result]))
    assert bytes_of(arguments) == before, f"{op} ({server}), refused, has changed something: {refused}"
    return refused, []


def close(a: Tensor, b: Tensor, op: str, arguments: list[Any]) -> bool:
    """The same bits; but sums, and what the reference's square root moves in float64, to rounding."""
    if a.device.type == "meta" or a.layout is not torch.strided:
        return True
    a, b = a.detach().resolve_neg().resolve_conj(), b.detach().resolve_neg().resolve_conj()
    if op == "channel_sums" and a.dtype == torch.float64:
        return torch.allclose(a, b, rtol=1e-4, atol=1e-2, equal_nan=True)
    if op == "masked_adamw_" and a.dtype == torch.float64:
        tame = all(isinstance(x, int) or 0 < x < 2 for x in arguments[8:15])
        return not tame or torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    return same(a, b)


def main(seed: int, calls: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    counts = {op: [0, 0] for op in OPS}
    for call in range(calls):
        maker = Maker(seed * 1_000_003 + call, wrong=(0.0, 0.02, 0.15)[call % 3])
        op = maker.chance.choice(OPS)
        arguments = maker.arguments(op)
        twins = copied(arguments, {})
        error, results = outcome(op, arguments, "native")
        expected_error, expected = outcome(op, twins, "reference")
        assert bool(error) == bool(expected_error), f"{call} {op}: {error!r}, by the reference {expected_error!r}"
        counts[op][bool(error)] += 1
        if not error:
            pairs = zip([*tensors_in(arguments), *results], [*tensors_in(twins), *expected], strict=True)
            for a, b in pairs:
                assert close(a, b, op, arguments), f"{call} {op}: {a} is not the reference's {b}"
    print(counts)
    assert all(min(count) for count in counts.values()), "both accepted and refused, of every operator"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
