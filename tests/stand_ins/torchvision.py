"""What denoising_diffusion_pytorch's Trainer takes from torchvision, for pictures that have its size already."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image


def _compose(steps):
    def run(picture):
        for step in steps:
            picture = step(picture)
        return picture

    return run


def _same(*_):
    return lambda picture: picture


def _to_tensor():
    return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def _save_image(images, path, nrow):
    pixels = (images.clamp(0, 1) * 255).byte().unflatten(0, (-1, nrow)).permute(0, 3, 1, 4, 2).flatten(2, 3)
    Image.fromarray(pixels.flatten(0, 1).cpu().numpy()).save(path)


transforms = SimpleNamespace(
    Compose=_compose,
    Lambda=lambda f: f,
    Resize=_same,
    RandomHorizontalFlip=_same,
    CenterCrop=_same,
    ToTensor=_to_tensor,
)
utils = SimpleNamespace(save_image=_save_image)
