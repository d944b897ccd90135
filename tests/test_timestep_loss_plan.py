"""How the timestep loss's kernels divide their work, and where their programs count themselves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from ebdiff.kernels import timestep_loss_counter as counters
from ebdiff.kernels import timestep_loss_plan as plans


@pytest.mark.parametrize("samples", [1, 3, 128, 4096])
@pytest.mark.parametrize("size", [1, 127, 3072, 20481, 3 * 256 * 256, (1 << 31) - (1 << 15) - 1])
def test_plans_cover_every_element_within_32_bits(samples: int, size: int) -> None:
    plan = plans.plan_of(samples, size)
    reach = plan.chunks * plan.steps * plan.block
    assert size <= reach < 1 << 31
    assert reach - size < plan.steps * plan.block
    assert plan.small[0] * plan.small[1] <= 1024


def test_samples_of_cifar_are_one_program_each() -> None:
    assert plans.plan_of(128, 3 * 32 * 32)[:3] == (1, 1, 4096)


def test_launches_that_run_at_once_count_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams, and two captures on each; what is captured when there are none left is zeroed in the graph."""
    place = [(1, False)]
    monkeypatch.setattr(counters, "_known", {})
    monkeypatch.setattr(counters, "_MANY", 5)
    monkeypatch.setattr(counters, "_now", lambda device: place[0])
    device, found = torch.device("cpu"), []
    for place[0] in [(1, False), (2, False), (1, True), (1, True), (2, True), (2, True)]:
        found.append(counters.counter(device))
    assert len({counter.data_ptr() for counter in found}) == 6
    assert not any(counter.any() for counter in found)
    assert [counter.numel() for counter in found] == [32] * 5 + [1]
    place[0] = 2, False
    assert counters.counter(device) is found[1]


def test_a_capture_before_anything_else_zeroes_its_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the CPU may not be captured."""
    monkeypatch.setattr(counters, "_known", {})
    monkeypatch.setattr(counters, "_now", lambda device: (1, True))
    assert counters.counter(torch.device("cpu")).numel() == 1
    assert not counters._known
