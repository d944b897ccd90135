"""What is learned from: images, or the latents that a VAE made of them, with their labels and embeddings."""

from .examples import Examples, Images, to_model, to_uint8
from .images import EMBEDDED, load_images
from .latents import Latents, decode, encode, load_latents, load_vae

__all__ = [
    "EMBEDDED",
    "Examples",
    "Images",
    "Latents",
    "decode",
    "encode",
    "load_images",
    "load_latents",
    "load_vae",
    "to_model",
    "to_uint8",
]
