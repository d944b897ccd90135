"""One picture after another: encoded or decoded, of any mode, into uint8 of one size and one number of channels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["Pixels", "Source", "decoded"]

Pixels = NDArray[np.uint8]  # [H, W, C]
Source = Path | bytes | Pixels  # one image, encoded or decoded


def decoded(
    names: Sequence[str], sources: Sequence[Source], where: str, size: int | None, channels: int | None
) -> Tensor:
    """Images as they came -> uint8 [N, C, H, W], C = 3 where any has colour and none was asked for.

    Args:
        names: what to call each of `sources` in an error.
        where: what to call them together.
        size, channels: see `load_images`.

    Raises:
        EbdiffError: some are unreadable or differ in size; names them.
    """

    def read(source: Source) -> Pixels | str:
        try:
            return _read(source, size, channels)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            return str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        pictures = list((map if isinstance(sources[0], np.ndarray) else pool.map)(read, sources))
    broken = {name: picture for name, picture in zip(names, pictures, strict=True) if isinstance(picture, str)}
    if broken:
        raise EbdiffError(
            f"{len(broken)} of {len(pictures)} images in {where} cannot be read",
            got=f"{_few([*broken])} ({next(iter(broken.values()))})",
            remedy="remove or replace them",
        )
    return _stack(names, [picture for picture in pictures if not isinstance(picture, str)], where)


def _read(source: Source, size: int | None, channels: int | None) -> Pixels:
    """One image as uint8 [H, W, C] of the wanted size; with channels=None, C is 1 where the image is grey."""
    if isinstance(source, np.ndarray):
        if size in (None, source.shape[0]) and size in (None, source.shape[1]) and channels in (None, source.shape[2]):
            return source
        return _fit(Image.fromarray(source[..., 0] if source.shape[2] == 1 else source), size, channels)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return _fit(image, size, channels)


def _fit(picture: Image.Image, size: int | None, channels: int | None) -> Pixels:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # sixteen bits, which Pillow would clip to eight
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = opaque.convert("L" if picture.mode == "LA" else "RGB")
    grey = channels == 1 or (channels is None and picture.mode in ("1", "L"))
    picture = picture.convert("L" if grey else "RGB")
    if size is not None and picture.size != (size, size):
        width, height = (max(size, round(side * size / min(picture.size))) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
    pixels: Pixels = np.array(picture)
    return pixels[..., None] if grey else pixels


def _stack(names: Sequence[str], pictures: Sequence[Pixels], where: str) -> Tensor:
    """[H, W, C] each -> [N, C, H, W]; grey ones become RGB where others have colour."""
    first = pictures[0].shape
    odd = [i for i, picture in enumerate(pictures) if picture.shape[:2] != first[:2]]
    if odd:
        height, width = pictures[odd[0]].shape[:2]
        raise EbdiffError(
            f"images in {where} differ in size",
            expected=f"{first[1]}x{first[0]} like {names[0]}",
            got=f"{width}x{height} in {_few([names[i] for i in odd])}",
            remedy="pass size= to scale and crop them all",
        )
    channels = max(picture.shape[2] for picture in pictures)
    same = [picture if picture.shape[2] == channels else picture.repeat(channels, axis=2) for picture in pictures]
    return torch.from_numpy(np.stack(same)).permute(0, 3, 1, 2).contiguous()


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
