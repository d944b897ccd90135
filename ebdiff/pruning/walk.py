"""A forward pass on fake tensors, seen op by op, and where in the model each op ran."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .fakes import Fakes

__all__ = ["Walk", "uncollected"]

# Seen as one op each, whatever they are made of: which kernel, and so which ops, depends on sizes and strides.
_WHOLE = {
    F.linear: torch.ops.aten.linear.default,
    F.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
}
_DEVICE = torch.ops.prim.device.default
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Walk(TorchDispatchMode):
    """Calls `seen` with every op of a forward pass, and keeps track of the module that runs it."""

    def __init__(self, model: nn.Module, fakes: Fakes, names: Mapping[int, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.fakes = model, fakes
        self.names = names or {id(module): name for name, module in model.named_modules()}
        self.path: tuple[nn.Module, ...] = ()  # the modules that run, outermost first
        self._ordinals: list[int] = [0]
        self._inside = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch asks anew at every op; nothing compiles what runs here

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An op ran: what went in and came out."""
        raise NotImplementedError

    def entered(self, module: nn.Module, args: Any) -> None:
        """A module begins to run."""

    def left(self, module: nn.Module, output: Any) -> None:
        """A module has run."""

    @contextmanager
    def walking(self) -> Iterator[None]:
        """Within this, whatever this thread runs is seen."""
        here = threading.get_ident()  # the hooks run in all of them

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != here:
                return
            self.path = (*self.path, module)
            self._ordinals.append(0)
            self.entered(module, args)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != here:
                return
            if self.path and self.path[-1] is module:
                self.path = self.path[:-1]
                self._ordinals.pop()
            self.left(module, output)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with self, _AsOne(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def module(self) -> nn.Module:
        """The innermost module that runs."""
        return self.path[-1] if self.path else self.model

    def where(self) -> str:
        """The name and class of the innermost module that runs."""
        name = self.names.get(id(self.module), "")
        return f"{name} ({type(self.module).__name__})" if name else type(self.module).__name__

    def ordinal(self) -> int:
        """How many ops the innermost module has run so far in this call of it."""
        self._ordinals[-1] += 1
        return self._ordinals[-1]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked more often than anything is computed
        kwargs = kwargs or {}
        out = self.fakes.run(func, args, kwargs)
        if not self._inside:
            self.seen(func, args, kwargs, out)
        return out

    def unseen(self, function: Callable[[], Any]) -> Any:
        """Call a function whose ops are not seen."""
        self._inside = True
        try:
            return function()
        finally:
            self._inside = False

    def run_whole(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one of the functions that are seen as one op."""
        out = self.unseen(lambda: _linear_shape(args) if func is F.linear and not kwargs else None)
        out = self.unseen(lambda: self.fakes.run_whole(func, args, kwargs)) if out is None else out
        if func is not F.linear:  # every argument at its place
            given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
            args, kwargs = tuple(given.get(key) for key in _ATTENTION), {}
        self.seen(_WHOLE[func], args, kwargs, out)
        return out


def _linear_shape(args: tuple[Any, ...]) -> Tensor | None:
    """What a linear layer on fake tensors returns, in one step instead of four; None where that is not plain."""
    x, weight = args[0], args[1]
    plain = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    if not plain or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return None
    made: Tensor = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return made


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection within: a trace makes a million objects and drops few of them, so looking costs a fifth."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _AsOne(TorchFunctionMode):
    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self.walk = walk

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _WHOLE:
            return self.walk.run_whole(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
