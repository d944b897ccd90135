"""Does a plan hold? Shrunken by a mask, on fake tensors, the model must do what it did before, op by op.

Where it does not, an integer that the user's code reads may be to blame (a head count in a view): those that held the
size of an axis at hand are tried, and kept where the trial then comes further. What no integer helps is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

import torch

from .axes import Atom, Axis, leaves, size
from .integers import integers, read
from .mask import ChannelMask
from .plan import ChannelPlan
from .record import Call
from .trial import Deviation, Sizes, Trials

if TYPE_CHECKING:
    from .trace import Tracer
    from .walk import Walk

__all__ = ["confirm"]

_SHARES = (0.5, 0.875, 0.625, 0.75)  # of neighbouring spaces, kept: unlike each other and their mean
_ODD_FROM = 16  # a forward that works at multiples only (halves, even pairs) is not to pass
_MOST_EXCEPTIONS = 4
_MOST_CANDIDATES = 24
_MOST_PASSES = 16  # trials, counted in dense forward passes, before whatever is in doubt is frozen


def confirm(tracer: Tracer, forward: Callable[[Walk], Any], batch: int) -> ChannelPlan:
    """The plan of a traced model, after trials: integers that follow an axis are added, what fails is frozen.

    Args:
        tracer: after the dense forward pass; its axes are frozen and its `sizes` extended.
        forward: runs the same model on the same arguments, seen by what it is given.
        batch: see `Tracer.plan`.
    """
    plan = tracer.plan(batch)
    return _Confirmation(tracer, forward, batch, plan).settled() if len(plan) else plan


class _Confirmation:
    def __init__(self, tracer: Tracer, forward: Callable[[Walk], Any], batch: int, plan: ChannelPlan) -> None:
        self.tracer, self.batch, self.plan = tracer, batch, plan
        self.trials = Trials(tracer, forward)
        self.names = dict(tracer.spaces)
        self.repeatable: bool | None = None
        self.sites: dict[Any, list[Call]] = {}
        for call in tracer.calls:
            self.sites.setdefault(call.site, []).append(call)

    def settled(self) -> ChannelPlan:
        """Try masks until the model passes."""
        for one_short in (False, True):
            self.one_short = one_short
            if one_short and not self._in_doubt() and self.repeatable is None:
                break  # nothing had to be guessed
            while (deviation := self._try(self.names)) is not None:
                self._repair(deviation)
                self._freeze_all(())
                if not self.names:
                    break
        return self.plan

    # Trials -----------------------------------------------------------------------------------------------------------

    def _try(self, atoms: Collection[Atom], extra: Sizes | None = None, until: int | None = None) -> Deviation | None:
        """Shrink these atoms and no others."""
        keep = {}
        places: dict[str, int] = {}  # the same for the same space of every block
        for atom, name in self.names.items():
            i = places.setdefault(re.sub(r"\d+", "", name), len(places))
            if atom in atoms and atom.length > 1:
                kept = atom.length - 1 if self.one_short else round(_SHARES[i % 4] * atom.length)
                kept |= atom.length >= _ODD_FROM
                keep[name] = torch.arange(atom.length, device="cpu") < min(kept, atom.length - 1)
        mask = ChannelMask(self.plan, keep)
        sizes = {**self.tracer.sizes, **(extra or {})}
        return self.trials.run(mask, self.names, sizes, len(self.tracer.calls) + 1 if until is None else until)

    def _repair(self, deviation: Deviation) -> None:
        """Let the model pass the op at which it deviated: by integers, else by freezing."""
        at = deviation.at
        if self.repeatable is not False:  # first the whole of it, then as far as it matters
            self.repeatable = self._try((), until=None if self.repeatable is None else at + 1) is None
        spent = self.trials.ops > _MOST_PASSES * len(self.tracer.calls)
        if not self.repeatable or spent:
            reason = "trials of it came to no end" if self.repeatable else "two forward passes differ: no trial tells"
            doubted = self._in_doubt()
            return self._freeze_all((atom, atom.doubt or reason) for atom in doubted or self.names)
        call = self._call_at(deviation)
        candidates = list(islice(self._candidates(call), _MOST_CANDIDATES))
        together = {key: axis for extra in reversed(candidates) for key, axis in extra.items()}
        if len(candidates) > 2 and self._try(self.names, together, at + 1) == deviation:
            candidates = []  # none of them is read
        read_here = []  # those that make a difference
        for extra in candidates:
            now = self._try(self.names, extra, at + 1)
            if now is None:
                return self.tracer.sizes.update(extra)
            if now != deviation:
                read_here.append(extra)
        for a, b in combinations(read_here, 2):
            if not a.keys() & b.keys() and self._try(self.names, {**a, **b}, at + 1) is None:
                return self.tracer.sizes.update({**a, **b})
        self._blame(call, deviation)

    def _call_at(self, deviation: Deviation) -> Call:
        """The dense op at which a trial deviated; the last one where it went on."""
        return self.tracer.calls[min(deviation.at, len(self.tracer.calls) - 1)]

    # Integers ---------------------------------------------------------------------------------------------------------

    def _candidates(self, call: Call) -> Iterator[Sizes]:
        """Integers that may follow an axis at this op, in every module of a class at once."""
        seen = []
        moving = [(i, axis) for i, axis in enumerate(call.quantities()) if self._moves(axis)]
        for depth, module in enumerate(reversed(call.path)):
            for path, value in integers(module):
                for i, axis in moving:
                    if size(axis) == value:
                        extra = dict(self._alike(call, depth, path, i))
                        if extra and extra not in seen:
                            seen.append(extra)
                            yield extra

    def _alike(self, call: Call, depth: int, path: str, index: int) -> Iterator[tuple[tuple[str, str], Axis]]:
        kind = type(call.path[-1 - depth])
        for other in self.sites[call.site]:
            if depth >= len(other.path) or type(other.path[-1 - depth]) is not kind:
                continue
            module, quantities = other.path[-1 - depth], other.quantities()
            key = self.tracer.names[id(module)], path
            if (
                index < len(quantities)
                and read(module, path) == size(quantities[index])
                and key not in self.tracer.sizes
            ):
                yield key, quantities[index]

    def _moves(self, axis: Axis) -> bool:
        return any(atom in self.names for atom in leaves(axis))

    # Freezing ---------------------------------------------------------------------------------------------------------

    def _blame(self, call: Call, deviation: Deviation) -> None:
        """Freeze what alone is enough to deviate at this op; in every module of its class."""
        until = deviation.at + 1
        found = False
        involved = [(other, self._involved(other)) for other in self.sites[call.site]]
        for i, atom in enumerate(self._involved(call)):
            alike = {id(other): own[i] for other, own in involved if len(own) > i}
            alone = self._try({atom}, until=until)
            if alone is not None:
                found = True
                self._freeze_all((other, self._reason(call, alone)) for other in self._guilty(call, alike))
        if not found:
            suspects = self._bisected(until)
            self._freeze_all((atom, self._reason(call, deviation)) for atom in suspects)

    def _guilty(self, call: Call, alike: Mapping[int, Atom]) -> Collection[Atom]:
        """Those of the same space in blocks of one class that deviate there: a few by themselves, or all.

        Args:
            call: where the first of them deviated.
            alike: the space at each call of the same line of code.
        """
        helping = {key: axis for extra in self._candidates(call) for key, axis in extra.items()}  # others may need it
        guilty: set[Atom] = set()
        for _ in range(_MOST_EXCEPTIONS):
            guilty.add(alike[id(call)])
            rest = set(alike.values()) - guilty
            deviation = self._try(rest) if rest else None
            if deviation is None:
                return guilty
            if id(self._call_at(deviation)) not in alike:
                break
            if helping and self._try(rest, helping, deviation.at + 1) is None:
                return guilty
            call = self._call_at(deviation)
        return alike.values()

    def _bisected(self, until: int) -> list[Atom]:
        """A small group of atoms that by itself is enough to deviate."""
        suspects = list(self.names)
        while len(suspects) > 1:
            half = len(suspects) // 2
            halves = (suspects[:half], suspects[half:])
            guilty = next((part for part in halves if self._try(set(part), until=until) is not None), None)
            if guilty is None:
                break
            suspects = guilty
        return suspects

    def _involved(self, call: Call) -> list[Atom]:
        axes = (axis for axes in (*call.inputs, *call.outputs) for axis in axes or ())
        return list(dict.fromkeys(atom for axis in axes for atom in leaves(axis) if atom in self.names))

    def _reason(self, call: Call, deviation: Deviation) -> str:
        module = call.path[-1] if call.path else self.tracer.model
        name = self.tracer.names.get(id(module), "")
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        return f"{call.kind} in {where} goes wrong when it shrinks: {deviation.what}"

    def _in_doubt(self) -> list[Atom]:
        return [atom for atom in self.names if atom.doubt]

    def _freeze_all(self, atoms: Iterable[tuple[Atom, str]]) -> None:
        for atom, reason in atoms:
            atom.reason = atom.reason or reason
        self.plan = self.tracer.plan(self.batch)
        self.names = dict(self.tracer.spaces)
