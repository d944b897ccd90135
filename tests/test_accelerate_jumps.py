"""Values that leave a block by break, continue or an exception, and additions whose operands are written to later."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from norm_patterns import Toy, counted, image
from torch import Tensor
from torch.nn import functional as F

import ebdiff


class Again(Toy):
    """Uses the norm in every turn."""

    def forward(self, x: Tensor) -> Tensor:
        scale, _ = self.rows()
        h = self.norm(x)
        for i in range(3):
            if i < 2:
                x = x + self.act(h * (1 + scale))
                continue
            x = x + 1
        return x


class EitherWay(Toy):
    def forward(self, x: Tensor) -> Tensor:
        scale, _ = self.rows()
        h = self.norm(x)
        for i in range(3):
            y = self.act(h * (1 + scale))
            if i == 1:
                break
            else:
                continue
        return y


class Behind(Toy):
    def forward(self, x: Tensor) -> Tensor:
        scale, _ = self.rows()
        h = self.norm(x)
        while True:
            y = self.act(h * (1 + scale))
            if x.dim():
                break
            else:
                continue
        return y + self.act(h)


class Suppressed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with suppress(RuntimeError):
            h = self.norm(x)
            torch.cat([x, x[:1]], 1)
            h = self.act(h)
        return h


class Caught(Toy):
    def forward(self, x: Tensor) -> Tensor:
        try:
            h = self.norm(x)
            torch.cat([x, x[:1]], 1)
            h = self.act(h)
        except RuntimeError:
            pass
        return h


class Handled(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        try:
            h = self.norm(x)
            torch.cat([x, x[:1]], 1)
            h = self.act(h)
        except RuntimeError:
            return h + 1
        return x


class AtLast(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with suppress(RuntimeError):
            try:
                h = self.norm(x)
                torch.cat([x, x[:1]], 1)
                h = self.act(h)
            finally:
                x = h + 1
        return x


@pytest.mark.parametrize("kind", [Again, EitherWay, Behind, Suppressed, Caught, Handled, AtLast])
def test_a_value_that_leaves_by_a_jump_is_still_used_more_than_once(kind: type[Toy]) -> None:
    model = kind()
    expected = model(image())
    report = ebdiff.accelerate(model, verbose=False)
    assert report.left["norm"] == "used more than once"
    assert torch.equal(model(image()), expected)


class UnderAutocast(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.norm(x)
            h = self.act(h)
        return h


def test_torchs_own_contexts_let_exceptions_through() -> None:
    assert ebdiff.accelerate(UnderAutocast(), verbose=False).fused == {"": ("norm",)}


class AddedTo(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.act(self.norm(h + self.rows()[0]))
        h += y
        return h


class Overwritten(Toy):
    def forward(self, x: Tensor) -> Tensor:
        row = self.rows()[0] * 1
        y = self.act(self.norm(self.conv(x) + row[:, :, :1]))
        row[0] = 0
        return y * row


class Activated(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.act(self.norm(h + self.rows()[0]))
        return F.relu(h, inplace=True) + y


@pytest.mark.parametrize("kind", [AddedTo, Overwritten, Activated])
def test_what_is_added_may_be_written_to_before_backward(kind: type[Toy]) -> None:
    """Addition keeps none of its operands, the operator keeps both."""
    model = kind()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(image()).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert ebdiff.accelerate(model, verbose=False).fused == {"": ("norm",)}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


class Rebound(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = h + self.rows()[0]
        h = self.act(self.norm(h))
        h += x
        return h


def test_a_name_that_holds_the_sum_by_then_is_none_of_its_operands() -> None:
    model = Rebound()
    ebdiff.accelerate(model, verbose=False)
    assert "_ebdiff_summed" in type(model).forward.__code__.co_freevars
    with counted() as norms:
        model(image())
    assert norms == []
