"""The timestep loss on a GPU, by the Triton kernels: the specification, the same bits, CUDA graphs, no waiting.

Never run on a GPU so far; the same kernels are interpreted in test_timestep_loss_triton.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from kernels_only import only_kernels_of
from timestep_loss_cases import CASES, Case, Looked, check, compare, exact
from torch import Tensor

from ebdiff.ops import timestep_loss_cuda
from ebdiff.ops import timestep_loss_reference as reference
from ebdiff.ops.timestep_loss_reference import Terms

operator = importlib.import_module("ebdiff.ops.timestep_loss")
pytestmark = pytest.mark.gpu

# One program for each sample, and several; sizes that no power of two divides.
LARGE = {
    "CIFAR": Case((128, 3, 32, 32), "v_prediction", "seed", table=True),
    "pixels": Case((8, 3, 256, 256), "flow", "noise", mask="float", huber="each"),
    "pixels, channels last": Case((8, 3, 256, 256), "v_prediction", "seed", mask="bool", last=True),
    "odd": Case((33, 3, 67, 131), "epsilon", "seed", huber="one"),
}


only_kernels = only_kernels_of(operator)


class Step:
    """What a training step does with the operators, on memory that stays where it is."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        pred, terms = case.arguments(dtype, "cuda")
        assert terms.x0 is not None
        self.pred, self.x0 = pred.requires_grad_(), terms.x0.to(dtype)
        self.kind, self.mask, self.huber_c = case.kind, terms.mask, terms.huber_c
        self.noise = operator.PhiloxNoise(torch.tensor([1, 2], device="cuda"))
        self.t = torch.arange(len(pred), device="cuda") % 8
        self.weight = torch.rand(8, device="cuda")
        self.profile = Looked(torch.rand(2, 8, device="cuda"))
        self.statistics = operator.LossStatistics(torch.arange(8, device="cuda") // 2)

    def __call__(self) -> list[Tensor]:
        """x_t, the losses, the gradient and the totals."""
        x_t, noise = operator.noised(self.x0, self.t, self.profile, self.noise)
        loss, per_sample = operator.weighted_timestep_loss(
            self.pred, (self.x0, noise), self.t, self.weight, self.kind,
            profile=self.profile, mask=self.mask, huber_c=self.huber_c, statistics=self.statistics,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, self.pred)
        return [x_t, loss.detach(), per_sample.detach(), grad, self.statistics.totals.clone()]

    def from_nothing(self) -> list[Tensor]:
        self.statistics.reset_()
        return self()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_specification(name: str) -> None:
    check(timestep_loss_cuda, *CASES[name].arguments(device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LARGE)
def test_large_ones_are_the_specification(name: str, dtype: torch.dtype) -> None:
    check(timestep_loss_cuda, *LARGE[name].arguments(dtype, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LARGE)
def test_noised_is_the_specification(name: str, dtype: torch.dtype) -> None:
    _, terms = LARGE[name].arguments(device="cuda")
    assert terms.x0 is not None
    x0, noise = terms.x0.to(dtype), terms.noise if terms.noise is None else terms.noise.to(dtype)
    truth = exact(terms._replace(x0=x0, noise=noise))
    mine, theirs = (m.noised(x0, noise, terms.seed, terms.table, terms.row) for m in (timestep_loss_cuda, reference))
    compare("x_t", mine, theirs, reference.noised(truth.x0, truth.noise, None, terms.table, terms.row))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LARGE)
def test_a_hundred_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    step = Step(LARGE[name], dtype)
    first = step.from_nothing()
    assert all(same(step.from_nothing(), first) for _ in range(100))


@pytest.mark.parametrize("name", LARGE)
def test_replayed_from_a_cuda_graph(name: str) -> None:
    """With other images, timesteps and noise than it was captured with, many times, and beside the same step."""
    step = Step(LARGE[name], torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for run in range(10):
        step.x0.add_(0.5)
        step.t.copy_(step.t.roll(1))
        step.noise.seed.add_(run)
        expected = step.from_nothing()
        step.statistics.reset_()
        graph.replay()
        assert same(found, expected)


def test_two_streams_at_once() -> None:
    """Each counts its programs where the other does not."""
    step = Step(LARGE["pixels"], torch.float32)
    arguments = step.pred.detach(), *LARGE["pixels"].arguments(device="cuda")[1:]
    expected = timestep_loss_cuda.forward(*arguments, True)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found: list[Any] = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(timestep_loss_cuda.forward(*arguments, True))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    step = Step(LARGE["CIFAR"], dtype)
    step()  # compiles, and makes the counters
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_launches(dtype: torch.dtype) -> None:
    """One forward and one backward, at the size of CIFAR; nothing is copied or set to 0."""
    pred, terms = LARGE["CIFAR"].arguments(dtype, "cuda")

    def step() -> None:
        loss = torch.ops.ebdiff.weighted_timestep_loss(pred.requires_grad_(), *terms)[0]
        torch.autograd.grad(loss, pred, one)

    one = torch.ones((), device="cuda")
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 2, names
    assert names[0] == "loss_kernel"


def test_what_autograd_keeps_is_the_gradient() -> None:
    """And no noise: x0 and the prediction are there anyway."""
    step = Step(LARGE["pixels, channels last"], torch.bfloat16)
    step()
    before = torch.cuda.memory_allocated()
    loss, _ = operator.weighted_timestep_loss(
        step.pred, (step.x0, step.noise), step.t, step.weight, step.kind, profile=step.profile
    )
    assert torch.cuda.memory_allocated() - before <= step.pred.nbytes + 4096
    del loss


def test_past_two_to_the_31_elements() -> None:
    """The last samples are what they are alone."""
    shape = (2112, 1 << 20)
    if torch.cuda.mem_get_info()[0] < 5 * 2 * torch.Size(shape).numel():
        pytest.skip("too little memory")
    pred = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.zeros_like(pred)
    weight = torch.ones(len(pred), device="cuda")
    terms, one = Terms(target, *(None,) * 5, weight, None, None, None, 0), torch.ones((), device="cuda")
    _, per_sample, grad = timestep_loss_cuda.forward(pred, terms, True)
    last = terms._replace(target=target[-1:], weight=weight[-1:])
    _, alone, _ = timestep_loss_cuda.forward(pred[-1:], last, True)
    torch.testing.assert_close(per_sample[-1:], alone)
    assert grad is not None
    expected = timestep_loss_cuda.backward(one / len(pred), pred[-1:], last)
    assert torch.equal(grad[-1:], expected)
    doubled = timestep_loss_cuda.scale_(grad, 2 * one)
    assert torch.equal(doubled[-1:], 2 * expected)
