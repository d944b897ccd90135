"""What finding and removing channels costs: trace, score, draw and shrink, next to Torch-Pruning's one step.

Targets: under 1 s for google/ddpm-cifar10-32's network; under 5 s for Stable Diffusion 1.5's UNet, of which the trace
takes under 1 s and under 100 MB; under 2 s for the trace of every published network in benchmarks.families.

The floor of a trace is a forward pass that computes nothing, on the meta device: `times_forward`.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebdiff
from benchmarks import SideBySide, ddpm_cifar10, few, halved_by_torch_pruning
from benchmarks.families import FULL_SIZE, build


def stable_diffusion_unet() -> tuple[nn.Module, dict[str, Tensor]]:
    """Stable Diffusion 1.5's UNet, 860M parameters with random weights, and its arguments."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    x, t, text = torch.randn(1, 4, 64, 64), torch.tensor([1]), torch.randn(1, 77, 768)
    return model, {"sample": x, "timestep": t, "encoder_hidden_states": text}


class Stages:
    """Trace, score, draw and shrink a model to half its channels, with a clock at every stage."""

    def __init__(self, model: nn.Module, arguments: dict[str, Tensor]) -> None:
        self.model, self.arguments = model, arguments
        self.seconds: dict[str, list[float]] = {}

    def __call__(self) -> None:
        plan = self._timed("trace", lambda: ebdiff.trace(self.model, **self.arguments))
        scores = self._timed("importance", lambda: ebdiff.importance(self.model, plan))
        mask = self._timed("draw", lambda: ebdiff.ChannelMask.draw(scores, plan=plan, ratio=0.5))
        self._timed("shrink", lambda: ebdiff.shrink(self.model, mask))

    def _timed(self, stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
        return result

    def best(self) -> dict[str, float]:
        """Seconds of each stage, the smallest of all rounds."""
        return {f"{stage}_seconds": min(times) for stage, times in self.seconds.items()}


def ddpm_cifar10_and_arguments() -> tuple[nn.Module, dict[str, Tensor]]:
    """google/ddpm-cifar10-32's network and its arguments."""
    return ddpm_cifar10(), {"sample": torch.randn(1, 3, 32, 32), "timestep": torch.tensor([1])}


def trace_peak_mb(build: Callable[[], Any]) -> float | None:
    """`peak_growth_mb` of the first trace of a fresh process, which has no freed memory to reuse."""
    code = f"import benchmarks.bench_trace as b; print(b.first_trace_mb(b.{build.__name__}))"
    root = Path(__file__).parent.parent
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    return None if printed.strip() == "None" else float(printed)


def first_trace_mb(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> float | None:
    """What `trace_peak_mb` runs in its process; modules that the first trace imports count."""
    model, arguments = build()
    trace = ebdiff.trace
    return peak_growth_mb(lambda: trace(model, **arguments))


def peak_growth_mb(call: Callable[[], Any]) -> float | None:
    """By how many megabytes the resident set grew at its peak during `call`; None where the kernel cannot say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # VmHWM starts anew at the present size
        before = _kilobytes(status, "VmHWM")
        call()
        return (_kilobytes(status, "VmHWM") - before) / 1024
    except OSError:
        return None


def _kilobytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{key}:"))


@pytest.mark.benchmark(group="trace")
def test_trace_draw_shrink_ddpm_cifar10(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    peak = trace_peak_mb(ddpm_cifar10_and_arguments)
    model, arguments = ddpm_cifar10_and_arguments()
    stages, rounds = Stages(model, arguments), few(5, full)
    candidates: dict[str, Callable[[], Any]] = {"ebdiff": stages}
    if find_spec("torch_pruning"):  # it prunes in place
        candidates["copy"] = lambda: copy.deepcopy(model)
        candidates["torch-pruning"] = lambda: halved_by_torch_pruning(copy.deepcopy(model), arguments)
    timing = SideBySide(candidates)
    timing.run(benchmark, rounds)
    rows = [{"what": "ebdiff", "seconds": timing.median("ebdiff"), **stages.best()}]
    if "torch-pruning" in candidates:
        rows.append(_theirs(timing.median("torch-pruning") - timing.median("copy"), rows[0]["seconds"]))
    report(rows, {"rounds": rounds, "trace_peak_mb": peak})


@pytest.mark.benchmark(group="trace")
def test_trace_draw_shrink_sd15(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    if not full:
        pytest.skip("--full: 860M parameters")
    peak = trace_peak_mb(stable_diffusion_unet)
    model, arguments = stable_diffusion_unet()
    stages, rounds = Stages(model, arguments), 3
    timing = SideBySide({"ebdiff": stages})
    timing.run(benchmark, rounds, warmup_rounds=0)
    rows = [{"what": "ebdiff", "seconds": timing.median("ebdiff"), **stages.best()}]
    if find_spec("torch_pruning"):  # once, last, in place: a second copy would take another 3.4 GB
        theirs = SideBySide({"torch-pruning": lambda: halved_by_torch_pruning(model, arguments)})
        theirs()
        rows.append(_theirs(theirs.median("torch-pruning"), rows[0]["seconds"]))
    report(rows, {"rounds": rounds, "trace_peak_mb": peak})


@pytest.mark.benchmark(group="trace")
def test_trace_full_size(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    built = {name: build(name) for name in FULL_SIZE}
    rounds, candidates = 3 if full else 1, dict[str, Callable[[], Any]]()
    for name, (model, arguments) in built.items():
        candidates[name] = partial(ebdiff.trace, model, **arguments)
        candidates[f"{name}, forward"] = torch.no_grad()(partial(model, **arguments))
    timing = SideBySide(candidates)
    timing.run(benchmark, rounds, warmup_rounds=int(full))
    ratios = {name: timing.ratio(name, f"{name}, forward") for name in built}
    rows = [{"what": name, "seconds": timing.median(name), "times_forward": ratios[name]} for name in built]
    report(rows, {"rounds": rounds})


def _theirs(seconds: float, ours: float) -> dict[str, Any]:
    return {"what": "torch-pruning", "seconds": seconds, "times_ours": seconds / ours}
