"""A small network from scratch: as if it had been built at the widths of its ticket."""

from __future__ import annotations

from typing import Any

import torch

from ..pruning.shrink import shrink
from ..tickets.ticket import Ticket
from .world import World

__all__ = ["drawn_anew"]


def drawn_anew(world: World, ticket: Ticket, seed: int) -> Any:
    """The network of a ticket, with weights that no training and no dense network had.

    Every module draws its own parameters again, which for torch's layers depend on how many inputs are left. What was
    constant in a new dense network (norms, layers that begin at zero) is that constant; parameters of modules that
    cannot draw anew (`reset_parameters`) are cut out of a dense draw.
    """
    dense = world.new_network(seed)
    constant = {name: p.flatten()[0] for name, p in dense.named_parameters() if p.numel() > 1 and p.min() == p.max()}
    network = shrink(dense, ticket)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in network.modules():
            draw: Any = getattr(module, "reset_parameters", None)
            if callable(draw):
                draw()
        for name, parameter in network.named_parameters():
            if name in constant:
                parameter.fill_(constant[name])
    return network
