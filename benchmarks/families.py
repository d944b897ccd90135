"""Published networks at their full size, as shapes without memory. What of each can go is the table of
docs/families.md, which `python -m benchmarks.families` writes anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ebdiff
from ebdiff.pruning.plan import ChannelPlan

Built = tuple[nn.Module, dict[str, Any]]
FULL_SIZE: dict[str, Callable[[], Built]] = {}
DOCS = Path(__file__).parent.parent / "docs" / "families.md"
HEADER = (
    "| network | parameters | GMACs | heads | MLP and others | head_dim | residual | can go | with head_dim "
    "| with residual |",
    "|" + "---|" * 10,
)


def build(name: str) -> Built:
    """(model, keyword arguments) of a family, both on the meta device; batch 1."""
    with torch.device("meta"):
        model, arguments = FULL_SIZE[name]()
    return model.to("meta").eval(), arguments  # tables that came from numpy are on the CPU


def _full_size(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def file(builder: Callable[[], Built]) -> Callable[[], Built]:
        FULL_SIZE[name] = builder
        return builder

    return file


def _called(x: tuple[int, ...], text: tuple[int, ...] | None = None, **others: Any) -> dict[str, Any]:
    """Arguments of a transformer."""
    found = {"hidden_states": torch.empty(1, *x), "timestep": torch.empty(1), **others}
    return found if text is None else {**found, "encoder_hidden_states": torch.empty(1, *text)}


def _unet(model: nn.Module, x: tuple[int, ...], text: tuple[int, ...], **added: Tensor) -> Built:
    arguments = {
        "sample": torch.empty(1, *x),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, *text),
    }
    return model, {**arguments, "added_cond_kwargs": added} if added else arguments


@_full_size("SD1.5 UNet")
def _sd15() -> Built:
    from diffusers import UNet2DConditionModel

    return _unet(UNet2DConditionModel(sample_size=64, cross_attention_dim=768), (4, 64, 64), (77, 768))


@_full_size("SDXL UNet")
def _sdxl() -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return _unet(model, (4, 128, 128), (77, 2048), text_embeds=torch.empty(1, 1280), time_ids=torch.empty(1, 6))


@_full_size("text-to-video UNet")
def _text_to_video() -> Built:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(sample_size=32, cross_attention_dim=1024, attention_head_dim=64)
    return _unet(model, (4, 16, 32, 32), (77, 1024))


@_full_size("SD VAE")
def _autoencoder() -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return model, {"sample": torch.empty(1, 3, 512, 512)}


@_full_size("DiT-XL/2")
def _dit() -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_layers=28, out_channels=8, sample_size=32)
    return model, _called((4, 32, 32), class_labels=torch.empty(1, dtype=torch.long))


@_full_size("PixArt-XL/2")
def _pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    added = {"resolution": torch.empty(1, 2), "aspect_ratio": torch.empty(1, 1)}
    return PixArtTransformer2DModel(sample_size=128, caption_channels=4096), _called(
        (4, 128, 128), (120, 4096), added_cond_kwargs=added
    )


def _sd3(**options: Any) -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(sample_size=128, joint_attention_dim=4096, pos_embed_max_size=192, **options)
    return model, _called((16, 128, 128), (333, 4096), pooled_projections=torch.empty(1, 2048))


@_full_size("SD3 medium")
def _sd3_medium() -> Built:
    return _sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)


@_full_size("SD3.5 large")
def _sd35_large() -> Built:
    return _sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")


@_full_size("Flux.1 dev")
def _flux() -> Built:
    from diffusers import FluxTransformer2DModel

    ids = {"img_ids": torch.empty(4096, 3), "txt_ids": torch.empty(512, 3)}
    pooled, guidance = torch.empty(1, 768), torch.empty(1)
    return FluxTransformer2DModel(guidance_embeds=True), _called(
        (4096, 64), (512, 4096), pooled_projections=pooled, guidance=guidance, **ids
    )


def _wan(**options: Any) -> Built:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**options), _called((16, 21, 60, 104), (512, 4096))


@_full_size("Wan2.1 1.3B")
def _wan_small() -> Built:
    return _wan(num_attention_heads=12, num_layers=30, ffn_dim=8960)


@_full_size("Wan2.1 14B")
def _wan_large() -> Built:
    return _wan(num_attention_heads=40, num_layers=40, ffn_dim=13824)


def _cogvideox(**options: Any) -> Built:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**options), _called((13, 16, 60, 90), (226, 4096))


@_full_size("CogVideoX-2b")
def _cogvideox_2b() -> Built:
    return _cogvideox(num_attention_heads=30, num_layers=30)


@_full_size("CogVideoX-5b")
def _cogvideox_5b() -> Built:
    model, arguments = _cogvideox(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
    tokens = 13 * 30 * 45
    return model, {**arguments, "image_rotary_emb": (torch.empty(tokens, 64), torch.empty(tokens, 64))}


@_full_size("Sana 1.6B")
def _sana() -> Built:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(), _called((32, 32, 32), (300, 2304))


# The table ------------------------------------------------------------------------------------------------------------


def row(name: str, plan: ChannelPlan) -> str:
    """A line of the table: the number of spaces of each unit, and the shares of parameters and MACs that can go."""
    units = Counter(space.unit for space in plan)
    counts = [str(units[unit] or "-") for unit in ("head", "channel", "head_dim", "residual")]
    more = [("channel", "head"), ("channel", "head", "head_dim"), ("channel", "head", "head_dim", "residual")]
    size = f"{plan.parameters() / 1e6:.0f}M", f"{plan.macs() / 1e9:,.0f}"
    return f"| {' | '.join([name, *size, *counts, *(removable(plan, allowed) for allowed in more)])} |"


def removable(plan: ChannelPlan, units: tuple[str, ...]) -> str:
    """The shares of parameters and of MACs that go where one index of every space of these units is kept."""
    keep = {space.name: torch.arange(space.size) == 0 for space in plan if space.unit in units}
    mask = ebdiff.ChannelMask(plan, keep)
    shares = 1 - plan.parameters(mask) / plan.parameters(), 1 - plan.macs(mask) / plan.macs()
    return ", ".join(f"{floor(1000 * share) / 10}%" for share in shares)


def traced(name: str) -> ChannelPlan:
    """The plan of a network at its full size."""
    model, arguments = build(name)
    return ebdiff.trace(model, **arguments)


def write(rows: list[str]) -> None:
    """Put the rows where docs/families.md has its table."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER[0])
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    DOCS.write_text("\n".join([*lines[:start], *HEADER, *rows, *lines[end:]]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write([row(name, traced(name)) for name in FULL_SIZE])
