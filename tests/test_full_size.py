"""Published networks at their full size, traced once each without memory: docs/families.md says what the plans say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import DOCS, FULL_SIZE, build, row
from ebdiff import trace

# Millions of parameters, as published; every attention has heads. A DiT of diffusers embeds its labels in each block.
PUBLISHED: dict[str, tuple[float, int]] = {
    "SD1.5 UNet": (859.5, 32),
    "SDXL UNet": (2567.5, 140),
    "text-to-video UNet": (1411.2, 66),
    "SD VAE": (83.7, 0),
    "DiT-XL/2": (749.8, 28),
    "PixArt-XL/2": (611.3, 2 * 28),
    "SD3 medium": (2028.3, 24),
    "SD3.5 large": (8056.6, 38),
    "Flux.1 dev": (11901.4, 19 + 38),
    "Wan2.1 1.3B": (1419.0, 2 * 30),
    "Wan2.1 14B": (14288.5, 2 * 40),
    "CogVideoX-2b": (1693.8, 30),
    "CogVideoX-5b": (5570.3, 42),
    "Sana 1.6B": (1604.5, 2 * 20),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_network_is_traced_without_memory(name: str) -> None:
    model, arguments = build(name)
    assert all(tensor.device == torch.device("meta") for tensor in model.state_dict().values())
    plan = trace(model, **arguments)
    millions, heads = PUBLISHED[name]
    assert round(plan.parameters() / 1e6, 1) == millions
    assert sum(space.unit == "head" for space in plan) == heads
    table = DOCS.read_text(encoding="utf-8").splitlines()
    assert row(name, plan) in table, "python -m benchmarks.families writes it anew"
