"""Arguments for the kernels of the timestep loss, and how far they may be from the specification."""

from __future__ import annotations

from math import pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebdiff.ops import timestep_loss_reference as reference
from ebdiff.ops.philox import philox, place_of_sample
from ebdiff.ops.timestep_loss_reference import PREDICTIONS, Terms

_LOW = (1 << 32) - 1


class Case(NamedTuple):
    """A prediction of [B, *].

    Args:
        kind: what is predicted, of PREDICTIONS.
        source: the target is a tensor ("target"), or made from x0 and a tensor ("noise") or numbers drawn ("seed").
        mask: "bool", "float", or "".
        huber: c is of all ("one") or of each sample ("each"), or "".
        table: weights are looked up by cells.
        last: channels last.
    """

    shape: tuple[int, ...] = (3, 4, 5, 7)
    kind: str = "epsilon"
    source: str = "noise"
    mask: str = ""
    huber: str = ""
    table: bool = False
    last: bool = False

    def arguments(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Terms]:
        """The prediction in this dtype; x0 and noise or the target in float32, as under autocast."""
        random = None if device == "meta" else torch.Generator(device).manual_seed(sum(map(ord, str(self))))

        def images() -> Tensor:
            x = torch.randn(self.shape, generator=random, device=device)
            return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else x

        samples = self.shape[0]
        each = torch.rand(samples, generator=random, device=device) + 0.1
        cells = torch.randint(20, (samples,), generator=random, device=device)
        mask = images().sigmoid() * (images() > -0.5)
        return images().to(dtype), Terms(
            target=images() if self.source == "target" else None,
            x0=images() if self.source != "target" else None,
            noise=images() if self.source == "noise" else None,
            seed=torch.tensor([-3, 5 << 33], device=device) if self.source == "seed" else None,
            table=torch.rand(2, 9, generator=random, device=device),
            row=torch.randint(9, (samples,), generator=random, device=device),
            weight=torch.rand(20, generator=random, device=device) if self.table else each * 2,
            cell=cells if self.table else None,
            huber_c={"": None, "one": each[:1], "each": each}[self.huber],
            mask={"": None, "bool": mask > 0, "float": mask}[self.mask],
            prediction=PREDICTIONS.index(self.kind),
        )


CASES = {
    "a target, squared": Case(source="target"),
    "epsilon": Case(),
    "v from a seed, channels last": Case(kind="v_prediction", source="seed", last=True, table=True),
    "x0, Huber": Case(kind="sample", huber="one"),
    "flow from a seed, a mask": Case(kind="flow", source="seed", mask="bool"),
    "v, Huber of each, a mask": Case(kind="v_prediction", mask="float", huber="each", table=True),
    "epsilon from a seed, odd": Case(shape=(5, 3, 3, 3), source="seed", huber="each"),
    "flow, five dimensions, a mask": Case(shape=(2, 3, 2, 3, 5), kind="flow", mask="float", last=True),
    "one sample": Case(shape=(1, 1, 33), kind="v_prediction", source="seed"),
    "many small ones": Case(shape=(37, 2), kind="v_prediction", table=True),
    "aligned": Case(shape=(2, 4, 8, 8), kind="v_prediction", source="seed", mask="bool", huber="one"),
}


class Looked(NamedTuple):
    """A noise profile that is its table; t are places in it."""

    table: Tensor

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.table, t

    def cells(self, t: Tensor) -> Tensor:
        return t


def exact_noise(seed: Tensor, x0: Tensor) -> Tensor:
    """float64: `PhiloxNoise.tensor_like` but for its rounding after the uniform numbers."""
    samples, count = len(x0), x0.shape[1:].numel()
    counter = torch.arange(-(-count // 4)), torch.arange(samples)[:, None], *(w.cpu() for w in words(seed[1]))
    first, second, third, fourth = (uniform(w) for w in philox(counter, [w.cpu() for w in words(seed[0])]))
    normal: list[Tensor] = []
    for radius, angle in ((first, second), (third, fourth)):
        length = (-2 * radius.clamp(min=1e-7).log()).sqrt()
        normal += [length * (2 * pi * angle).cos(), length * (2 * pi * angle).sin()]
    flat = torch.stack(normal, -1).flatten(1)[:, :count].contiguous()
    return flat.as_strided(x0.shape, (count, *place_of_sample(x0))).to(x0.device)


def words(number: Tensor) -> tuple[Tensor, Tensor]:
    return number & _LOW, number >> 32 & _LOW


def uniform(word: Tensor) -> Tensor:
    signed = word.to(torch.int32)
    return (torch.where(signed < 0, ~signed, signed).float() * 4.6566127342e-10).double()


def exact(terms: Terms) -> Terms:
    """In float64, with the noise that the seed stands for."""
    wide = (t.double() if t is not None and t.is_floating_point() else t for t in terms[:-1])
    found = Terms(*wide, terms.prediction)
    if terms.seed is None or terms.x0 is None:
        return found
    return found._replace(noise=exact_noise(terms.seed, terms.x0), seed=None)


def everything(module: Any, pred: Tensor, terms: Terms) -> dict[str, Tensor]:
    """The losses; the gradient from the forward pass; that from the backward pass, for 0.375."""
    loss, per_sample, grad = module.forward(pred, terms, True)
    assert grad is not None
    again = module.backward(torch.full_like(loss, 0.375), pred, terms)
    return {"loss": loss, "per_sample": per_sample, "grad": grad, "again": again}


def check(module: Any, pred: Tensor, terms: Terms, rounding: float = 0.0) -> dict[str, Tensor]:
    """No more than 1.2 times the specification's own error in this dtype, and what the order of additions decides.

    Args:
        rounding: of a store, relative: the interpreter cuts bfloat16 off where a GPU rounds to nearest.
    """
    truth = everything(reference, pred.double(), exact(terms))
    theirs, found = everything(reference, pred, terms), everything(module, pred, terms)
    for name, mine in found.items():
        stored = 0.0 if mine.dtype == torch.float32 else rounding
        compare(name, mine, theirs[name], truth[name], stored)
    return found


def compare(name: str, mine: Tensor, theirs: Tensor, true: Tensor, stored: float = 0.0) -> None:
    assert mine.dtype == theirs.dtype
    assert mine.stride() == theirs.stride()
    order = 4 * torch.finfo(torch.float32).eps * true.abs().max()
    allowed = 1.2 * (theirs - true).abs().max() + order + stored * true.abs()
    assert ((mine - true).abs() <= allowed).all(), f"{name}: {(mine - true).abs().max()} of {true.abs().max()}"
