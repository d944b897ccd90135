"""What a network is told about an image besides x and t, and guidance by what it says when it is told nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EbdiffError
from ..seeds import generator

__all__ = ["LOW_RES", "Asked", "Conditions", "Told", "ask", "call_of", "guided"]

Told = Mapping[str, Tensor]  # {keyword of the network: one row per image of the batch}

LOW_RES = "low_res"  # no keyword: channels [B, C, H, W] that stand behind the noisy ones


@dataclass(frozen=True)
class Conditions:
    """What a network is told about each image of a data set.

    Args:
        rows: {keyword of the network: one row per image}, as class_labels int64 [N] or encoder_hidden_states [N, L, D].
        nothing: {the same keyword: the row that says nothing}.
        dropout: share of the images in training about which it is told nothing (Ho & Salimans 2022, algorithm 1).
        factor: above 1, it also sees each image so many times smaller, scaled up again (Saharia et al. 2022); then
            zeros say nothing.
        tokens: above 0, a label is also a token for attention, encoder_hidden_states float32 [B, 1, tokens], one-hot.

    Raises:
        EbdiffError: rows that differ in number, a keyword without its row that says nothing, or a share outside [0, 1).
    """

    rows: Told = field(default_factory=dict)
    nothing: Told = field(default_factory=dict)
    dropout: float = 0.1
    factor: int = 1
    tokens: int = 0

    def __post_init__(self) -> None:
        counts = {len(rows) for rows in self.rows.values()}
        alike = all(
            key in self.nothing and self.nothing[key].shape == rows.shape[1:] for key, rows in self.rows.items()
        )
        if len(counts) > 1 or not alike or not 0 <= self.dropout < 1 or self.factor < 1:
            shapes = {key: list(rows.shape) for key, rows in self.rows.items()}
            silent = {key: list(row.shape) for key, row in self.nothing.items()}
            raise EbdiffError(
                "conditions",
                expected="equally many rows, for each a row that says nothing, dropout in [0, 1), factor of at least 1",
                got=f"rows {shapes}, nothing {silent}, dropout {self.dropout:g}, factor {self.factor}",
            )

    @classmethod
    def of_labels(cls, labels: Tensor, classes: int, dropout: float = 0.1, tokens: bool = False) -> Conditions:
        """int64 [N] in [0, classes); class number `classes` says nothing. `tokens`: as tokens for attention, too.

        Raises:
            EbdiffError: a label outside.
        """
        lowest, highest = int(labels.min()), int(labels.max())
        if labels.dtype != torch.int64 or lowest < 0 or highest >= classes:
            got = f"{labels.dtype} from {lowest} to {highest}"
            raise EbdiffError("labels", expected=f"int64, at least 0 and below {classes}", got=got)
        silent = {"class_labels": torch.tensor(classes)}
        return cls({"class_labels": labels}, silent, dropout, tokens=classes + 1 if tokens else 0)

    @classmethod
    def of_embeddings(cls, embeddings: Tensor, null: Tensor | None = None, dropout: float = 0.1) -> Conditions:
        """float [N, L, D] of captions; [L, D] of no caption, zeros by default."""
        key, null = "encoder_hidden_states", torch.zeros(embeddings.shape[1:]) if null is None else null
        return cls({key: embeddings}, {key: null}, dropout)

    def of(self, chosen: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """What is told about the images of these numbers, int64 [B], which are `clean` (float32 [B, C, H, W])."""
        told = self.with_tokens({key: _plain(rows[chosen]) for key, rows in self.rows.items()})
        return told | ({LOW_RES: low_resolution(clean, self.factor)} if self.factor > 1 else {})

    def with_tokens(self, told: Told) -> dict[str, Tensor]:
        """`told`, with the tokens of its labels where the network takes them."""
        if not self.tokens:
            return dict(told)
        one_hot = F.one_hot(told["class_labels"], self.tokens)[:, None].float()
        return {**told, "encoder_hidden_states": one_hot}

    def silenced(self, told: Told, which: Tensor) -> dict[str, Tensor]:
        """`told`, but nothing about the images where `which` (bool [B]) is True."""
        silent = {}
        for key, rows in told.items():
            nothing = _plain(self.nothing[key]).to(rows.device) if key in self.nothing else rows.new_zeros(())
            silent[key] = torch.where(which.to(rows.device).view(-1, *[1] * (rows.dim() - 1)), nothing, rows)
        return self.with_tokens(silent)

    def in_training(self, chosen: Tensor, clean: Tensor, seed: int, step: int) -> dict[str, Tensor]:
        """As `of`, with dropout: which images it falls on depends on (seed, step) alone."""
        told = self.of(chosen, clean)
        if not self.dropout:
            return told
        return self.silenced(told, torch.rand(len(chosen), generator=generator(seed, "untold", step)) < self.dropout)


def low_resolution(clean: Tensor, factor: int) -> Tensor:
    """float [B, C, H, W] averaged over squares of `factor` pixels, and scaled up again (bicubic).

    Raises:
        EbdiffError: sides that are no multiples of `factor`: a part of the image would be lost, and the rest stretched.
    """
    if clean.shape[-2] % factor or clean.shape[-1] % factor:
        got = f"{clean.shape[-1]}x{clean.shape[-2]}"
        raise EbdiffError("low resolution", expected=f"sides that are multiples of the factor, {factor}", got=got)
    small = F.avg_pool2d(clean, factor)
    return F.interpolate(small, clean.shape[-2:], mode="bicubic").clamp(-1, 1)


def call_of(x: Tensor, told: Told) -> tuple[Tensor, dict[str, Tensor]]:
    """(x, keywords) for network(x, t, **keywords): low-resolution channels stand behind those of x."""
    keywords = {key: rows for key, rows in told.items() if key != LOW_RES}
    return torch.cat([x, told[LOW_RES]], 1) if LOW_RES in told else x, keywords


def ask(network: Any, x: Tensor, t: Tensor, told: Told) -> Tensor:
    """What the network predicts, [B, C, H, W]."""
    x, keywords = call_of(x, told)
    output = network(x, t, **keywords)
    predicted = getattr(output, "sample", output)
    return predicted[0] if isinstance(predicted, tuple) else predicted  # type: ignore[no-any-return]


class Asked(nn.Module):
    """A network as a function of x, t and all that it is told."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, **told: Tensor) -> Tensor:
        """See `ask`."""
        return ask(self.network, x, t, told)


def guided(network: Any, told: Told, silent: Told, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance: u + scale (c - u), with c predicted when told and u when told nothing.

    It is equation 6 of Ho & Salimans 2022 for scale = 1 + w. Both predictions come from one batch; at a scale of 1
    and of 0 only the one that counts is made.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.device).expand(len(x))
        if not told or scale in (0, 1):
            return ask(network, x, t, silent if scale == 0 else told)
        both = {key: torch.cat([rows, silent[key]]) for key, rows in told.items()}
        c, u = ask(network, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return u + scale * (c - u)

    return predict


def _plain(rows: Tensor) -> Tensor:
    """Embeddings are kept in the precision they came in, networks take float32."""
    return rows.float() if rows.is_floating_point() else rows
