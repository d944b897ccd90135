"""Latents: what is encoded comes back, the way to images is the VAE's, and every bad file is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor

from ebdiff.data import Images, decode, encode, load_images, load_latents, load_vae, to_model, to_uint8
from ebdiff.errors import EbdiffError
from ebdiff.files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that halves height and width."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.125,
    )
    where = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(where)
    return where


def test_encoded_images_are_read_as_a_model_sees_them_and_go_back(folder: Path, tmp_path: Path) -> None:
    images, vae = load_images("fashion16", limit=20), load_vae(folder)
    assert list(encode(images, vae, tmp_path / "l.safetensors", batch_size=16)) == [16, 4, 16, 4]
    data = load_latents(tmp_path / "l.safetensors")
    assert data.train.shape == data.test.shape == (20, 2, 8, 8)
    with torch.no_grad():
        mean = torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in images.train.split(16)])
        image = to_uint8(vae.decode(mean[:3]).sample)
    assert torch.equal(data.train, (mean - 0.125) * 0.5)
    difference = decode(data.train[:3], vae, data.scaling, data.shift).int() - image.int()
    assert int(difference.abs().max()) <= 1, "the way back undoes scaling and shift"
    assert (data.scaling, data.shift, data.source) == (0.5, 0.125, "fashion16")
    assert data.pictures is not None
    assert torch.equal(data.pictures, images.test)
    for ours, theirs in ((data.labels, images.labels), (data.test_labels, images.test_labels)):
        assert ours is not None
        assert ours.tolist() == (theirs.tolist() if theirs is not None else None)
    assert torch.equal(to_model(data.train), data.train), "floats are what the model sees"


def test_latents_of_one_s_own_making(tmp_path: Path) -> None:
    """.npz, half precision, no test split: a tenth is held out, with what belongs to each."""
    values = np.random.default_rng(0).normal(size=(30, 2, 4, 4)).astype(np.float16)
    texts = np.arange(30, dtype=np.float32)[:, None, None].repeat(3, 1).repeat(5, 2)
    np.savez(tmp_path / "l.npz", latents=values, labels=np.arange(30), embeddings=texts, scaling_factor=2.0)
    data = load_latents(tmp_path / "l.npz")
    assert data.labels is not None
    assert data.test_labels is not None
    assert sorted([*data.labels.tolist(), *data.test_labels.tolist()]) == list(range(30))
    assert torch.equal(data.train, 2 * torch.from_numpy(values).float()[data.labels])
    assert torch.equal(data.test, 2 * torch.from_numpy(values).float()[data.test_labels])
    assert data.embeddings is not None
    assert torch.equal(data.embeddings[:, 0, 0].long(), data.labels)
    assert data.pictures is None
    few = load_latents(tmp_path / "l.npz", limit=2)
    assert torch.equal(few.train, data.train[:2])


def test_a_file_is_whole_or_absent(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "l.safetensors"
    part = encode(load_images("fashion16", limit=20), load_vae(folder), out, batch_size=16)
    next(part)
    part.close()
    assert not out.exists()


@pytest.mark.parametrize(("shape", "words"), [((3, 16, 16), "1 channels"), ((1, 15, 16), "multiple of 2")])
def test_images_that_do_not_fit_the_vae(folder: Path, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    with pytest.raises(EbdiffError, match=words):
        encode(Images(images, images, "x"), load_vae(folder), tmp_path / "l.safetensors")
    assert not list(tmp_path.iterdir())


def broken(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "facts", "words"),
    [
        (broken("latents", None), {}, "no latents in"),
        (broken("latents", torch.full((4, 2, 2, 2), float("nan"))), {}, "finite: False"),
        (broken("latents", torch.zeros(4, 2, 2)), {}, "finite floats"),
        (broken("latents_test", torch.zeros(4, 3, 2, 2)), {}, "test latents of"),
        (broken("labels", torch.zeros(3, dtype=torch.int64)), {}, "labels of"),
        (broken("labels", torch.zeros(4)), {}, "integers"),
        (broken("embeddings", torch.zeros(4, 3)), {}, "embeddings of"),
        (broken("embeddings_test", torch.zeros(4, 3, 9)), {}, "embeddings of"),
        (broken("null_embedding", torch.zeros(5)), {}, "embeddings of"),
        (broken("pictures_test", torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), {}, "pictures_test in"),
        (broken("labels", None), {"scaling_factor": "0"}, "scaling_factor"),
        (broken("labels", None), {"shift_factor": "much"}, "shift_factor"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_together(
    change: Callable[[dict[str, Tensor]], None], facts: dict[str, str], words: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = {f"latents{end}": torch.zeros(4, 2, 2, 2) for end in ("", "_test")}
    tensors |= {f"embeddings{end}": torch.zeros(4, 3, 5) for end in ("", "_test")}
    tensors |= {"null_embedding": torch.zeros(3, 5), "labels": torch.zeros(4, dtype=torch.int32)}
    write_tensors(tmp_path / "l.safetensors", tensors)
    assert load_latents(tmp_path / "l.safetensors").scaling == 1
    change(tensors)
    write_tensors(tmp_path / "l.safetensors", tensors, **facts)
    with pytest.raises(EbdiffError, match=words):
        load_latents(tmp_path / "l.safetensors")


def test_what_is_no_file_of_latents(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", latents=np.array([{}], dtype=object))
    np.savez(tmp_path / "words.npz", latents=np.array(["a"]))
    (tmp_path / "cut.safetensors").write_bytes(b"junk")
    words = {
        "objects.npz": "is damaged",
        "words.npz": "no number",
        "cut.safetensors": "is damaged",
        "nowhere.npz": "no latents there",
        "odd.txt": "no latents there",
    }
    for name, problem in words.items():
        with pytest.raises(EbdiffError, match=problem):
            load_latents(tmp_path / name)


def test_what_is_no_vae(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EbdiffError, match="no VAE there"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(EbdiffError, match="holds no AutoencoderKL"):
        load_vae(tmp_path)
    weights, _ = read_tensors(folder / "diffusion_pytorch_model.safetensors")
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")  # a pickle, which diffusers would read
    with pytest.raises(EbdiffError, match="holds no AutoencoderKL"):
        load_vae(tmp_path)
    UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(EbdiffError, match="unet holds no AutoencoderKL: got a UNet2DModel"):
        load_vae(tmp_path / "unet")
    shutil.copytree(folder, tmp_path / "part")
    write_tensors(tmp_path / "part" / "diffusion_pytorch_model.safetensors", dict([*weights.items()][1:]), format="pt")
    with pytest.raises(EbdiffError, match=f"part holds no AutoencoderKL: got no {next(iter(weights))}"):
        load_vae(tmp_path / "part")
