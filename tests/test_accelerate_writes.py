"""While a norm waits for its SiLU nothing may change what it computes with: calls that might are found by reading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from norm_patterns import Toy, counted, image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ebdiff
from ebdiff import EbdiffError


def scribble(x: Tensor) -> Tensor:
    return x.mul_(2)


def pass_on(x: Tensor) -> Tensor:
    return scribble(x) if x.dim() > 1 else x


def adds(x: Tensor) -> Tensor:
    x += 1
    return x


def stores(x: Tensor) -> Tensor:
    x[0] = 0
    return x


def later(x: Tensor) -> Any:
    yield x.zero_()


class OwnCode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=True)


class Deep(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)

    def step(self, x: Tensor) -> Tensor:
        return 1 + self.inner(x)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forward = scribble  # type: ignore[assignment]


class Skipping(Toy):
    """The norm's input goes somewhere else before SiLU runs."""

    def __init__(self, skip: Any) -> None:
        super().__init__()
        self.skip = skip


class ByModule(Skipping):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        x = self.skip(x)
        return self.act(h) + x


class ByALoop(Skipping):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        for layer in [self.skip]:
            x = layer(x)
        return self.act(h) + x


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.SiLU())
        self.seen: Any = None

    def forward(self, t: Tensor) -> Tensor:
        self.seen = t.shape
        return self.layers(t).float()


WRITING: dict[str, Callable[[], Any]] = {
    "in place": lambda: nn.SiLU(inplace=True),
    "a container of it": lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(6, 6, 1)),
    "code of its own": OwnCode,
    "one that calls it": lambda: Deep(nn.Sequential(OwnCode())),
    "an own forward": Hidden,
    "a function": lambda: scribble,
    "a function that calls it": lambda: pass_on,
    "an addition": lambda: adds,
    "a store": lambda: stores,
    "a generator": lambda: lambda x: next(later(x)),
    "something else": lambda: partial(torch.Tensor.mul_, other=2),
    "torch's": lambda: torch.relu_,
}


@pytest.mark.parametrize("kind", [ByModule, ByALoop])
@pytest.mark.parametrize("case", WRITING)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_a_call_that_may_write_keeps_the_norm_as_it_is(context: Any, case: str, kind: type[Skipping]) -> None:
    model = kind(WRITING[case]())
    with context():
        expected = model(image())
        report = ebdiff.accelerate(model, verbose=False)
        assert report.fused == {}
        assert "may change its input in place before SiLU" in report.left["norm"]
        assert torch.equal(model(image()), expected)


class ByPlace(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        F.dropout(x, 0.5, False, True)
        return self.act(h) + F.silu(x)


class ByKeyword(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        F.relu(x, inplace=x.dim() > 1)
        return self.act(h) + x


class ByTheActivation(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        y = self.act(x)
        return y + self.act(h)


class InTheSameExpression(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.act(self.norm(x) + x.mul_(2)[:, :, :1, :1])


class InAComprehension(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        more = [part.add_(1) for part in (x,)]
        return self.act(h) + more[0]


class OfTheTimeBias(Toy):
    def forward(self, x: Tensor) -> Tensor:
        row = self.rows()[0].detach()
        h = x + row
        row.zero_()
        return self.act(self.norm(h)) + self.act(self.other(h))


class InANestedClass(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)

        class Late:
            y = x.mul_(2)

        return self.act(h) + Late.y


class InACheckpoint(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        y = checkpoint(lambda x: x.mul_(2), x, use_reentrant=False)
        return self.act(h) + y


class Renamed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        self = self.gelu
        return F.silu(h) + self(x)


WAYS = [
    ByPlace,
    ByKeyword,
    ByTheActivation,
    InTheSameExpression,
    InAComprehension,
    InANestedClass,
    InACheckpoint,
    Renamed,
]


@pytest.mark.parametrize("kind", WAYS)
def test_ways_of_writing_in_between(kind: type[Toy]) -> None:
    model = kind()
    with torch.inference_mode():
        expected = model(image())
        report = ebdiff.accelerate(model, verbose=False)
        torch.testing.assert_close(model(image()), expected)
    assert report.fused == {}, kind


def test_a_time_bias_that_is_written_to_is_added_at_once() -> None:
    model = OfTheTimeBias()
    with torch.inference_mode():
        expected = model(image())
        assert ebdiff.accelerate(model, verbose=False).norms == 2
        torch.testing.assert_close(model(image()), expected)


def exists(x: Any) -> bool:
    return x is not None


class Harmless(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = Embedding(), nn.Dropout(0.5, inplace=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x)
        if exists(t) and isinstance(t, Tensor) and t.dim() == 2:
            scale = self.embed(t).reshape(-1, 6, 1, 1)
            shift = torch.chunk(F.dropout(self.rows()[1], 0.5, False, False), 1)[0]
            h = h * (1 + scale) + shift
        return self.act(h) + self.conv(F.relu(x, inplace=False))


def test_calls_that_leave_their_input_alone_are_let_through() -> None:
    model, t = Harmless().eval(), torch.ones(2, 2)
    expected = model(image(), t)
    assert ebdiff.accelerate(model, verbose=False).fused == {"": ("norm",)}
    with counted() as norms:
        torch.testing.assert_close(model(image(), t), expected)
    assert norms == []


# What reading cannot see, the versions of tensors show ----------------------------------------------------------------


class Watched(Toy):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, row: Tensor) -> Tensor:
        h = self.norm(x + row) * (1 + scale) + shift
        y = self.conv(x)
        return self.act(h) + y


@pytest.mark.parametrize("which", range(4))
def test_a_hook_that_writes_is_noticed(which: int) -> None:
    model = Watched()
    tensors = (image(), *torch.randn(3, 2, 6, 1, 1))
    ebdiff.accelerate(model, verbose=False)

    def write(*_: Any) -> None:
        tensors[which].add_(1)

    handle = model.conv.register_forward_hook(write)
    with torch.no_grad(), pytest.raises(EbdiffError, match="in place"):
        model(*tensors)
    ebdiff.restore(model)
    with torch.no_grad():
        model(*tensors)
    ebdiff.accelerate(model, verbose=False)  # sees that there is a hook
    with torch.no_grad():
        model(*tensors)
    handle.remove()
