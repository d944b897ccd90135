"""Has a network attention that a search can watch?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import EbdiffError
from ..tickets.attention import Attention
from ..tickets.attention_watch import AttentionWatch
from .conditions import Told, ask

__all__ = ["check_attention"]


def check_attention(network: Any, x: Tensor, t: Tensor, told: Told, density: float) -> None:
    """Refuse to watch the attention of a network that has none, or none of enough tokens to pay.

    Args:
        network: on the meta device, where calling it takes no memory.
        x: float [1, C, H, W], there too.
        t: int64 [1].
        told: one row each.
        density: the share of blocks to keep.

    Raises:
        EbdiffError: there is nothing to watch.
    """
    watch = AttentionWatch(network, Attention(density, every=1))
    try:
        ask(network, x, t, told)
        watch.step()
    except EbdiffError as error:
        raise EbdiffError(f"search.attention: {error}") from None
    finally:
        watch.detach()
