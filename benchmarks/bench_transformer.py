"""What half the heads and half the MLP of a DiT-B/4 buy: dense, shrunken, and built natively at the small size.

Target on 2 cores: a step of the shrunken network within 15% of the native one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ebdiff
from benchmarks import SideBySide, few

BATCH = {True: 8, False: 2}  # at full size, and elsewhere
ROUNDS = 7
DEPTH, HEADS, HEAD_DIM, PATCH = 12, 12, 64, 4  # DiT-B/4 (Peebles & Xie 2023) on latents of 256x256 images
HALVED = {"*.attn1.to_q.head": 0.5, "*.ff.net.0.proj": 0.5}


def dit() -> nn.Module:
    """DiT-B/4 with random weights."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_layers=DEPTH,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        sample_size=32,
        patch_size=PATCH,
        in_channels=4,
        out_channels=8,
    )


def native() -> nn.Module:
    """A DiT-B/4 whose attention and MLP were built with half the heads and half the width."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention

    model, width = dit(), HEADS * HEAD_DIM
    for block in model.transformer_blocks:
        block.attn1 = Attention(width, heads=HEADS // 2, dim_head=HEAD_DIM, bias=True)
        block.ff = FeedForward(width, mult=2, activation_fn="gelu-approximate")
    return model


def shrunken() -> nn.Module:
    """The dense one without half of its heads and half of its MLP."""
    model = dit()
    plan = ebdiff.trace(model, **example(1))
    scores = ebdiff.importance(model, plan)
    return ebdiff.shrink(model, ebdiff.ChannelMask.draw(scores, plan=plan, ratio=HALVED))


def example(batch: int) -> dict[str, torch.Tensor]:
    """Arguments of its forward."""
    t, labels = torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))
    return {"hidden_states": torch.randn(batch, 4, 32, 32), "timestep": t, "class_labels": labels}


def training_step(model: nn.Module, device: torch.device, batch: int) -> Callable[[], None]:
    """Forward and backward of one batch in float32; gradients are dropped before the clock starts again."""
    arguments = {name: tensor.to(device) for name, tensor in example(batch).items()}
    model.to(device).train()

    def step() -> None:
        model(**arguments).sample.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


@pytest.mark.benchmark(group="shrink")
def test_half_the_heads_and_mlp(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    batch, rounds = BATCH[full], few(ROUNDS, full)
    networks = {"dense": dit(), "shrunken": shrunken(), "native": native()}
    timing = SideBySide({name: training_step(net, device, batch) for name, net in networks.items()}, device)
    timing.run(benchmark, rounds)
    rows = [
        {
            "network": name,
            "parameters": sum(p.numel() for p in net.parameters()),
            "seconds": timing.median(name),
            "times_faster": timing.ratio("dense", name),
            "of_native": timing.median(name) / timing.median("native"),
        }
        for name, net in networks.items()
    ]
    report(rows, {"what": "DiT-B/4, 64 tokens, forward + backward, float32", "batch": batch, "rounds": rounds})
