"""Drawing 256 timesteps with their weights, as a training step does. Target: under 50 microseconds on a CPU.

"as released" does what SpeeD's published code does per step: a multinomial draw from a float table on the CPU, the
duals, a copy to the device, and the weights looked up in a float64 numpy array that is copied there first. With
coefficients, each of the weight, alpha and sigma becomes a tensor as large as the images; ours are a table and rows of
it, which the loss reads (`ebdiff.ops.weighted_timestep_loss`).

Ours seeds a generator from (seed, step) in every draw; torch's randint and multinomial go on with theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import Candidate, few, side_by_side
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.sampler import Sampler, Stratified, Uniform, Within
from ebdiff.timesteps.speed import SpeeD

BATCH, DRAWS, ROUNDS = 256, 20, 21
IMAGES = (BATCH, 3, 32, 32)
OURS = "SpeeD, stratified"

Draw = Callable[[], Any]


def linear() -> NoiseProfile:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return NoiseProfile.from_alphas_cumprod((1 - betas).cumprod(0))


def ours(sampler: Sampler, device: torch.device) -> Draw:
    steps = count()
    return lambda: sampler.sample(BATCH, step=next(steps), device=device)


class Released:
    """One training step's draws as the published code makes them, on the tables of `speed`."""

    def __init__(self, speed: SpeeD, device: torch.device) -> None:
        profile = speed.profile
        self.device, self.p = device, speed.asymmetric().float()
        weights, alpha, sigma = speed.weights().double(), profile.alpha, profile.sigma
        self.tables: list[np.ndarray[Any, Any]] = [table.numpy() for table in (weights, alpha, sigma)]
        slope = np.gradient(np.sqrt(1 - profile.alpha_bar.numpy()))
        self.meaningful = int(np.argmax(slope < 1e-4)) + 1

    def timesteps(self) -> Tensor:
        first = torch.multinomial(self.p, BATCH // 2 + 1, replacement=True)
        dual = torch.where(first < self.meaningful, self.meaningful - first, first - self.meaningful)
        return torch.cat([first, dual])[:BATCH].to(self.device)

    def look_up(self, table: np.ndarray[Any, Any], t: Tensor, size: tuple[int, ...]) -> Tensor:
        values = torch.from_numpy(table).to(self.device)[t].float()
        return values.view(-1, *[1] * (len(size) - 1)) + torch.zeros(size, device=self.device)

    def draw(self) -> tuple[Tensor, Tensor]:
        t = self.timesteps()
        return t, self.look_up(self.tables[0], t, (BATCH,))

    def full_size(self) -> list[Tensor]:
        t = self.timesteps()
        return [self.look_up(table, t, IMAGES) for table in self.tables]


def repeated(draw: Draw) -> Draw:
    def many() -> None:
        for _ in range(DRAWS):
            draw()

    return many


def measure(benchmark: Any, device: torch.device, report: Any, draws: dict[str, Draw], what: str, full: bool) -> None:
    rounds = few(ROUNDS, full)
    candidates = {name: Candidate(repeated(draw), ours=OURS) for name, draw in draws.items()}
    rows = side_by_side(benchmark, device, candidates, rounds, warm=True)
    each = [{**row, "us_per_draw": 1e3 * row["ms"] / DRAWS, "least_us": 1e3 * row["least_ms"] / DRAWS} for row in rows]
    report(each, {"what": what, "batch": BATCH, "draws_per_call": DRAWS, "rounds": rounds})


@pytest.mark.benchmark(group="sampling")
def test_sampling(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    profile = linear()
    speed, released = SpeeD(profile), SpeeD(profile, tau=700, variant="released")
    table, weights = speed.pmf().float(), speed.weights()

    def multinomial() -> tuple[Tensor, Tensor]:
        t = torch.multinomial(table, BATCH, replacement=True)
        return t.to(device), weights[t].to(device)

    draws: dict[str, Draw] = {
        OURS: ours(Stratified(speed), device),
        "SpeeD": ours(speed, device),
        "SpeeD, stratified, antithetic": ours(Stratified(speed, antithetic=True), device),
        "SpeeD, stratified, within a region": ours(Within(Region(440, 720), Stratified(speed)), device),
        "SpeeD, released variant": ours(released, device),
        "flow matching, stratified (float32 t)": ours(Stratified(SpeeD(NoiseProfile.flow(3.0))), device),
        "uniform": ours(Uniform(1000), device),
        "torch.randint, no weights": lambda: torch.randint(1000, (BATCH,), device=device),
        "torch.multinomial and weights": multinomial,
        "as released": Released(released, device).draw,
    }
    measure(benchmark, device, report, draws, "timesteps and weights of a batch", full)


@pytest.mark.benchmark(group="sampling")
def test_sampling_coefficients(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    profile = linear()
    sampler, steps = Stratified(SpeeD(profile)), count()

    def table_and_rows() -> tuple[Tensor, Tensor, Tensor]:
        t, weight = sampler.sample(BATCH, step=next(steps), device=device)
        return (weight, *profile.coefficients(t))

    draws = {OURS: table_and_rows, "as released": Released(SpeeD(profile, variant="released"), device).full_size}
    measure(benchmark, device, report, draws, f"the same with alpha and sigma, for images {list(IMAGES)}", full)
