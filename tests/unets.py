"""UNet2DModel configurations, small enough to run in a test and odd enough to hurt."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"down": "DownBlock2D", "up": "UpBlock2D"},
    "attention": {"down": "AttnDownBlock2D", "up": "AttnUpBlock2D"},
    "skip": {"down": "SkipDownBlock2D", "up": "SkipUpBlock2D", "in_channels": 3, "out_channels": 3},
    "attention skip": {
        "down": "AttnSkipDownBlock2D",
        "up": "AttnSkipUpBlock2D",
        "in_channels": 3,
        "out_channels": 3,
        "widths": (32, 64),
    },
    "resnet resampling": {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"},
    "K": {"down": "KDownBlock2D", "up": "KUpBlock2D", "add_attention": False, "widths": (32, 64)},
}


def unet(
    down: str = "DownBlock2D", up: str = "UpBlock2D", widths: tuple[int, ...] = (16, 32), **options: Any
) -> UNet2DModel:
    """A randomly initialised UNet2DModel in which every parameter is far from zero and norms differ by channel."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "block_out_channels": widths,
        "down_block_types": (down,) * len(widths),
        "up_block_types": (up,) * len(widths),
    }
    torch.manual_seed(0)
    return scatter(UNet2DModel(**{**settings, **options}).eval())


def scatter(model: nn.Module) -> nn.Module:
    """Give every parameter, biases and norm weights included, a random value that keeps activations of order one."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_().mul_(0.7 if parameter.dim() == 1 else 1.0).div_(fan_in**0.5)
    return model


def inputs(
    model: Any, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """(positional, keyword) arguments of a UNet2DModel."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=generator).to(dtype)
    t = torch.tensor([7, 900, 31, 555][:batch])
    if config.class_embed_type == "identity":
        width = config.block_out_channels[0] * 4
        return (x, t), {"class_labels": torch.randn(batch, width, generator=generator).to(dtype)}
    if config.class_embed_type == "timestep" or config.num_class_embeds is not None:
        return (x, t), {"class_labels": torch.tensor([1, 3, 0, 2][:batch])}
    return (x, t), {}
