"""BlockMask: what it keeps, its compressed rows and columns, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ebdiff import EbdiffError
from ebdiff.ops import BlockMask, sparse_attention


def test_rows_and_columns_of_a_mask_by_hand() -> None:
    kept = torch.tensor([[[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]]], dtype=torch.bool)
    mask = BlockMask(kept, 16, 20, 48)
    assert mask.rows.start.tolist() == [0, 2, 2, 3, 6]
    assert mask.rows.at.tolist() == [0, 2, 1, 0, 1, 2]
    assert mask.columns.start.tolist() == [0, 1, 1, 2, 3, 5, 6]
    assert mask.columns.at.tolist() == [0, 0, 1, 0, 1, 1]
    assert mask.density == 0.5
    assert str(mask) == "2 heads, 20 x 48 tokens in blocks of 16, 50.0% kept"


def test_dense_expands_blocks_to_tokens_and_cuts_the_last() -> None:
    kept = torch.rand(2, 3, 2, 3) < 0.5
    dense = BlockMask(kept, 32, 40, 70).dense()
    assert dense.shape == (2, 3, 40, 70)
    for i, j in ((0, 0), (31, 31), (32, 32), (39, 69), (0, 64)):
        assert torch.equal(dense[:, :, i, j], kept[:, :, i // 32, j // 32])


def test_a_mask_made_while_sampling_serves_training() -> None:
    with torch.inference_mode():
        mask = BlockMask.local(1, 40, 40, 16, 0)
        assert not mask.to("meta").rows.at.is_inference()
    x = torch.randn(1, 1, 40, 8, requires_grad=True)
    sparse_attention(x, x, x, mask).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("window", [0, 1, 32, 33])
def test_patterns(window: int) -> None:
    assert bool(BlockMask.full(3, 100, 40, 32).kept.all())
    # A block stays exactly where one of its pairs of tokens is near enough; those behind the ends count too.
    q, k = torch.arange(112)[:, None], torch.arange(160)[None, :]
    near = ((q - k).abs() <= window).view(7, 16, 10, 16).any(3).any(1)
    for heads in (1, 2):
        local = BlockMask.local(heads, 100, 150, 16, window)
        assert torch.equal(local.kept, near.expand(1, heads, 7, 10))
    strided = BlockMask.strided(2, 100, 150, 16, 3, window)
    assert torch.equal(strided.kept, local.kept | (torch.arange(10) % 3 == 0))


def test_top_keeps_the_most_and_the_best_of_every_row() -> None:
    mass = torch.tensor([[[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0], [5.0, 4.0, 0.0]]])
    expected = [[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 1, 0]]]
    assert BlockMask.top(mass, 0.5, 16, 32, 48).kept[0].int().tolist() == expected
    least = BlockMask.top(mass, 0.01, 16, 32, 48)
    assert torch.equal(least.kept.sum(-1), torch.ones(1, 2, 2, dtype=torch.int64))
    assert bool(BlockMask.top(mass, 1.0, 16, 32, 48).kept.all())


@pytest.mark.parametrize("density", [0.1, 0.37, 0.8])
def test_top_keeps_no_block_of_less_mass_than_one_it_leaves_out(density: float) -> None:
    mass = torch.rand(2, 3, 8, 8)
    mask = BlockMask.top(mass, density, 16, 128, 128)
    counts = mask.kept.flatten(2).sum(2)
    assert bool((counts == max(8, round(density * 64))).all())
    best = torch.zeros_like(mask.kept).scatter(-1, mass.argmax(-1, keepdim=True), True)
    for kept, mass_, first in zip(mask.kept.flatten(0, 1), mass.flatten(0, 1), best.flatten(0, 1), strict=True):
        others = mass_[kept & ~first]
        assert others.numel() == 0 or others.min() >= mass_[~kept].max()


def test_heads_are_those_that_stay() -> None:
    mask = BlockMask(torch.rand(2, 4, 3, 2) < 0.5, 16, 33, 32)
    keep = torch.tensor([True, False, True, False])
    assert mask.heads(keep) == BlockMask(mask.kept[:, [0, 2]], 16, 33, 32)
    assert mask.heads(torch.ones(4, dtype=torch.bool)) == mask


def test_masks_are_equal_by_content_and_immutable() -> None:
    kept = torch.rand(1, 2, 3, 3) < 0.5
    mask, same = BlockMask(kept, 16, 40, 40), BlockMask(kept.clone(), 16, 40, 40)
    assert mask == same
    assert hash(mask) == hash(same)
    assert mask != BlockMask(kept, 16, 41, 40)
    assert mask != BlockMask(~kept, 16, 40, 40)
    kept[:] = ~kept
    assert mask == same
    assert mask.to("cpu") is mask


REFUSED: dict[str, Callable[[], BlockMask]] = {
    "16, 32, 64 or 128": lambda: BlockMask.full(1, 64, 64, 48),
    "at least one token": lambda: BlockMask.full(1, 0, 64, 16),
    "kept": lambda: BlockMask(torch.ones(1, 1, 4, 4), 16, 64, 64),
    r"bool \[samples or 1, heads, 4, 5\]": lambda: BlockMask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 64, 65),
    "heads": lambda: BlockMask(torch.ones(4, 4, dtype=torch.bool), 16, 64, 64),
    "window": lambda: BlockMask.local(1, 64, 64, 16, -1),
    "stride": lambda: BlockMask.strided(1, 64, 64, 16, 0),
    "density": lambda: BlockMask.top(torch.ones(1, 4, 4), 0.0, 16, 64, 64),
    "mass": lambda: BlockMask.top(torch.full((1, 4, 4), torch.nan), 0.5, 16, 64, 64),
    "keep": lambda: BlockMask.full(3, 64, 64, 16).heads(torch.zeros(3, dtype=torch.bool)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_mask_is_refused(what: str) -> None:
    with pytest.raises(EbdiffError, match=what):
        REFUSED[what]()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_mask_is_moved_inside_a_compiled_graph_once(backend: str) -> None:
    """As on the first call of a compiled network on a GPU; here to the device without memory."""
    mask, elsewhere = BlockMask.strided(2, 70, 50, 16, 2), torch.device("meta")

    def moved(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        there = mask.to(elsewhere)
        return x + there.rows.at.numel() + there.columns.start.numel(), there.kept, *there.rows, *there.columns

    call = torch.compile(moved, fullgraph=True, backend=backend)
    x = torch.zeros(1)
    for _ in range(2):
        total, *parts = call(x)
        assert total == mask.rows.at.numel() + mask.columns.start.numel()
        expected = (mask.kept, *mask.rows, *mask.columns)
        assert [(part.shape, part.dtype) for part in parts] == [(part.shape, part.dtype) for part in expected]
        assert all(part.device == elsewhere for part in parts)
    there = mask.to(elsewhere)
    assert mask.to(elsewhere) is there
    assert type(there.kept) is torch.Tensor
    assert (there.block, there.q_len, there.k_len) == (16, 70, 50)
    assert there.to("meta") is there
    assert there._elsewhere is not mask._elsewhere
