"""What the benchmarks share: the models, Torch-Pruning's half of one, and timing several things side by side."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ebdiff.files import write_bytes

Item = TypeVar("Item")

# google/ddpm-cifar10-32
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "attention_head_dim": None,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}


def ddpm_cifar10() -> nn.Module:
    """google/ddpm-cifar10-32's network, seeded random weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(**DDPM_CIFAR10)


def halved_by_torch_pruning(model: nn.Module, example: Mapping[str, Tensor]) -> nn.Module:
    """Prune half of the channels of a diffusers UNet with Torch-Pruning, in place.

    As it comes, the result does not run: diffusers asserts the widths that its resamplers remember, so they are
    corrected here, as Diff-Pruning does. Fresh dicts, because Torch-Pruning's default arguments are shared.

    Raises:
        ModuleNotFoundError: Torch-Pruning (the test extra) is not installed.
    """
    import torch_pruning
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    torch_pruning.pruner.BasePruner(
        model,
        dict(example),
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.conv_out],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    for module in model.modules():
        if isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    return model.train()


def seconds_of(call: Callable[[], Any], device: torch.device | str) -> float:
    """Wall-clock seconds of one call; on a GPU those between two events, so that waiting for it does not count."""
    if torch.device(device).type == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after)) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def few(rounds: int, full: bool) -> int:
    """So many rounds at full size, and three elsewhere."""
    return rounds if full else min(rounds, 3)


@dataclass
class SideBySide:
    """Seconds of several candidates, one of each per round, so that a busy spell hits all of them."""

    candidates: Mapping[str, Callable[[], Any]]
    device: torch.device | str = "cpu"
    between: Callable[[], Any] | None = None  # before each, off the clock
    warm: bool = False  # see `side_by_side`
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self) -> None:
        """One round."""
        for name, call in self.candidates.items():
            if self.between is not None:
                self.between()
            if self.warm:
                time.sleep(0.005)
                call()
            self.seconds.setdefault(name, []).append(seconds_of(call, self.device))

    def run(self, benchmark: Any, rounds: int, warmup_rounds: int = 1) -> None:
        """`rounds` rounds under pytest-benchmark, whose own figure is the time of a whole round."""
        benchmark.pedantic(self, rounds=rounds, iterations=1, warmup_rounds=warmup_rounds)
        self.seconds = {name: times[warmup_rounds:] for name, times in self.seconds.items()}

    def median(self, name: str) -> float:
        """Median seconds of a candidate."""
        return statistics.median(self.seconds[name])

    def least(self, name: str) -> float:
        """Least seconds of a candidate: what is left to compare by when the machine was busy."""
        return min(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over rounds of slow / fast within the same round."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


@dataclass(frozen=True)
class Candidate:
    """One way of doing something.

    Args:
        call: does it once.
        floor: bytes it cannot do without (see `benchmarks.floors`); 0 where that is not the point.
        ours: the name of the candidate it is compared with.
    """

    call: Callable[[], Any]
    floor: float = 0
    ours: str = ""


def copy_of(elements: int, device: torch.device | str) -> Candidate:
    """torch's own copy_ of so many float32: the bandwidth of memory that this machine reaches."""
    source = torch.ones(elements, device=device)
    target = torch.zeros_like(source)
    return Candidate(lambda: target.copy_(source), floor=8 * elements)


def table(candidates: Mapping[str, Candidate], timing: SideBySide, copy: str = "copy_") -> list[dict[str, Any]]:
    """Rows for `report`: median and least milliseconds, the floor, and two ratios, each taken within a round.

    `share_of_copy` is floor / time over the same of the candidate `copy`; `times_ours` is how many times longer than
    ours it took. The `least_` ones compare the least times instead: to be read where the machine was busy.
    """
    rows = []
    for name, candidate in candidates.items():
        row: dict[str, Any] = {"what": name, "ms": 1e3 * timing.median(name), "least_ms": 1e3 * timing.least(name)}
        if candidate.floor:
            bytes_per_copied = candidate.floor / candidates[copy].floor
            row["floor_gb"] = candidate.floor / 1e9
            row["share_of_copy"] = bytes_per_copied * timing.ratio(copy, name)
            row["least_share"] = bytes_per_copied * timing.least(copy) / timing.least(name)
        if candidate.ours:
            row["times_ours"] = timing.ratio(name, candidate.ours)
            row["least_times_ours"] = timing.least(name) / timing.least(candidate.ours)
        rows.append(row)
    return rows


def side_by_side(
    benchmark: Any,
    device: torch.device,
    candidates: Mapping[str, Candidate],
    rounds: int,
    between: Callable[[], Any] | None = None,
    *,
    warm: bool = False,
) -> list[dict[str, Any]]:
    """Measure candidates in turn, and return their `table`. One of them is "copy_" where any has a floor.

    With `warm` each pauses, then runs once off the clock: for what takes less than a millisecond. What torch.compile
    makes for the CPU has threads of its own, which go on spinning for a while, on the cores of whoever comes next.
    """
    timing = SideBySide({name: candidate.call for name, candidate in candidates.items()}, device, between, warm)
    timing.run(benchmark, rounds, warmup_rounds=1)
    return table(candidates, timing)


def replayed(call: Callable[[], Any]) -> Callable[[], None]:
    """The call, captured in a CUDA graph after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def pool(
    waiting: list[Item],
    start: Callable[[Item], subprocess.Popen[bytes]],
    jobs: int,
    ready: Callable[[Item], bool] = lambda item: True,
) -> Generator[tuple[Item, int], None, None]:
    """Every item in a process of its own, `jobs` side by side; yields each that ended and its exit code.

    Ends when nothing runs and nothing that waits is `ready`; what was not started is left in `waiting`. Processes that
    run when it is closed are ended.
    """
    running: dict[subprocess.Popen[bytes], Item] = {}
    try:
        while True:
            for item in [item for item in waiting if ready(item)][: jobs - len(running)]:
                waiting.remove(item)
                running[start(item)] = item
            if not running:
                return
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                yield running.pop(process), process.returncode
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _commit() -> str:
    """The commit measured, with a plus where the library differs from it; "unknown" outside a checkout."""
    here = Path(__file__).parent.parent
    git = ["git", "-C", str(here)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    watched = ["ebdiff", "kernels", "csrc"]
    changed = subprocess.run([*git, "status", "--porcelain", *watched], capture_output=True, text=True)
    return found.stdout.strip() + ("+" if changed.stdout else "") if found.returncode == 0 else "unknown"


def machine(device: torch.device | str) -> dict[str, Any]:
    """Where a number was measured, and what else the machine was doing."""
    cpu = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load_at_the_start": os.getloadavg()[0],
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def write_results(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write `folder`/`name`.json, atomically."""
    write_bytes(folder / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())
