"""What the tracer sees of a forward pass."""

from __future__ import annotations

from threading import Event, Thread

import torch
from laws import assert_law, random_keep
from torch import Tensor, nn
from torch.nn import functional as F

import ebdiff


def test_what_another_thread_runs_meanwhile_is_not_seen() -> None:
    inside, passed = Event(), Event()

    class Other(nn.Module):
        def forward(self) -> None:
            inside.set()
            passed.wait(10)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            thread = Thread(target=Other())
            thread.start()
            inside.wait(10)
            y: Tensor = self.last(F.silu(self.first(x)))
            passed.set()
            thread.join()
            inside.clear()
            passed.clear()
            return y

    model, arguments = Net().double(), {"x": torch.randn(2, 3, dtype=torch.float64)}
    plan = ebdiff.trace(model, **arguments)
    assert {space.name: space.size for space in plan} == {"first": 12}
    assert_law(model, arguments, random_keep(plan, 0))
