"""What samplers that learn have in common: they draw what they know, lose nothing, wait for nothing, and agree."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lessons import FOUR, LINEAR, g, taught
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.adaptive import Adaptive, LossSecondMoment
from ebdiff.timesteps.densities import CLTS
from ebdiff.timesteps.learned import Learned
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.reweighted import Weighted
from ebdiff.timesteps.sampler import Stratified, Uniform, Within, Wrapped


@pytest.mark.parametrize("make", [lambda: LossSecondMoment(LINEAR, history=1), lambda: Adaptive(LINEAR, every=2)])
def test_drawn_as_it_says_and_at_once(make) -> None:
    """A sampler around it draws what it has just learned; chi-square of 40 groups of cells."""
    sampler = make()
    around = Stratified(sampler)
    before = around.sample(8, generator=g()).weight
    assert torch.equal(before, torch.ones(8))
    sampler.update(torch.arange(1000).repeat(10), torch.linspace(3, 0.5, 1000).repeat(10))
    sampler.update(torch.arange(1000).repeat(10), torch.linspace(3, 0.5, 1000).repeat(10))
    t, weight = sampler.sample(40_000, generator=g())
    counts = torch.bincount(t // 25, minlength=40).double()
    expected = sampler.pmf().view(40, 25).sum(1) * 40_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 72.1  # 39 degrees of freedom, p = 0.001
    assert float(expected.max() / expected.min()) > 1.5
    assert torch.equal(weight, sampler.weights()[t])
    assert torch.equal(around.pmf(), sampler.pmf())
    stratified = around.sample(40_000, generator=g())
    counts = torch.bincount(stratified.t // 25, minlength=40).double()
    torch.testing.assert_close(counts, expected, rtol=0, atol=2.0)


@pytest.mark.parametrize("make", [lambda: LossSecondMoment(4, history=1), lambda: Adaptive(FOUR, buckets=4, every=1)])
def test_losses_that_are_not_finite_are_left_out(make) -> None:
    one, other = make(), make()
    t = torch.arange(4).repeat(10)
    one.update(t, torch.arange(40.0))
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    other.update(torch.cat([torch.tensor([0, 1, 2]), t]), torch.cat([bad, torch.arange(40.0)]))
    other.update(torch.tensor([0, 1, 2]), bad)
    torch.testing.assert_close(one.pmf(), other.pmf(), rtol=1e-14, atol=0)
    assert not torch.allclose(one.pmf(), Uniform(4).pmf())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LossSecondMoment(LINEAR),
        lambda: Adaptive(LINEAR, every=4),
        lambda: Adaptive(NoiseProfile.edm(), every=1),
    ],
)
def test_nothing_waits_for_the_device(make) -> None:
    """Tensors without values: whoever asked for one would raise."""
    sampler = make()
    sampler.update(torch.empty(16, device="meta", dtype=sampler.sample(1).t.dtype), torch.empty(16, device="meta"))
    assert sampler.state.device.type == "meta"
    around = Stratified(sampler)
    for step in range(5):
        t, weight = around.sample(16, step=step, device="meta")
        sampler.update(t, weight)
    assert t.device.type == weight.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("make", [lambda: LossSecondMoment(LINEAR, history=2), lambda: Adaptive(LINEAR, every=2)])
def test_on_a_gpu_it_learns_the_same_and_waits_for_nothing(make) -> None:
    here, there = make(), make()
    for step in range(60):
        t, losses = torch.randint(1000, (256,), generator=g(step)), torch.rand(256, generator=g(step))
        here.update(t, losses)
        t, losses = t.cuda(), losses.cuda()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # tables are copied once
        there.update(t, losses)
        there.sample(64, step=step, device="cuda")
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(here.pmf(), there.pmf(), rtol=1e-12, atol=0)
    assert not torch.equal(here.pmf(), make().pmf())


@pytest.mark.parametrize("make", [lambda: LossSecondMoment(20), lambda: Adaptive(LINEAR, every=7)])
def test_a_resumed_sampler_goes_on_bit_for_bit(make) -> None:
    one = make()
    scale = torch.linspace(2, 0.1, one.T)
    taught(one, scale, steps=40)
    other = make()
    other.sample(4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.sample(64, step=3).t, one.sample(64, step=3).t)
    assert not torch.equal(other.pmf(), make().pmf())
    taught(one, scale, steps=10)
    taught(other, scale, steps=10)
    assert torch.equal(one.pmf(), other.pmf())


def test_what_was_loaded_stays_as_it_is() -> None:
    one, other = (taught(LossSecondMoment(20), torch.ones(20), steps=20) for _ in range(2))
    saved = one.state_dict()
    other.load_state_dict(saved)
    taught(other, torch.full((20,), 3.0), steps=1)
    assert torch.equal(saved["losses"], one.state_dict()["losses"])


def test_losses_of_a_graph_are_not_kept_alive() -> None:
    sampler = LossSecondMoment(4)
    sampler.update(torch.arange(4), torch.ones(4, requires_grad=True) * 2)
    assert not sampler.state.tensors["losses"].requires_grad


def test_a_state_dict_is_a_copy_and_another_samplers_is_refused() -> None:
    sampler = Adaptive(LINEAR)
    saved = sampler.state_dict()
    saved["average"].fill_(9)
    assert float(sampler.state.tensors["average"].sum()) == 0
    for wrong in (LossSecondMoment(4).state_dict(), Adaptive(LINEAR, buckets=8).state_dict(), {}):
        with pytest.raises(EbdiffError, match="no state of this Adaptive"):
            sampler.load_state_dict(wrong)


@pytest.mark.parametrize("t", [-21, -5, -1, 20, 400])
@pytest.mark.parametrize("schedule", [20, NoiseProfile.from_alphas_cumprod(torch.linspace(0.99, 0.01, 20))])
def test_what_is_no_timestep_is_refused_and_nothing_learned(schedule: NoiseProfile | int, t: int) -> None:
    samplers: list[Learned] = [LossSecondMoment(schedule)]
    samplers += [] if isinstance(schedule, int) else [Adaptive(schedule)]
    for sampler in samplers:
        before = sampler.state_dict()
        with pytest.raises(EbdiffError, match="no timestep"):
            sampler.update(torch.tensor([3, t]), torch.ones(2))
        assert all(torch.equal(tensor, before[name]) for name, tensor in sampler.state_dict().items())


def test_a_region_of_it_trains_what_the_priors_region_would() -> None:
    prior = Weighted(Uniform(LINEAR), torch.linspace(1, 2, 1000))
    sampler = taught(Adaptive(LINEAR, prior), torch.linspace(5, 0.1, 1000))
    inside, priors_own = Within(Region(100, 400), sampler), Within(Region(100, 400), prior)
    torch.testing.assert_close(
        inside.pmf() * inside.weights(), priors_own.pmf() * priors_own.weights(), rtol=1e-5, atol=1e-12
    )
    assert bool((inside.sample(1000, generator=g()).t.sub(250).abs() <= 150).all())


class Fresh(Wrapped):
    """Weights in a region that are not those of the whole."""

    def weights_in(self, region: Region) -> Tensor:
        return torch.where(torch.arange(self.T) < region.lo + 10, 2.0, 0.5)


def test_a_region_has_the_priors_weights_for_that_region() -> None:
    inside = Within(Region(100, 120), Adaptive(LINEAR, Fresh(LINEAR))).weights()
    assert float(inside[100]) == pytest.approx(1.6)
    assert float(inside[119]) == pytest.approx(0.4)


def test_a_prior_that_learns_is_followed() -> None:
    prior = LossSecondMoment(LINEAR, history=1)
    sampler = Adaptive(LINEAR, prior)
    before = sampler.sample(64, generator=g()).t
    prior.update(torch.arange(1000), torch.linspace(9, 0.1, 1000))
    assert not torch.equal(sampler.sample(64, generator=g()).t, before)


def test_a_prior_with_a_plan_shares_what_is_learned() -> None:
    curriculum = CLTS(LINEAR, 300, 100, steps=10)
    sampler = Adaptive(LINEAR, curriculum, every=1)
    later = sampler.at(10)
    torch.testing.assert_close(later.pmf(), 0.99 * curriculum.at(10).pmf() + 0.01 / 1000, rtol=1e-12, atol=0)
    before, losses = later.pmf(), torch.linspace(3, 0.5, 1000)
    sampler.update(torch.arange(1000).repeat(10), losses.repeat(10))
    for step in (0, 10):
        now, prior = sampler.at(step), curriculum.at(step)
        assert float((now.pmf() * now.weights() * losses).sum()) == pytest.approx(float((prior.pmf() * losses).sum()))
    more = later.pmf() / before
    assert float(more[100]) > 1 > float(more[500])


# Several processes


def makers() -> dict[str, Learned]:
    return {"lsdm": LossSecondMoment(20, history=4), "adaptive": Adaptive(LINEAR, buckets=8, every=3)}


def train(sampler: Learned, rank: int, world: int) -> list[list[float]]:
    """The timesteps of nine steps of 48 as this rank draws them, and the density after them."""
    drawn = []
    for step in range(9):
        t, _ = sampler.sample(48 // world, step=step, rank=rank, world=world)
        sampler.update(t, (t + 1.0) ** 0.5)
        drawn.append([float(value) for value in t])
    return [*drawn, sampler.pmf().tolist()]


def one_of_several(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {name: train(sampler, rank, world) for name, sampler in makers().items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_learn_the_same_and_draw_one_sequence(tmp_path: Path) -> None:
    mp.start_processes(one_of_several, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name, sampler in makers().items():
        alone = train(sampler, 0, 1)
        assert first[name][-1] == second[name][-1]
        assert first[name][-1] == alone[-1]
        assert first[name][-1] != Uniform(sampler.T).pmf().tolist()
        for step in range(9):
            assert first[name][step] + second[name][step] == alone[step]
