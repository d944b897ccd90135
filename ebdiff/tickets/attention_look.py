"""One look at a network's attention: who computes it during a forward, and how much each block holds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..nn.attention_calls import AttentionCall, AttentionCalls
from .attention import Attention, Grid, attention_mass

__all__ = ["Look"]


class Look:
    """What the attention of one step holds, added up over its forwards."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.grids: dict[str, Grid] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._short: dict[str, int] = {}  # layers too short to watch, and their tokens
        self._sizes: dict[str, Grid] = {}  # of this forward
        self._several: set[str] = set()  # layers of several sizes in one forward: no mask fits them all
        self._running: list[str] = []  # names of the modules whose forward runs, the innermost last
        self._calls: ExitStack | None = None

    def attach(self, model: nn.Module) -> list[Any]:
        """Look at every forward from now on, until these hooks are removed."""
        self.grids, self._sums, self._counts, self._short, self._several = {}, {}, {}, {}, set()
        hooks: list[Any] = [model.register_forward_pre_hook(self._enter)]
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(self._begin, name)))
            hooks.append(module.register_forward_hook(self._end, always_call=True))
        return [*hooks, model.register_forward_hook(self._leave, always_call=True)]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and self._calls is None:
            self._running, self._sizes = [], {}
            self._calls = ExitStack()
            self._calls.enter_context(AttentionCalls(self._serve))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Answer no more calls, also where an interrupt (KeyboardInterrupt runs no hook) has ended a forward."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self._running.append(name)

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running.pop()

    def _serve(self, call: AttentionCall) -> Tensor:
        name, block = self._running[-1], self.attention.block
        query, key = (tensor.reshape(-1, *tensor.shape[-3:]) for tensor in call[:2])
        grid = Grid(query.shape[1], query.shape[2], key.shape[2], block)
        if self._sizes.setdefault(name, grid) != grid:
            self._several.add(name)
            for held in (self.grids, self._sums, self._counts, self._short):
                held.pop(name, None)
        if name in self._several:
            return call.run()
        if min(grid.q_len, grid.k_len) < self.attention.tokens:
            self._short[name] = min(grid.q_len, grid.k_len)
            return call.run()
        if self.grids.setdefault(name, grid) != grid:
            _refuse_sizes(name, self.grids[name], grid)
        mask, samples = call.attn_mask, call.query.shape[:-3]
        if mask is not None and mask.dim() > 3 and samples:  # by sample: joined as those of the queries
            mask = mask.expand(*samples, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
        with torch.no_grad():
            mass = attention_mass(query, key, block, call.scale, mask, call.is_causal)
        self._sums[name] = self._sums[name] + mass if name in self._sums else mass
        self._counts[name] = self._counts.get(name, 0) + 1
        return call.run()

    def take(self, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
        """{layer: its mean mass}, of the layers that are watched already, or of all that were seen."""
        if not self._sums:
            longest = max(self._short.values(), default=0)
            got = f"at most {longest} tokens" if longest else "no such call while this module ran"
            if self._several:
                names = ", ".join(name or "the model" for name in sorted(self._several))
                got = f"only layers of several sizes in one forward: {names}"
            raise EbdiffError(
                "no attention to watch",
                expected=f"a forward with gradients that calls scaled_dot_product_attention with at least "
                f"{self.attention.tokens} queries and keys",
                got=got,
                remedy="leave attention out; or pass the module that the loop runs, not compiled, or lower tokens",
            )
        for name, grid in grids.items():
            if self.grids.get(name) != grid:
                _refuse_sizes(name, grid, self.grids.get(name))
        return {name: self._sums[name] / self._counts[name] for name in grids or self._sums}


def _refuse_sizes(name: str, expected: Grid, got: Grid | None) -> None:
    words = "{0} heads, {1} queries, {2} keys"
    raise EbdiffError(
        f"the attention of {name or 'the model'} changes its size",
        expected=words.format(*expected),
        got="no call" if got is None else words.format(*got),
        remedy="search at one resolution: a block mask means nothing at another",
    )
