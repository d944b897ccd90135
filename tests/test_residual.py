"""Residual widths: a norm takes its statistics over the kept channels, and the shrunken one computes just that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from laws import assert_changes_the_output
from torch import Tensor, nn
from torch.nn import functional as F
from unets import scatter, unet

import ebdiff
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.plan import ChannelPlan


class LlamaNorm(nn.Module):
    """Root mean square in single steps, as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class UnitNorm(nn.Module):
    """Division by the length, times a constant that knows the width, as in denoising_diffusion_pytorch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**0.5
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.g * self.scale


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer norm": nn.LayerNorm,
    "layer norm without bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer norm without weight": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "rms norm": nn.RMSNorm,
    "rms norm without weight": lambda width: nn.RMSNorm(width, elementwise_affine=False),
    "diffusers rms norm": lambda width: DiffusersRMSNorm(width, 1e-6),
    "diffusers fp32 layer norm": FP32LayerNorm,
    "llama": LlamaNorm,
    "unit length": UnitNorm,
}


class Blocks(nn.Module):
    """Two blocks that add to a stream of 12 channels and normalise it."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 12) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        y: Tensor = self.out(self.norms[-1](x))
        return y


def drawn(plan: ChannelPlan, seed: int = 0, **options: Any) -> ChannelMask:
    generator = torch.Generator().manual_seed(seed)
    scores = {space.name: torch.rand(space.size, generator=generator) for space in plan}
    return ChannelMask.draw(scores, plan=plan, **{"ratio": 0.5, "residual": True, "head_dim": True, **options})


def assert_law(model: nn.Module, mask: ChannelMask, x: Tensor) -> Any:
    """Outputs and gradients, and outputs to the last digits; returns the shrunken network."""
    assert_changes_the_output(model, {"x": x}, mask)
    small = laws.assert_law(model, {"x": x}, mask)
    ours, theirs = (f(model, mask)(x) for f in (ebdiff.shrink, ebdiff.masked))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    small.zero_grad()
    return small


@pytest.mark.parametrize("norm", NORMS)
def test_a_stream_and_its_norms_shrink_together(norm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = scatter(Blocks(NORMS[norm])).double(), torch.randn(2, 7, 5).double()
    plan = ebdiff.trace(model, x)
    assert [(s.name, s.size) for s in plan if s.unit == "residual"] == [("into.residual", 12)]
    small = assert_law(model, drawn(plan), x)
    assert small.into.out_features == 6
    ebdiff.save(small, tmp_path)
    torch.testing.assert_close(ebdiff.load(tmp_path)(x), small(x), rtol=0, atol=0)
    again = drawn(ebdiff.trace(small, x), ratio=0.4)
    assert_law(small, again, x)


@pytest.mark.parametrize("norm", ["layer norm", "rms norm", "diffusers rms norm", "llama", "unit length"])
def test_a_shrunken_norm_is_the_norm_of_that_width(norm: str) -> None:
    """Statistics over six kept channels, by a norm that was made for six."""
    model, x = scatter(Blocks(NORMS[norm])), torch.randn(2, 7, 5)
    mask = drawn(ebdiff.trace(model, x))
    small, fresh, h = ebdiff.shrink(model, mask).norms[0], NORMS[norm](6), torch.randn(4, 6)
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(h), fresh(h), rtol=0, atol=0)


def test_residual_widths_stay_whole_unless_asked_for() -> None:
    model, x = Blocks(nn.LayerNorm), torch.randn(2, 7, 5)
    plan = ebdiff.trace(model, x)
    assert drawn(plan, residual=False)["into.residual"].all()
    assert not drawn(plan)["into.residual"].all()


def test_an_inner_norm_is_no_residual_stream() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    assert [(s.name, s.unit) for s in ebdiff.trace(model, torch.randn(3, 4))] == [("0", "channel")]


def test_what_is_not_normalised_over_one_axis_is_frozen() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
            self.norm = nn.LayerNorm([6, 4, 4])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.norm(self.a(x)))
            return y

    plan = ebdiff.trace(Several(), torch.randn(2, 2, 4, 4))
    assert len(plan) == 0
    assert "together with other axes" in {axis.name: axis.reason for axis in plan.frozen}["a.weight[0]"]


def test_a_norm_in_the_middle_of_a_forward_is_frozen() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y: Tensor = self.b(h * torch.rsqrt(h.square().mean(-1, keepdim=True)))
            return y

    plan = ebdiff.trace(nn.Sequential(Inline()), torch.randn(3, 4))
    assert len(plan) == 0
    assert {axis.name: axis.reason for axis in plan.frozen}["0.a.weight[0]"].startswith("reduced by mean in 0 (Inline)")


def test_a_norm_that_is_called_in_two_ways_is_frozen_in_both() -> None:
    """It has no weights that would tie the two axes; one of its calls is not followed."""

    class Twice(nn.Module):
        def __init__(self, keyword: bool) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.norm, self.keyword = nn.LayerNorm(6, elementwise_affine=False), keyword

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.norm(self.a(x)))
            y: Tensor = self.d(self.c(self.norm(input=h) if self.keyword else h))
            return y

    assert "a" in {space.name for space in ebdiff.trace(Twice(False), torch.randn(3, 4))}
    assert [space.name for space in ebdiff.trace(Twice(True), torch.randn(3, 4))] == ["c"]


def test_captions_are_viewed_at_the_width_of_the_stream() -> None:
    """`view(.., -1, hidden_states.size(-1))` ties their width to the stream's; PixArt and Sana do the same."""
    torch.manual_seed(0)
    options: dict[str, int] = {"in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1, "num_layers": 1}
    widths = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12}
    model = scatter(LTXVideoTransformer3DModel(**options, **widths)).double().eval()
    arguments: dict[str, Any] = {
        "hidden_states": torch.randn(2, 8, 4).double(),
        "encoder_hidden_states": torch.randn(2, 5, 12).double(),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        **{"num_frames": 2, "height": 2, "width": 2},
    }
    plan = ebdiff.trace(model, **arguments)
    assert [(space.name, space.size) for space in plan if space.unit == "residual"] == [("proj_in.residual", 16)]
    assert ("caption_projection.linear_2.weight", 0) in {(m.parameter, m.dim) for m in plan["proj_in.residual"].members}
    laws.assert_law(model, arguments, drawn(plan))


def test_plans_of_before_there_were_kinds_still_load() -> None:
    plan = ebdiff.trace(unet(), torch.randn(1, 2, 8, 8), 3)
    old = plan.to_json()
    for norm in old["norms"]:
        del norm["kind"], norm["inputs"], norm["outputs"]
    assert ChannelPlan.from_json(old) == plan
