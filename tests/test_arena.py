"""Tensors of an arena are saved singly; refusals leave nothing half done."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from test_shrink import trained
from torch import Tensor, nn

import ebdiff
from ebdiff import EbdiffError
from ebdiff.ops import channel_mask, native
from ebdiff.ops import channel_mask_reference as reference
from ebdiff.optim import AdamW
from ebdiff.pruning.slices import scatter_back


def test_every_shrunken_tensor_is_saved_by_itself(tmp_path: Path) -> None:
    model, *_, args, mask = trained(1)
    small = ebdiff.shrink(model, mask)
    assert len({p.untyped_storage().data_ptr() for p in small.parameters()}) == len(list(small.parameters()))
    save_model(small, str(tmp_path / "whole.safetensors"))
    first = next(small.parameters())
    torch.save(first, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < first.nbytes + 4096
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(small)
    expected = prepared(*args).sample
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(prepared(*args).sample, expected)


def test_an_arena_lives_as_long_as_one_of_its_tensors() -> None:
    model, *_, mask = trained(1)
    name, parameter = list(ebdiff.shrink(model, mask).named_parameters())[5]
    torch.randn(1 << 20)  # would be given freed memory
    expected = dict(model.named_parameters())[name].detach()
    for dim, alive in mask.kept(name).items():
        expected = expected.index_select(dim, alive.nonzero()[:, 0])
    assert torch.equal(parameter, expected)


def test_a_network_without_memory_shrinks() -> None:
    model, *_, mask = trained(1)
    small = ebdiff.shrink(model.to("meta"), mask)
    expected = [[int(alive.sum()) for alive in mask.kept(name).values()] for name, _ in small.named_parameters()]
    found = [[p.shape[dim] for dim in mask.kept(name)] for name, p in small.named_parameters()]
    assert found == expected
    assert {p.device.type for p in small.parameters()} == {"meta"}


def test_grown_tensors_have_their_own_storages() -> None:
    model, *_, mask = trained(1)
    small = dict(ebdiff.shrink(model, mask).named_parameters())
    dense = scatter_back(small, mask.plan, mask)
    assert len({tensor.untyped_storage().data_ptr() for tensor in dense}) == len(dense)


def test_a_refused_average_leaves_the_training_state_whole() -> None:
    model, optimizer, ema, _, mask = trained(1)
    shadows = ema.shadow_params
    shadows[3] = shadows[3].to_sparse()
    before = [tensor.clone() for tensor in (*model.parameters(), *_moments(optimizer))]
    with pytest.raises(EbdiffError, match="EMA does not belong"):
        ebdiff.shrink_(model, mask, optimizer=optimizer, ema=shadows)
    after = [*model.parameters(), *_moments(optimizer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["exp_avg"] for state in optimizer.state.values()]


def test_a_refused_second_group_leaves_the_first_unstepped() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([{"params": [first]}, {"params": [second]}])
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[second]["exp_avg"] = torch.zeros(5)
    before = first.detach().clone()
    with pytest.raises(EbdiffError, match="exp_avg"):
        optimizer.step()
    assert torch.equal(first, before)
    assert float(optimizer.state[first]["step"]) == 1


@pytest.mark.skipif(native.module() is None, reason="the compiled part is not built")
def test_a_change_of_memory_format_behind_a_linear_layer_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 8, 3))
    optimizer = AdamW(model.parameters())

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    model.to(memory_format=torch.channels_last)
    monkeypatch.setattr(reference, "masked_adamw_", None)
    step()
    assert optimizer.state[model[1].weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_a_default_device_does_not_reach_the_step_count() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter])
    parameter.grad = torch.ones(3)
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[parameter]["step"].device.type == "cpu"


def test_arguments_of_torch_are_taken_or_refused() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    AdamW(parameters, foreach=True, fused=False)
    for unknown in ({"capturable": True}, {"differentiable": True}):
        with pytest.raises(EbdiffError, match="capturable"):
            AdamW(parameters, **unknown)


@pytest.mark.skipif(native.module() is None, reason="the compiled part is not built")
def test_freed_memory_is_refused() -> None:
    axes = channel_mask.Axes((torch.tensor([True, False]),), (0,), (0,))
    for tensor in (torch.ones(2, 4), torch.ones(3, 4)[1:]):
        tensor.untyped_storage().resize_(0)
        for call in (channel_mask.apply_mask_, channel_mask.compact):
            with pytest.raises(EbdiffError, match="storage"):
                call([tensor], axes)


def test_betas_of_one_are_refused_by_the_operator() -> None:
    lists = [[torch.ones(2)] for _ in range(4)]
    numbers = {"lr": 1e-3, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    before = copy.deepcopy(lists)
    with pytest.raises(EbdiffError, match="betas"):
        channel_mask.masked_adamw_(*lists, [], channel_mask.Axes(), beta2=1.0, **numbers)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(lists, before, strict=True))


def test_sums_of_a_long_vector_need_little_memory() -> None:
    x = torch.ones(1 << 20)
    sums = channel_mask.channel_sums([x], [], [0], [0], "square")
    assert torch.equal(sums, torch.ones(1 << 20, dtype=torch.float64))
