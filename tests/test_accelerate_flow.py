"""Which norms become one with SiLU: those that provably go to nothing else, on any path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ebdiff
from ebdiff import EbdiffError
from ebdiff.nn.replace import deferred, source

deferred.served.add("cpu")  # by the specification, where nothing has been compiled


class Toy(nn.Module):
    """What the forwards below use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.other = nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)
        self.act, self.gelu, self.conv = nn.SiLU(), nn.GELU(), nn.Conv2d(6, 6, 1)
        self.scales = nn.Linear(2, 12)
        for norm in (self.norm, self.other):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, [2, 6, 1, 1] each."""
        t = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
        return self.scales(t)[:, :, None, None].chunk(2, 1)


class Nested(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.norm(x)))


class Functional(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class InSteps(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = h
        h = self.conv(x)
        return self.act(y) + h


class ScaleAndShift(Toy):
    def forward(self, x: Tensor, condition: bool = True) -> Tensor:
        h = self.norm(x)
        if condition:
            scale, shift = self.rows()
            h = h * (1 + scale) + shift
        return torch.nn.functional.silu(h)


class ScaleInFront(Toy):
    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.rows()
        return self.act(shift + (scale + 1.0) * self.norm(x))


class TimeBias(Toy):
    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.conv(x)
        if t is None:
            h = h + self.rows()[0]
        h = self.norm(h)
        return self.act(h)


class TimeBiasOfANormThatStays(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x) + self.rows()[0]
        if x.shape[0] > 1:
            return self.other(h)
        return self.act(self.norm(h))


class InALoop(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.conv(self.act(self.norm(x)))
        return x


class BothBranches(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) if x.shape[0] > 1 else self.other(x)
        return self.act(h)


class OtherMethod(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        """Called by forward."""
        return self.act(self.norm(x))


def doubled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(method)
    def both(*args: Any) -> Tensor:
        return 2 * method(*args)

    return both


class Decorated(Toy):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + super().rows()[0]


class Inherited(Nested):
    pass


def nonlinearity(x: Tensor) -> Tensor:
    # swish
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """As torch's, before there was one."""
        return F.sigmoid(x) * x


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class WrittenOut(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return nonlinearity(self.norm(x))


class WrittenOutAsModules(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.norm = Swish(), GroupNorm32(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


FUSED = {
    WrittenOut: ["norm"], WrittenOutAsModules: ["norm"],
    Nested: ["norm"], Functional: ["norm"], InSteps: ["norm"], ScaleAndShift: ["norm"], ScaleInFront: ["norm"],
    TimeBias: ["norm"], TimeBiasOfANormThatStays: ["norm"],
    InALoop: ["norm"], BothBranches: ["norm", "other"], OtherMethod: ["norm"],
    Decorated: ["norm"], Inherited: ["norm"],
}  # fmt: skip


class UsedTwice(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.act(h) + h


class PerhapsTwice(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = x if x.shape[0] > 1 else self.act(h)
        return y + self.act(h)


class Returned(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if x.shape[0] > 5:
            return h
        return self.act(h)


class OtherActivation(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.gelu(self.norm(x))


class OtherFactor(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x) * self.rows()[0])


def almost(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.7 * x)


class AlmostSiLU(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return almost(self.norm(x))


class Shadowed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        nonlinearity = self.gelu
        return nonlinearity(self.norm(x))


class ChangedInPlace(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        x += 1
        return self.act(h) + x


class ChangedByAMethod(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        x.mul_(2)
        return self.act(h) + x


class ThroughAnother(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.act(h.clone())


class OutOfAContext(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.norm(x)
        return self.act(h)


class InAClosure(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)

        def late() -> Tensor:
            return h

        return self.act(h) + late()


class InAList(Toy):
    def forward(self, x: Tensor) -> Tensor:
        kept = [self.norm(x)]
        return self.act(kept[0])


class FromALoopBefore(Toy):
    def forward(self, x: Tensor) -> Tensor:
        h = seen = x
        for _ in range(2):
            seen = seen + h
            h = self.norm(x)
        return self.act(h) + seen


LEFT = {
    UsedTwice: "used more than once", PerhapsTwice: "used more than once",
    Returned: "returned", OtherActivation: "goes to self.gelu",
    AlmostSiLU: "goes to almost(...)", OtherFactor: "other than 1 + scale",
    Shadowed: "goes to nonlinearity(...)", ChangedInPlace: "in place", ChangedByAMethod: "in place",
    ThroughAnother: "other than SiLU", OutOfAContext: "with statement", InAClosure: "nested",
    InAList: "", FromALoopBefore: "",
}  # fmt: skip


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 5, 5, generator=torch.Generator().manual_seed(1))


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


class counted:
    """The modules whose own forward torch's group_norm ran in."""

    def __enter__(self) -> list[Any]:
        self.seen: list[Any] = []
        self.original = F.group_norm
        F.group_norm = lambda *args: (self.seen.append(args), self.original(*args))[1]
        return self.seen

    def __exit__(self, *_: object) -> None:
        F.group_norm = self.original


def test_a_decorated_method_looks_like_the_original() -> None:
    model = Decorated()
    ebdiff.accelerate(model, verbose=False)
    fused = type(model).forward
    assert inspect.signature(fused) == inspect.signature(Decorated.forward)
    assert (fused.__qualname__, fused.__module__) == (Decorated.forward.__qualname__, __name__)
    assert "_ebdiff_activated" in inspect.unwrap(fused).__code__.co_freevars


# What is decided by every call ----------------------------------------------------------------------------------------


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


# What cannot be rewritten ---------------------------------------------------------------------------------------------


def test_a_forward_without_source_is_left() -> None:
    space: dict[str, Any] = {"Toy": Toy}
    exec("class Typed(Toy):\n    def forward(self, x):\n        return self.act(self.norm(x))", space)
    report = ebdiff.accelerate(space["Typed"](), verbose=False)
    assert report.left["norm"] == "called in Typed.forward, but its source cannot be read"


def test_a_source_that_is_not_what_runs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Edited(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(x)) + 1

    real = source.getlines
    source._file.cache_clear()
    monkeypatch.setattr(source, "getlines", lambda name: [line.replace(") + 1", ") + 2") for line in real(name)])
    report = ebdiff.accelerate(Edited(), verbose=False)
    source._file.cache_clear()
    assert report.left["norm"] == "called in Edited.forward, but its source is not what runs"


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

    for norm in (Wide(2, 6), Doubled(2, 6), Doubled32(2, 6)):
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
        "     1 not called by Nested as self.other(x): 0.other",
        "     1 used more than once: 1.norm",
        "     1 not called by UsedTwice as self.other(x): 1.other",
    ]


def test_only_modules_are_taken() -> None:
    with pytest.raises(EbdiffError, match=r"torch\.nn\.Module"):
        ebdiff.accelerate([nn.SiLU()])  # type: ignore[arg-type]
