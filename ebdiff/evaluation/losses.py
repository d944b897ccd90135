"""Held-out loss per timestep bin: needs no extractor and no sampling, and shows where in time a model is good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..data import to_model
from ..errors import EbdiffError

__all__ = ["LossProfile", "loss_per_bin"]


@dataclass(frozen=True)
class LossProfile:
    """Mean squared error of the predicted noise, per bin of timesteps. `dataclasses.asdict` of it is JSON.

    Args:
        edges: bins + 1 ascending timesteps; bin i is the half-open [edges[i], edges[i + 1]).
        mean: bins numbers; 0 is a perfect prediction, 1 that of always predicting no noise.
        n: images per bin.
    """

    edges: tuple[int, ...]
    mean: tuple[float, ...]
    n: int

    @property
    def total(self) -> float:
        """The mean over all timesteps: the bins weighted by their widths."""
        widths = [hi - lo for lo, hi in pairwise(self.edges)]
        return sum(mean * width for mean, width in zip(self.mean, widths, strict=True)) / sum(widths)


def loss_per_bin(
    model_fn: Callable[..., Any],
    images: Tensor,
    scheduler: Any,
    *,
    bins: int = 20,
    per_bin: int = 256,
    seed: int = 0,
    batch_size: int = 256,
    told: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None,
) -> LossProfile:
    """The loss of `model_fn` on held-out images, in terms of the noise whatever the model predicts.

    Images, noise and timesteps depend on (seed, bin) alone, so that differences between two models are theirs.

    Args:
        model_fn: (x float32 [B, C, H, W], t int64 [B]) -> prediction, or an object with it as `.sample`; a module runs
            in eval mode on its own device, and its modes are restored.
        images: uint8 [M, C, H, W], or latents as floats, taken over again if per_bin > M.
        scheduler: a diffusers scheduler with `add_noise`, `alphas_cumprod` and a prediction type of epsilon,
            v_prediction or sample.
        bins: number of bins, equal in width up to rounding.
        per_bin: images per bin, their timesteps spread evenly over the bin.
        told: (numbers of images int64 [B], the images as `model_fn` sees them) -> further keywords of `model_fn`.

    Raises:
        EbdiffError: more bins than timesteps, another kind of scheduler, or predictions that are not finite.
    """
    T, kind = int(scheduler.config.num_train_timesteps), str(scheduler.config.get("prediction_type"))
    if not hasattr(scheduler, "alphas_cumprod") or kind not in _TO_EPSILON:
        raise EbdiffError(
            f"{type(scheduler).__name__} with prediction type {kind}",
            expected=f"alphas_cumprod and one of {', '.join(_TO_EPSILON)}",
        )
    if not 1 <= bins <= T or per_bin < 1 or not len(images):
        raise EbdiffError(
            "loss per bin",
            expected=f"1 <= bins <= {T}, per_bin >= 1 and some images",
            got=f"bins={bins}, per_bin={per_bin}, {len(images)} images",
        )
    edges = [T * i // bins for i in range(bins + 1)]
    means = []
    with _evaluating(model_fn) as device:
        for i, (lo, hi) in enumerate(pairwise(edges)):
            drawn = _draw(images, lo, hi, per_bin, (seed * 100_003 + i) % 2**64)
            parts = (torch.split(part, batch_size) for part in drawn)
            errors = []
            for chosen, x0, t, noise in zip(*parts, strict=True):
                keywords = {key: rows.to(device) for key, rows in told(chosen, x0).items()} if told else {}
                asked = partial(model_fn, **keywords)
                errors.append(_squared_error(asked, scheduler, kind, x0, t, noise, device))
            means.append(float(torch.cat(errors).mean()))
            if not torch.isfinite(torch.tensor(means[-1])):
                raise EbdiffError(
                    f"the model's predictions for timesteps [{lo}, {hi}) are not finite",
                    remedy="use an earlier checkpoint",
                )
    return LossProfile(tuple(edges), tuple(means), per_bin)


# Error of the noise over error of the prediction, from x_t = a x0 + s eps (Salimans & Ho 2022, appendix D):
# v = a eps - s x0 gives eps = a v + s x_t; eps = (x_t - a x0) / s.
_TO_EPSILON: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "epsilon": lambda a, s: torch.ones_like(a),
    "v_prediction": lambda a, s: a,
    "sample": lambda a, s: a / s,
}


def _target(kind: str, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[kind]


def _draw(images: Tensor, lo: int, hi: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(numbers int64 [count], x0 float32 [count, C, H, W], t int64 [count], noise like x0), of its arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[torch.arange(count) % len(images)]
    spread = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    t = (lo + (spread * (hi - lo)).long()).clamp(max=hi - 1)
    x0 = to_model(images[chosen.to(images.device)].cpu())
    return chosen, x0, t, torch.randn(x0.shape, generator=generator)


def _squared_error(
    model_fn: Callable[..., Any],
    scheduler: Any,
    kind: str,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    device: torch.device,
) -> Tensor:
    """Mean squared error of the noise, float64 [B]."""
    signal2 = scheduler.alphas_cumprod.cpu().double()[t].view(-1, 1, 1, 1)
    a, s = signal2.sqrt(), (1 - signal2).sqrt()
    out = model_fn(scheduler.add_noise(x0, noise, t).to(device), t.to(device))
    predicted = getattr(out, "sample", out)[:, : x0.shape[1]].cpu().double()  # a learned variance comes after the mean
    error = _TO_EPSILON[kind](a, s) * (predicted - _target(kind, x0.double(), noise.double(), a, s))
    squared: Tensor = error.square().flatten(1).mean(1)
    return squared


@contextmanager
def _evaluating(model_fn: Any) -> Iterator[torch.device]:
    """Without gradients, and a module in eval mode; yields the device it lives on."""
    modules = list(model_fn.modules()) if isinstance(model_fn, nn.Module) else []
    modes = [module.training for module in modules]
    somewhere = next((p.device for module in modules[:1] for p in module.parameters()), torch.device("cpu"))
    try:
        for module in modules[:1]:
            module.eval()
        with torch.no_grad():
            yield somewhere
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
