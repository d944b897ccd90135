"""Run a model once on fake tensors and follow every axis: which slices of which parameters are one prunable axis."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import EbdiffError
from ..nn.sparse_model import densify
from . import rules_layers, rules_shape  # noqa: F401  (they file their rules)
from .axes import Atom, Axis, Place, freeze, places, resolve, size
from .confirm import confirm
from .cost import cost_of, kept_size, terms_of
from .diffusers_classes import splits_its_own_axes
from .fakes import Fakes, quiet
from .modules import refuse_wrapped, sizes_read_by
from .norms import Statistics
from .plan import ChannelPlan, ChannelSpace, Frozen, Member, ModuleSize, Norm, Unit
from .record import Call, call_of
from .repeats import Blocks
from .rules import rule_for, unknown
from .stand_ins import put_stand_ins
from .trial import state_of
from .walk import Walk, uncollected
from .zeros import follow

__all__ = ["trace"]

_LABEL, _READ, _HOOKED = "_ebdiff_axes", "_ebdiff_read", "_ebdiff_hooked"


@uncollected()
@torch.inference_mode(False)  # in which torch would not say what ops are made of
def trace(model: nn.Module, *args: Any, **kwargs: Any) -> ChannelPlan:
    """Find every prunable axis of `model`, from one forward pass on fake tensors.

    The model is called as ``model(*args, **kwargs)`` on a copy whose tensors hold no memory; the model itself, its
    mode, gradients, hooks and device stay as they are.

    Args:
        model: any module; not wrapped by DistributedDataParallel, FSDP or torch.compile.
        args, kwargs: what its forward takes; only shapes, dtypes and devices of tensors matter.

    Returns:
        The plan. What the tracer cannot follow is listed in ``plan.frozen`` by name, with the reason.

    Raises:
        EbdiffError: the model is wrapped, or its forward fails on fake tensors.
    """
    refuse_wrapped(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = Fakes(fake)
    shadow = _shadow(model, fakes)
    tracer = Tracer(shadow, fakes)
    fake_args, fake_kwargs = _map_tensors(fake.from_tensor, (args, kwargs))
    for tensor in _tensors((fake_args, fake_kwargs)):
        tracer.label(tensor, [Atom(n, "an input of the model") for n in tensor.shape])
    batch = next((t.shape[0] for t in _tensors((fake_args, fake_kwargs)) if t.dim() > 1), 1)

    def forward(walk: Walk) -> Any:
        with torch.no_grad(), fake, walk.walking():
            return shadow(*fake_args, **fake_kwargs)

    try:
        with quiet():
            output = forward(tracer)
    except Exception as error:
        where = tracer.where() or "the model"
        raise EbdiffError(
            f"cannot trace {type(model).__name__}",
            expected="a forward pass that runs on the given arguments without reading tensor values",
            got=f"{type(error).__name__} in {where}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="call ebdiff.trace(model, ...) with the arguments that model(...) itself takes",
        ) from error
    for tensor in _tensors(output):
        for axis in tracer.axes(tensor):
            freeze(axis, "an output of the model")
    return confirm(tracer, forward, max(batch, 1))


class Tracer(Walk):
    """Labels every dimension of every tensor of a forward pass with an axis, op by op (see rules.py)."""

    def __init__(self, model: nn.Module, fakes: Fakes) -> None:
        super().__init__(model, fakes)
        self.used: set[int] = set()
        self.transposed: set[int] = set()  # weights that make their second dimension
        self.foreign: dict[int, tuple[Tensor, list[Axis]]] = {}
        self.norms: dict[str, Norm] = {}
        self.costs: list[list[Axis]] = []  # one multiply-accumulate per position of each product of axes
        self.sizes: dict[tuple[str, str], Axis] = {}
        self.calls: list[Call] = []
        self.blocks = Blocks()
        self.state = state_of(model)
        self.spaces: dict[Atom, str] = {}  # the names of the free axes
        self.parameters: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._label_parameters()
        self.statistics = Statistics(self)

    # Labels -----------------------------------------------------------------------------------------------------------

    def _label_parameters(self) -> None:
        first: dict[int, str] = {}
        named = (self.model.named_parameters(remove_duplicate=False), self.model.named_buffers(remove_duplicate=False))
        for name, tensor in (pair for pairs in named for pair in pairs):
            if id(tensor) in first:
                self.aliases[name] = first[id(tensor)]
                continue
            first[id(tensor)] = name
            self.parameters[name] = tensor
            self.label(tensor, [Atom(n) for n in tensor.shape])

    def label(self, tensor: Any, axes: list[Axis]) -> None:
        """Say what the dimensions of a tensor are."""
        if isinstance(tensor, Tensor):
            assert [size(axis) for axis in axes] == list(tensor.shape), "a label that does not fit its tensor"
            if isinstance(tensor, FakeTensor):
                setattr(tensor, _LABEL, axes)
            else:  # the user's own, reached through a closure: leave no mark on it
                self.foreign[id(tensor)] = (tensor, axes)

    def axes(self, tensor: Tensor) -> list[Axis]:
        """What the dimensions of a tensor are; those of a table that the forward itself makes are frozen."""
        if not self.is_labelled(tensor):
            self.label(tensor, self.fixed(tensor, f"matched with a fixed table in {self.where()}"))
        self.used.add(id(tensor))
        if hasattr(tensor, _READ):
            freeze(*vars(tensor).pop(_READ))
        return self.labels(tensor)

    def when_used(self, tensor: Tensor, axis: Axis, reason: str) -> None:
        """Freeze an axis as soon as a tensor made from it goes into an op."""
        if isinstance(tensor, FakeTensor):
            setattr(tensor, _READ, (axis, reason))
        else:
            freeze(axis, reason)

    def labels(self, tensor: Tensor) -> list[Axis]:
        """As `axes`, without counting as a use."""
        axes: list[Axis] = getattr(tensor, _LABEL) if hasattr(tensor, _LABEL) else self.foreign[id(tensor)][1]
        return axes

    def is_labelled(self, tensor: Tensor) -> bool:
        """Do we know what its dimensions are?"""
        return hasattr(tensor, _LABEL) or id(tensor) in self.foreign

    def fixed(self, tensor: Tensor, reason: str) -> list[Axis]:
        """Fresh frozen axes for a tensor."""
        return [Atom(n, reason) for n in tensor.shape]

    # Where we are -----------------------------------------------------------------------------------------------------

    def entered(self, module: nn.Module, args: Any) -> None:
        """A module begins to run."""
        self.blocks.enter(module, len(self.calls))
        self.statistics.enter(module, args)
        self._watch_sizes(module, args, "input")
        self._freeze_if_hooked(module, args)

    def left(self, module: nn.Module, output: Any) -> None:
        """A module has run."""
        self.blocks.leave(module, output, len(self.calls))
        self.statistics.leave(module, output)
        self._watch_sizes(module, output, "output")
        self._freeze_if_hooked(module, output)

    def _watch_sizes(self, module: nn.Module, value: Any, side: str) -> None:
        """Remember the axes whose sizes a module keeps as integers, so that `shrink` can update them."""
        tensor = next(_tensors(value), None)
        if id(module) in self.names and tensor is not None and tensor.dim() > 1:
            for attribute in sizes_read_by(module, side):
                if getattr(module, attribute, None) == tensor.shape[1]:  # unbatched images have theirs in front
                    self.sizes[self.names[id(module)], attribute] = self.axes(tensor)[1]

    def _freeze_if_hooked(self, module: nn.Module, value: Any) -> None:
        """A hook of the user's may change what goes in or comes out; it did not run here."""
        if vars(module).get(_HOOKED):
            for tensor in _tensors(value):
                for axis in self.axes(tensor):
                    freeze(axis, f"a forward hook on {self.names.get(id(module), '')} may change it")

    def may_split(self) -> bool:
        """Does a rule update the integers by which the running module views its channels as heads x head_dim?"""
        return splits_its_own_axes(self.module)

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Label what an op gives, and record it."""
        try:
            rule_for(func)(self, func, args, kwargs, out)
        except Exception:  # a use of the op that its rule does not know: freeze what it touches
            unknown(self, func, args, kwargs, out)
        follow(self, func, args, kwargs, out)
        call = call_of(self, func, args, kwargs, out)
        if call is not None:
            self.calls.append(call)

    # The result -------------------------------------------------------------------------------------------------------

    def plan(self, batch: int) -> ChannelPlan:
        """The plan of everything seen; costs are divided by the batch size."""
        norms = self.statistics.norms()
        members, frozen = self._members()
        residual = self.statistics.residual()
        spaces: list[ChannelSpace] = []
        names: dict[Atom, str] = {}
        for atom, found in members.items():
            rows = [m for m, _ in found if m.dim == 0]
            matrices = [m for m in rows if self.parameters[m.parameter].dim() > 1]
            producer = (matrices or rows or [found[0][0]])[0]
            unit = _unit(atom, [place for _, place in found])
            unit = "residual" if unit == "channel" and atom in residual else unit
            name = _space_name(producer, unit)
            while name in names.values():
                name += "'"
            names[atom] = name
            spaces.append(ChannelSpace(name, atom.length, tuple(m for m, _ in found), unit))
        self.spaces = names
        return ChannelPlan(
            spaces=tuple(spaces),
            frozen=tuple(frozen),
            shapes={name: tuple(tensor.shape) for name, tensor in self.parameters.items()},
            buffers=frozenset(name for name, t in self.parameters.items() if not isinstance(t, nn.Parameter)),
            aliases=self.aliases,
            norms=(*self.norms.values(), *norms),
            cost=cost_of(self.costs, names, batch),
            sizes=tuple(
                ModuleSize(module, attribute, terms_of(kept_size(resolve(axis), names)))
                for (module, attribute), axis in self.sizes.items()
            ),
            transposed=frozenset(name for name, t in self.parameters.items() if id(t) in self.transposed),
        )

    def _members(self) -> tuple[dict[Atom, list[tuple[Member, Place]]], list[Frozen]]:
        free: dict[Atom, list[tuple[Member, Place]]] = {}
        frozen: dict[Atom, Frozen] = {}
        for name, tensor in self.parameters.items():
            unused = id(tensor) not in self.used
            for dim, axis in enumerate(self.axes(tensor)):
                if unused:
                    freeze(axis, "not used in this forward pass")
                for place in places(axis):
                    member = Member(name, dim, place.offset, place.outer, place.period, place.inner)
                    if place.atom.reason is None:
                        free.setdefault(place.atom, []).append((member, place))
                    elif dim < 2 and place.atom not in frozen:
                        frozen[place.atom] = Frozen(f"{name}[{dim}]", place.atom.length, place.atom.reason)
        for atom in [atom for atom, found in free.items() if len(found) == 1]:
            member, _ = free.pop(atom)[0]
            frozen[atom] = Frozen(f"{member.parameter}[{member.dim}]", atom.length, "no other slice follows it")
        return free, list(frozen.values())


def _unit(atom: Atom, found: list[Place]) -> Unit:
    if atom.kind == "head":
        return "head"
    return "head_dim" if any(other.kind == "head" for place in found for other in place.within) else "channel"


def _space_name(producer: Member, unit: str) -> str:
    name = producer.parameter.removesuffix(".weight")
    if producer.dim:
        name += f"[in {producer.dim}]"
    if producer.offset:
        name += f"[from {producer.offset}]"
    return name if unit == "channel" else f"{name}.{unit}"


def _shadow(model: nn.Module, fakes: Fakes) -> nn.Module:
    """A copy of the model whose tensors are fake and whose hooks, but for torch's own, are gone."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = fakes.like(tensor)
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:  # of hooks: a dozen in every module
                memo[id(value)] = OrderedDict()
    shadow = copy.deepcopy(model, memo)
    densify(shadow)  # which axes belong together does not depend on blocks of attention
    for module in shadow.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
                    vars(module)[_HOOKED] = True
    put_stand_ins(shadow)
    return shadow


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value.detach())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(change, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(change, item) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(change, item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
