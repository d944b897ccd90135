"""Noise from Philox: the words of the published generator, normal numbers, and the same ones whenever they are made."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import pytest
import torch
from norm_cases import LAYOUTS
from op_cases import needs_native
from timestep_loss_cases import exact_noise
from torch import Tensor

from ebdiff import EbdiffError
from ebdiff.ops import PhiloxNoise, noised, weighted_timestep_loss
from ebdiff.ops import timestep_loss_cpu as cpu
from ebdiff.ops import timestep_loss_reference as reference
from ebdiff.ops.philox import philox

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_words_are_the_published_ones(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """Known answers for philox4x32-10, of Random123's authors."""
    found = philox([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(map(int, found)) == words


def seed_of(key: int, offset: int = 0) -> Tensor:
    return torch.tensor([key, offset])


def drawn(seed: Tensor, x: Tensor) -> Tensor:
    """The noise that the compiled part makes for x."""
    only_noise, row = torch.tensor([[0.0], [1.0]]), torch.zeros(len(x), dtype=torch.int64)
    return cpu.noised(torch.zeros_like(x), None, seed, only_noise, row)


@needs_native
@pytest.mark.parametrize("seed", [seed_of(0), seed_of(-1, -1), seed_of(2**40 + 5, 7 << 33), seed_of(-(2**63), 2**62)])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 32, 32), (2, 7, 53, 61), (4, 1), (1, 20001)])
def test_the_compiled_part_makes_the_same_noise(shape: tuple[int, ...], seed: Tensor) -> None:
    """A single wrong bit of a word would give another number altogether."""
    x = torch.empty(shape)
    torch.testing.assert_close(drawn(seed, x), exact_noise(seed, x).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(PhiloxNoise(seed).tensor_like(x), exact_noise(seed, x).float(), rtol=3e-6, atol=3e-6)


@needs_native
def test_it_is_closer_to_exact_normal_numbers_than_torchs_functions() -> None:
    seed, x = seed_of(11), torch.empty(16, 3, 64, 64)
    true = exact_noise(seed, x)
    ours, theirs = ((made - true).abs() for made in (drawn(seed, x), PhiloxNoise(seed).tensor_like(x)))
    assert ours.max() <= theirs.max()
    assert ours.mean() <= theirs.mean()


# Statistics -----------------------------------------------------------------------------------------------------------


def samples(seed: Tensor) -> Tensor:
    """float64 [64, 16384]: about a million."""
    return PhiloxNoise(seed).tensor_like(torch.empty(64, 4, 64, 64)).double().flatten(1)


@pytest.mark.parametrize("key", [0, 1, 123456789012345])
def test_moments_are_those_of_normal_numbers(key: int) -> None:
    """To five standard errors."""
    x = samples(seed_of(key)).flatten()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - moment) < 5 * sqrt(variance / n), power


@pytest.mark.parametrize("lane", range(4))
def test_the_distribution_is_normal(lane: int) -> None:
    """Kolmogorov and Smirnov's distance, for each of a counter's four numbers; 1.95 is passed once in a thousand."""
    x = samples(seed_of(3))[:, lane::4].flatten().sort().values
    n = len(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    share = torch.special.ndtr(x)
    distance = torch.maximum((share - steps[:-1]).abs().max(), (share - steps[1:]).abs().max())
    assert float(distance) < 1.95 / sqrt(n)


def test_tails_reach_as_far_as_a_million_numbers_do() -> None:
    x = samples(seed_of(5)).flatten()
    assert 4.4 < float(x.abs().max()) < 5.69
    expected = 2 * float(torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64))) * len(x)
    assert abs(int((x.abs() > 3).sum()) - expected) < 5 * sqrt(expected)


def test_nothing_is_correlated() -> None:
    """Neighbours, the four of a counter, samples, seeds and offsets; their squares neither. To five standard errors."""
    first = samples(seed_of(3))
    others = [samples(seed) for seed in (seed_of(4), seed_of(3, 1), seed_of(3 + (1 << 32)), seed_of(3, 1 << 32))]
    pairs = [(first.flatten(), other.flatten()) for other in others]
    pairs += [(first[:-1].flatten(), first[1:].flatten()), (first[0], first[32])]
    pairs += [(first[:, :-lag].flatten(), first[:, lag:].flatten()) for lag in (1, 2, 3, 4, 64, 1024, 4096)]
    pairs += [(first[:, i::4].flatten(), first[:, j::4].flatten()) for i, j in [*pairwise(range(4)), (0, 2), (0, 3)]]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 5 / sqrt(len(a))
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < 5 * 2 / sqrt(len(a))


# The same noise again -------------------------------------------------------------------------------------------------


class Plain:
    """x_t = x0 / 2 + noise."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor([[0.5], [1.0]]), torch.zeros_like(t)

    def cells(self, t: Tensor) -> Tensor:
        return t


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_draws_what_noising_drew(layout: str) -> None:
    """To the last bit: predicting exactly that noise costs nothing."""
    x0 = LAYOUTS[layout](torch.randn(3, 5, 9, 7))
    t, noise = torch.zeros(3, dtype=torch.int64), PhiloxNoise.draw()
    used, _ = noised(torch.zeros_like(x0), t, Plain(), noise)
    found = weighted_timestep_loss(used, (x0, noise), t, torch.ones(3), "epsilon", profile=Plain())
    assert not found.per_sample.any()
    other = PhiloxNoise(noise.seed + 1)
    assert weighted_timestep_loss(used, (x0, other), t, torch.ones(3), "epsilon", profile=Plain()).loss > 1


def test_noise_belongs_to_a_place_and_a_sample_alone() -> None:
    """Not to the size of the batch, nor to what lies between samples."""
    seed = seed_of(9)
    large, small = (PhiloxNoise(seed).tensor_like(torch.empty(b, 3, 4, 5)) for b in (7, 2))
    assert torch.equal(large[:2], small)
    sliced = torch.empty(7, 6, 4, 5)[:2, :3]
    assert torch.equal(PhiloxNoise(seed).tensor_like(sliced), small)
    last = PhiloxNoise(seed).tensor_like(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(1), small.flatten(1))


def test_seeds_are_drawn_from_torchs_generator() -> None:
    draws = [PhiloxNoise.draw(generator=torch.Generator().manual_seed(seed)).seed for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(4)
    assert not torch.equal(PhiloxNoise.draw().seed, PhiloxNoise.draw().seed)


@pytest.mark.parametrize("seed", [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.tensor(5)])
def test_what_is_no_seed_is_refused(seed: Tensor) -> None:
    with pytest.raises(EbdiffError, match="seed"):
        PhiloxNoise(seed)


def test_the_reference_and_the_compiled_part_noise_alike() -> None:
    x0, seed, row = torch.randn(3, 4, 9), seed_of(2, 3), torch.tensor([1, 0, 1])
    table = torch.tensor([[0.9, 0.1], [0.4, 0.99]])
    ours = torch.ops.ebdiff.noised(x0, None, seed, table, row)
    torch.testing.assert_close(ours, reference.noised(x0, None, seed, table, row), rtol=1e-5, atol=1e-5)
