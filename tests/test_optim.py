"""AdamW is torch.optim.AdamW, then masks, then the EMA: to rounding; to the bit when repeated; zeros are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from toys import mlp

import ebdiff
from ebdiff.optim import AdamW

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
STEPS = 20


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def network(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, ebdiff.ChannelMask]:
    """Three layers, and a mask that cuts into both axes of the middle one."""
    model, plan = mlp(5, 8, 6, 3)
    keep = {"h1": torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool(), "h2": torch.tensor([0, 1, 1, 1, 1, 0]).bool()}
    return model.to(dtype), ebdiff.ChannelMask(plan, keep)


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]


def removed(mask: ebdiff.ChannelMask, name: str) -> Tensor:
    """bool, of the parameter's shape: what is removed of it."""
    gone = torch.zeros(mask.plan.shapes[name], dtype=torch.bool)
    for dim, alive in mask.plan.kept(mask.keep, name).items():
        gone.index_fill_(dim, (~alive).nonzero()[:, 0], True)
    return gone


def averaged(model: nn.Module) -> EMAModel:
    return EMAModel(model.parameters(), decay=0.7, use_ema_warmup=True, power=0.75, foreach=True)


def everything(model: nn.Module, optimizer: Any, ema: EMAModel) -> dict[str, list[Tensor]]:
    parameters = list(model.parameters())
    moments = {key: [optimizer.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq")}
    return {"p": parameters, **moments, "ema": list(ema.shadow_params)}


def by_torch(dtype: torch.dtype, masked: bool, **options: Any) -> dict[str, list[Tensor]]:
    """torch.optim.AdamW, then masks on all four, then EMAModel, for STEPS steps."""
    model, mask = network(dtype)
    optimizer, ema = torch.optim.AdamW(model.parameters(), **SETTINGS, **options), averaged(model)
    for step in range(STEPS):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = gradient
        optimizer.step()
        names = [name for name, _ in model.named_parameters()] if masked else []
        found = everything(model, optimizer, ema)
        with torch.no_grad():
            for i, name in enumerate(names):
                for key in ("p", "exp_avg", "exp_avg_sq"):
                    found[key][i].masked_fill_(removed(mask, name), 0)
            ema.step(model.parameters())
            for i, name in enumerate(names):
                ema.shadow_params[i].masked_fill_(removed(mask, name), 0)
    return everything(model, optimizer, ema)


def by_us(
    dtype: torch.dtype = torch.float32, masked: bool = True, spoil: Callable[[Tensor, Tensor], None] | None = None
) -> tuple[dict[str, list[Tensor]], EMAModel]:
    model, mask = network(dtype)
    ema = averaged(model)
    optimizer = AdamW(model.named_parameters(), **SETTINGS, mask=mask if masked else None, ema=ema)
    for step in range(STEPS):
        for (name, p), gradient in zip(model.named_parameters(), gradients(model, step), strict=True):
            p.grad = gradient
            if spoil is not None:
                spoil(gradient, removed(mask, name))
        optimizer.step()
    return everything(model, optimizer, ema), ema


def truth(dtype: torch.dtype, masked: bool) -> dict[str, list[np.ndarray]]:
    """The same in 80 bits: Loshchilov & Hutter 2019, algorithm 2, and the EMA's warm-up 1 - n^-0.75 from n = 1."""
    model, mask = network(dtype)
    beta1, beta2 = SETTINGS["betas"]
    found: dict[str, list[np.ndarray]] = {"p": [], "exp_avg": [], "exp_avg_sq": [], "ema": []}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        p = parameter.detach().double().numpy().astype(np.longdouble)
        kept = ~removed(mask, name).numpy() if masked else np.ones(p.shape, bool)
        m, v, e = p * 0, p * 0, p.copy()
        for n in range(1, STEPS + 1):
            g = gradients(model, n - 1)[i].double().numpy().astype(np.longdouble)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            p = p * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"])
            p = p - SETTINGS["lr"] * (m / (1 - beta1**n)) / (np.sqrt(v / (1 - beta2**n)) + SETTINGS["eps"])
            p, m, v = p * kept, m * kept, v * kept
            decay = min(0.7, 1 - n**-0.75)
            e = (decay * e + (1 - decay) * p) * kept
        for key, value in zip(found, (p, m, v, e), strict=True):
            found[key].append(value)
    return found


def errors(found: dict[str, list[Tensor]], true: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Root mean square, over the elements of all parameters."""
    return {
        key: float(
            np.sqrt(np.mean(np.concatenate([
                ((t.detach().double().numpy() - x) ** 2).ravel() for t, x in zip(found[key], true[key], strict=True)
            ])))
        )
        for key in true
    }  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_near_to_the_truth_as_torch(dtype: torch.dtype, masked: bool) -> None:
    """Weights, both moments and the EMA, each at most twice as far off as the worse of torch's two.

    Twice: torch contracts a * b + c into one rounding where the instruction set can; here that is always two.
    """
    true = truth(dtype, masked)
    ours = errors(by_us(dtype, masked)[0], true)
    torchs = [errors(by_torch(dtype, masked, **{kind: True}), true) for kind in ("foreach", "fused")]
    for key, error in ours.items():
        assert 0 < error <= 2 * max(t[key] for t in torchs), key


def test_one_step_by_hand() -> None:
    """A first step goes by lr against the sign of the gradient; moments are g / 10 and g^2 / 1000; then decay."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 4.0]))
    optimizer = AdamW([p], lr=0.25, eps=0.0, weight_decay=0.5)
    p.grad = torch.tensor([3.0, -0.5, 100.0])
    optimizer.step()
    state = optimizer.state[p]
    torch.testing.assert_close(p.detach(), torch.tensor([0.875 - 0.25, -1.75 + 0.25, 3.5 - 0.25]))
    torch.testing.assert_close(state["exp_avg"], p.grad / 10)
    torch.testing.assert_close(state["exp_avg_sq"], p.grad.square() / 1000)
    assert state["step"].dtype == torch.float32
    assert state["step"] == 1
    up = AdamW([q := nn.Parameter(torch.ones(1))], lr=0.25, eps=0.0, weight_decay=0.0, maximize=True)
    q.grad = torch.ones(1)
    up.step()
    assert float(q.detach()) == pytest.approx(1.25)


def same(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_and_threads_agree_to_the_bit(dtype: torch.dtype) -> None:
    found = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        found.append(by_us(dtype)[0])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_removed_channels_are_exact_zeros_whatever_their_gradients() -> None:
    """From the first step on, in weights, moments and EMA; NaN there changes nothing elsewhere."""

    def poison(gradient: Tensor, gone: Tensor) -> None:
        gradient.masked_fill_(gone, float("nan"))

    plain, poisoned = by_us()[0], by_us(spoil=poison)[0]
    assert same(plain, poisoned)
    model, mask = network()
    ema = averaged(model)
    optimizer = AdamW(model.named_parameters(), mask=mask, ema=ema)
    for step in range(2):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = gradient
        optimizer.step()
        for key, tensors in everything(model, optimizer, ema).items():
            for (name, _), tensor in zip(model.named_parameters(), tensors, strict=True):
                gone = removed(mask, name)
                assert bool((tensor[gone] == 0).all()), (key, name)
                assert bool((tensor[~gone] != 0).all()), (key, name)


def test_the_ema_model_counts_as_if_it_had_stepped() -> None:
    """Its schedule goes on where we leave it: a later ema.step is the step after ours."""
    model, _ = network()
    _, ema = by_us()
    assert ema.optimization_step == STEPS
    assert ema.cur_decay_value == ema.get_decay(STEPS)
    ema.step(model.parameters())
    assert ema.optimization_step == STEPS + 1


def test_a_mask_can_be_set_and_cleared() -> None:
    model, mask = network()
    ticket = ebdiff.Ticket(mask, ratio=0.5, step=0, criterion="magnitude")
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    gone = removed(mask, "1.weight")

    def zeros() -> int:
        for p, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
            p.grad = gradient
        optimizer.step()
        return int((model[1].weight == 0).sum())  # type: ignore[operator, arg-type, union-attr]

    assert zeros() == 0
    optimizer.mask = ticket
    assert optimizer.mask is mask
    assert zeros() == int(gone.sum()) > 0
    optimizer.mask = None
    assert zeros() == 0


def test_parameters_at_rest_are_masked_and_followed_and_frozen_ones_copied() -> None:
    """The first layer has no gradient, the second is frozen with one left over, the third is trained."""
    model, mask = network()
    start = [p.detach().clone() for p in model.parameters()]
    ema = averaged(model)
    optimizer = AdamW(model.named_parameters(), lr=0.1, mask=mask, ema=ema)
    ema.optimization_step = 9
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    model[1].requires_grad_(False)
    _, second, third = gradients(model, 0)
    model[1].weight.grad, model[2].weight.grad = second, third  # type: ignore[union-attr]
    optimizer.step()
    share = 1 - ema.get_decay(10)
    for i, (name, p) in enumerate(model.named_parameters()):
        gone = removed(mask, name)
        assert bool((p[gone] == 0).all())
        assert bool((ema.shadow_params[i][gone] == 0).all())
        wanted = p.detach() if i == 1 else start[i] + share * (p.detach() - start[i])
        torch.testing.assert_close(ema.shadow_params[i], wanted.masked_fill(gone, 0), rtol=1e-6, atol=1e-7)
    assert model[0].weight not in optimizer.state  # type: ignore[comparison-overlap]
    torch.testing.assert_close(model[0].weight, (3 * start[0]).masked_fill(removed(mask, "0.weight"), 0))


def test_what_is_frozen_later_is_copied_from_then_on() -> None:
    model, _ = network()
    ema = averaged(model)
    optimizer = AdamW(model.parameters(), lr=0.1, ema=ema)
    for step in range(4):
        model[1].requires_grad_(step < 3)
        for p, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
            p.grad = gradient
        optimizer.step()
        same_now = [torch.equal(p, e) for p, e in zip(model.parameters(), ema.shadow_params, strict=True)]
        assert same_now == [False, step == 3, False] or step == 0


def test_a_tied_parameter_is_masked_by_any_of_its_names() -> None:
    model, mask = network()
    plan = replace(mask.plan, aliases={"tied": "1.weight"})
    tied = ebdiff.ChannelMask(plan, {name: mask[name] for name in mask})
    weight: Any = model[1].weight
    optimizer = AdamW([("tied", weight)], mask=tied)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight == 0, removed(mask, "1.weight"))


KINDS = ["module", "dict", "list", "averaged model"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_ema_with_a_decay_of_its_own(kind: str) -> None:
    """ema <- d * ema + (1 - d) * p with d = 1 - 1 / n is the mean of all weights so far."""
    model, _ = network()
    ema: Any = {
        "module": lambda: copy.deepcopy(model),
        "dict": lambda: {name: p.detach().clone() for name, p in model.named_parameters()},
        "list": lambda: [p.detach().clone() for p in model.parameters()],
        "averaged model": lambda: torch.optim.swa_utils.AveragedModel(model),
    }[kind]()
    optimizer = AdamW(model.named_parameters(), lr=0.1, ema=ema, ema_decay=lambda n: 1 - 1 / n)
    assert optimizer.ema is ema
    seen: list[list[Tensor]] = []
    for step in range(5):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = gradient
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    found = list(ema.values() if kind == "dict" else ema if kind == "list" else ema.parameters())
    for i, tensor in enumerate(found):
        torch.testing.assert_close(tensor.detach(), torch.stack([s[i] for s in seen]).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ema_of_another_dtype_moves_too(dtype: torch.dtype) -> None:
    model, mask = network(torch.bfloat16)
    start = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    ema = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = AdamW(model.named_parameters(), lr=0.5, mask=mask, ema=ema, ema_decay=0.75)
    for p, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
        p.grad = gradient
    optimizer.step()
    for name, p in model.named_parameters():
        wanted = 0.75 * start[name] + 0.25 * p.detach().to(dtype)
        torch.testing.assert_close(ema[name], wanted.masked_fill(removed(mask, name), 0))
