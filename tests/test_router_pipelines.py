"""TimestepRouter as the transformer of diffusers' own pipelines, and called as they call theirs.

The pipelines of SD3 and Flux need transformers, which ebdiff does not; without it they are called by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ebdiff import Partition, TimestepRouter

PARTITION = Partition(0, 240, 440, 1000)


def vae(**config: Any) -> Any:
    torch.manual_seed(9)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        sample_size=16,
        **config,
    ).eval()


def dit(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_num_groups=2,
    ).eval()


def sd3(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).eval()


def flux(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()


def numbers_called(networks: list[Any]) -> list[int]:
    """Filled with the number of each network that is called."""
    calls: list[int] = []
    for number, net in enumerate(networks):
        net.register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


def dit_pipeline(transformer: Any) -> Any:
    return DiTPipeline(transformer, vae(), DDIMScheduler())


def sd3_pipeline(transformer: Any) -> Any:
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2"))
    parts: dict[str, Any] = {"vae": vae(shift_factor=0.1), **texts, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), **parts)


def flux_pipeline(transformer: Any) -> Any:
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    parts: dict[str, Any] = {"vae": vae(shift_factor=0.1), **texts}
    return diffusers.FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def drawn(pipeline: Any, **told: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**told, num_inference_steps=5, generator=generator, output_type="np").images


def text(sign: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"prompt_embeds": sign * torch.randn(1, 5, 8), "pooled_prompt_embeds": sign * torch.randn(1, 8)}


FAMILIES: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any], dict[str, Any], float]] = {
    "DiT": (dit, dit_pipeline, {"class_labels": [1, 2], "guidance_scale": 2.0}, 1),
    "SD3": (
        sd3,
        sd3_pipeline,
        {"height": 16, "width": 16, **text(), **{f"negative_{name}": value for name, value in text(-1.0).items()}},
        1,
    ),
    "Flux": (flux, flux_pipeline, {"height": 16, "width": 16, **text()}, 1000),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_of_transformers_runs_each_region_with_its_network(family: str) -> None:
    make, pipeline, told, scale = FAMILIES[family]
    if family != "DiT":
        pytest.importorskip("transformers")
    nets = [make(0), make(1), make(2)]
    alike = drawn(pipeline(TimestepRouter(PARTITION, nets[:1] * 3, timestep_scale=scale)), **told)
    assert (alike == drawn(pipeline(nets[0]), **told)).all()
    calls = numbers_called(nets)
    drawn(pipeline(TimestepRouter(PARTITION, nets, timestep_scale=scale)), **told)
    # DDIM visits t = 800, 600, 400, 200, 0; flow matching 1000, 750, 500, 250 and 1.
    assert calls == ([2, 2, 1, 0, 0] if family == "DiT" else [2, 2, 2, 1, 0])


def test_a_saved_pipeline_of_transformers_comes_back_bit_equal(tmp_path: Any) -> None:
    pipeline = dit_pipeline(TimestepRouter(PARTITION, [dit(0), dit(1), dit(2)]))
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.transformer) is TimestepRouter
    assert again.transformer.dtype is torch.float32
    told = FAMILIES["DiT"][2]
    assert (drawn(again, **told) == drawn(pipeline, **told)).all()


def sd3_call(rows: slice, t: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(4)
    given = {"hidden_states": torch.randn(5, 4, 8, 8), "timestep": t}
    given |= {"encoder_hidden_states": torch.randn(5, 3, 8), "pooled_projections": torch.randn(5, 8)}
    return {name: value[rows] for name, value in given.items()}


def flux_call(rows: slice, t: Tensor) -> dict[str, Tensor]:
    """Flux is given t / 1000, and positions that are no batch."""
    torch.manual_seed(4)
    given = {"hidden_states": torch.randn(5, 16, 16), "timestep": t / 1000, "guidance": torch.full((5,), 3.5)}
    given |= {"encoder_hidden_states": torch.randn(5, 3, 8), "pooled_projections": torch.randn(5, 8)}
    return {name: value[rows] for name, value in given.items()} | {
        "txt_ids": torch.zeros(3, 3),
        "img_ids": torch.arange(48.0).view(16, 3) % 4,
    }


@pytest.mark.parametrize(("make", "call", "scale"), [(sd3, sd3_call, 1), (flux, flux_call, 1000)], ids=["SD3", "Flux"])
def test_a_batch_of_mixed_timesteps_is_each_sample_through_its_own_network(
    make: Callable[[int], Any], call: Callable[[slice, Tensor], dict[str, Tensor]], scale: float
) -> None:
    nets = [make(number) for number in range(3)]
    model, t = TimestepRouter(PARTITION, nets, timestep_scale=scale), torch.tensor([440, 239, 999, 240, 0])
    with torch.no_grad(), model.cache_context("cond"):
        mixed = model(**call(slice(None), t), return_dict=False)[0]
        for row, number in enumerate([2, 0, 2, 1, 0]):
            single = nets[number](**call(slice(row, row + 1), t)).sample
            torch.testing.assert_close(mixed[row : row + 1], single, rtol=1e-5, atol=1e-5)
