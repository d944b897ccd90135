"""How like the true images are those that were made of their low resolutions: PSNR and SSIM."""

from __future__ import annotations

from torch import Tensor

from ..errors import EbdiffError

__all__ = ["SMALLEST", "likeness"]

SMALLEST = 11  # side of SSIM's window, in pixels
ROUNDING = 1 / 12  # mean square of what is lost by rounding to whole levels, in levels squared


def likeness(real: Tensor, made: Tensor) -> dict[str, float]:
    """{"psnr": dB, "ssim": at most 1}, both the higher the better; SSIM of Wang et al. 2004, the mean over images.

    An image's squared error counts as at least that of rounding, 1/12 of a level squared, so PSNR is at most 58.92 dB
    and finite for equal images too.

    Args:
        real, made: uint8 [N, C, H, W], image by image.

    Raises:
        EbdiffError: other shapes, or images too small for SSIM's window of 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if real.shape != made.shape or min(real.shape[-2:]) < SMALLEST:
        expected, got = (
            f"images like {list(real.shape)}, at least {SMALLEST} pixels wide and high",
            str(list(made.shape)),
        )
        raise EbdiffError("images to compare", expected=expected, got=got)
    a, b = made.float(), real.float()
    mse = (a - b).square().mean((1, 2, 3)).clamp(min=ROUNDING)
    psnr = (10 * (255**2 / mse).log10()).mean()
    return {"psnr": float(psnr), "ssim": float(structural_similarity_index_measure(a, b, data_range=255.0))}
