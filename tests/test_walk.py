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


def test_a_forward_that_takes_gradients_goes_through_its_linear_layers() -> None:
    class Guided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.energy, self.last = nn.Linear(3, 12), nn.Linear(12, 8), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                h = self.first(x).detach().requires_grad_()
                slope = torch.autograd.grad(F.silu(self.energy(h)).sum(), h, create_graph=True)[0]
            y: Tensor = self.last(slope)
            return y

    model, arguments = Guided().double(), {"x": torch.randn(2, 3, dtype=torch.float64)}
    model.first.requires_grad_(False)
    plan = ebdiff.trace(model, **arguments)
    assert_law(model, arguments, random_keep(plan, 0))


def test_inference_mode_sees_the_same_axes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 3, 1))
    x = torch.randn(2, 3, 4, 4)
    plan = ebdiff.trace(model, x)
    assert [space.size for space in plan] == [12]
    with torch.inference_mode():
        assert ebdiff.trace(model, x.clone()) == plan
