"""How like the true images are those that were made of their low resolutions: PSNR and SSIM."""

from __future__ import annotations

from torch import Tensor

from ..errors import EbdiffError

__all__ = ["SMALLEST", "likeness"]

SMALLEST = 11  # side of SSIM's window, in pixels


def likeness(real: Tensor, made: Tensor) -> dict[str, float]:
    """{"psnr": dB, "ssim": at most 1}, both the higher the better; SSIM of Wang et al. 2004, the mean over images.

    Args:
        real, made: uint8 [N, C, H, W], image by image.

    Raises:
        EbdiffError: other shapes, or images too small for SSIM's window of 11 pixels.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if real.shape != made.shape or min(real.shape[-2:]) < SMALLEST:
        expected, got = (
            f"images like {list(real.shape)}, at least {SMALLEST} pixels wide and high",
            str(list(made.shape)),
        )
        raise EbdiffError("images to compare", expected=expected, got=got)
    a, b = made.float(), real.float()
    psnr = peak_signal_noise_ratio(a, b, data_range=(0.0, 255.0), reduction="elementwise_mean", dim=(1, 2, 3))
    return {"psnr": float(psnr), "ssim": float(structural_similarity_index_measure(a, b, data_range=255.0))}
