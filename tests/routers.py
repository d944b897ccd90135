"""Networks and a router over them, for the tests of TimestepRouter."""

import torch
from diffusers import UNet2DModel
from torch import nn

from ebdiff import Partition, TimestepRouter

PARTITION = Partition(0, 240, 440, 1000)


def unet(width: int, seed: int = 0, **config) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **config,
    ).eval()


def router(**options) -> TimestepRouter:
    return TimestepRouter(PARTITION, [unet(8), unet(12), unet(16)], **options).eval()


class Names(nn.Module):
    """Returns its own number plus the mean of each sample, and records what it was called with."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(float(number)))
        self.calls: list[tuple[tuple, dict]] = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        x = args[0] if args else kwargs["hidden_states"]
        return (x.mean(dim=(1, 2, 3)) + self.bias, {"twice": [2 * x]}, None)


def named(**options) -> TimestepRouter:
    return TimestepRouter(PARTITION, [Names(0), Names(1), Names(2)], **options)


def images(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=5, output_type="np", **options).images
