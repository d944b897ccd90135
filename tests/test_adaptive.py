"""Samplers that learn: by hand, without changing the objective, and the same on all ranks."""

import json
import math
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.ops.timestep_loss_statistics import LossStatistics
from ebdiff.timesteps.adaptive import Adaptive, LossSecondMoment
from ebdiff.timesteps.densities import CLTS, LogNormalSigma
from ebdiff.timesteps.learned import Learned
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.reweighted import Weighted
from ebdiff.timesteps.sampler import Sampler, Stratified, Uniform, Within, Wrapped

FOUR = NoiseProfile.from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64))
LINEAR = NoiseProfile.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def taught(sampler: Learned, scale: Tensor, steps: int = 40, n: int = 256) -> Learned:
    """`sampler` after some steps of losses that have mean `scale` at each cell."""
    for step in range(steps):
        t = sampler.sample(n, generator=g(step)).t
        cell = t if sampler.profile is None else sampler.profile.cells(t)
        sampler.update(t, scale[cell] * torch.rand(n, generator=g(step)))
    return sampler


def weighted_prior() -> Sampler:
    return Weighted(Uniform(FOUR), numbers(1, 1, 2, 4))  # weights 1/2, 1/2, 1, 2


# Loss second moment


def test_loss_second_moment_by_hand() -> None:
    sampler = LossSecondMoment(2, history=2)
    for t, loss in ((0, 3.0), (1, 1.0), (0, 4.0)):
        assert torch.equal(sampler.pmf(), numbers(0.5, 0.5))
        assert torch.equal(sampler.weights(), torch.ones(2))
        sampler.update(torch.tensor([t]), torch.tensor([loss]))
    sampler.update(torch.tensor([1]), torch.tensor([-1.0]))
    root = numbers(math.sqrt((9 + 16) / 2), 1)
    expected = 0.999 * root / root.sum() + 0.001 / 2
    torch.testing.assert_close(sampler.pmf(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(sampler.weights(), (1 / (2 * expected)).float())


def test_only_the_last_losses_count_however_they_come() -> None:
    """As one by one in Python, where a batch holds a timestep more often than is kept."""
    sampler, lists = LossSecondMoment(5, history=3), [deque[float](maxlen=3) for _ in range(5)]
    for step in range(20):
        t, losses = torch.randint(5, (17,), generator=g(step)), torch.rand(17, generator=g(step))
        sampler.update(t, losses)
        for at, loss in zip(t.tolist(), losses.tolist(), strict=True):
            lists[at].append(loss)
    root = numbers(*(math.sqrt(sum(loss**2 for loss in kept) / 3) for kept in lists))
    torch.testing.assert_close(sampler.pmf(), 0.999 * root / root.sum() + 0.001 / 5, rtol=1e-14, atol=0)
    assert float(sampler.state.tensors["losses"][5].abs().sum()) == 0


def test_losses_that_are_all_zero_change_nothing() -> None:
    for sampler in (LossSecondMoment(4, history=1), Adaptive(FOUR, buckets=4, every=1)):
        sampler.update(torch.arange(4).repeat(10), torch.zeros(40))
        torch.testing.assert_close(sampler.pmf(), Uniform(4).pmf(), rtol=1e-15, atol=0)


# Adaptive


def test_adaptive_by_hand() -> None:
    """Buckets with losses 2 and 1: q ~ prior * weight * loss ~ (1/2 * 2, 1/2 * 2, 1 * 1, 2 * 1) = (1, 1, 1, 2)."""
    sampler = Adaptive(FOUR, weighted_prior(), buckets=2, mix=0.5, floor=0.1, every=1)
    assert sampler.buckets.tolist() == [0, 0, 1, 1]
    for t in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2], [1, 3]):
        assert torch.equal(sampler.weights(), weighted_prior().weights())  # ten losses of each bucket are wanted
        sampler.update(torch.tensor(t), torch.tensor([2.0, 2.0, 1.0, 1.0])[t])
    low, high = 0.9 * (0.5 / 4 + 0.5 / 5) + 0.1 / 4, 0.9 * (0.5 / 4 + 0.5 * 2 / 5) + 0.1 / 4
    torch.testing.assert_close(sampler.pmf(), numbers(low, low, low, high), rtol=1e-12, atol=0)
    weights = numbers(0.5 / 4 / low, 0.5 / 4 / low, 1 / 4 / low, 2 / 4 / high)
    torch.testing.assert_close(sampler.weights(), weights.float())


def test_the_average_forgets_by_half_after_a_halflife() -> None:
    """Squares 1 and then 9, each one loss and one halflife: (1 * 1/2 + 9) / (1/2 + 1)."""
    sampler = Adaptive(FOUR, buckets=1, halflife=1, every=1)
    for loss in (1.0, 3.0):
        sampler.update(torch.tensor([2]), torch.tensor([loss]))
    moment, share = sampler.state.tensors["average"]
    assert float(moment / share) == pytest.approx(9.5 / 1.5)
    assert float(share) == pytest.approx(0.75)


def test_losses_count_alike_in_whatever_batches_they_come() -> None:
    whole, parts = (Adaptive(LINEAR, every=every) for every in (1, 4))
    t, losses = torch.randint(1000, (64,), generator=g()), torch.rand(64, generator=g())
    whole.update(t, losses)
    for part in range(4):
        assert torch.equal(parts.state.tensors["average"], torch.zeros(2, 32, dtype=torch.float64))
        parts.update(t[part * 16 : part * 16 + 16], losses[part * 16 : part * 16 + 16])
    averages = (sampler.state.tensors["average"] for sampler in (whole, parts))
    torch.testing.assert_close(*averages, rtol=1e-13, atol=0)


def test_statistics_of_the_fused_loss_teach_the_same() -> None:
    one, other = Adaptive(LINEAR, every=2), Adaptive(LINEAR, every=2)
    statistics = LossStatistics(other.buckets)
    for step in range(6):
        t, losses = torch.randint(1000, (64,), generator=g(step)), torch.rand(64, generator=g(step))
        one.update(t, losses)
        statistics.add(t, losses)
        other.update_from(statistics)
    assert float(statistics.count.sum()) == 0
    torch.testing.assert_close(one.state.tensors["average"], other.state.tensors["average"], rtol=1e-13, atol=0)
    statistics.add(torch.tensor([0, 999]), torch.tensor([math.inf, 7.0]))
    before = one.state.tensors["average"].clone()
    other.update_from(statistics)
    other.update_from(statistics)
    changed = (other.state.tensors["average"] / before - 1).abs().amax(0) > 1e-9
    assert changed.nonzero().flatten().tolist() == [31]
    with pytest.raises(EbdiffError, match="other buckets"):
        Adaptive(LINEAR, buckets=8).update_from(statistics)


def priors() -> dict[str, tuple[NoiseProfile, Sampler | None]]:
    edm = NoiseProfile.edm()
    return {
        "uniform": (LINEAR, None),
        "weighted": (LINEAR, Weighted(Uniform(LINEAR), torch.linspace(0, 2, 1000))),
        "within": (LINEAR, Within(Region(240, 440), Uniform(LINEAR))),
        "continuous": (edm, LogNormalSigma(edm)),
    }


@pytest.mark.parametrize("name", priors())
def test_the_objective_stays_the_priors(name: str) -> None:
    """E_p[w L] is the prior's for any L; the weights have mean 1 under p; nothing leaves the prior's support."""
    profile, prior = priors()[name]
    prior = Uniform(profile) if prior is None else prior
    sampler = taught(Adaptive(profile, prior, mix=0.5, floor=0.01, every=4), torch.linspace(5, 0.1, 1000))
    pmf, weights = sampler.pmf(), sampler.weights().double()
    assert not torch.allclose(pmf, prior.pmf(), rtol=0.05)
    assert float(pmf.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(pmf > 0, prior.pmf() > 0)
    for seed in range(3):
        losses = torch.rand(1000, dtype=torch.float64, generator=g(seed)) ** 3
        expected = float((prior.pmf() * prior.weights() * losses).sum())
        assert float((pmf * weights * losses).sum()) == pytest.approx(expected, rel=1e-6)
    assert float((pmf * weights).sum()) == pytest.approx(1, abs=1e-6)
    bound = prior.weights().double() / (0.99 * 0.5)
    assert bool((weights <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", ["uniform", "weighted", "within"])
def test_it_learns_the_density_of_least_variance(name: str) -> None:
    """Where a bucket has one loss, w L is constant under that density: its second moment is its mean squared."""
    profile, prior = priors()[name]
    prior = Uniform(profile) if prior is None else prior
    sampler = Adaptive(profile, prior, mix=1.0, floor=1e-9, every=1)
    losses = 1 + sampler.buckets.double() % 5
    sampler.update(torch.arange(1000).repeat(10), losses.repeat(10))
    pmf, weights = sampler.pmf(), sampler.weights().double()
    mean = float((prior.pmf() * prior.weights() * losses).sum())
    assert float((pmf * (weights * losses) ** 2).sum()) == pytest.approx(mean**2, rel=1e-5)
    assert float((prior.pmf() * (prior.weights() * losses) ** 2).sum()) > 1.05 * mean**2


def test_buckets_have_equal_shares_of_the_prior_and_are_intervals_of_log_snr() -> None:
    edm = NoiseProfile.edm()
    for profile, prior in (
        (LINEAR, Uniform(LINEAR)),
        (edm, LogNormalSigma(edm)),
        (LINEAR, CLTS(LINEAR, 300, 40, 1, step=1)),
    ):
        bucket = Adaptive(profile, prior, buckets=32).buckets
        assert bool((bucket.diff() >= 0).all())
        mass = torch.zeros(32, dtype=torch.float64).index_add(0, bucket, prior.pmf())
        assert float((mass - 1 / 32).abs().max()) <= 2 * float(prior.pmf().max())


def test_fewer_buckets_where_a_timestep_has_more_than_its_share() -> None:
    assert Adaptive(FOUR, buckets=32).buckets.tolist() == [0, 1, 2, 3]
    inside = Adaptive(FOUR, Within(Region(1, 3), Uniform(4)), buckets=8)
    assert sorted(set(inside.buckets.tolist())) == [0, 1]
    inside.update(torch.tensor([1, 2]).repeat(10), torch.tensor([1.0, 3.0]).repeat(10))


# Both


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


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: LossSecondMoment(4, history=0), "history"),
        (lambda: LossSecondMoment(4, floor=0), "floor"),
        (lambda: LossSecondMoment(0), "schedule"),
        (lambda: Adaptive(FOUR, buckets=0), "buckets"),
        (lambda: Adaptive(FOUR, mix=0), "mix"),
        (lambda: Adaptive(FOUR, mix=1.1), "mix"),
        (lambda: Adaptive(FOUR, floor=math.nan), "floor"),
        (lambda: Adaptive(FOUR, halflife=-1), "halflife"),
        (lambda: Adaptive(FOUR, every=0), "every"),
        (lambda: Adaptive(FOUR, Uniform(5)), "another schedule"),
        (lambda: Adaptive(FOUR).update(torch.zeros(3), torch.zeros(4)), "one length"),
        (lambda: Adaptive(FOUR).update(torch.tensor(0), torch.tensor(0.0)), "one length"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(call, word: str) -> None:
    with pytest.raises(EbdiffError, match=word):
        call()


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
        assert first[name][-1] == pytest.approx(alone[-1], rel=1e-12)
        assert first[name][-1] != Uniform(sampler.T).pmf().tolist()
        for step in range(9):
            assert first[name][step] + second[name][step] == alone[step]
