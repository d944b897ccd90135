"""What the group norm benchmark computes by itself: floors, kept memory, replays, and the baseline written for it."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_group_norm as bench

CPU = torch.device("cpu")
TINY = bench.Case((2, 6, 3, 3), (3, 3))
UNEVEN = bench.Case((2, 6, 3, 3), (1, 3, 2))


@pytest.mark.parametrize(
    ("what", "one", "two"), [("forward", 0.02, 0.03), ("backward", 0.03, 0.05), ("both", 0.05, 0.08)]
)
def test_floors_of_a_tensor_that_takes_ten_microseconds(what: str, one: float, two: float) -> None:
    assert bench.floors_ms(43_000_000, what) == pytest.approx({"one_pass_floor_ms": one, "two_pass_floor_ms": two})


def test_shares_of_the_floors() -> None:
    timed = [{"what": "bfloat16, channels_last, backward: eager, graph", "ms": 0.06}, {"what": "copy_", "ms": 1.0}]
    row, copy = bench.with_floors(timed, 43_000_000)
    assert (row["one_pass_share"], row["two_pass_share"]) == pytest.approx((0.5, 5 / 6))
    assert copy == timed[1]


def test_the_large_cases_are_one_of_each_kind() -> None:
    kinds = [large.kind(torch.bfloat16, "NCHW") for large, _ in bench.LARGE.values()]
    assert kinds == ["held", "cached", "two passes"]
    assert all(2 * torch.Size(large.shape).numel() >= 20e6 for large, _ in bench.LARGE.values())
    assert bench.Case((8, 512, 32, 32), (16,) * 32).kind(torch.float32, "NCHW") == "held and cached"


def test_kept_memory_counts_once() -> None:
    x = torch.randn(100, requires_grad=True)
    assert bench.saved_bytes(lambda x: x[:50] * x[50:], [x]) == 400
    assert bench.saved_bytes(lambda x: x.exp(), [x]) == 400
    assert bench.saved_bytes(lambda x: x + 1, [x]) == 0


def test_the_operator_keeps_x_and_two_numbers_a_group_and_the_weights() -> None:
    inputs, _ = bench.arguments(TINY, "NCHW", torch.float32, CPU)
    assert bench.saved_bytes(TINY.ours, inputs) == 4 * (2 * 6 * 9 + 2 * 2 * 2 + 2 * 6)


def test_a_graph_is_captured_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, seen = MagicMock(), []
    fake.stream.side_effect = lambda stream: nullcontext()
    fake.graph.side_effect = lambda graph: nullcontext(seen.append("capture"))
    monkeypatch.setattr(torch, "cuda", fake)
    replay = bench.replayed(lambda: seen.append("call"))
    assert seen == ["call"] * 3 + ["capture", "call"]
    replay()
    fake.CUDAGraph.return_value.replay.assert_called_once_with()
    assert seen[-2:] == ["capture", "call"]


def test_calls_do_what_they_are_named_for() -> None:
    inputs, dy = bench.arguments(TINY, "channels_last", torch.float32, CPU)
    calls = bench.calls_of(TINY.ours, inputs, dy, forward_only=False)
    y, backward, both = (calls[what]() for what in ("forward", "backward", "both"))
    assert not y.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(calls["backward"](), both, strict=True))
    for mine, true in zip(backward, torch.autograd.grad(TINY.plain(*inputs), inputs, dy), strict=True):
        torch.testing.assert_close(mine, true)
    assert list(bench.calls_of(TINY.ours, inputs, dy, forward_only=True)) == ["forward"]


@pytest.mark.parametrize("case", [TINY, UNEVEN])
def test_candidates_are_named_by_what_they_do_and_have_to_agree(case: bench.Case) -> None:
    functions = {"ebdiff": case.ours, "eager": case.plain}
    found = bench.candidates_of(case, "NCHW", torch.bfloat16, CPU, functions, "forward both")
    t = 2 * 108
    assert {name: candidate.floor for name, candidate in found.items()} == {
        f"bfloat16, NCHW, {what}: {name}": floor
        for name in functions
        for what, floor in (("forward", 2 * t), ("both", 5 * t))
    }
    assert {candidate.ours for candidate in found.values()} <= found.keys()

    def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return case.plain(x, weight, bias) + 1

    with pytest.raises(AssertionError, match="theirs"):
        bench.candidates_of(case, "NCHW", torch.bfloat16, CPU, {"theirs": wrong}, "forward")


def test_half_of_176_channels() -> None:
    case = bench.ragged()
    assert sum(case.sizes) == case.shape[1] == case.offsets[-1] == 88
    assert not case.even


@pytest.mark.parametrize(("c", "groups"), [(20, 2), (88, 8), (12, 12), (90, 3)])
def test_the_baseline_in_two_passes(c: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: several tiles along positions, whole groups in each, and a last one that is not full."""
    pytest.importorskip("triton", minversion="3.6")
    from triton_offline import interpreting

    torch.manual_seed(0)
    x = torch.randn(2, c, 5, 7).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, c)
    with interpreting("two_pass_nhwc"):
        monkeypatch.delitem(sys.modules, "benchmarks.two_pass_nhwc", raising=False)
        module: Any = importlib.import_module("benchmarks.two_pass_nhwc")
        monkeypatch.setattr(module, "_ELEMENTS", 512)
        y = module.group_norm_silu(x, weight, bias, groups, 1e-5)
    monkeypatch.delitem(sys.modules, "benchmarks.two_pass_nhwc")
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, F.silu(F.group_norm(x, groups, weight, bias)), rtol=1e-5, atol=1e-5)
