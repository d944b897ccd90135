"""Noise that is not stored: normal numbers made from a seed and each element's place, again whenever they are needed.

Philox4x32-10 gives four words of 32 bits for a counter of four words and a key of two. The words of counter
(i // 4, sample, offset) make the normal numbers of the elements i, i + 1, i + 2, i + 3 of a sample, i divisible by 4.

Source: Salmon et al. 2011 (Philox); Box & Muller 1958. Rounded as triton.language.randn4x does, which takes the same
words for the same counter and key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["PhiloxNoise", "normals", "philox", "place_of_sample"]

_LOW = 0xFFFFFFFF
_FACTORS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # what the key is raised by in each round
_ROUNDS = 10
_TO_UNIFORM = 4.6566127342e-10  # the largest factor with 2**31 * factor < 1 in float32
_LEAST = 1e-7  # below it, uniform numbers are raised to it: no normal number is further out than 5.68


@dataclass(frozen=True)
class PhiloxNoise:
    """Standard normal noise, given by a seed. The same seed is the same noise.

    Args:
        seed: int64 [2], the key and an offset, on the device of what it is noise for. Its values are read when the
            noise is made, so that a CUDA graph that draws a new seed has new noise in every replay.

    Raises:
        EbdiffError: the seed is none.
    """

    seed: Tensor

    def __post_init__(self) -> None:
        if self.seed.dtype != torch.int64 or self.seed.shape != (2,):
            got = f"{self.seed.dtype} {list(self.seed.shape)}"
            raise EbdiffError("a seed for Philox", expected="torch.int64 [2]", got=got, remedy="see PhiloxNoise.draw")

    @classmethod
    def draw(cls, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> PhiloxNoise:
        """With a seed of its own, drawn from torch's generator without waiting for the device."""
        return cls(torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator))

    def tensor_like(self, x: Tensor) -> Tensor:
        """The noise for x, [B, *]: float32 at least, and rounded to x's dtype nowhere.

        Elements are numbered within each sample, in the order of x's memory.
        """
        count = x.shape[1:].numel()
        flat = normals(self.seed, len(x), count, torch.promote_types(x.dtype, torch.float32))
        return flat.as_strided(x.shape, (count, *place_of_sample(x)))


def place_of_sample(x: Tensor) -> Sequence[int]:
    """Strides of a sample of x, [B, *], that leave no gaps: in the order of x's memory, dimensions of stride 0 last."""
    strides, reach = [1] * (x.dim() - 1), 1
    for i in reversed(sorted(range(len(strides)), key=lambda i: -x.stride(i + 1))):
        strides[i], reach = reach, reach * x.shape[i + 1]
    return strides


def normals(seed: Tensor, samples: int, count: int, dtype: torch.dtype) -> Tensor:
    """[samples, count] standard normal numbers of a seed, computed in float32."""
    blocks = torch.arange((count + 3) // 4, device=seed.device)
    sample = torch.arange(samples, device=seed.device)[:, None]
    counter = blocks & _LOW, sample & _LOW, seed[1] & _LOW, seed[1] >> 32 & _LOW
    uniforms = [_uniform(word) for word in philox(counter, (seed[0] & _LOW, seed[0] >> 32 & _LOW))]
    pairs = [_box_muller(*uniforms[:2]), _box_muller(*uniforms[2:])]
    return torch.stack([*pairs[0], *pairs[1]], -1).flatten(1)[:, :count].to(dtype).contiguous()


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words for a counter of four and a key of two, all int64 in [0, 2**32) and broadcast."""
    words, (low, high) = list(torch.broadcast_tensors(*counter)), key
    for _ in range(_ROUNDS):
        first, second = (words[i] * factor for i, factor in zip((0, 2), _FACTORS, strict=True))
        words = [_high(second) ^ words[1] ^ low, second & _LOW, _high(first) ^ words[3] ^ high, first & _LOW]
        low, high = low + _WEYL[0] & _LOW, high + _WEYL[1] & _LOW
    return words


def _high(product: Tensor) -> Tensor:
    """The upper word of a product, which may have wrapped around to a negative number."""
    return product >> 32 & _LOW


def _uniform(word: Tensor) -> Tensor:
    """In [0, 1), float32: the distance of the word, taken as int32, from -1 or 0."""
    signed = word.to(torch.int32)
    return torch.where(signed < 0, ~signed, signed).to(torch.float32) * _TO_UNIFORM


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = (-2 * first.clamp(min=_LEAST).log()).sqrt(), 2 * pi * second
    return radius * angle.cos(), radius * angle.sin()
