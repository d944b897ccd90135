"""Ways of writing group norm and SiLU, and ways that only look like it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebdiff.nn.replace import deferred

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


def recursive(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(method)
    def run(*args: Any) -> Tensor:
        return method(*args) if args else never

    if method is None:
        never = torch.zeros(())
    return run


class DecoratedWithAnEmptyCell(Toy):
    @recursive
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


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
    Decorated: ["norm"], DecoratedWithAnEmptyCell: ["norm"], Inherited: ["norm"],
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


class counted:
    """The calls of one of torch's functions: those that no operator of ours has taken over."""

    def __init__(self, name: str = "group_norm") -> None:
        self.name, self.original = name, getattr(F, name)

    def __enter__(self) -> list[Any]:
        self.seen: list[Any] = []
        setattr(F, self.name, lambda *args, **options: (self.seen.append(args), self.original(*args, **options))[1])
        return self.seen

    def __exit__(self, *_: object) -> None:
        setattr(F, self.name, self.original)
