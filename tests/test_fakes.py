"""What ops on fake tensors give is remembered: it must be what torch itself gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ebdiff.pruning.fakes import Fakes

aten = torch.ops.aten


def into(out: Tensor, x: Tensor) -> Tensor:
    aten.add.out(x, x, out=out)
    return out


CALLS: dict[str, Any] = {
    "a sum": lambda x, i: aten.add.Tensor(x, x),
    "an integer more": lambda x, i: aten.add.Tensor(i, 1),
    "a float more": lambda x, i: aten.add.Tensor(i, 1.0),
    "a truth more": lambda x, i: aten.add.Tensor(i, True),
    "integers and others": lambda x, i: aten.mul.Tensor(x[0, 0, 0, :3], i),
    "half precision": lambda x, i: aten._to_copy.default(x, dtype=torch.float16),
    "on meta": lambda x, i: aten._to_copy.default(x, device=torch.device("meta")),
    "as it lies": lambda x, i: aten.relu.default(x),
    "halves as they lie": lambda x, i: aten.relu.default(x.half()),
    "as it lies on meta": lambda x, i: aten.relu.default(x.to("meta")),
    "channels last": lambda x, i: aten.clone.default(x, memory_format=torch.channels_last),
    "of channels last": lambda x, i: aten.relu.default(x.contiguous(memory_format=torch.channels_last)),
    "a view": lambda x, i: aten.view.default(x, [2, 4, 48]),
    "a copy by reshaping": lambda x, i: x.transpose(1, 3).reshape(2, -1),
    "turned": lambda x, i: aten.permute.default(x, [0, 2, 3, 1]),
    "a sum of turned ones": lambda x, i: aten.add.Tensor(x.transpose(1, 3), x.transpose(1, 3)),
    "a slice": lambda x, i: aten.slice.Tensor(x, 1, 1, 3),
    "a slice of a slice": lambda x, i: aten.slice.Tensor(x[:, 1:], 1, 1, 3),
    "a slice elsewhere": lambda x, i: aten.slice.Tensor(x[:, 1:], 1, 0, 2),
    "a slice further on": lambda x, i: aten.slice.Tensor(x[:, :3], 1, 0, 2),
    "as strided": lambda x, i: aten.as_strided.default(x[:, 1:], [2, 2], [3, 1]),
    "expanded": lambda x, i: aten.expand.default(x[:, :1], [2, 5, 6, 8]),
    "parts": lambda x, i: aten.split.Tensor(x, 3, 1),
    "joined": lambda x, i: aten.cat.default([x, x[:, :1]], 1),
    "a norm and its statistics": lambda x, i: aten.native_layer_norm.default(x, [8], None, None, 1e-5),
    "a convolution": lambda x, i: aten.convolution.default(
        x, x.new_empty(8, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1
    ),
    "drawn": lambda x, i: aten.rand_like.default(x),
    "in place": lambda x, i: aten.mul_.Tensor(x, 2),
    "chosen": lambda x, i: aten.index.Tensor(x, [None, i]),
    "in another": lambda x, i: into(x.new_empty(0), x),
    "imaginary parts": lambda x, i: torch.view_as_complex(x[..., :2]).imag.unsqueeze(0),
    "negative imaginary parts": lambda x, i: torch.view_as_complex(x[..., :2]).conj().imag.unsqueeze(0),
}


class _Through(TorchDispatchMode):
    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self.fakes = fakes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.fakes.run(func, args, kwargs or {})


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        yield Fakes(mode)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.empty(2, 4, 6, 8), torch.zeros(3, dtype=torch.long)


def facts(out: Any, given: Tensor) -> Any:
    if type(out) in (list, tuple):
        return type(out), [facts(item, given) for item in out]
    shared = out.untyped_storage()._cdata == given.untyped_storage()._cdata
    size = out.shape, out.stride(), out.storage_offset(), out.dtype, out.device
    base = out._base.shape if out._is_view() else None
    return type(out), size, shared, base, out.is_neg(), out.requires_grad, torch._C._dispatch_key_set(out)


@pytest.mark.parametrize("turn", [1, -1])
def test_calls_give_what_torch_gives_each_time(turn: int, fakes: Fakes) -> None:
    names = list(CALLS)[::turn]
    found: list[Any] = []
    for through in (False, True, True):
        found.append({})
        for name in names:
            x, i = inputs()
            if through:
                with _Through(fakes):
                    out = CALLS[name](x, i)
            else:
                out = CALLS[name](x, i)
            found[-1][name] = facts(out, x)
    for name in names:
        assert found[1][name] == found[0][name], name
        assert found[2][name] == found[0][name], name


def test_a_call_runs_once(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[Any] = []
    dispatch = FakeTensorMode.dispatch
    monkeypatch.setattr(
        FakeTensorMode, "dispatch", lambda mode, func, *given: run.append(func) or dispatch(mode, func, *given)
    )
    x, _ = inputs()
    y, _ = inputs()
    first, second = (fakes.run(aten.add.Tensor, (tensor, tensor), {}) for tensor in (x, y))
    assert run.count(aten.add.Tensor) == 1
    assert first is not second
    fakes.run(aten.add.Tensor, (x, x.new_empty(8)), {})
    assert run.count(aten.add.Tensor) == 2
    assert {type(fakes.run(aten.split.Tensor, (tensor, 3, 1), {})) for tensor in (x, y)} == {list}


def test_what_values_decide_is_asked_anew(fakes: Fakes) -> None:
    """Torch remembers the value of a tensor made of one number."""
    fakes.run(aten.mul.Tensor, (torch.zeros((), dtype=torch.long), 2), {})
    for number in (3, 5):
        assert fakes.run(aten.mul.Tensor, (torch.tensor(number), 2), {}).item() == 2 * number


def test_a_whole_function_lies_in_memory_as_torch_puts_it(fakes: Fakes) -> None:
    q = torch.empty(2, 3, 5, 8).transpose(1, 2)
    asked = F.scaled_dot_product_attention(q, q, q)
    for _ in range(2):
        out = fakes.run_whole(F.scaled_dot_product_attention, (q, q, q), {})
        assert (out.shape, out.stride()) == (asked.shape, asked.stride())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_fake_of_a_parameter_is_a_parameter(needs_grad: bool, fakes: Fakes) -> None:
    like = nn.Parameter(torch.empty(3, 5).t(), requires_grad=needs_grad)
    fake = fakes.like(like)
    assert type(fake) is FakeTensor
    assert isinstance(fake, nn.Parameter)
    assert (fake.shape, fake.stride(), fake.requires_grad) == (like.shape, like.stride(), needs_grad)
    assert not isinstance(fakes.like(like.data), nn.Parameter)
    small = fakes.resized(fake, (2, 4))
    assert type(small) is FakeTensor
    assert isinstance(small, nn.Parameter)
    assert (small.shape, small.stride(), small.requires_grad) == ((2, 4), (4, 1), needs_grad)
