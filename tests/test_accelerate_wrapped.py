"""Models that others wrap, hook or refuse to change: restore is exact, and the report says what is true."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from norm_patterns import Functional, Nested, ScaleAndShift, Toy, counted, image
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import ebdiff


class Stack(nn.Module):
    """A Sequential of which only a slice is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[:2](x)


def pair() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 6, 1), Nested())


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


# Wrapped after accelerate ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooked(model: nn.Module) -> None:
    add_hook_to_module(model, Doubling())


def bound(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def parametrized(model: nn.Module) -> None:
    model.register_parameter("factor", nn.Parameter(torch.ones(())))
    parametrize.register_parametrization(model, "factor", Twice())
    model.register_forward_hook(lambda module, args, out: module.factor * out)


def sharded(model: nn.Module) -> None:
    fully_shard(model)
    model.register_forward_hook(lambda module, args, out: 2 * out)


WRAPPED = [
    (wrap, make)
    for wrap in (hooked, bound, parametrized, sharded)
    for make in (pair, Nested, ScaleAndShift)
    if (wrap, make) != (parametrized, pair)  # not even torch runs that
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("wrap", "make"), WRAPPED)
def test_restored_under_a_wrapper_the_original_runs(wrap: Callable[[nn.Module], None], make: Callable[[], Any]) -> None:
    model = make()
    expected = 2 * model(image())
    ebdiff.accelerate(model, verbose=False)
    wrap(model)
    keys = list(model.state_dict())
    with counted() as norms:
        torch.testing.assert_close(model(image()), expected)
    assert norms == []
    ebdiff.restore(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(image()), expected)
    ebdiff.restore(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("wrap", "make"), WRAPPED)
def test_accelerated_again_under_a_wrapper(wrap: Callable[[nn.Module], None], make: Callable[[], Any]) -> None:
    model = make()
    expected = 2 * model(image())
    first = ebdiff.accelerate(model, verbose=False)
    wrap(model)
    assert ebdiff.accelerate(model, verbose=False).fused == first.fused
    torch.testing.assert_close(model(image()), expected)
    ebdiff.restore(model)
    again = ebdiff.accelerate(model, verbose=False)
    with counted() as norms:
        torch.testing.assert_close(model(image()), expected)
    assert len(norms) == first.norms - again.norms


@pytest.mark.usefixtures("one_process")
def test_sharded_first() -> None:
    model = nn.Sequential(Nested(), pair())
    expected = model(image())
    for module in (model[0], model[1], model):
        fully_shard(module)
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"0": ("norm",), "1.3": ("norm",)}
    assert report.left["1.0"] == "FSDPSequential makes its slices itself; accelerate before it is wrapped"
    torch.testing.assert_close(model(image()), expected)
    assert type(model[1][:2]) is nn.Sequential
    ebdiff.restore(model)
    assert torch.equal(model(image()), expected)


def test_a_hook_that_is_taken_off_again_leaves_the_original() -> None:
    model = Nested()
    expected = model(image())
    ebdiff.accelerate(model, verbose=False)
    hooked(model)
    ebdiff.restore(model)
    remove_hook_from_module(model)
    assert type(model) is Nested
    assert torch.equal(model(image()), expected)


def test_a_parametrized_module_is_copied_as_ever() -> None:
    model = Nested()
    expected = 2 * model(image())
    ebdiff.accelerate(model, verbose=False)
    parametrized(model)
    torch.testing.assert_close(copy.deepcopy(model)(image()), expected)


def test_no_mark_is_left_behind() -> None:
    model = pair()
    before = [set(vars(module)) for module in model.modules()]
    ebdiff.accelerate(model, channels_last=True, verbose=False)
    loaded, copied = pickle.loads(pickle.dumps(model)), copy.copy(model)
    for plain in (loaded, copied):
        assert (type(plain), set(vars(plain))) == (nn.Sequential, before[0])
    ebdiff.restore(model)
    assert [set(vars(module)) for module in model.modules()] == before


def test_slices_of_a_sequential_are_accelerated_and_restored_with_it() -> None:
    model = Stack()
    expected = model(image())
    ebdiff.accelerate(model, verbose=False)
    with counted() as norms:
        torch.testing.assert_close(model(image()), expected)
    assert norms == []
    kept = model.layers[:2]
    ebdiff.restore(model)
    ebdiff.restore(kept)
    assert torch.equal(model(image()), expected)
    assert torch.equal(kept(image()), expected)


# Refused --------------------------------------------------------------------------------------------------------------


class Final(Nested):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses, please")


class Sealing(type):
    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
        if any(isinstance(base, Sealing) for base in bases):
            raise ValueError("sealed")
        return super().__new__(cls, name, bases, space)


class Sealed(Nested, metaclass=Sealing):
    pass


class Guarded(Nested):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)


def test_classes_that_refuse_are_left_and_named() -> None:
    model = nn.Sequential(Nested(), Final(), Sealed(), Guarded())
    kinds = [type(module) for module in model.modules()]
    expected = model(image())
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"0": ("norm",), "3": ("norm",)}
    assert report.left["1.norm"] == "Final refuses a subclass: TypeError: no subclasses, please"
    assert report.left["2.norm"] == "Sealed refuses a subclass: ValueError: sealed"
    torch.testing.assert_close(model(image()), expected)
    ebdiff.restore(model)
    assert [type(module) for module in model.modules()] == kinds


def test_nothing_is_changed_where_a_module_cannot_be_read_at_all() -> None:
    class Broken(Toy):
        def named_children(self) -> Any:
            raise RuntimeError("broken")

    model = nn.Sequential(Nested(), Broken())
    with pytest.raises(RuntimeError, match="broken"):
        ebdiff.accelerate(model, verbose=False)
    assert type(model[0]) is Nested


# Hooked before accelerate ---------------------------------------------------------------------------------------------


def test_norms_and_activations_with_hooks_are_not_called_fused() -> None:
    model = nn.Sequential(Nested(), Nested(), Functional(), nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU()))
    handles = [m.register_forward_hook(lambda *_: None) for m in (model[0].norm, model[1].act, model[3][1])]
    report = ebdiff.accelerate(model, verbose=False)
    assert report.fused == {"2": ("norm",)}
    assert report.left["0.norm"] == "hooks on GroupNorm, or all modules: it runs as it was while they are there"
    assert report.left["1.norm"] == report.left["3.0"] == report.left["0.norm"].replace("GroupNorm", "SiLU")
    with counted() as norms:
        model(image())
    assert len(norms) == 3
    for handle in handles:
        handle.remove()
    assert ebdiff.accelerate(model, verbose=False).norms == 4
    with counted() as norms:
        model(image())
    assert norms == []


def test_offloaded_by_accelerate() -> None:
    model = pair()
    cpu_offload(model, torch.device("cpu"))
    report = ebdiff.accelerate(model, verbose=False)
    with counted() as norms:
        model(image())
    assert report.norms + len(norms) == 2
    ebdiff.restore(model)
    model(image())


# Others' compilers ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [pair, Nested, ScaleAndShift])
def test_torch_jit(make: Callable[[], Any]) -> None:
    model = make()
    expected = model(image())
    ebdiff.accelerate(model, verbose=False)
    if make is not ScaleAndShift:  # not even the plain one
        assert torch.equal(torch.jit.script(model)(image()), expected)
    torch.testing.assert_close(torch.jit.trace(model, image())(image()), expected)
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), expected)
    assert type(model) is not type(make())


@pytest.mark.parametrize("make", [pair, Stack, ScaleAndShift])
def test_compiled_it_follows_accelerate_and_restore(make: Callable[[], Any]) -> None:
    model = make()
    expected = model(image())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for change in (ebdiff.accelerate, ebdiff.restore, ebdiff.accelerate):
        change(model, verbose=False) if change is ebdiff.accelerate else change(model)
        with counted() as norms:
            torch.testing.assert_close(compiled(image()), expected)
        assert bool(norms) == (change is ebdiff.restore)
