"""Which norms become one with SiLU: those that provably go to nothing else, on any path."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from norm_patterns import (
    FUSED,
    LEFT,
    BothBranches,
    Decorated,
    GroupNorm32,
    Nested,
    ScaleAndShift,
    Swish,
    TimeBiasOfANormThatStays,
    Toy,
    UsedTwice,
    counted,
    image,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ebdiff
from ebdiff import EbdiffError
from ebdiff.nn.replace import source
from ebdiff.nn.replace.deferred import dense, divided


@pytest.mark.parametrize("kind", FUSED)
def test_norms_that_go_to_silu_alone_are_fused(kind: type[Toy]) -> None:
    model = kind()
    calls = [image(), image(1)] if kind in (BothBranches, TimeBiasOfANormThatStays) else [image()]
    expected = [model(x) for x in calls]
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"": tuple(FUSED[kind])}
    assert list(report.left) == [name for name in ("norm", "other") if name not in FUSED[kind]]
    with counted() as norms:
        found = [model(x) for x in calls]
    assert len(norms) == (1 if kind is TimeBiasOfANormThatStays else 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", LEFT)
def test_norms_that_go_anywhere_else_are_left_with_a_reason(kind: type[Toy]) -> None:
    model, x = kind(), image()
    expected = model(x)
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {}
    assert type(model) is kind
    assert LEFT[kind] in report.left["norm"]
    assert torch.equal(model(x), expected)


def test_a_decorated_method_looks_like_the_original() -> None:
    model = Decorated()
    ebdiff.accelerate(model, verbose=False)
    fused = type(model).forward
    assert inspect.signature(fused) == inspect.signature(Decorated.forward)
    assert (fused.__qualname__, fused.__module__) == (Decorated.forward.__qualname__, Decorated.__module__)
    assert "_ebdiff_activated" in inspect.unwrap(fused).__code__.co_freevars


# Sequential -----------------------------------------------------------------------------------------------------------


def test_pairs_in_sequential() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    model = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(6, 6, 1), norm, nn.Dropout(0.0), nn.SiLU(), nn.GroupNorm(2, 6))
    x = image()
    expected = model(x)
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"": ("0",)}
    assert report.left == {"6": "no SiLU follows"}
    assert list(model.state_dict()) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
        "3.weight",
        "3.bias",
        "6.weight",
        "6.bias",
    ]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[:2](x), F.silu(norm(x)))
    torch.testing.assert_close(model[:1](x), norm(x))


def test_the_residual_block_of_guided_diffusion() -> None:
    """Norm and SiLU in Sequentials; scale and shift come in between, so one of them is taken apart."""

    class Rows(nn.Sequential):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            for layer in self:
                x = layer(x, rows) if isinstance(layer, Block) else layer(x)
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(GroupNorm32(2, 6), Swish(), nn.Conv2d(6, 6, 1))
            self.after = nn.Sequential(GroupNorm32(3, 6), Swish(), nn.Conv2d(6, 6, 1))

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            h = self.before[:-1](x)
            h = self.before[-1](h)
            norm, rest = self.after[0], self.after[1:]
            scale, shift = rows.chunk(2, dim=1)
            return x + rest(norm(h) * (1 + scale) + shift)

    torch.manual_seed(0)
    model = Rows(nn.Conv2d(6, 6, 1), Block())
    x, rows = image(), torch.randn(2, 12, 1, 1)
    expected = model(x, rows)
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"1.before": ("0",)}
    assert report.left == {"1.after.0": "Block.forward takes the Sequential apart behind it"}
    torch.testing.assert_close(model(x, rows), expected)


class Calls(TorchDispatchMode):
    """Counts those of an operator."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is self.operator
        return func(*args, **(kwargs or {}))


class Residual(Toy):
    factor: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = (x + self.conv(self.act(self.norm(x)))) / self.factor
        return (x + y) / 2 / self.factor


@pytest.mark.parametrize(("factor", "divisions"), [(1.0, 2), (1, 2), (2.0, 3), (True, 3), (torch.ones(()), 3)])
def test_a_sum_is_not_divided_by_one(factor: Any, divisions: int) -> None:
    model, x = Residual(), image().requires_grad_()
    ebdiff.accelerate(model, verbose=False)
    model.factor = factor  # each call looks
    with Calls(torch.ops.aten.div) as seen:
        y = model(x)
        y.sum().backward()
    assert seen.count == 2 * divisions  # forward and backward
    found, x.grad = x.grad, None
    ebdiff.restore(model)
    expected = model(x)
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    torch.testing.assert_close(found, x.grad)


class Shortcut(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(x))
        if self.training:
            x = x.contiguous()
        x = self.conv(x)
        return x + h


class SeenAgain(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(x))
        y = x.contiguous()
        x = self.conv(y)
        return x + h + y.view(x.shape)


class GoesElsewhere(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(x))
        x = x.contiguous()
        x = self.gelu(x)
        return x + h


@pytest.mark.parametrize(("kind", "copies"), [(Shortcut, 0), (SeenAgain, 1), (GoesElsewhere, 1)])
def test_what_goes_to_a_convolution_alone_may_be_channels_last(kind: type[Toy], copies: int) -> None:
    model, x = kind(), image().to(memory_format=torch.channels_last)
    expected = model(x)
    ebdiff.accelerate(model, channels_last=True, verbose=False)
    with Calls(torch.ops.aten.clone) as seen:
        y = model(x)
    assert seen.count == copies
    torch.testing.assert_close(y, expected)
    ebdiff.restore(model)
    ebdiff.accelerate(model, channels_last=False, verbose=False)
    with Calls(torch.ops.aten.clone) as seen:
        y = model(x)
    assert seen.count == 1  # its convolution is in the usual order, and so is what it returns
    assert y.stride() == expected.stride()


def test_only_a_convolution_in_channels_last_order_takes_it_as_it_is() -> None:
    class Viewing(nn.Conv2d):
        pass

    x = image().to(memory_format=torch.channels_last)
    for kind, order, taken in (
        (nn.Conv2d, torch.channels_last, True),
        (nn.Conv2d, torch.contiguous_format, False),
        (Viewing, torch.channels_last, False),
    ):
        conv = kind(6, 6, 3).to(memory_format=order)
        assert (dense(conv, x) is x) is taken
        assert torch.equal(dense(conv, x), x)
        assert dense(conv, x.transpose(2, 3)).is_contiguous()


def test_a_sum_of_integers_becomes_a_fraction_when_divided() -> None:
    one = torch.ones(2, dtype=torch.int64)
    assert divided(one, 1).dtype is torch.float32
    assert divided(3, 1) == 3.0


def test_norms_in_a_list_are_called_by_their_place() -> None:
    class Last(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)])

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norms[-1](x))

    model = Last()
    expected = model(image())
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"": ("norms.1",)}
    assert report.left["norms.0"] == "no method of Last calls it as self.norms[0](x)"
    torch.testing.assert_close(model(image()), expected)


def test_norms_in_nested_functions_are_named() -> None:
    class Inner(Toy):
        def forward(self, x: Tensor) -> Tensor:
            def run(x: Tensor) -> Tensor:
                return self.act(self.norm(x))

            return run(x)

    assert ebdiff.accelerate(Inner(), verbose=False).left["norm"] == "called in a nested scope"


OUTSIDE = nn.GroupNorm(2, 6)


def test_a_norm_of_nobodys_is_left_alone() -> None:
    class Foreign(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(OUTSIDE(x)) + self.act(self.norm(x))

    assert ebdiff.accelerate(Foreign(), verbose=False).fused == {"": ("norm",)}


# What cannot be rewritten ---------------------------------------------------------------------------------------------


def test_a_forward_without_source_is_left() -> None:
    space: dict[str, Any] = {"Toy": Toy}
    exec("class Typed(Toy):\n    def forward(self, x):\n        return self.act(self.norm(x))", space)
    report = ebdiff.accelerate(space["Typed"](), verbose=False)
    assert report.left["norm"] == "used in Typed.forward, but its source cannot be read"


def test_a_source_that_is_not_what_runs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Edited(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(x)) + 1

    real = source.getlines
    source._file.cache_clear()
    monkeypatch.setattr(source, "getlines", lambda name: [line.replace(") + 1", ") + 2") for line in real(name)])
    report = ebdiff.accelerate(Edited(), verbose=False)
    source._file.cache_clear()
    assert report.left["norm"] == "used in Edited.forward, but its source is not what runs"


def test_a_norm_with_a_forward_of_its_own_is_left() -> None:
    class Wide(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()).float()

    class Doubled(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Doubled32(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).type(x.dtype)

    class Called(nn.GroupNorm):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    for norm in (Wide(2, 6), Doubled(2, 6), Doubled32(2, 6), Called(2, 6)):
        report = ebdiff.accelerate(nn.Sequential(norm, nn.SiLU()), verbose=False)
        assert report.left == {"0": f"{type(norm).__name__} has a forward of its own"}


def test_a_model_without_group_norms_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    ebdiff.accelerate(nn.Sequential(nn.Linear(3, 3), nn.SiLU()))
    assert capsys.readouterr().out == "GroupNorm + SiLU as one operator: this model has no group norm\n"


def test_the_report_says_what_where_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    report = ebdiff.accelerate(nn.Sequential(Nested(), UsedTwice()))
    assert capsys.readouterr().out == f"{report}\n"
    assert str(report).splitlines() == [
        "GroupNorm + SiLU as one operator: 1 of 4 group norms",
        "     1 in Nested",
        "left as they were:",
        "     1 no method of Nested calls it as self.other(x): 0.other",
        "     1 used more than once: 1.norm",
        "     1 no method of UsedTwice calls it as self.other(x): 1.other",
    ]


def test_the_report_says_what_every_call_decides() -> None:
    lines = str(ebdiff.accelerate(nn.Sequential(Nested(), ScaleAndShift()), verbose=False)).splitlines()
    assert lines[3] == "     1 of them where scale and shift, if there are any, are one number per channel"


def test_only_modules_are_taken() -> None:
    with pytest.raises(EbdiffError, match=r"torch\.nn\.Module"):
        ebdiff.accelerate([nn.SiLU()])  # type: ignore[arg-type]
