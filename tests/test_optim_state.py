"""AdamW's state goes to torch and back, is copied and resumed; groups and memory layouts."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from test_optim import SETTINGS, averaged, everything, gradients, network, same
from torch import Tensor, nn

from ebdiff.errors import EbdiffError
from ebdiff.optim import AdamW


def walk(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Steps first to last - 1, with the gradients of these numbers."""
    for step in range(first, last):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = gradient
        optimizer.step()


def weights(model: nn.Module) -> dict[str, list[Tensor]]:
    return {"p": list(model.parameters())}


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# State ----------------------------------------------------------------------------------------------------------------


def test_resuming_through_state_dicts_is_never_having_stopped() -> None:
    """Written by torch.save and read as weights only, as any optimizer's."""
    straight, mask = network()
    ema = averaged(straight)
    optimizer = AdamW(straight.named_parameters(), **SETTINGS, mask=mask, ema=ema)
    walk(straight, optimizer, 0, 6)

    first, _ = network()
    before = averaged(first)
    writer = AdamW(first.named_parameters(), **SETTINGS, mask=mask, ema=before)
    walk(first, writer, 0, 3)
    file = io.BytesIO()
    torch.save([first.state_dict(), writer.state_dict(), before.state_dict()], file)
    file.seek(0)
    model_state, state, ema_state = torch.load(file, weights_only=True)
    again, _ = network()
    again.load_state_dict(model_state)
    after = averaged(again)
    reader = AdamW(again.named_parameters(), mask=mask, ema=after)
    reader.load_state_dict(state)
    after.load_state_dict(ema_state)
    walk(again, reader, 3, 6)
    assert same(everything(straight, optimizer, ema), everything(again, reader, after))


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])
def test_state_goes_to_torch_and_back(kind: dict[str, bool]) -> None:
    """Three steps of torch's, three of ours, three of torch's = nine of torch's, to rounding."""
    straight, mixed = network()[0], network()[0]
    reference = torch.optim.AdamW(straight.parameters(), **SETTINGS, **kind)
    walk(straight, reference, 0, 9)
    theirs = torch.optim.AdamW(mixed.parameters(), **SETTINGS, **kind)
    walk(mixed, theirs, 0, 3)
    ours = AdamW(mixed.parameters())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    walk(mixed, ours, 3, 6)
    state = ours.state_dict()
    assert state.keys() == reference.state_dict().keys()
    assert state["param_groups"] == reference.state_dict()["param_groups"]
    for key, value in reference.state_dict()["state"][0].items():
        assert (state["state"][0][key].dtype, state["state"][0][key].shape) == (value.dtype, value.shape)
        assert state["state"][0][key].device == value.device
    back = torch.optim.AdamW(mixed.parameters())
    back.load_state_dict(copy.deepcopy(state))
    walk(mixed, back, 6, 9)
    close(mixed, straight)
    assert [int(s["step"]) for s in back.state.values()] == [9, 9, 9]


def test_capturable_flags_names_and_old_numbers_of_steps_are_taken() -> None:
    """torch has kept the step as an int, as a tensor on the device, and with names beside the parameters."""
    model, twin = network()[0], network()[0]
    theirs = torch.optim.AdamW(twin.named_parameters(), **SETTINGS)
    walk(twin, theirs, 0, 2)
    walk(model, torch.optim.AdamW(model.parameters(), **SETTINGS), 0, 2)
    state = copy.deepcopy(theirs.state_dict())
    state["param_groups"][0] |= {"capturable": True, "fused": True}
    for i, entry in state["state"].items():
        entry["step"] = [2, torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)][i]
    ours = AdamW(model.parameters())
    ours.load_state_dict(state)
    walk(model, ours, 2, 4)
    walk(twin, theirs, 2, 4)
    close(model, twin)
    assert {(s["step"].dtype, s["step"].device.type, float(s["step"])) for s in ours.state.values()} == {
        (torch.float32, "cpu", 4.0)
    }
    assert ours.state_dict()["param_groups"][0]["fused"] is True


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: _by_file(x)], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(copied: Any) -> None:
    model, mask = network()
    ema = averaged(model)
    optimizer = AdamW(model.named_parameters(), **SETTINGS, mask=mask, ema=ema)
    walk(model, optimizer, 0, 2)
    other, twin, shadow = copied((model, optimizer, ema))
    assert twin.mask == mask
    assert twin.ema is shadow
    walk(model, optimizer, 2, 4)
    assert not same(weights(model), weights(other))
    walk(other, twin, 2, 4)
    assert same(everything(model, optimizer, ema), everything(other, twin, shadow))


def _by_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_steps_that_differ_are_kept_apart() -> None:
    """A parameter that starts later has its own bias correction; a step set by hand counts."""
    model, twin = network()[0], network()[0]
    ours, theirs = AdamW(model.parameters(), **SETTINGS), torch.optim.AdamW(twin.parameters(), **SETTINGS)
    for step in range(8):
        for network_, optimizer in ((model, ours), (twin, theirs)):
            for i, (p, gradient) in enumerate(zip(network_.parameters(), gradients(network_, step), strict=True)):
                p.grad = None if i == step else gradient
            if step == 5:
                optimizer.state[network_[2].weight]["step"].fill_(1)
            optimizer.step()
    close(model, twin)
    assert [float(s["step"]) for s in ours.state.values()] == [float(s["step"]) for s in theirs.state.values()]


# Groups and layouts ---------------------------------------------------------------------------------------------------


def test_groups_have_their_own_settings_and_more_can_be_added() -> None:
    model, mask = network()
    twin = network()[0]
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    a, b, c = model.named_parameters()
    ours = AdamW([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.0}], ema=ema, ema_decay=0.0)
    theirs = torch.optim.AdamW([{"params": twin[0].weight, "lr": 0.5}, {"params": twin[1].weight, "weight_decay": 0.0}])
    walk(model, ours, 0, 2)
    walk(twin, theirs, 0, 2)
    before = ema[c[0]].clone()
    ours.add_param_group({"params": [c], "betas": (0.5, 0.6)})
    theirs.add_param_group({"params": [twin[2].weight], "betas": (0.5, 0.6)})
    walk(model, ours, 2, 4)
    walk(twin, theirs, 2, 4)
    close(model, twin)
    assert not torch.equal(ema[c[0]], before)
    torch.testing.assert_close(ema[c[0]], c[1].detach())
    ours.mask = mask
    walk(model, ours, 4, 5)
    assert int((model[2].weight == 0).sum()) == 6  # 2 of 6 columns


def test_several_groups_need_to_hear_what_an_ema_follows() -> None:
    model, _ = network()
    first, *others = model.parameters()
    groups = [{"params": others}, {"params": [first]}]
    ema, twin = averaged(model), averaged(model)
    with pytest.raises(EbdiffError, match=r"order.*ema_params=model.parameters"):
        AdamW(groups, ema=ema)
    optimizer = AdamW(groups, **SETTINGS, ema=ema, ema_params=model.parameters())
    for step in range(3):
        walk(model, optimizer, step, step + 1)
        twin.step(model.parameters())
    for ours, theirs in zip(ema.shadow_params, twin.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_ema_of_more_than_is_trained_copies_the_rest() -> None:
    """Parameters that the optimizer does not hold: frozen ones are copied, others followed, as EMAModel does."""
    model, _ = network()
    model[0].requires_grad_(False)
    ema, twin = averaged(model), averaged(model)
    optimizer = AdamW(model[2].parameters(), ema=ema, ema_params=model.named_parameters())
    for step in range(3):
        for p, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            p.data += 0.1 * gradient  # whoever else trains them
        model[2].weight.grad = torch.ones_like(model[2].weight)  # type: ignore[arg-type, union-attr]
        optimizer.step()
        twin.step(model.parameters())
    for ours, theirs in zip(ema.shadow_params, twin.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(ema.shadow_params[0], model[0].weight)  # type: ignore[arg-type]


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    empty = nn.utils.skip_init(nn.Conv2d, 4, 0, 1, bias=False)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), empty)


def test_memory_layouts_carry_over_and_change_no_bit() -> None:
    """channels_last weights with contiguous gradients, EMA and loaded moments; a layer without elements."""
    plain, last = convolutions(), convolutions()
    ema, other = averaged(plain), averaged(last)
    last.to(memory_format=torch.channels_last)
    optimizer, twin = AdamW(plain.parameters(), ema=ema), AdamW(last.parameters(), ema=other)
    walk(plain, optimizer, 0, 2)
    walk(last, twin, 0, 2)
    contiguous = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(contiguous)
    walk(plain, optimizer, 2, 4)
    walk(last, twin, 2, 4)
    assert same(everything(plain, optimizer, ema), everything(last, twin, other))
    for tensors in everything(last, twin, other).values():
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (tensors[0], tensors[2]))
    assert everything(last, twin, other)["exp_avg"][-1].shape == (0, 4, 1, 1)
