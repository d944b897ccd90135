"""head_dim of every family: the softmax keeps the scale of the dense network, whatever the network goes through."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
from diffusers.models.transformers.transformer_ltx import LTXAttention
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from families import build
from laws import assert_comes_back, assert_law, assert_trains, random_keep, tensors_of, thinnest
from test_families import traced
from torch import Tensor, nn

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.nn.attention_calls import AttentionCall, AttentionCalls
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.plan import ChannelPlan

NAMES = ("DiT", "SD3", "SD3.5", "Flux", "Wan", "CogVideoX-2b", "CogVideoX-5b", "LTX")


def cut(plan: ChannelPlan, kept: float = 0.5) -> ChannelMask:
    """Another number of dimensions for q and k than for v."""
    spaces = [space for space in plan if space.unit == "head_dim"]
    assert spaces
    sizes = {space.name: max(1, int(kept * space.size) - i % 2) for i, space in enumerate(spaces)}
    return ChannelMask(plan, {space.name: torch.arange(space.size) < sizes[space.name] for space in spaces})


def scales_of(model: nn.Module, arguments: dict[str, Any]) -> list[float]:
    """The factor on the logits in every call of attention."""
    found = []

    def answer(call: AttentionCall) -> Tensor:
        found.append(call.query.shape[-1] ** -0.5 if call.scale is None else call.scale)
        return call.run()

    with torch.no_grad(), AttentionCalls(answer):
        model(**arguments)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_call_keeps_its_scale_and_what_is_left_is_saved(name: str, tmp_path: Path) -> None:
    model, arguments, plan = traced(name)
    small = assert_law(model, arguments, cut(plan))
    assert scales_of(small, arguments) == pytest.approx(scales_of(model, arguments))
    assert_comes_back(small, arguments, tmp_path)
    small.zero_grad()
    again = ebdiff.trace(small, **arguments)
    smaller = assert_law(small, arguments, thinnest(again, ("head_dim", "head")))
    assert scales_of(smaller, arguments) == pytest.approx(scales_of(model, arguments))
    assert_comes_back(smaller, arguments, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_changed_gets_another_processor(name: str) -> None:
    model, _, plan = traced(name)
    heads = ebdiff.shrink(model, thinnest(plan, ("head", "channel")))
    assert processors_of(heads) == processors_of(model)


def processors_of(model: nn.Module) -> list[str]:
    return [type(layer.processor).__name__ for layer in model.modules() if hasattr(layer, "processor")]


@pytest.mark.parametrize("name", ["SD3.5", "Flux", "Wan", "CogVideoX-2b"])
def test_it_trains_with_checkpoints(name: str) -> None:
    dense, arguments, plan = traced(name)
    model: Any = copy.deepcopy(dense).train()
    model.enable_gradient_checkpointing()
    assert_law(model, arguments, cut(plan))
    assert_trains(model, arguments, cut(plan))


@pytest.mark.parametrize("name", ["SD3", "Flux", "Wan", "CogVideoX-2b"])
def test_it_compiles_in_one_graph(name: str) -> None:
    model, arguments, plan = traced(name)
    small = ebdiff.shrink(model, cut(plan))
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    with torch.no_grad():
        pairs = zip(tensors_of(compiled(**arguments)), tensors_of(small(**arguments)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Flux", "Wan", "LTX"])
def test_it_goes_on_in_the_backend_that_diffusers_was_told_to_use(name: str) -> None:
    model, arguments = build(name)
    model.set_attention_backend("_native_math")
    small: Any = ebdiff.shrink(model, cut(ebdiff.trace(model, **arguments)))
    chosen = {layer.processor._attention_backend for layer in small.modules() if hasattr(layer, "processor")}
    assert chosen == {"_native_math"}
    assert scales_of(small, arguments) == pytest.approx(scales_of(model, arguments))


def test_fused_projections_and_attention_to_images_keep_their_head_dim() -> None:
    model, arguments = build("Flux")
    model.fuse_qkv_projections()
    plan = ebdiff.trace(model, **arguments)
    assert not [space for space in plan if space.unit == "head_dim"]
    torch.manual_seed(0)
    wan: Any = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=16, ffn_dim=40, num_layers=1, cross_attn_norm=True, rope_max_seq_len=16, image_dim=10,
        added_kv_proj_dim=24,
    ).eval()  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 2, 4, 4), "timestep": torch.tensor([3]),
              "encoder_hidden_states": torch.randn(1, 512, 20),
              "encoder_hidden_states_image": torch.randn(1, 3, 10)}  # fmt: skip
    plan = ebdiff.trace(wan, **inputs)
    frozen = {axis.name: axis.reason for axis in plan.frozen}
    assert "softmax scale" in str([reason for name, reason in frozen.items() if "attn2" in name])


class TwoLayers(nn.Module):
    """Attention twice, the projections named by `shared` shared; the first takes `of` as its values' weights, too."""

    def __init__(self, shared: tuple[str, ...] = (), of: str | None = None) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 16), nn.Linear(16, 6)
        first, second = (Attention(16, heads=4, dim_head=4) for _ in range(2))
        for name in shared:
            setattr(second, name, getattr(first, name))
        if of is not None:
            first.to_v.weight = getattr(first, of).weight
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.first(h)
        y: Tensor = self.out(h + self.second(h))
        return y


@pytest.mark.parametrize(
    ("shared", "of"),
    [(("to_q", "to_k", "to_v"), None), (("to_q",), None), (("to_v",), None), ((), "to_k"), ((), "to_q")],
)
def test_layers_that_share_weights_keep_their_scale(shared: tuple[str, ...], of: str | None) -> None:
    torch.manual_seed(0)
    model, arguments = TwoLayers(shared, of).double(), {"x": torch.randn(2, 5, 6, dtype=torch.float64)}
    plan = ebdiff.trace(model, **arguments)
    assert "first.to_q.head_dim" in {space.name for space in plan}
    for seed in range(3):
        small = assert_law(model, arguments, random_keep(plan, seed))
        assert scales_of(small, arguments) == scales_of(model, arguments)


def test_attention_to_nothing_but_the_text_has_no_values_of_its_own() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"only_cross_attention": True, "processor": AttnAddedKVProcessor2_0()}
    model = Attention(16, heads=4, dim_head=4, added_kv_proj_dim=12, norm_num_groups=4, **options).double()
    arguments = {
        "hidden_states": torch.randn(2, 16, 3, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, 5, 12, dtype=torch.float64),
    }
    plan = ebdiff.trace(model, **arguments)
    for seed in range(3):
        assert_law(model, arguments, random_keep(plan, seed))


@pytest.mark.parametrize(
    "attention",
    [WanAttention(16, 2, 8, processor=WanAttnProcessor()), LTXAttention(16, 2, 2, 8)],
    ids=["Wan", "LTX"],
)
def test_positions_that_the_trace_did_not_see_are_refused(attention: nn.Module) -> None:
    tokens = torch.randn(2, 5, 16)
    plan = ebdiff.trace(attention, tokens)
    small = ebdiff.shrink(attention, thinnest(plan, ("head_dim",)))
    small(tokens)
    with pytest.raises(EbdiffError, match="rotary positions"):
        small(tokens, None, None, (torch.ones(1, 5, 1, 8), torch.ones(1, 5, 1, 8)))
