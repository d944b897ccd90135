"""Latents made beforehand by the VAE of a latent diffusion model, and the way back to images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..files import read_object, read_tensors, write_tensors
from .archives import read_npz
from .examples import Examples, Images, to_model, to_uint8
from .images import held_out

__all__ = ["Latents", "decode", "encode", "load_latents", "load_vae"]

KEYS = ("latents", "labels", "embeddings")  # each also with _test appended


@dataclass(frozen=True, eq=False)
class Latents(Examples):
    """Latents as a model sees them, float32 [N, C, H, W]: (what the VAE made - shift) * scaling; see `Examples`.

    Args:
        scaling, shift: of the VAE, for the way back.
        pictures: uint8 [M, c, h, w], the held-out images themselves, which scores refer to; None if the file has none.
        source: name of the images that they were made of.
    """

    noun: ClassVar[str] = "latents"

    scaling: float = 1.0
    shift: float = 0.0
    pictures: Tensor | None = None
    source: str = ""

    def _check_values(self) -> None:
        for split in (self.train, self.test):
            if split.dtype != torch.float32 or split.ndim != 4 or not split.numel() or not split.isfinite().all():
                raise EbdiffError(
                    f"latents of {self.name}",
                    expected="finite floats [N, C, H, W], N > 0, in both splits",
                    got=f"{split.dtype} {list(split.shape)}, finite: {bool(split.isfinite().all())}",
                    remedy="make the file with `ebdiff encode`",
                )


def load_latents(path: str | Path, limit: int | None = None) -> Latents:
    """Read a file of latents, as `encode` writes it or by your own hand.

    Args:
        path: .safetensors or .npz with `latents` (floats [N, C, H, W] as the VAE makes them) and, where there are any,
            `labels` (integers [N]), `embeddings` (floats [N, L, D]), the same with `_test` appended, `null_embedding`
            and `pictures_test`; `scaling_factor` and `shift_factor` in the metadata (.npz: as numbers beside), 1 and 0
            by default. Without `latents_test` a tenth is held out, as of images.
        limit: at most so many in each split.

    Raises:
        EbdiffError: the file is missing, damaged, or holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise EbdiffError("no latents there", expected="an existing .safetensors or .npz file", got=str(path))
    tensors, facts = read_npz(path) if path.suffix == ".npz" else read_tensors(path)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    if "latents" not in tensors:
        raise EbdiffError(
            f"no latents in {path}",
            expected="latents, floats [N, C, H, W]",
            got=", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "nothing",
            remedy="make the file with `ebdiff encode`",
        )
    scaling, shift = (
        _number(facts, key, default, path) for key, default in (("scaling_factor", 1), ("shift_factor", 0))
    )
    parts = _both(tensors, str(path), limit)
    for name in [name for name in parts if name.startswith("latents")]:
        parts[name] = (parts[name].float() - shift) * scaling
    for name in [name for name in parts if name.startswith("labels")]:
        if parts[name].is_floating_point():
            raise EbdiffError(f"{name} in {path}", expected="integers", got=str(parts[name].dtype))
        parts[name] = parts[name].long()
    pictures = tensors.get("pictures_test")
    if pictures is not None:
        pictures = pictures[:limit]
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or len(pictures) != len(parts["latents_test"]):
            expected, got = f"uint8 [{len(parts['latents_test'])}, C, H, W]", f"{pictures.dtype} {list(pictures.shape)}"
            raise EbdiffError(f"pictures_test in {path}", expected=expected, got=got)
    return Latents(
        parts["latents"],
        parts["latents_test"],
        path.name,
        parts.get("labels"),
        parts.get("labels_test"),
        parts.get("embeddings"),
        parts.get("embeddings_test"),
        tensors.get("null_embedding"),
        scaling=scaling,
        shift=shift,
        pictures=pictures,
        source=facts.get("source", ""),
    )


def _both(tensors: Mapping[str, Tensor], where: str, limit: int | None) -> dict[str, Tensor]:
    """Training and held-out parts by name, those of a file without a test split divided as images are."""
    if "latents_test" in tensors:
        return {key + end: tensors[key + end][:limit] for key in KEYS for end in ("", "_test") if key + end in tensors}
    count = len(tensors["latents"])
    train, test = held_out([f"train[{i}]" for i in range(count)], where)
    found = {key: tensors[key] for key in KEYS if key in tensors}
    wrong = [f"{key} {len(tensor)}" for key, tensor in found.items() if len(tensor) != count]
    if wrong:
        raise EbdiffError(f"{where} disagrees with itself", expected=f"{count} of each", got=", ".join(wrong))
    split = {"": train[:limit], "_test": test[:limit]}
    return {key + end: found[key][rows] for key in found for end, rows in split.items()}


def _number(facts: Mapping[str, str], key: str, default: float, path: Path) -> float:
    try:
        value = float(facts.get(key, default))
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf") or (key == "scaling_factor" and value <= 0):
        raise EbdiffError(f"{key} in {path}", expected="a finite number, of scaling above 0", got=str(facts.get(key)))
    return value


def load_vae(folder: str | Path) -> Any:
    """diffusers' AutoencoderKL from a local folder, in eval mode; nothing is downloaded or unpickled.

    Raises:
        EbdiffError: there is none, a network of another class, or one whose weights are not all there.
    """
    import diffusers
    from diffusers import AutoencoderKL

    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise EbdiffError(
            "no VAE there", expected="a folder that AutoencoderKL.save_pretrained wrote", got=str(folder),
            remedy="of a pipeline, pass its subfolder vae",
        )  # fmt: skip
    kind = str(read_object(folder / "config.json").get("_class_name"))
    known = getattr(diffusers, kind, AutoencoderKL)  # a class of the user's own may be one, too
    if not (isinstance(known, type) and issubclass(known, AutoencoderKL)):
        raise EbdiffError(f"{folder} holds no AutoencoderKL", got=f"a {kind}", remedy="pass the folder of a VAE")
    try:
        vae = AutoencoderKL.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    except Exception as error:  # a config of another class, absent weights and damaged ones each have their own errors
        reason = " ".join(str(error).split())[:300]
        raise EbdiffError(f"{folder} holds no AutoencoderKL", got=reason, remedy="save it in safetensors") from None
    absent = next((name for name, parameter in vae.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise EbdiffError(f"{folder} holds no AutoencoderKL", got=f"no {absent}", remedy="save all of its weights")
    return vae.eval().requires_grad_(False)


def encode(images: Images, vae: Any, out: str | Path, batch_size: int = 32) -> Iterator[int]:
    """Write the latents of images, the means of what the VAE says about each, into a safetensors file.

    Labels and embeddings go with them, and the held-out images, so that scores refer to images and not to what the VAE
    makes of them. The file is written in one piece when all are encoded.

    Args:
        images: as `load_images` gives them.
        vae: as `load_vae` gives it, on the device where it is to run.
        out: the file.
        batch_size: images at a time.

    Yields:
        How many images were encoded since the last time.

    Raises:
        EbdiffError: the images do not fit the VAE; by the call itself.
    """
    channels, factor = int(vae.config.in_channels), 2 ** (len(vae.config.block_out_channels) - 1)
    shape = list(images.train.shape[1:])
    if shape[0] != channels or shape[1] % factor or shape[2] % factor:
        raise EbdiffError(
            f"images of {images.name} do not fit the VAE",
            expected=f"{channels} channels, height and width a multiple of {factor}",
            got=str(shape),
            remedy="set --channels and --size",
        )
    return _encoded(images, vae, Path(out), batch_size)


@torch.no_grad()
def _encoded(images: Images, vae: Any, out: Path, batch_size: int) -> Iterator[int]:
    tensors = {"pictures_test": images.test}
    for name, split in (("latents", images.train), ("latents_test", images.test)):
        parts = []
        for batch in torch.split(split, batch_size):
            parts.append(vae.encode(to_model(batch).to(vae.device, vae.dtype)).latent_dist.mean.float().cpu())
            yield len(batch)
        tensors[name] = torch.cat(parts)
    told = {
        "labels": images.labels,
        "labels_test": images.test_labels,
        "embeddings": images.embeddings,
        "embeddings_test": images.test_embeddings,
        "null_embedding": images.null_embedding,
    }
    tensors |= {name: tensor for name, tensor in told.items() if tensor is not None}
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    write_tensors(out, tensors, scaling_factor=repr(scaling), shift_factor=repr(shift), source=images.name)


@torch.no_grad()
def decode(latents: Tensor, vae: Any, scaling: float, shift: float) -> Tensor:
    """Latents as a model sees them -> uint8 images [N, C, H, W]."""
    values = latents.to(vae.device, vae.dtype) / scaling + shift
    return to_uint8(vae.decode(values).sample.cpu())
