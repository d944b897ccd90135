"""Who calls scaled_dot_product_attention while a module runs: to look at the queries and keys, or to answer instead."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import EbdiffError

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
        self._multi_head = _calling(self._served)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._served(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            if torch.compiler.is_compiling():  # dynamo cannot follow; without fullgraph, it leaves this out
                raise EbdiffError(
                    "torch.compile of nn.MultiheadAttention whose attention calls are answered",
                    expected="fullgraph=False",
                    got="fullgraph=True",
                    remedy="use ebdiff.nn.SparseAttention",
                )
            func = self._multi_head
        if func is Tensor.unflatten and torch.compiler.is_compiling():  # its super() is more than dynamo can follow
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionCalls, (self.serve,)  # copied as it is, the function would go on calling the original

    def _served(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.serve(AttentionCall(*args, **kwargs))


def _calling(serve: Callable[..., Tensor]) -> Any:
    """multi_head_attention_forward with `serve` as its attention: inside it, torch has switched the mode off."""
    function: Any = F.multi_head_attention_forward
    ours = {"scaled_dot_product_attention": serve, "has_torch_function": lambda _: False}
    names = {**function.__globals__, **ours}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
