"""One forward pass of a shrunken model on fake tensors, held op by op against what the dense one did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from .axes import Atom, Axis, Prod, resolve, size
from .fakes import quiet
from .integers import read, write
from .mask import ChannelMask
from .modules import adapt_modules, adapt_statistics, keeps_sizes
from .record import Call, before, facts_of, kind_of, start_of, told
from .repeats import Block, map_output, state_of_block
from .walk import Walk

if TYPE_CHECKING:
    from .trace import Tracer

__all__ = ["Deviation", "Sizes", "Trials", "state_of"]

# Integers by (name of the module, path below it) that follow an axis.
Sizes = Mapping[tuple[str, str], Axis]


class Deviation(NamedTuple):
    """The first op that a shrunken forward pass did not do as the dense one, and what happened."""

    at: int
    what: str


class _Stop(BaseException):
    """Ends a forward pass that has been seen far enough; no `except Exception` of a user's catches it."""


class Trials:
    """Runs the model of a dense trace at other widths, and puts it back as it was."""

    def __init__(self, tracer: Tracer, forward: Callable[[Walk], Any]) -> None:
        self.tracer, self.forward = tracer, forward
        self.ops = 0  # that all trials ran together
        self._owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for module, own in tracer.state:
            for kind in ("_parameters", "_buffers"):
                for key, tensor in own[kind].items():
                    self._owners.setdefault(id(tensor), []).append((kind, module, key))
        self._restore()
        self._held = [
            (name, module, {id(tensor) for tensor in (*module.parameters(), *module.buffers())})
            for name, module in tracer.model.named_modules()
            if keeps_sizes(module)
        ]
        self.passed = _Passed(tracer.calls)
        self._made: dict[Any, Tensor] = {}

    def run(self, mask: ChannelMask, names: Mapping[Atom, str], sizes: Sizes, until: int) -> Deviation | None:
        """The first deviation among the first `until` ops, None where there is none.

        Args:
            mask: what to remove.
            names: the space of every free atom.
            sizes: integers to change.
            until: how many ops to look at.
        """
        widths = Widths({atom: int(mask.keep[name].sum()) for atom, name in names.items() if name in mask.keep})
        walk = _Held(self.tracer, widths, until, self.passed)
        cut = [name for atom, name in names.items() if widths(atom) < atom.length]
        with self._shrunken(mask, cut, widths, sizes):
            for block in self.tracer.blocks.once():
                vars(block.module)["forward"] = partial(walk.run_block, block, block.module.forward)
            try:
                with quiet():
                    self.forward(walk)
                    walk.ended()
            except _Stop:
                pass
            except Exception as error:
                first = str(error).splitlines()[0] if str(error) else ""
                walk.deviation = walk.deviation or Deviation(walk.at, f"{type(error).__name__}: {first}")
        self.ops += walk.ran
        return walk.deviation

    @contextmanager
    def _shrunken(self, mask: ChannelMask, cut: list[str], widths: Widths, sizes: Sizes) -> Iterator[None]:
        model, tracer = self.tracer.model, self.tracer
        names = {member.parameter for space in cut for member in mask.plan[space].members}
        changed = {id(tracer.parameters[name]): tracer.parameters[name] for name in names}
        try:
            for tensor in changed.values():
                small = self._tensor(tensor, tuple(map(widths, tracer.labels(tensor))))
                for kind, module, key in self._owners[id(tensor)]:
                    vars(module)[kind][key] = small
            self._adapt(model, mask, set(changed))
            for (name, path), axis in sizes.items():
                module = model.get_submodule(name)
                if read(module, path) is not None:
                    write(module, path, widths(axis))
            yield
        finally:
            self._restore()

    def _adapt(self, model: nn.Module, mask: ChannelMask, changed: set[int]) -> None:
        for norm in mask.plan.norms:
            module: Any = model.get_submodule(norm.module)
            if not mask.regroups(norm):
                continue
            if norm.kind == "group":  # whatever becomes of its groups
                module.num_channels, module.num_groups = int(mask.kept_by(norm).sum()), 1
            else:
                adapt_statistics(module, norm, mask)
        adapt_modules(((name, own) for name, own, held in self._held if not held.isdisjoint(changed)), mask)

    def _tensor(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        key = shape, like.dtype, like.device, isinstance(like, nn.Parameter), like.requires_grad
        if key not in self._made:  # one serves all: nothing is written
            self._made[key] = self.tracer.fakes.resized(like, shape)
        return self._made[key]

    def _restore(self) -> None:
        for module, held in self.tracer.state:
            vars(module).clear()
            vars(module).update(_own(held))


def state_of(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """All that the modules hold, to be put back; not what lists and other objects in it hold."""
    return [(module, _own(vars(module))) for module in model.modules()]


def _own(held: dict[str, Any]) -> dict[str, Any]:
    return {**held, **{key: dict(held[key]) for key in ("_parameters", "_buffers", "_modules")}}


class Widths:
    """The kept size of every axis, for given sizes of atoms."""

    def __init__(self, kept: Mapping[Atom, int]) -> None:
        self.kept = kept
        self._known: dict[int, tuple[Axis, int]] = {}

    def __call__(self, axis: Axis) -> int:
        known = self._known.get(id(axis))
        if known is None:  # it holds the axis: no other gets its id
            known = self._known[id(axis)] = axis, self._of(resolve(axis))
        return known[1]

    def _of(self, axis: Axis) -> int:
        if isinstance(axis, Atom):
            return self.kept.get(axis, axis.length)
        if isinstance(axis, Prod):
            result = 1
            for factor in axis.factors:
                result *= self._of(factor)
            return result
        return sum(map(self._of, axis.segments))


class _Passed:
    """Blocks that did as they should, by their state and the sizes of all that their ops take and give."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.blocks: set[Any] = set()
        self._dense: dict[int, tuple[int, list[Axis]]] = {}
        self._numbers: dict[Any, int] = {}
        self._outputs: dict[Any, tuple[Tensor, Tensor]] = {}

    def dense(self, at: int) -> tuple[int, list[Axis]]:
        """A number, the same for ops that are alike in the dense forward pass, and the axes of what the op handles."""
        if at not in self._dense:
            call = self.calls[at]
            axes = [axes or [] for axes in (*call.inputs, *call.outputs)]
            sizes = tuple(tuple(map(size, own)) for own in axes)
            alike = call.kind, call.ordinal, call.facts, sizes, call.start and call.start[1]
            number = self._numbers.setdefault(alike, len(self._numbers))
            self._dense[at] = number, [axis for own in axes for axis in own]
        return self._dense[at]

    def output(self, dense: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of another shape for an output of a block, its dimensions in memory as the dense one's."""
        key = id(dense), shape
        if key not in self._outputs or self._outputs[key][1].shape != shape:  # reshaped in place since
            order = sorted(range(dense.dim()), key=dense.stride, reverse=True)
            made = dense.new_empty([shape[dim] for dim in order])
            self._outputs[key] = dense, made.permute([order.index(dim) for dim in range(dense.dim())])
        return self._outputs[key][1]


class _Held(Walk):
    """Compares every op with the dense trace's."""

    def __init__(self, tracer: Tracer, widths: Widths, until: int, passed: _Passed) -> None:
        super().__init__(tracer.model, tracer.fakes, tracer.names)
        self.tracer, self.calls, self.widths, self.until, self.passed = tracer, tracer.calls, widths, until, passed
        self.loose = tracer.statistics.calls  # modules whose numbers follow their width
        self.at = self.ran = 0
        self.deviation: Deviation | None = None
        self._sizes: dict[int, Any] = {}

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        kind = kind_of(func, out)
        if kind is None:
            return
        what = self._differs(kind, args, kwargs, out)
        if what is not None:
            self.deviation = Deviation(self.at, what)
            raise _Stop
        self._advance(self.at + 1)
        self.ran += 1

    def _advance(self, at: int) -> None:
        self.at = at
        if at >= self.until:
            raise _Stop

    def run_block(self, block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a module, unless one like it has passed."""
        if self.at != block.start:
            return forward(*args, **kwargs)
        key = state_of_block(block.module), *map(self._sizes_of, range(block.start, min(block.end, self.until)))
        if key in self.passed.blocks:
            self._advance(min(block.end, self.until))
            return self.unseen(lambda: map_output(self._stand_in, block.output))
        output = forward(*args, **kwargs)
        if self.at == block.end:
            self.passed.blocks.add(key)
        return output

    def _sizes_of(self, at: int) -> Any:
        """An op with the dense and the predicted sizes of all that it takes and gives."""
        if at not in self._sizes:
            number, axes = self.passed.dense(at)
            self._sizes[at] = number, *map(self.widths, axes)
        return self._sizes[at]

    def _stand_in(self, dense: Tensor) -> Tensor:
        """A tensor of the predicted shape."""
        return self.passed.output(dense, tuple(map(self.widths, self.tracer.labels(dense))))

    def ended(self) -> None:
        """The forward pass returned."""
        if self.at < len(self.calls):
            self.deviation = Deviation(self.at, "leaves out ops of the dense one")

    def _differs(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> str | None:
        if self.at >= len(self.calls):
            return f"{kind} in {self.where()} after the dense one has ended"
        call: Call = self.calls[self.at]
        if call.kind != kind or (call.path and call.path[-1] is not self.module):
            return f"{kind} in {self.where()} in place of {call.kind}"
        for axes, tensor in zip(call.outputs, told(out), strict=False):
            expected = None if axes is None else tuple(map(self.widths, axes))
            if expected is not None and tuple(tensor.shape) != expected:
                return f"{tuple(tensor.shape)} in place of {expected}"
        if call.start is not None:
            start = before(call.start)
            if start_of(args) != (start if isinstance(start, int) else self.widths(start)):
                return f"begins at {start_of(args)}"
        if self.names.get(id(self.module)) not in self.loose and facts_of(kind, args, kwargs) != call.facts:
            return "with another constant"
        return None
