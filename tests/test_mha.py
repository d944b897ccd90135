"""torch's own attention: its heads, head_dim and width are free, in encoder layers too and past their fused kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from laws import assert_changes_the_output, assert_law
from test_residual import drawn
from torch import Tensor, nn
from unets import scatter

import ebdiff
from ebdiff.nn.multihead import MultiheadAttention


class Encoder(nn.Module):
    """Layers of torch's own between two linear ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y: Tensor = self.out(self.encoder(self.into(x), src_key_padding_mask=padding))
        return y


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.other, self.out = nn.Linear(5, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y: Tensor = self.out(self.decoder(self.into(x), self.other(context)))
        return y


class Looks(nn.Module):
    """Uses the attention weights, averaged over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        mixed, weights = self.attention(h, h, h)
        y: Tensor = self.out(h + mixed) * weights.max()
        return y


MODELS: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
    "norm last": (Encoder(), {"x": torch.randn(2, 7, 5)}),
    "norm first": (Encoder(norm_first=True), {"x": torch.randn(2, 7, 5)}),
    "without biases": (Encoder(norm_first=True, bias=False), {"x": torch.randn(2, 7, 5)}),
    "padding": (Encoder(), {"x": torch.randn(2, 7, 5), "padding": torch.arange(14).view(2, 7) > 11}),
    "decoder": (Decoder(), {"x": torch.randn(7, 2, 5), "context": torch.randn(4, 2, 6)}),
}


def double(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_heads_head_dim_and_width_are_free(name: str, training: bool, tmp_path: Path) -> None:
    model, arguments = scatter(MODELS[name][0]).double().train(training), double(MODELS[name][1])
    plan = ebdiff.trace(model, **arguments)
    assert {space.unit for space in plan} == {"channel", "head", "head_dim", "residual"}
    mask = drawn(plan)
    assert_changes_the_output(model, arguments, mask)
    small = assert_law(model, arguments, mask)
    assert_law(small.zero_grad() or small, arguments, drawn(ebdiff.trace(small, **arguments), ratio=0.3))
    with torch.no_grad():  # where torch's fused layers would have run
        ours, theirs = small(**arguments), ebdiff.masked(model, mask)(**arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        ebdiff.save(small, tmp_path)
        torch.testing.assert_close(ebdiff.load(tmp_path)(**arguments), small.eval()(**arguments), rtol=0, atol=0)


def test_heads_stay_where_the_average_of_their_weights_is_used() -> None:
    model, x = scatter(Looks()).double(), torch.randn(2, 7, 5).double()
    plan = ebdiff.trace(model, x)
    assert "head" not in {space.unit for space in plan}
    assert_law(model, {"x": x}, drawn(plan))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_has_no_stand_in_is_frozen_with_the_reason(options: dict[str, bool]) -> None:
    model = Looks()
    model.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
    plan = ebdiff.trace(model, torch.randn(2, 7, 5))
    assert len(plan) == 0
    assert "embed_dim is asserted" in {axis.name: axis.reason for axis in plan.frozen}["into.weight[0]"]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
    "added": {"attn_mask": torch.randn(5, 5).double(), "need_weights": False},
    "added to each head": {"attn_mask": torch.randn(8, 5, 5).double()},
    "both": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "key_padding_mask": torch.arange(10).view(2, 5) == 4},
}


@pytest.mark.parametrize("layout", ["batch first", "tokens first", "no batch", "other widths", "no bias"])
@pytest.mark.parametrize("call", CALLS)
def test_the_stand_in_computes_what_torch_does(call: str, layout: str) -> None:
    widths = {"kdim": 6, "vdim": 10} if layout == "other widths" else {}
    first = layout != "tokens first"
    theirs = nn.MultiheadAttention(16, 4, batch_first=first, bias=layout != "no bias", **widths).double()
    scatter(theirs)
    ours, options = MultiheadAttention(theirs), CALLS[call]
    query, key, value = (torch.randn(2, 5, n).double() for n in (16, widths.get("kdim", 16), widths.get("vdim", 16)))
    inputs = [query, key, value] if first else [x.transpose(0, 1) for x in (query, key, value)]
    if layout == "no batch":
        inputs = [x[0] for x in inputs]
        options = {
            name: x[0] if name == "key_padding_mask" else x[:4] if name == "attn_mask" and x.dim() == 3 else x
            for name, x in options.items()
        }
    for one, other in zip(ours(*inputs, **options), theirs(*inputs, **options), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
