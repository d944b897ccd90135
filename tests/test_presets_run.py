"""Presets of networks that are told something would really train: the same configuration, small, on a file of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny import ebdiff

from ebdiff.data import encode, load_images, load_vae
from ebdiff.pruning.save import load

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = (
    "train.batch_size=2",
    "train.accumulate=1",
    "train.checkpoint_every=3",
    "sample.steps=2",
    "sample.batch_size=4",
    "sample.grid=4",
    "evaluate.extractor=none",
    "evaluate.marks=[1.0]",
    "evaluate.score_marks=[1.0]",
    "evaluate.loss_bins=2",
    "evaluate.loss_per_bin=2",
)
SEARCH = ("search.steps=6", "search.window=2", "regions.steps=[2, 2, 2]")
SMALL_UNET = (
    "model.block_out_channels=[8, 16]",
    "model.layers_per_block=1",
    "model.down_block_types=[DownBlock2D, CrossAttnDownBlock2D]",
    "model.up_block_types=[CrossAttnUpBlock2D, UpBlock2D]",
    "model.norm_num_groups=4",
    "model.sample_size=8",
    "model.cross_attention_dim=8",
)
SMALL_DIT = ("model.num_layers=1", "model.num_attention_heads=2", "model.attention_head_dim=8", "model.sample_size=8")


def latents(folder: Path, channels: int, labelled: bool) -> tuple[str, str]:
    """A VAE that halves height and width, and what it makes of 40 images of 16x16 with 3 labels or none."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    labels = {"y": np.arange(40) % 3} if labelled else {}
    np.savez(folder / "images.npz", x=pixels, **labels)
    list(encode(load_images(folder / "images.npz"), load_vae(folder / "vae"), folder / "latents.safetensors"))
    return f"data.source=latents:{folder / 'latents.safetensors'}", f"data.vae={folder / 'vae'}"


def test_classes_as_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network embeds one-hot labels and attends to them, in training, in drawing and after a shrink."""
    data = latents(tmp_path, 3, labelled=True)
    run = ("--preset", "imagenet-ldm", "--out", str(tmp_path / "run"), *FEW, *SEARCH, *SMALL_UNET, *data)
    assert ebdiff(monkeypatch, "run", *run, "conditional.classes=3") == 0
    network = load(tmp_path / "run" / "regions" / "0" / "nets" / "1").eval()
    assert (network.config.encoder_hid_dim, network.config.num_class_embeds) == (4, None)
    assert ebdiff(monkeypatch, "sample", "--out", str(tmp_path / "run"), "-n", "2", "--label", "1") == 0
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        answers = [network(x, t, torch.eye(4)[None, None, label]).sample for label in range(4)]
    assert not torch.equal(answers[0], answers[1]), "the label matters"


def test_one_class_for_networks_that_must_be_told_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = latents(tmp_path, 4, labelled=False)
    run = ("--preset", "metfaces-dit", "--out", str(tmp_path / "run"), *FEW, *SMALL_DIT, *data)
    assert ebdiff(monkeypatch, "run", *run, "regions.steps=[5]") == 0
    network = load(tmp_path / "run" / "regions" / "0" / "nets" / "1")
    assert sum(p.numel() for p in network.parameters()) == sum(
        p.numel() for p in load(tmp_path / "run" / "search" / "nets" / "0").parameters()
    ), "nothing was removed"
