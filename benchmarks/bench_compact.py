"""From dense to ticket and back: compact and scatter_back of all parameters, against one index_select per axis.

Target: at the bandwidth of memory, for the 860M parameters of Stable Diffusion 1.5's UNet. Half of the channels are
removed. Every candidate allocates its result anew, as shrinking does, in memory that the system has to provide: what
was freed is handed back before each, off the clock. On a CPU this first touch costs more than the copying, so `clone`
of as many bytes as are kept stands beside copy_, and what ours does to memory that is there beside what allocates it.

The floor: of rows that are kept all bytes are read, since what is removed of them shares lines of memory with what is
kept; kept elements are written. Going back to new tensors: kept elements are read, all bytes are written; into tensors
that are there: rows that are kept are written, and read before where some of them stays.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import Candidate, copy_of, few, side_by_side
from benchmarks.axes import axes_of, listed, random_mask, tensors_of
from benchmarks.floors import Elements
from ebdiff.ops import native, native_cpu
from ebdiff.ops.channel_mask import compact, scatter_back

ROUNDS = 9
NEEDED = 12 * 10**9  # bytes for 860M parameters: dense, small, dense again, and one more of each in passing


class Compaction:
    """A model's parameters, half of whose channels go, and the usual ways to cut them and to put them back."""

    def __init__(self, name: str, device: torch.device) -> None:
        plan = listed(name)
        mask = random_mask(plan, 0.5)
        self.device, self.axes = device, axes_of(plan, mask)
        self.dense = tensors_of(plan, device)
        self.small = compact(self.dense, self.axes)
        self.elements = Elements.of(self.dense, self.axes)
        self.held: Any = None
        self.positions: list[dict[int, Tensor]] = [{} for _ in self.dense]
        for kept, i, dim in zip(self.axes.keep, self.axes.owner, self.axes.dims, strict=True):
            self.positions[i][dim] = kept.nonzero()[:, 0].to(device)

    def compact(self) -> list[Tensor]:
        """Ours."""
        return compact(self.dense, self.axes)

    def scatter_back(self) -> list[Tensor]:
        """Ours."""
        return scatter_back(self.small, self.axes, like=self.dense)

    def index_select(self) -> list[Tensor]:
        """As usual: one tensor after another, one axis after another."""
        return [_selected(tensor, where) for tensor, where in zip(self.dense, self.positions, strict=True)]

    def index_copy(self) -> list[Tensor]:
        """Back: into zeros, one tensor after another, one axis after another."""
        return [_put(*each) for each in zip(self.small, self.dense, self.positions, strict=True)]

    def check(self) -> None:
        """Both ways have to do the same, or their times mean nothing."""
        for ours, theirs in ((self.compact, self.index_select), (self.scatter_back, self.index_copy)):
            assert all(torch.equal(a, b) for a, b in zip(ours(), theirs(), strict=True)), theirs.__name__

    def candidates(self) -> dict[str, Candidate]:
        """Ours, theirs, and what memory can do."""
        ones = torch.ones(self.elements.kept, device=self.device)
        back, forth = self.elements.scatter_back(4), self.elements.compact(4)
        return {
            "copy_": copy_of(min(self.elements.all, 10**8), self.device),
            "clone": Candidate(self._holding(ones.clone), 8 * self.elements.kept),
            "compact": Candidate(self._holding(self.compact), forth, "compact"),
            "index_select per axis": Candidate(self._holding(self.index_select), forth, "compact"),
            **self._compact_again(forth),
            "scatter_back": Candidate(self._holding(self.scatter_back), back, "scatter_back"),
            "zeros and index_copy_ per axis": Candidate(self._holding(self.index_copy), back, "scatter_back"),
            "scatter_back into dense tensors": Candidate(
                lambda: scatter_back(self.small, self.axes, like=self.dense, into=self.dense),
                self.elements.scatter_into(4),
                "scatter_back",
            ),
        }

    def _compact_again(self, floor: int) -> dict[str, Candidate]:
        """What `compact` calls on a CPU, to the same memory every time; a GPU's allocator gives that by itself."""
        if self.device.type != "cpu" or native.module() is None:
            return {}
        call = partial(native_cpu.compact, self.dense, self.small, self.axes)
        return {"compact, without allocating": Candidate(call, floor, "compact")}

    def _holding(self, call: Callable[[], Any]) -> Callable[[], None]:
        """Keep the result until `release`, so that freeing it is not on the clock."""

        def run() -> None:
            self.held = call()

        return run

    def release(self) -> None:
        """Free what is held, and have the C library hand it back to the system, large blocks and small ones alike."""
        self.held = None
        if self.device.type == "cpu" and sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def _selected(tensor: Tensor, where: dict[int, Tensor]) -> Tensor:
    for dim, positions in where.items():
        tensor = tensor.index_select(dim, positions)
    return tensor.clone() if not where else tensor


def _put(small: Tensor, dense: Tensor, where: dict[int, Tensor]) -> Tensor:
    for dim, positions in reversed(where.items()):  # the inner axis first, while there are few rows
        shape = list(small.shape)
        shape[dim] = dense.shape[dim]
        small = small.new_zeros(shape).index_copy_(dim, positions, small)
    return small.clone() if not where else small


def available(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def measure(name: str, benchmark: Any, device: torch.device, report: Any, rounds: int) -> None:
    """Check, measure and report one model."""
    model = Compaction(name, device)
    model.check()
    rows = side_by_side(benchmark, device, model.candidates(), rounds, model.release)
    facts = {"parameters": model.elements.all, "kept": model.elements.kept, "ratio": 0.5, "rounds": rounds}
    report(rows, {"what": "float32, results freshly allocated", **facts})


@pytest.mark.benchmark(group="compact")
def test_compact_cifar_unet(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    measure("cifar_unet", benchmark, device, report, few(ROUNDS, full))


@pytest.mark.benchmark(group="compact")
def test_compact_sd15_unet(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    if not full:
        pytest.skip("--full: 860M parameters")
    if available(device) < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of free memory, there are {available(device) / 1e9:.1f}")
    measure("sd15_unet", benchmark, device, report, ROUNDS)
