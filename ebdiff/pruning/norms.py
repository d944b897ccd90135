"""Which modules take statistics over a prunable axis, and may take them over its kept channels instead.

A reduction depends on how many channels there are, so it freezes its axis; unless it is taken inside a module without
children (LayerNorm, RMSNorm, a weight-normalised convolution) between one tensor and another. Such a module can be
shrunken and run by itself: `masked` runs the shrunken one on the kept channels, and the law holds by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .axes import Atom, Axis, doubt, freeze, leaves, resolve
from .integers import integers
from .plan import Along, Norm
from .rules import tensors_in
from .zeros import clear

if TYPE_CHECKING:
    from .trace import Tracer

__all__ = ["Statistics"]


@dataclass
class _Call:
    """One call of a module without children: what went in, and the axes that it reduced."""

    module: nn.Module
    inputs: list[Axis] | None  # None: not one tensor
    reduced: list[tuple[Axis, str, bool]] = field(default_factory=list)  # (axis, reason, of the input?)
    outputs: list[Axis] = field(default_factory=list)

    def is_norm(self) -> bool:
        """Does every axis of the input that was reduced come out again?"""
        if self.inputs is None:
            return False
        kept = set(map(resolve, self.inputs)) & set(map(resolve, self.outputs))
        return all(resolve(axis) in kept for axis, _, of_input in self.reduced if of_input)

    def give_up(self) -> None:
        for axis, reason, _ in self.reduced:
            freeze(axis, reason)


class Statistics:
    """The statistics that a forward takes, and the residual streams that it adds to."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.running: list[_Call] = []
        self.calls: dict[str, list[_Call]] = {}
        self.refused: set[str] = set()  # modules of which some call is no norm
        self.sums: list[Axis] = []
        for module in tracer.model.modules():
            if self._may_be_norm(module):
                module.register_forward_pre_hook(partial(_refuse_keywords, self), with_kwargs=True)

    def _may_be_norm(self, module: nn.Module) -> bool:
        name = self.tracer.names.get(id(module), "")
        alone = all(child == "parametrizations" for child, _ in module.named_children())
        return bool(name) and alone and "parametrizations" not in name.split(".")

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module begins to run."""
        if type(module) is nn.MultiheadAttention:  # one that has no stand-in
            for tensor in tensors_in([args]):
                freeze(self.tracer.axes(tensor)[-1], f"embed_dim is asserted by {self.tracer.where()}")
        if self._may_be_norm(module):
            tensors = [tensor for tensor in tensors_in([args]) if tensor.dim()]
            inputs = list(self.tracer.axes(tensors[0])) if len(tensors) == 1 and args[0] is tensors[0] else None
            self.running.append(_Call(module, inputs))

    def leave(self, module: nn.Module, output: Any) -> None:
        """A module has run."""
        if not self.running or self.running[-1].module is not module:
            return
        call = self.running.pop()
        if not call.reduced:
            return
        if isinstance(output, Tensor) and output.dim():
            call.outputs = list(self.tracer.axes(output))
        if call.outputs and call.is_norm():
            self.calls.setdefault(self.tracer.names[id(module)], []).append(call)
            clear(output)
        else:
            call.give_up()
            self.refused.add(self.tracer.names[id(module)])

    def over(self, axis: Axis, reason: str) -> None:
        """A reduction over an axis: it is frozen where no module can take it over the kept channels alone."""
        call = self.running[-1] if self.running else None
        if call is not None and call.inputs is None:
            self.refused.add(self.tracer.names[id(call.module)])
        if call is None or call.inputs is None:
            return freeze(axis, reason)
        own = {atom for of_input in call.inputs for atom in leaves(of_input)}
        call.reduced.append((axis, reason, any(atom in own for atom in leaves(axis))))

    def expanded(self, length: int, reason: str) -> Atom:
        """The axis of a tensor expanded to a length that the forward names: that of its input, inside a norm.

        Elsewhere it can follow another axis only by an integer that the module keeps.
        """
        atom = Atom(length)
        if not self.running and length in (value for _, value in integers(self.tracer.module)):
            doubt(atom, reason)
        else:
            self.over(atom, reason)
        return atom

    def added(self, axes: list[Axis]) -> None:
        """Two tensors of equal shape were added: the sum may be a residual stream."""
        self.sums += axes

    # The result -------------------------------------------------------------------------------------------------------

    def norms(self) -> list[Norm]:
        """The modules found, each with the parameters along which its axes lie; freezes what lies along none."""
        for name in self.refused & self.calls.keys():
            for call in self.calls.pop(name):
                call.give_up()
        lying: dict[Axis, list[tuple[str, int]]] = {}
        for parameter, tensor in self.tracer.parameters.items():
            for dim, axis in enumerate(self.tracer.labels(tensor)):
                lying.setdefault(resolve(axis), []).append((parameter, dim))
        own: dict[str, set[Atom]] = {}  # what lies along a module's own parameters
        for axis, known in lying.items():
            for parameter, _ in known:
                owner, _, inner = parameter.partition(".parametrizations.")
                own.setdefault(owner if inner else owner.rpartition(".")[0], set()).update(leaves(axis))
        in_parameters = set().union(*own.values())
        found = []
        for name, calls in self.calls.items():
            over = own.get(name, set()).union(*(leaves(axis) for call in calls for axis, *_ in call.reduced))
            sides = ([call.inputs or [] for call in calls], [call.outputs for call in calls])
            inputs, outputs = (_along(side, lying, name, over & in_parameters) for side in sides)
            found.append(Norm(name, kind="statistics", inputs=inputs, outputs=outputs))
        return found

    def residual(self) -> set[Atom]:
        """The channels of residual streams that norms take statistics over."""
        reduced = [entry for calls in self.calls.values() for call in calls for entry in call.reduced]
        normed = {atom for axis, _, of_input in reduced if of_input for atom in leaves(axis)}
        return normed & {atom for axis in self.sums for atom in leaves(axis)}


def _along(
    calls: list[list[Axis]], lying: dict[Axis, list[tuple[str, int]]], name: str, over: set[Atom]
) -> tuple[Along, ...]:
    """Where the prunable axes at one side of a module lie: the same at every call, along some parameter.

    Only those that it reduces or has parameters along: it does not mix others, such as the heads beside a norm of q.
    """
    result = []
    for dim, axis in enumerate(calls[0]):
        if not any(atom.reason is None and atom in over for atom in leaves(axis)):
            continue
        place = dim if dim < len(calls[0]) - 1 else -1
        others = [axes[place] for axes in calls if place < len(axes)]
        found = lying.get(resolve(axis), [])
        if found and len(others) == len(calls) and all(resolve(other) == resolve(axis) for other in others):
            own = f"{name}."
            result.append(Along(place, *next((entry for entry in found if entry[0].startswith(own)), found[0])))
        else:
            for other in others:
                freeze(other, f"statistics over it in {name}, along which no parameter lies")
    return tuple(result)


def _refuse_keywords(statistics: Statistics, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """What a module is given by name is not followed."""
    if any(tensor.dim() for tensor in tensors_in(kwargs)) and statistics.running:
        statistics.running[-1].inputs = None
