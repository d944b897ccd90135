"""Who calls scaled_dot_product_attention while a module runs: to look at the queries and keys, or to answer instead."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionCall", "AttentionCalls"]


class AttentionCall(NamedTuple):
    """The arguments of scaled_dot_product_attention: [.., heads, tokens, dim] each."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        """What torch returns for them."""
        return F.scaled_dot_product_attention(**self._asdict())


class AttentionCalls(TorchFunctionMode):
    """While it is entered, `serve` answers every call of scaled_dot_product_attention, in whatever code.

    That is what diffusers' processors call, its native attention backend, torch's own modules and most other code.
    Calls of other kernels, and attention written out as two matrix products, are not seen.
    """

    def __init__(self, serve: Callable[[AttentionCall], Tensor]) -> None:
        super().__init__()
        self.serve = serve

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._served(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            func = self._reached(func)
        return func(*args, **(kwargs or {}))

    def _served(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.serve(AttentionCall(*args, **kwargs))

    def _reached(self, func: Any) -> Any:
        """The same function calling us: inside what a mode is asked about, torch has it switched off."""
        ours = {"scaled_dot_product_attention": self._served, "has_torch_function": lambda _: False}
        names = {**func.__globals__, **ours}
        return FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
