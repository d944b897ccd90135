"""What an accelerated module decides by every call: whether the operator may serve, or the original runs."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import permutations
from typing import Any

import pytest
import torch
from norm_patterns import Nested, ScaleAndShift, Toy, counted, image
from torch import Tensor, nn

import ebdiff
from ebdiff.nn.group_norm import RaggedGroupNorm
from ebdiff.nn.replace import deferred


def test_what_does_not_fit_is_computed_as_the_original_computes_it() -> None:
    """A scale over positions, and one that would widen the result."""

    class Scaled(Toy):
        def forward(self, x: Tensor, scale: Any, shift: Any) -> Tensor:
            return self.act(self.norm(x) * (1 + scale) + shift)

    model, row = Scaled(), torch.randn(2, 6, 1, 1)
    cases: list[Any] = [
        (image(), image(), row),
        (image(), row, image()),
        (image(), row, image()[:1, :1]),
        (image(), row, torch.ones(1, 1, 1, 1, 1)),
        (image(), row.double(), row),
        (image(), row, row.double()),
    ]
    expected = [model(*case) for case in cases]
    assert ebdiff.accelerate(model, verbose=False).norms == 1
    for case, y in zip(cases, expected, strict=True):
        assert torch.equal(model(*case), y)


@pytest.mark.parametrize(("norm", "side", "fused"), [("torch", 15, False), ("torch", 16, True), ("ragged", 3, True)])
def test_with_few_positions_a_norm_of_torch_s_runs_as_it_was_on_the_cpu(
    norm: str, side: int, fused: bool, fewest_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "_FEWEST", fewest_positions)
    kinds = {"torch": nn.GroupNorm(2, 6), "ragged": RaggedGroupNorm([2, 4])}
    model, x = nn.Sequential(kinds[norm], nn.SiLU()), image().repeat(1, 1, 4, 4)[:, :, :side, :side]
    expected = model(x)
    ebdiff.accelerate(model, verbose=False)
    with counted("silu") as alone:
        torch.testing.assert_close(model(x), expected)
    assert len(alone) == (not fused)


ROWS: list[Any] = [torch.randn(1, 6, 1, 1), torch.randn(6, 1, 1), torch.randn(2, 1, 1, 1), torch.randn(()), 0.5, 1]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(tuple(getattr(row, "shape", [row]))))
def test_whatever_is_the_same_at_all_positions_is_fused(row: Any) -> None:
    class Both(Toy):
        def forward(self, x: Tensor, scale: Any, shift: Any) -> Tensor:
            return self.act(self.norm(x) * (1 + scale) + shift)

    model, full = Both(), torch.randn(2, 6, 1, 1)
    for rows in ((row, full), (full, row), (row, row)):
        ebdiff.restore(model)
        expected = model(image(), *rows)
        assert ebdiff.accelerate(model, verbose=False).modulated == 1
        with counted() as norms:
            torch.testing.assert_close(model(image(), *rows), expected)
        assert norms == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_scales_and_shifts_in_any_order(dtype: torch.dtype) -> None:
    class Many(Toy):
        def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return self.act(((self.norm(x) + a) * (1 + b) * (1 + c) + 1.5 + b) * (1 + a))

    rows = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 6, 1, 1), (6, 1, 1), (1, 1, 1, 1))]
    model = Many().to(dtype)

    def run(dtype: torch.dtype) -> list[Tensor]:
        y = model.to(dtype)(image().to(dtype), *(row.to(dtype) for row in rows))
        found = [y, *torch.autograd.grad(y.square().sum(), [*rows, model.norm.weight])]
        model.to(rows[0].dtype)
        return found

    truth, theirs = run(torch.float64), run(dtype)
    ebdiff.accelerate(model, verbose=False)
    with counted() as norms:
        ours = run(dtype)
    assert norms == []
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert (mine - true).norm() <= 1.2 * (other - true).norm() + torch.finfo(dtype).eps * true.norm()


def test_another_callable_in_the_place_of_a_norm() -> None:
    model = Nested()
    ebdiff.accelerate(model, verbose=False)
    del model.norm
    for norm in (lambda x: 2 * x, torch.abs, nn.Identity().forward):
        model.norm = norm
        assert torch.equal(model(image()), model.conv(model.act(norm(image()))))


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_the_result_lies_in_memory_as_the_originals(order: tuple[int, ...]) -> None:
    """What comes next may be a view of it."""
    model = nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU())
    places = [order.index(i) for i in range(4)]
    given = [torch.randn([shape[i] for i in order]).permute(places) for shape in ((2, 6, 5, 4), (1, 6, 1, 4))]
    given += [given[0][:, :, 1:], given[0][..., 0], given[0][..., :2, None].expand(-1, -1, -1, -1, 3)]
    expected = [model(x) for x in given]
    ebdiff.accelerate(model, verbose=False)
    for x, y in zip(given, expected, strict=True):
        found = model(x)
        torch.testing.assert_close(found, y)
        assert [s for s, n in zip(found.stride(), x.shape, strict=True) if n > 1] == [
            s for s, n in zip(y.stride(), x.shape, strict=True) if n > 1
        ]


@pytest.mark.parametrize("hooked", ["norm", "act"])
def test_hooks_go_on_working(hooked: str) -> None:
    model, seen = Nested(), []
    expected = model(image())
    ebdiff.accelerate(model, verbose=False)
    handle = getattr(model, hooked).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    model.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(model(image()), expected + 1)
    normed = model.norm(image()) if hooked == "act" else seen[0][1]
    assert torch.equal(seen[0][0 if hooked == "act" else 1], normed)
    handle.remove()
    with counted() as norms:
        model(image())
    assert norms == []


def test_global_hooks_see_every_module() -> None:
    model, seen = Nested(), []
    ebdiff.accelerate(model, verbose=False)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module)):
        model(image())
    assert seen == [model.norm, model.act, model.conv, model]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, nullcontext])
def test_with_and_without_gradients(context: Any) -> None:
    model = ScaleAndShift()
    with context():
        expected = model(image())
        ebdiff.accelerate(model, verbose=False)
        torch.testing.assert_close(model(image()), expected)


def test_without_a_kernel_the_original_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Nested()
    monkeypatch.setattr(deferred, "served", set())
    monkeypatch.setattr(deferred.native, "module", lambda: None)
    expected = model(image())
    report = ebdiff.accelerate(model, verbose=False)
    assert "kernels: none on cpu: norms run there as they were" in str(report).splitlines()
    assert torch.equal(model(image()), expected)
