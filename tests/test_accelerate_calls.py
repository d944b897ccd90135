"""What an accelerated module decides by every call: whether the operator may serve, or the original runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from norm_patterns import Nested, ScaleAndShift, Toy, counted, image
from torch import Tensor

import ebdiff
from ebdiff import EbdiffError
from ebdiff.nn.replace import deferred


def test_what_does_not_fit_is_computed_as_the_original_computes_it() -> None:
    """A scale over positions, one that would widen the result, and one that is no tensor."""

    class Scaled(Toy):
        def forward(self, x: Tensor, scale: Any, shift: Any) -> Tensor:
            return self.act(self.norm(x) * (1 + scale) + shift)

    model, row = Scaled(), torch.randn(2, 6, 1, 1)
    cases: list[Any] = [
        (image(), image(), row),
        (image(), row, image()),
        (image(), 0.5, row),
        (image(), torch.randn(6, 1, 1), row),
        (image(), row.double(), row),
        (image(), row, row.double()),
    ]
    expected = [model(*case) for case in cases]
    assert ebdiff.accelerate(model, verbose=False).norms == 1
    for case, y in zip(cases, expected, strict=True):
        assert torch.equal(model(*case), y)


def test_rows_that_are_shared_by_the_batch_are_fused() -> None:
    class Shared(Toy):
        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return self.act(self.norm(x) * (1 + scale) + shift)

    model, rows = Shared(), (torch.randn(1, 6, 1, 1), torch.randn(2, 6, 1, 1))
    expected = model(image(), *rows)
    ebdiff.accelerate(model, verbose=False)
    with counted() as norms:
        torch.testing.assert_close(model(image(), *rows), expected)
    assert norms == []


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


def test_an_input_that_is_changed_behind_our_back_is_noticed() -> None:
    class Sly(Toy):
        def forward(self, x: Tensor, change: Callable[[], Any]) -> Tensor:
            h = self.norm(x)
            change()
            return self.act(h)

    model, x = Sly(), image()
    ebdiff.accelerate(model, verbose=False)
    with pytest.raises(EbdiffError, match="in place"):
        model(x, lambda: x.add_(1))
    ebdiff.restore(model)
    model(x, lambda: x.add_(1))


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
