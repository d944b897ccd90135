"""Regions tile [0, T) and samplers never leave theirs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.timesteps.region import Partition, Region
from ebdiff.timesteps.sampler import Sampler, Stratified, Timesteps, Uniform, Within


class Table(Sampler):
    """A sampler given by its table: an uneven pmf and an uneven weight with mean 1 under it."""

    def __init__(self, pmf: list[float], weights: list[float] | None = None, u: float | None = None) -> None:
        self.table, self.u, self.T = torch.tensor(pmf, dtype=torch.float64), u, len(pmf)
        self.table /= self.table.sum()
        raw = torch.tensor(weights if weights is not None else [1.0] * self.T, dtype=torch.float64)
        self.w = (raw / (raw * self.table).sum()).float()

    def pmf(self) -> Tensor:
        return self.table

    def weights(self) -> Tensor:
        return self.w

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self.u is None:
            return super().uniforms(n, generator, device)
        return torch.full((n,), self.u, dtype=torch.float64, device=device)


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_region_is_half_open():
    region = Region(240, 440)
    assert len(region) == 200
    times = (239, 240, 439, 439.5, 440)
    for kind in (float, np.float64, torch.tensor):
        assert [kind(t) in region for t in times] == [False, True, True, True, False]
    assert np.int64(300) in region
    assert not any(t in Region(0, 440) for t in ("300", np.str_("300"), None, True, np.True_, torch.zeros(2)))
    assert Uniform(np.int64(1000)).T == 1000
    assert str(region) == "[240, 440)"
    assert Region.from_json(region.to_json()) == region


@pytest.mark.parametrize("bounds", [(5, 5), (6, 5), (-1, 5), (0.0, 5), (False, 5), ("0", "5")])
def test_a_region_that_is_none_is_refused(bounds):
    with pytest.raises(EbdiffError):
        Region(*bounds)


def test_widening_goes_upward_and_stops_at_the_limit():
    assert Region(0, 240).widened(20, 1000) == Region(0, 260)
    assert Region(440, 1000).widened(20, 1000) == Region(440, 1000)
    for overlap, limit in ((-1, 1000), (0, 239)):
        with pytest.raises(EbdiffError, match="widen"):
            Region(0, 240).widened(overlap, limit)


def test_a_partition_holds_every_timestep_exactly_once():
    partition = Partition(0, 3, 4, 10)
    for t in range(partition.T):
        holders = [number for number, region in enumerate(partition) if t in region]
        assert holders == [partition.index(t)] == [int(partition.of_t(torch.tensor(t)))]
    assert (len(partition), partition.T, partition[-1]) == (3, 10, Region(4, 10))
    assert list(Partition.paper()) == [Region(0, 240), Region(240, 440), Region(440, 1000)]


def test_of_t_keeps_the_shape_and_takes_any_dtype():
    t = torch.tensor([[0, 239, 240], [439, 440, 999]])
    expected = torch.tensor([[0, 0, 1], [1, 2, 2]])
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        index = Partition.paper().of_t(t.to(dtype))
        assert index.dtype == torch.int64
        assert torch.equal(index, expected)
    assert torch.equal(Partition(0, 1000).of_t(t), torch.zeros(2, 3, dtype=torch.int64))


def test_a_partition_survives_json():
    partition = Partition.paper()
    assert partition.to_json() == [0, 240, 440, 1000]
    assert Partition.from_json(partition.to_json()) == partition == Partition.of(partition)


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ([(0, 240), (220, 1000)], ["overlap", "start at 240", "[220, 1000)", "widened"]),
        ([(0, 240), (250, 1000)], ["gap [240, 250)", "start at 240", "[250, 1000)"]),
        ([(10, 1000)], ["gap [0, 10)"]),
        ([(240, 1000), (0, 240)], ["ascending"]),
        ([(0, 240), (240, 900)], ["expected [0, 1000)", "got [0, 900)"]),
        ([], ["expected [0, 1000)"]),
        ([(0, 500, 1000)], ["a pair"]),
    ],
)
def test_regions_that_do_not_tile_are_refused_by_name(regions, words):
    with pytest.raises(EbdiffError) as error:
        Partition.of(regions, T=1000)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("bounds", [(), (0,), (1, 5), (0, 5, 5), (0, 5, 3), (0, 2.5, 5)])
def test_bounds_that_are_no_partition_are_refused(bounds):
    with pytest.raises(EbdiffError):
        Partition(*bounds)


@pytest.mark.parametrize("t", [-1, 1000, float("nan")])
def test_a_timestep_outside_the_partition_has_no_region(t):
    with pytest.raises(EbdiffError, match="outside"):
        Partition.paper().index(t)


def test_uniform_draws_each_timestep_alike_with_weight_one():
    t, weight = Uniform(10).sample(20_000, generator=g())
    assert (t.dtype, weight.dtype) == (torch.int64, torch.float32)
    assert torch.equal(weight, torch.ones(20_000))
    counts = torch.bincount(t, minlength=10).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_a_generator_makes_the_draw_repeatable():
    sampler = Within(Region(240, 440), Stratified(1000))
    first, again, other = (sampler.sample(64, generator=g(seed)).t for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sampler.sample(2, generator=g(), device="meta").t.device.type == "meta"


@pytest.mark.parametrize("inner", [Uniform(50), Stratified(50), Table([1 + t % 7 for t in range(50)], list(range(50)))])
def test_within_is_the_conditional_distribution(inner):
    region = Region(13, 31)
    sampler = Within(region, inner)
    pmf, weights = sampler.pmf(), sampler.weights()
    inside = torch.tensor([t in region for t in range(50)])
    assert torch.equal(pmf > 0, inside)
    torch.testing.assert_close(pmf[inside], inner.pmf()[inside] / inner.mass(region), rtol=1e-14, atol=0)
    assert float((pmf * weights).sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(weights[14:31] / weights[14], inner.weights()[14:31] / inner.weights()[14])
    t, weight = sampler.sample(30_000, generator=g())
    assert torch.equal(weight, weights[t])
    assert bool(inside[t].all())
    expected = pmf[inside] * 30_000
    counts = torch.bincount(t, minlength=50)[inside].double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 40.8  # 17 degrees of freedom, p = 0.001


def test_within_uniform_is_uniform_in_the_region():
    pmf = Within(Region(240, 440), Uniform(1000)).pmf()
    torch.testing.assert_close(pmf[240:440], torch.full((200,), 1 / 200, dtype=torch.float64), rtol=4e-16, atol=0)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 1.0])
def test_no_rounding_leaves_the_region(u):
    # A region with zeros at its ends, and values whose float64 sum falls short of 1.
    uneven = [0.1] * 10
    for region, pmf in ((Region(3, 9), [*uneven, 5.0]), (Region(2, 8), [1.0, 1, 0, 0, 0.1, 0.2, 0, 0, 1, 1])):
        sampler = Within(region, Table(pmf, u=u))
        t, _ = sampler.sample(4)
        support = [s for s in range(region.lo, region.hi) if pmf[s] > 0]
        assert t.tolist() == [support[0] if u == 0 else support[-1]] * 4


def test_regions_nest():
    uniform = Uniform(1000)
    nested = Within(Region(250, 300), Within(Region(240, 440), uniform))
    torch.testing.assert_close(nested.pmf(), Within(Region(250, 300), uniform).pmf(), rtol=1e-14, atol=0)
    with pytest.raises(EbdiffError, match=r"never draws in \[500, 600\)"):
        Within(Region(500, 600), Within(Region(240, 440), uniform))


def test_a_region_outside_the_schedule_is_refused_by_both_names():
    with pytest.raises(EbdiffError, match=r"\[0, 1000\).*\[900, 1001\)"):
        Within(Region(900, 1001), Uniform(1000))
    with pytest.raises(EbdiffError, match="no region"):
        Within((0, 10), Uniform(1000))  # type: ignore[arg-type]


def test_a_region_without_any_weight_is_refused():
    sampler = Within(Region(0, 2), Table([1, 1, 1], [0, 0, 1]))
    with pytest.raises(EbdiffError, match="every weight"):
        sampler.sample(1)


def test_region_masses_add_up_to_one():
    sampler = Table([1 + t % 7 for t in range(1000)])
    assert sum(sampler.mass(region) for region in Partition.paper()) == pytest.approx(1, abs=1e-12)
    assert Uniform(1000).mass(Region(240, 440)) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize(
    "sampler", [Stratified(Within(Region(8, 24), Uniform(64))), Within(Region(8, 24), Stratified(64))]
)
def test_stratified_draws_one_from_each_stratum_in_no_order(sampler):
    t, _ = sampler.sample(16, generator=g())
    assert t.tolist() != sorted(t.tolist())
    assert sorted(t.tolist()) == list(range(8, 24))
    t, _ = sampler.sample(4, generator=g())
    assert sorted((t - 8).div(4, rounding_mode="floor").tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("T", [0, -3, 10.0, True])
def test_a_schedule_without_timesteps_is_refused(T):
    with pytest.raises(EbdiffError, match="no schedule"):
        Uniform(T)


def test_an_empty_draw_is_refused():
    with pytest.raises(EbdiffError, match="nothing to draw"):
        Uniform(10).sample(0)


@pytest.mark.parametrize(
    ("t", "weight"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.ones(2)),
        (torch.zeros(3, dtype=torch.int32), torch.ones(3)),
        (torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)),
        (torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, -1.0])),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, float("nan")])),
    ],
)
def test_timesteps_cannot_be_wrong(t, weight):
    with pytest.raises(EbdiffError):
        Timesteps(t, weight)


def test_timesteps_may_be_continuous():
    assert len(Timesteps(torch.tensor([0.5, 0.7]), torch.ones(2))) == 2


def test_importing_ebdiff_and_its_samplers_loads_neither_diffusers_nor_triton():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import ebdiff; ebdiff.Within(ebdiff.Region(2, 4), ebdiff.Uniform(9)).sample(1)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(', '.join(new & {'diffusers', 'triton', 'transformers', 'torchvision'}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_front_door_hands_out_the_same_classes():
    assert (ebdiff.Region, ebdiff.Partition, ebdiff.Within) == (Region, Partition, Within)
