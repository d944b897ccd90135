"""A mask applied by names to any tensors of a model's shapes: zeroing, cutting, growing back; and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import needs_native, only, same_bytes, twins
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from toys import mlp

import ebdiff
from ebdiff import EbdiffError
from ebdiff.pruning.slices import apply_mask_, compact, scatter_back


class Toy(nn.Module):
    """Two convolutions around a normalisation, concatenated and projected: masks on both axes, and one in a concat."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.last(torch.cat([h, self.second(h)], 1))


def traced() -> tuple[nn.Module, ebdiff.ChannelPlan, ebdiff.ChannelMask]:
    model = Toy()
    plan = ebdiff.trace(model, torch.zeros(1, 3, 4, 4))
    chance = torch.Generator().manual_seed(1)
    scores = {space.name: torch.rand(space.size, generator=chance) for space in plan}
    return model, plan, ebdiff.ChannelMask.draw(scores, plan=plan, ratio=0.4)


def by_hand() -> tuple[ebdiff.ChannelPlan, ebdiff.ChannelMask]:
    """Weights [3, 2] and [1, 3], of whose three hidden channels the middle one is removed."""
    _, plan = mlp(2, 3, 1)
    return plan, ebdiff.ChannelMask(plan, {"h1": torch.tensor([True, False, True])})


def named(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}


def test_hand() -> None:
    plan, mask = by_hand()
    first, second = torch.arange(6.0).view(3, 2), torch.tensor([[1.0, float("nan"), 3.0]])
    moment = torch.ones(3, 2, dtype=torch.bfloat16)
    pairs = [("0.weight", first), ("1.weight", second), ("0.weight", moment)]
    small = compact(pairs, plan, mask)
    apply_mask_(pairs, plan, mask)
    assert first.tolist() == [[0, 1], [0, 0], [4, 5]]
    assert second.tolist() == [[1, 0, 3]]
    assert moment.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert [part.tolist() for part in small] == [[[0, 1], [4, 5]], [[1, 3]], [[1, 1], [1, 1]]]
    names = [name for name, _ in pairs]
    grown = scatter_back(list(zip(names, small, strict=True)), plan, mask)
    assert [part.tolist() for part in grown] == [part.tolist() for _, part in pairs]
    into = [torch.full((3, 2), 9.0), torch.full((1, 3), 9.0)]
    scatter_back(dict(zip(names[:2], small[:2], strict=True)), plan, mask, into=into)
    assert [part.tolist() for part in into] == [[[0, 1], [9, 9], [4, 5]], [[1, 9, 3]]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_law_masked_is_cut_and_grown_and_has_the_shapes_of_the_smaller_network(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    model, plan, mask = traced()
    model = model.to(memory_format=memory_format)
    tensors = named(model, dtype)
    whole = twins(list(tensors.values()))
    small = dict(zip(tensors, compact(tensors, plan, mask), strict=True))
    grown = scatter_back(small, plan, mask)
    shrunk = dict(ebdiff.shrink(model, mask).named_parameters())
    apply_mask_(tensors, plan, mask)
    assert {name: part.shape for name, part in small.items()} == {name: p.shape for name, p in shrunk.items()}
    for name, part, before in zip(tensors, grown, whole, strict=True):
        for dim, alive in plan.kept(mask.keep, name).items():
            before.index_fill_(dim, (~alive).nonzero()[:, 0], 0)
        assert torch.equal(tensors[name], before)
        assert torch.equal(part, before)
        assert part.stride() == tensors[name].stride()
    assert any(bool((part == 0).any()) for part in grown)


@needs_native
def test_all_tensors_of_a_model_go_through_the_compiled_part() -> None:
    model, plan, mask = traced()
    pairs = [(name, p) for dtype in (torch.float32, torch.bfloat16) for name, p in named(model, dtype).items()]
    expected = twins([tensor for _, tensor in pairs])
    with only("reference"):
        apply_mask_(zip([name for name, _ in pairs], expected, strict=True), plan, mask)
    with only("native"):
        apply_mask_(pairs, plan, mask)
        scatter_back(list(zip([name for name, _ in pairs], compact(pairs, plan, mask), strict=True)), plan, mask)
    assert all(same_bytes(a, b) for (_, a), b in zip(pairs, expected, strict=True))


def test_leaves_under_autograd() -> None:
    model, plan, mask = traced()
    parameters = dict(model.named_parameters())
    apply_mask_(parameters, plan, mask)
    small = compact(parameters, plan, mask)
    grown = scatter_back(dict(zip(parameters, small, strict=True)), plan, mask)
    assert not any(part.requires_grad for part in (*small, *grown))
    assert all(p.requires_grad and p.grad_fn is None for p in parameters.values())


def test_a_mask_that_removes_nothing_and_no_tensors_at_all() -> None:
    model, plan, _ = traced()
    tensors, everything = named(model), ebdiff.ChannelMask(plan, {})
    before = twins(list(tensors.values()))
    apply_mask_(tensors, plan, everything)
    small = compact(tensors, plan, everything)
    assert all(torch.equal(a, b) for a, b in zip(small, before, strict=True))
    assert all(same_bytes(a, b) for a, b in zip(tensors.values(), before, strict=True))
    assert compact({}, plan, everything) == []
    assert scatter_back({}, plan, everything) == []
    apply_mask_({}, plan, everything)


WRONG: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "an unknown name": ("2.weight", lambda: torch.ones(3, 2)),
    "another shape": ("0.weight", lambda: torch.ones(2, 3)),
    "an expanded tensor": ("0.weight", lambda: torch.ones(3, 1).expand(3, 2)),
    "a sparse tensor": ("0.weight", lambda: torch.ones(3, 2).to_sparse()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_changes(wrong: str) -> None:
    plan, mask = by_hand()
    name, make = WRONG[wrong]
    good = torch.ones(1, 3)
    with pytest.raises((EbdiffError, NotImplementedError)):
        apply_mask_([("1.weight", good), (name, make())], plan, mask)
    assert good.all()


def test_wrong_masks_and_lists_are_refused() -> None:
    plan, mask = by_hand()
    _, other = mlp(2, 4, 1)
    with pytest.raises(EbdiffError, match="another plan"):
        apply_mask_({}, other, mask)
    small = compact({"0.weight": torch.ones(3, 2)}, plan, mask)
    with pytest.raises(EbdiffError, match="into"):
        scatter_back([("0.weight", small[0])], plan, mask, into=[])
    with pytest.raises(EbdiffError, match="shape of"):
        scatter_back([("0.weight", small[0])], plan, mask, into=[torch.ones(2, 3)])
    with pytest.raises(EbdiffError, match="small tensor 0"):
        scatter_back([("0.weight", torch.ones(3, 2))], plan, mask)


# torch.compile


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compile_with_a_traced_plan(backend: str, asked_before: bool) -> None:
    torch._dynamo.reset()
    model, plan, mask = traced()
    if asked_before:
        assert all(isinstance(mask.kept(name), dict) for name in plan.shapes)

    def cut(tensors: dict[str, Tensor]) -> list[Tensor]:
        apply_mask_(tensors, plan, mask)
        return compact(tensors, plan, mask)

    def grow(small: dict[str, Tensor]) -> list[Tensor]:
        return scatter_back(small, plan, mask)

    tensors, expected = named(model), named(model)
    small = torch.compile(cut, fullgraph=True, backend=backend)(tensors)
    assert all(torch.equal(a, b) for a, b in zip(small, cut(expected), strict=True))
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    cut_before = dict(zip(tensors, compact(expected, plan, mask), strict=True))
    grown = torch.compile(grow, fullgraph=True, backend=backend)(cut_before)
    assert all(torch.equal(a, b) for a, b in zip(grown, expected.values(), strict=True))


def test_compile_again_with_another_mask() -> None:
    torch._dynamo.reset()
    model, plan, mask = traced()
    space = next(iter(plan))
    other = ebdiff.ChannelMask(plan, {**mask.keep, space.name: mask[space.name].flip(0)})
    compiled = torch.compile(lambda tensors, m: apply_mask_(tensors, plan, m), fullgraph=True, backend="aot_eager")
    for chosen in (mask, other, mask):
        tensors, expected = named(model), named(model)
        compiled(tensors, chosen)
        apply_mask_(expected, plan, chosen)
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_a_mask_remembers_what_it_masks() -> None:
    model, _plan, mask = traced()
    names = [name for name, _ in model.named_parameters()]
    axes = mask.axes(names)
    assert axes is mask.axes(names)
    assert axes is not mask.axes(names[1:])
    for k in range(20):
        mask.axes(names[k % len(names) :] * (k + 1))
    assert len(mask._axes) <= 8
    assert [part.tolist() for part in mask.axes(names).keep] == [part.tolist() for part in axes.keep]


def test_fake_tensors_leave_nothing_behind() -> None:
    model, plan, mask = traced()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        apply_mask_({name: mode.from_tensor(p) for name, p in named(model).items()}, plan, mask)
    tensors = named(model)
    apply_mask_(tensors, plan, mask)
    assert all(
        not tensors[name].index_select(d, (~keep).nonzero()[:, 0]).any()
        for name in tensors
        for d, keep in mask.kept(name).items()
    )
