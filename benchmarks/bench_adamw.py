"""A training step's update: AdamW, the masks on weights, gradients and moments, and the EMA, on the DDPM CIFAR UNet.

Targets: on 2 cores 1.5 times faster than torch's fused AdamW, foreach masks and foreach EMA, at 70% of the bandwidth of
torch's own copy_; on an H200 at 85% of the floor, and 2.2 times faster than fused AdamW and four foreach
multiplications.

Half of the channels are removed. The floor: an element takes 36 bytes in float32 (w, g, m, v, e are read, all but g
written), one in a row that is removed whole 16 (written only); half as much in bfloat16. "fused alone" has neither
masks nor an average, and its own floor of 28. All candidates share the same tensors, and do the same to them: checked.

Compiling the whole sequence takes minutes on a CPU: EBDIFF_BENCH_COMPILE=1 -k masked_adamw_compiled runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebdiff
from benchmarks import Candidate, copy_of, few, side_by_side
from benchmarks.axes import axes_of, full_size, listed, random_mask, tensors_of
from benchmarks.floors import Elements
from ebdiff import ChannelMask, ChannelPlan
from ebdiff.ops.channel_mask import apply_mask_, masked_adamw_

ROUNDS = 11
TAKEN = 99  # steps before the first one here
DECAY = 0.9999
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
OURS = "ebdiff op"

Way = Callable[[], Any]


class State:
    """Parameters, gradients, moments and averages, removed channels at zero but in the gradients; ways to move on."""

    def __init__(self, plan: ChannelPlan, mask: ChannelMask, device: torch.device, dtype: torch.dtype) -> None:
        self.plan, self.mask, self.device = plan, mask, device
        w, self.g, self.m, self.v, self.ema = (tensors_of(plan, device, dtype) for _ in range(5))
        for square in self.v:
            square.square_()
        self.w: list[Tensor] = [nn.Parameter(tensor) for tensor in w]
        self.axes = axes_of(plan, mask)
        apply_mask_([*w, *self.m, *self.v, *self.ema], axes_of(plan, mask, 4))
        for parameter, gradient in zip(self.w, self.g, strict=True):
            parameter.grad = gradient
        # As every tool does, masks only for those parameters that lose channels; for all where none does.
        touched = [i for i, name in enumerate(plan.shapes) if mask.kept(name)] or list(range(len(w)))
        bools = full_size(plan, mask, w, torch.bool)
        self.bools = [bools[i] for i in touched]
        self.floats = [mask.to(dtype) for mask in self.bools]
        self.masked = [[tensors[i] for i in touched] for tensors in (w, self.g, self.m, self.v)]

    def ways(self) -> dict[str, Way]:
        """All but "fused alone" do the same."""
        ways: dict[str, Way] = {
            OURS: self._op,
            "ebdiff.optim.AdamW": self._ours().step,
            "fused alone": self._torch(fused=True).step,
            "fused + foreach masks + foreach EMA": self._then(self._torch(fused=True), self._lerp),
            "foreach + foreach masks + foreach EMA": self._then(self._torch(foreach=True), self._lerp),
            "loop of bool masks on g, fused, loop on w (apex) + foreach EMA": self._apex(self._torch(fused=True)),
        }
        if find_spec("diffusers"):
            average = self._diffusers_ema()
            ways["fused + foreach masks + EMAModel(foreach=True)"] = self._then(
                self._torch(fused=True), lambda: average.step(self.w)
            )
        return ways

    def _then(self, optimizer: torch.optim.Optimizer, move_average: Way) -> Way:
        """A step, masks on all four lists, and the average."""

        def update() -> None:
            optimizer.step()
            for tensors in self.masked:
                torch._foreach_mul_(tensors, self.floats)
            move_average()

        return update

    def compiled(self) -> Way:
        """The whole foreach sequence, as torch's tutorial on compiled optimizers does it."""
        return torch.compile(self._then(self._torch(foreach=True), self._lerp))

    @torch.no_grad()
    def check(self, ways: Mapping[str, Way]) -> None:
        """One step of each from the same state has to end in the same, or their times mean nothing."""
        lists = (self.w, self.m, self.v, self.ema, self.g)
        before = [[tensor.detach().clone() for tensor in tensors] for tensors in lists]
        expected: list[list[Tensor]] = []
        rtol = 2**-5 if self.w[0].dtype == torch.bfloat16 else 1e-4
        for name, way in ways.items():
            way()
            found = [[tensor.detach().clone() for tensor in tensors] for tensors in lists[:4]]
            expected = expected or found
            for got, wanted in zip(found, expected, strict=True):
                alike = all(torch.allclose(a, b, rtol, 1e-6) for a, b in zip(got, wanted, strict=True))
                assert alike or name == "fused alone", name
            for tensors, values in zip(lists, before, strict=True):
                torch._foreach_copy_(list(tensors), values)

    def _op(self) -> None:
        beta1, beta2 = SETTINGS["betas"]
        masked_adamw_(
            self.w,
            self.g,
            self.m,
            self.v,
            self.ema,
            self.axes,
            lr=SETTINGS["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=SETTINGS["eps"],
            weight_decay=SETTINGS["weight_decay"],
            step=TAKEN + 1,
            ema_decay=DECAY,
        )

    def _ours(self) -> torch.optim.Optimizer:
        named = list(zip(self.plan.shapes, self.w, strict=True))
        mask = self.mask if len(self.plan) else None
        optimizer = ebdiff.optim.AdamW(named, **SETTINGS, mask=mask, ema=self.ema, ema_decay=DECAY)
        return self._with_state(optimizer, "cpu")

    def _torch(self, **how: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.w, **SETTINGS, **how)
        return self._with_state(optimizer, self.device if "fused" in how else "cpu")

    def _with_state(self, optimizer: torch.optim.Optimizer, steps_on: torch.device | str) -> torch.optim.Optimizer:
        for p, m, v in zip(self.w, self.m, self.v, strict=True):
            step = torch.tensor(float(TAKEN), device=steps_on)
            optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        return optimizer

    def _lerp(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.w, 1 - DECAY)

    def _apex(self, fused: torch.optim.Optimizer) -> Way:
        weights, gradients, *_ = self.masked

        def update() -> None:
            for gradient, mask in zip(gradients, self.bools, strict=True):
                gradient.mul_(mask)
            fused.step()
            for weight, mask in zip(weights, self.bools, strict=True):
                weight.mul_(mask)
            self._lerp()

        return update

    def _diffusers_ema(self) -> Any:
        from diffusers.training_utils import EMAModel

        average = EMAModel(self.w, decay=DECAY, foreach=True)
        average.shadow_params = self.ema
        average.optimization_step = 1_000_000  # past its warm-up
        return average


def measured(benchmark: Any, state: State, ways: Mapping[str, Way], rounds: int) -> list[dict[str, Any]]:
    """Rows of these ways and of copy_."""
    size = state.w[0].element_size()
    elements = Elements.of(state.w, state.axes)
    candidates = {"copy_": copy_of(elements.all, state.device)}
    for name, way in ways.items():
        floor = 7 * size * elements.all if name == "fused alone" else elements.masked_adamw(size)
        candidates[name] = Candidate(way, floor, OURS)
    return side_by_side(benchmark, state.device, candidates, rounds)


def cifar_state(device: torch.device, dtype: torch.dtype) -> State:
    plan = listed("cifar_unet")
    return State(plan, random_mask(plan, 0.5), device, dtype)


def facts(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    return {"what": "AdamW, masks and EMA", "dtype": str(dtype), "ratio": 0.5, "rounds": rounds}


@pytest.mark.benchmark(group="adamw")
def test_masked_adamw_float32(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    state = cifar_state(device, torch.float32)
    rounds = few(ROUNDS, full)
    state.check(state.ways())
    report(measured(benchmark, state, state.ways(), rounds), facts(torch.float32, rounds))


@pytest.mark.benchmark(group="adamw")
def test_masked_adamw_bfloat16(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    state = cifar_state(device, torch.bfloat16)
    rounds = few(ROUNDS, full)
    state.check(state.ways())
    report(measured(benchmark, state, state.ways(), rounds), facts(torch.bfloat16, rounds))


@pytest.mark.benchmark(group="adamw")
@pytest.mark.skipif(os.environ.get("EBDIFF_BENCH_COMPILE") != "1", reason="minutes: EBDIFF_BENCH_COMPILE=1 runs it")
def test_masked_adamw_compiled(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    state = cifar_state(device, torch.float32)
    names = (OURS, "fused + foreach masks + foreach EMA", "foreach + foreach masks + foreach EMA")
    ways = {name: way for name, way in state.ways().items() if name in names}
    ways["foreach + foreach masks + foreach EMA, compiled"] = state.compiled()
    state.check(ways)
    rounds = few(ROUNDS, full)
    report(measured(benchmark, state, ways, rounds), facts(torch.float32, rounds))


@pytest.mark.benchmark(group="adamw")
def test_adamw_overhead(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    plan = ChannelPlan((), (), {f"parameter{i}": (1,) for i in range(300)})
    state = State(plan, ChannelMask(plan, {}), device, torch.float32)
    ways = state.ways()
    candidates = {name: Candidate(way, ours=OURS) for name, way in ways.items()}
    rounds = few(50, full)
    rows = side_by_side(benchmark, device, candidates, rounds)
    report(rows, {"what": "300 parameters of one element, no channel removed", "rounds": rounds})
