"""Tiny random networks of every diffusers family that is claimed to work, and the arguments they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from unets import scatter

Built = tuple[nn.Module, dict[str, Any]]
BUILDERS: dict[str, Callable[[], Built]] = {}


def build(name: str, dtype: torch.dtype = torch.float64) -> Built:
    """(model in eval mode with every parameter far from zero, keyword arguments), both in `dtype`."""
    torch.manual_seed(0)
    model, arguments = BUILDERS[name]()
    return scatter(model).to(dtype).eval(), cast(arguments, dtype)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested containers, in another dtype."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def family(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """File a builder under the name of its family."""

    def file(builder: Callable[[], Built]) -> Callable[[], Built]:
        BUILDERS[name] = builder
        return builder

    return file


def steps() -> Tensor:
    """Two timesteps."""
    return torch.tensor([3, 7])


# Convolutional --------------------------------------------------------------------------------------------------------


@family("SD1.5 UNet")
def stable_diffusion() -> Built:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    return model, {"sample": x, "timestep": steps(), "encoder_hidden_states": text}


@family("SDXL UNet")
def stable_diffusion_xl() -> Built:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10,
    )  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.rand(2, 6)}
    return model, {"sample": x, "timestep": steps(), "encoder_hidden_states": text, "added_cond_kwargs": added}


@family("text-to-video UNet")
def text_to_video() -> Built:
    model = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip
    x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 12)
    return model, {"sample": x, "timestep": torch.tensor([3]), "encoder_hidden_states": text}


@family("SD VAE")
def autoencoder() -> Built:
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 3, 8, 8)}


# Transformers ---------------------------------------------------------------------------------------------------------


@family("DiT")
def dit() -> Built:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    return model, {"hidden_states": x, "timestep": steps(), "class_labels": labels}


@family("PixArt")
def pixart() -> Built:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=12, norm_num_groups=4,
    )  # fmt: skip
    added = {"resolution": None, "aspect_ratio": None}
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    return model, {
        "hidden_states": x, "encoder_hidden_states": text, "timestep": steps(), "added_cond_kwargs": added
    }  # fmt: skip


def _sd3(**options: Any) -> Built:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12, pos_embed_max_size=8, **options,
    )  # fmt: skip
    x, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20), torch.randn(2, 12)
    return model, {
        "hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": steps()
    }  # fmt: skip


@family("SD3")
def sd3() -> Built:
    return _sd3(num_layers=2)


@family("SD3.5")
def sd35() -> Built:
    return _sd3(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0, 1))


@family("Flux")
def flux() -> Built:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    x, text, pooled = torch.randn(2, 16, 4), torch.randn(2, 5, 20), torch.randn(2, 12)
    return model, {
        "hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": torch.rand(2),
        "img_ids": torch.rand(16, 3), "txt_ids": torch.rand(5, 3), "guidance": torch.rand(2),
    }  # fmt: skip


@family("Wan")
def wan() -> Built:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=16, ffn_dim=40, num_layers=2, cross_attn_norm=True, rope_max_seq_len=16,
    )  # fmt: skip
    x, text = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 5, 20)
    return model, {"hidden_states": x, "encoder_hidden_states": text, "timestep": steps()}


def _cogvideox(head_dim: int, **options: Any) -> Built:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=head_dim, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=20, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        max_text_seq_length=5, **options,
    )  # fmt: skip
    x, text = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 5, 20)
    return model, {"hidden_states": x, "encoder_hidden_states": text, "timestep": steps()}


@family("CogVideoX-2b")
def cogvideox() -> Built:
    return _cogvideox(8)


@family("CogVideoX-5b")
def cogvideox_rotary() -> Built:
    model, arguments = _cogvideox(16, use_rotary_positional_embeddings=True)
    return model, {**arguments, "image_rotary_emb": (torch.randn(32, 16), torch.randn(32, 16))}


@family("LTX")
def ltx() -> Built:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=20,
    )  # fmt: skip
    x, text, mask = torch.randn(2, 16, 4), torch.randn(2, 5, 20), torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    return model, {
        "hidden_states": x, "encoder_hidden_states": text, "timestep": steps(), "encoder_attention_mask": mask,
        "num_frames": 2, "height": 2, "width": 4,
    }  # fmt: skip


@family("Lumina")
def lumina() -> Built:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, cross_attention_dim=20,
    )  # fmt: skip
    x, text, turns = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20), torch.randn(384, 384, 4)
    return model, {
        "hidden_states": x, "encoder_hidden_states": text, "timestep": torch.rand(2), "cross_attention_kwargs": {},
        "encoder_mask": torch.ones(2, 5), "image_rotary_emb": torch.polar(torch.ones_like(turns), turns),
    }  # fmt: skip


@family("AuraFlow")
def auraflow() -> Built:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=20, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20)
    return model, {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.rand(2)}


@family("Sana")
def sana() -> Built:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
    )  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    return model, {"hidden_states": x, "encoder_hidden_states": text, "timestep": steps()}
