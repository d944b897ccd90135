"""Fake tensors at a fraction of their cost: what an op gives is remembered by all that it takes but values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["Fakes", "quiet"]

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")  # it logs every op that fails, with a traceback

# Ops with these tags give what depends on values, or change the shape of what they take.
_UNTOLD = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
_LIFTS = {"aten::lift", "aten::lift_fresh", "aten::lift_fresh_copy"}
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # a view that does not say so
_COMPARED = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Made(NamedTuple):
    """One output of an op."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Outcome(NamedTuple):
    """What an op gave."""

    made: tuple[_Made, ...]
    kind: type | None  # None: one tensor, no container
    of: int | None  # which of the arguments it is a view of


class Fakes:
    """Runs ops on fake tensors, each kind of call once: the same shapes, strides, dtypes and devices give the same.

    So does torch's own cache of fake tensors, whose keys cost more than most ops.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[Any, _Outcome | None] = {}
        self._plain: dict[Any, bool] = {}
        self._patterns: dict[torch.device, dict[str, Any]] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an op gives."""
        plain = self._plain.get(func)
        if plain is None:
            plain = self._plain[func] = _is_plain(func)
        if not plain:
            return func(*args, **kwargs)
        return self._recalled(func, args, kwargs, func.is_view or func is _UNSAFE_VIEW)

    def run_whole(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a function of many ops gives, a fresh tensor that follows from shapes alone."""
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            return func(*args, **kwargs)
        out: Tensor = self._recalled(func, args, kwargs, False)
        return out

    def like(self, tensor: Tensor) -> Tensor:
        """A fake of a tensor, and a parameter where it is one."""
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized:
            made = _Made(tensor.shape, tensor.stride(), 0, tensor.dtype, tensor.device)
            return _as(tensor, self._make(made, None))
        return _as(tensor, self.mode.from_tensor(tensor.detach()))

    def resized(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A fake of another shape, otherwise like the given one, in the plain order."""
        if tensor.layout is not torch.strided:
            return _as(tensor, tensor.new_empty(shape))
        stride = torch.empty(shape, device="meta").stride()
        return _as(tensor, self._make(_Made(shape, stride, 0, tensor.dtype, tensor.device), None))

    def _recalled(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_view: bool) -> Any:
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        if not (self._tell(args, key) and (not kwargs or self._tell(kwargs, key))):
            return func(*args, **kwargs)
        known = tuple(key)
        if known not in self._known:
            out = func(*args, **kwargs)
            self._known[known] = self._outcome(out, args, is_view)
            return out
        outcome = self._known[known]
        return func(*args, **kwargs) if outcome is None else self._again(outcome, args)

    def _tell(self, value: Any, into: list[Any]) -> bool:
        """Add all that an op's output may depend on; False where that is more than can be told."""
        if isinstance(value, dict):
            into.extend(value)
            value = value.values()
        into.append(len(value))
        for item in value:
            kind = type(item)
            into.append(kind)  # 1, 1.0 and True are equal
            if kind is FakeTensor:
                if item.layout is not torch.strided or item.constant is not None or item.fake_mode is not self.mode:
                    return False
                if item.dtype.is_complex or item.is_neg():
                    return False
                into += item.shape, item.stride(), item.storage_offset(), item.dtype, item.fake_device
            elif kind in (list, tuple, torch.Size):
                if not self._tell(item, into):
                    return False
            elif item is None or isinstance(item, _COMPARED):
                into.append(item)
            else:
                return False
        return True

    def _outcome(self, out: Any, args: tuple[Any, ...], is_view: bool) -> _Outcome | None:
        """How to make an output again; None where that cannot be told."""
        several = type(out) in (tuple, list)
        tensors = out if several else (out,)
        of = next((i for i, arg in enumerate(args) if isinstance(arg, Tensor)), None) if is_view else None
        if (is_view and of is None) or any(not self._is_fresh(tensor, args) for tensor in tensors):
            return None
        made = tuple(_Made(t.shape, t.stride(), t.storage_offset(), t.dtype, t.fake_device) for t in tensors)
        outcome = _Outcome(made, type(out) if several else None, of)
        again = self._again(outcome, args)
        for old, new in zip(tensors, again if several else (again,), strict=True):
            if torch._C._dispatch_key_set(old) != torch._C._dispatch_key_set(new):
                return None
        return outcome

    def _is_fresh(self, tensor: Any, args: tuple[Any, ...]) -> bool:
        plain = type(tensor) is FakeTensor and tensor.layout is torch.strided and tensor.constant is None
        return plain and not tensor.requires_grad and all(tensor is not arg for arg in args)

    def _again(self, outcome: _Outcome, args: tuple[Any, ...]) -> Any:
        storage = None if outcome.of is None else args[outcome.of].untyped_storage()
        if outcome.kind is None:
            return self._make(outcome.made[0], storage)
        return outcome.kind(self._make(made, storage) for made in outcome.made)

    def _make(self, made: _Made, storage: torch.UntypedStorage | None) -> FakeTensor:
        shape, stride, offset, dtype, device = made
        with torch._C._DisableTorchDispatch():
            if storage is None:
                meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                meta = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, stride)
        pattern = self._patterns.get(device)
        if pattern is None:
            pattern = self._patterns[device] = dict(vars(FakeTensor(self.mode, meta, device)))
        fake = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(pattern)
        return fake


def _as(tensor: Tensor, fake: Tensor) -> Tensor:
    """The fake, as a parameter where the tensor is one: what nn.Parameter does to subclasses, without a copy."""
    if isinstance(tensor, nn.Parameter):
        fake.requires_grad_(tensor.requires_grad)
        fake._is_param = True
    return fake


def _is_plain(func: Any) -> bool:
    """Does what an op gives follow from shapes, and is it either new or a view of its one tensor?"""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    if func._schema.is_mutable or _UNTOLD.intersection(func.tags) or func._schema.name in _LIFTS:
        return False
    implicit = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return not (func.is_view and implicit)  # which may be views or not


@contextmanager
def quiet() -> Iterator[None]:
    """Operators on fake tensors fail without torch's logging: who runs them tells what went wrong."""
    _LOGGER.addFilter(_nothing)
    try:
        yield
    finally:
        _LOGGER.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
