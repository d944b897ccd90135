"""What the dense forward pass did, op by op: what a shrunken one must do again, at the sizes that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .axes import Atom, Axis, Cat, Prod, cut, fuse, resolve, size
from .rules import tensors_in

if TYPE_CHECKING:
    from .trace import Tracer

__all__ = ["Call", "before", "call_of", "facts_of", "kind_of", "start_of", "told"]

# Views of one tensor have many names; which one runs depends on strides. Copies are no matter of axes.
_VIEWS = dict.fromkeys(("_unsafe_view", "reshape", "_reshape_alias", "squeeze", "flatten", "unflatten"), "view")
_SILENT = {"clone", "contiguous", "detach", "alias"}
# Their integers are sizes, and follow from the shapes of what comes out.
_SIZES = {"view", "expand", "split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split"}
# Which of the arguments are facts, where others are sizes.
_FACTS = {"convolution": slice(3, 8), "native_group_norm": slice(7, 8), "native_layer_norm": slice(4, 5),
          "_fused_rms_norm": slice(3, 4)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One op of the dense forward pass."""

    kind: str
    path: tuple[nn.Module, ...]  # the modules that ran it, outermost first
    ordinal: int  # among the ops of the innermost one
    facts: tuple[Any, ...]
    inputs: tuple[list[Axis], ...]
    outputs: tuple[list[Axis] | None, ...]  # None: whose axes are not told
    start: tuple[Axis, int] | None  # where a slice begins

    @property
    def site(self) -> tuple[type | None, int, str]:
        """The same for the same line of code in every module of a class."""
        return type(self.path[-1]) if self.path else None, self.ordinal, self.kind

    def quantities(self) -> list[Axis]:
        """Everything whose size an integer of the user's may hold."""
        axes = (axis for axes in (*self.inputs, *self.outputs) for axis in axes or ())
        return list(dict.fromkeys(part for axis in axes for part in parts(resolve(axis))))


def parts(axis: Axis) -> Iterator[Axis]:
    """An axis, the runs of its factors, its segments, and theirs."""
    yield axis
    if isinstance(axis, Cat):
        for segment in axis.segments:
            yield from parts(segment)
    elif isinstance(axis, Prod):
        count = len(axis.factors)
        runs = ((i, j) for i in range(count) for j in range(i + 1, count + 1) if (i, j) != (0, count))
        for i, j in runs:
            run = fuse(list(axis.factors[i:j]))
            yield from parts(run) if j == i + 1 else (run,)


def kind_of(func: Any, out: Any) -> str | None:
    """The name by which ops are compared; None for those that are left out: copies, and what asks for a device."""
    name = str(func._schema.name).removeprefix("aten::")
    return None if name in _SILENT or not tensors_in([out]) else _VIEWS.get(name, name)


def facts_of(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments that are the same at every width."""
    if kind in _SIZES:
        return ()
    if kind == "slice":
        given = dict(enumerate(args))
        return given.get(1, 0), given.get(4, 1)
    if kind == "transpose":
        return tuple(sorted(dim % args[0].dim() for dim in args[1:3]))
    if kind == "scaled_dot_product_attention":
        scale = args[6] if args[6] is not None else args[0].shape[-1] ** -0.5
        return float(f"{scale:.6g}"), bool(args[5]), args[4] or 0.0
    found: list[Any] = []
    _collect((args[_FACTS[kind]], kwargs) if kind in _FACTS else (args, kwargs), found)
    return tuple(found)


def _collect(value: Any, into: list[Any]) -> None:
    if isinstance(value, Tensor):
        if not isinstance(value, FakeTensor) and value.numel() <= 16 and value.device.type != "meta":
            with _disable_current_modes():
                into.append(tuple(value.flatten().tolist()))
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, into)
    elif isinstance(value, dict):
        for key in value:
            _collect(value[key], into)
    else:
        into.append(value)


def start_of(args: tuple[Any, ...]) -> int:
    """Where a slice begins."""
    given = dict(enumerate(args))
    return slice(given.get(2), given.get(3)).indices(args[0].shape[given.get(1, 0)])[0]


def call_of(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Call | None:
    """The record of an op whose output has been labelled."""
    kind = kind_of(func, out)
    if kind is None:
        return None
    inputs = [tracer.labels(tensor) for tensor in tensors_in([args, kwargs]) if tracer.is_labelled(tensor)]
    outputs = [tracer.labels(tensor) if tracer.is_labelled(tensor) else None for tensor in told(out)]
    start = (inputs[0][args[1] if len(args) > 1 else 0], start_of(args)) if kind == "slice" else None
    facts = facts_of(kind, args, kwargs)
    return Call(kind, tracer.path, tracer.ordinal(), facts, tuple(inputs), tuple(outputs), start)


def told(out: Any) -> list[Tensor]:
    """The outputs that are compared: all of a split, the first of an op that also gives statistics."""
    return tensors_in([out]) if isinstance(out, list) else tensors_in([out])[:1]


def before(start: tuple[Axis, int]) -> Axis | int:
    """What lies on an axis before the position where a slice begins."""
    axis, at = resolve(start[0]), start[1]
    halves = cut(axis, at) if 0 < at < size(axis) and not isinstance(axis, Atom) else None
    return halves[0] if halves else at if at < size(axis) or at == 0 else axis
