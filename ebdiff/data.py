"""Images in memory: the embedded set, folders, .npz files and Hugging Face data sets, all as uint8 [N, C, H, W].

A source without a test split of its own holds out a tenth. Which images those are depends on a hash of each image's
name (its path in the folder, its position elsewhere), so adding images moves none from one side to the other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .errors import EbdiffError

__all__ = ["EMBEDDED", "Images", "load_images", "to_model", "to_uint8"]

EMBEDDED = "fashion16"
TEST_SHARE = 0.1
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}

Pixels = NDArray[np.uint8]  # [H, W, C]
Source = Path | bytes | Pixels  # one image, encoded or decoded


class _Split(NamedTuple):
    names: Sequence[str]
    sources: Sequence[Source]
    labels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Images:
    """Images to learn from and images held out.

    Args:
        train: uint8 [N, C, H, W].
        test: uint8 [M, C, H, W], never trained on: the reference of every score and of the held-out loss.
        name: "fashion16" for the embedded set as it is, "cats/" for a folder, "cifar.npz", "hf:mnist".
        labels: int64 [N] or None; nothing in training or evaluation needs them.
        test_labels: int64 [M] or None.

    `fingerprint` is the sha256 of both splits' shapes and bytes.
    """

    train: Tensor
    test: Tensor
    name: str
    labels: Tensor | None = None
    test_labels: Tensor | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if split.dtype != torch.uint8 or split.ndim != 4 or not split.numel():
                raise EbdiffError(
                    f"images of {self.name}",
                    expected="uint8 [N, C, H, W], N > 0, in both splits",
                    got=f"{split.dtype} {list(split.shape)}",
                )
        if self.train.shape[1:] != self.test.shape[1:]:
            sizes = [str(list(split.shape[1:])) for split in (self.train, self.test)]
            raise EbdiffError(f"test images of {self.name}", expected=f"{sizes[0]} like the others", got=sizes[1])
        for split, labels in ((self.train, self.labels), (self.test, self.test_labels)):
            if labels is not None and labels.shape != split.shape[:1]:
                raise EbdiffError(f"labels of {self.name}", expected=f"[{len(split)}]", got=str(list(labels.shape)))
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(repr(tuple(split.shape)).encode())
            digest.update(split.contiguous().numpy().data)
        object.__setattr__(self, "fingerprint", digest.hexdigest())


def to_model(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], any shape: what a diffusion model sees."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded, what lies outside clipped; the inverse of `to_model`.

    Raises:
        EbdiffError: a value is NaN or infinite, as after a training run that diverged.
    """
    if not torch.isfinite(images).all():
        raise EbdiffError(
            "images hold NaN or infinity",
            remedy="the model that made them has diverged: use an earlier checkpoint or a smaller learning rate",
        )
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_images(
    spec: str | Path, *, size: int | None = None, channels: int | None = None, limit: int | None = None
) -> Images:
    """Read images into memory.

    Args:
        spec: "fashion16", the embedded set (Fashion-MNIST at 16x16, grey, 20,000 and 10,000); a folder, searched
            recursively for png, jpg, jpeg, bmp and webp; a .npz file with `x` (uint8 [N, H, W, C], [N, C, H, W] or
            [N, H, W]), or with `blob` and `off` (encoded image i is blob[off[i]:off[i+1]]), optionally `y`, and the
            same with `_test` appended; or "hf:<data set>" or "hf:<data set>:<config>" through the `datasets` extra.
        size: side of the square images, in pixels: the short side is scaled to it (bicubic, antialiased) and the middle
            is cropped. None takes images as they are, and then all must have one size.
        channels: 1 for grey, 3 for RGB; None for 3 if any image has colour. Transparent pixels become white.
        limit: at most so many images in each split; for folders a choice by hash that stays the same.

    Raises:
        EbdiffError: the source is missing or empty, or images are unreadable or unequal in size; it names them.
    """
    for word, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise EbdiffError(f"{word} of images", expected="at least 1", got=str(value))
    if channels not in (None, 1, 3):
        raise EbdiffError("channels of images", expected="1 (grey) or 3 (RGB)", got=str(channels))
    spec = str(spec)
    path = Path(spec).expanduser()
    if spec == EMBEDDED:
        name, splits = EMBEDDED, _embedded()
    elif spec.startswith("hf:"):
        name, splits = spec, _hugging_face(spec.removeprefix("hf:"))
    elif path.is_dir():
        name, splits = f"{path.resolve().name}/", _folder(path)
    elif path.suffix == ".npz" and path.is_file():
        name, splits = path.name, _npz(path)
    else:
        raise EbdiffError(
            "no images there",
            expected="'fashion16', an existing folder, an existing .npz file or 'hf:<data set>'",
            got=repr(spec),
            remedy="check the path",
        )
    both = splits if len(splits) == 2 else _hold_out(splits[0], spec)
    train, test = (_pick(split, range(len(split.names))[:limit]) for split in both)
    images = _decode([*train.names, *test.names], [*train.sources, *test.sources], spec, size, channels)
    if name == EMBEDDED and images.shape[1:] != (1, 16, 16):
        name += f"@{'x'.join(map(str, images.shape[1:]))}"  # scores of changed images do not compare
    return Images(images[: len(train.names)], images[len(train.names) :], name, train.labels, test.labels)


def _pick(split: _Split, at: Sequence[int]) -> _Split:
    labels = None if split.labels is None else split.labels[list(at)]
    return _Split([split.names[i] for i in at], [split.sources[i] for i in at], labels)


def _hold_out(split: _Split, where: str) -> tuple[_Split, _Split]:
    """Training and test images, each in the order of their names' sha256. Neither side is ever empty."""
    count = len(split.names)
    if count < 2:
        raise EbdiffError(f"too few images in {where}", expected="at least 2, one of them held out", got=str(count))
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in split.names]
    order = sorted(range(count), key=lambda i: (hashes[i], split.names[i]))
    held_out = min(max(1, sum(h < TEST_SHARE for h in hashes)), count - 1)
    return _pick(split, order[held_out:]), _pick(split, order[:held_out])


def _embedded() -> list[_Split]:
    """Each split of the asset is one PNG, 16-pixel-wide images below each other (benchmarks/make_fashion16.py)."""
    with resources.files("ebdiff.assets").joinpath(f"{EMBEDDED}.npz").open("rb") as file:
        arrays = dict(np.load(file, allow_pickle=False))
    splits = []
    for split in ("train", "test"):
        strip = np.array(Image.open(io.BytesIO(arrays[split].tobytes())))
        labels = torch.from_numpy(arrays[f"{split}_y"].astype(np.int64))
        splits.append(_Split(_numbered(split, len(labels)), list(strip.reshape(-1, 16, 16, 1)), labels))
    return splits


def _folder(folder: Path) -> list[_Split]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not files:
        raise EbdiffError(f"no images in {folder}", expected=f"files ending in {', '.join(sorted(SUFFIXES))}")
    return [_Split([file.relative_to(folder).as_posix() for file in files], files)]


def _npz(path: Path) -> list[_Split]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a damaged archive raises nearly anything, a single array has no names
        raise EbdiffError(
            f"{path} is damaged",
            expected="a whole .npz file of plain arrays",
            got=str(error),
            remedy="copy or write it again",
        ) from None
    suffixes = ("", "_test") if "x_test" in arrays or "blob_test" in arrays else ("",)
    return [_npz_split(arrays, suffix, path) for suffix in suffixes]


def _npz_split(arrays: Mapping[str, NDArray[Any]], suffix: str, path: Path) -> _Split:
    x, blob, off, y = (arrays.get(f"{key}{suffix}") for key in ("x", "blob", "off", "y"))
    if x is not None:
        sources: Sequence[Source] = list(_channels_last(x, f"x{suffix} in {path}"))
    elif blob is not None and off is not None and blob.dtype == np.uint8 and _ascending(off, blob.size):
        sources = [blob[a:b].tobytes() for a, b in zip(off[:-1].tolist(), off[1:].tolist(), strict=True)]
    else:
        raise EbdiffError(
            f"no images in {path}",
            expected=f"x{suffix}, or uint8 blob{suffix} with ascending off{suffix}",
            got=", ".join(f"{key} {value.dtype}{list(value.shape)}" for key, value in arrays.items()) or "nothing",
        )
    if y is not None and (y.shape != (len(sources),) or y.dtype.kind not in "iu"):
        raise EbdiffError(
            f"y{suffix} in {path}", expected=f"integers [{len(sources)}]", got=f"{y.dtype}{list(y.shape)}"
        )
    names = _numbered(suffix.removeprefix("_") or "train", len(sources))
    return _Split(names, sources, None if y is None else torch.from_numpy(y.astype(np.int64)))


def _ascending(offsets: NDArray[Any], end: int) -> bool:
    whole = offsets.ndim == 1 and offsets.size > 1 and offsets.dtype.kind in "iu"
    return bool(whole and offsets[0] >= 0 and offsets[-1] <= end and (offsets[1:] > offsets[:-1]).all())


def _channels_last(x: NDArray[Any], what: str) -> Pixels:
    """uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3 -> [N, H, W, C]."""
    if x.dtype == np.uint8 and x.size:
        if x.ndim == 3:
            return x[..., None]
        if x.ndim == 4 and x.shape[3] in (1, 3):
            return x
        if x.ndim == 4 and x.shape[1] in (1, 3):
            return x.transpose(0, 2, 3, 1)
    raise EbdiffError(
        what,
        expected="uint8 [N, H, W, C], [N, C, H, W] or [N, H, W] with C of 1 or 3",
        got=f"{x.dtype} {list(x.shape)}",
    )


def _hugging_face(spec: str) -> list[_Split]:
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise EbdiffError(
            "hf: needs the package datasets", got="it is not installed", remedy="pip install ebdiff[datasets]"
        ) from None
    name, _, config = spec.partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the network, the hub and the data set's own files each have their own errors
        raise EbdiffError(
            f"data set {name} cannot be loaded", got=str(error).partition("\n")[0], remedy="check its name"
        ) from None
    splits = [found[split] for split in ("train", "test", "validation") if split in found][:2] or [*found.values()][:1]
    return [_hugging_face_split(split, datasets, name) for split in splits]


def _hugging_face_split(rows: Any, datasets: Any, name: str) -> _Split:
    columns = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise EbdiffError(f"no image column in {name}", expected="one of type Image", got=", ".join(rows.features))
    encoded = rows.cast_column(columns[0], datasets.Image(decode=False))[:][columns[0]]  # {"bytes", "path"} each
    kinds = [column for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = torch.tensor(rows[kinds[0]]) if kinds else None
    sources = [row["bytes"] or Path(row["path"]) for row in encoded]
    return _Split(_numbered(str(rows.split), len(sources)), sources, labels)


def _decode(
    names: Sequence[str], sources: Sequence[Source], where: str, size: int | None, channels: int | None
) -> Tensor:
    """Images as they came -> uint8 [N, C, H, W], C = 3 where any has colour and none was asked for."""

    def read(source: Source) -> Pixels | str:
        try:
            return _read(source, size, channels)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            return str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        pictures = list((map if isinstance(sources[0], np.ndarray) else pool.map)(read, sources))
    broken = {name: picture for name, picture in zip(names, pictures, strict=True) if isinstance(picture, str)}
    if broken:
        raise EbdiffError(
            f"{len(broken)} of {len(pictures)} images in {where} cannot be read",
            got=f"{_few([*broken])} ({next(iter(broken.values()))})",
            remedy="remove or replace them",
        )
    return _stack(names, [picture for picture in pictures if not isinstance(picture, str)], where)


def _read(source: Source, size: int | None, channels: int | None) -> Pixels:
    """One image as uint8 [H, W, C] of the wanted size; with channels=None, C is 1 where the image is grey."""
    if isinstance(source, np.ndarray):
        if size in (None, source.shape[0]) and size in (None, source.shape[1]) and channels in (None, source.shape[2]):
            return source
        return _fit(Image.fromarray(source[..., 0] if source.shape[2] == 1 else source), size, channels)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return _fit(image, size, channels)


def _fit(picture: Image.Image, size: int | None, channels: int | None) -> Pixels:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # sixteen bits, which Pillow would clip to eight
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = opaque.convert("L" if picture.mode == "LA" else "RGB")
    grey = channels == 1 or (channels is None and picture.mode in ("1", "L"))
    picture = picture.convert("L" if grey else "RGB")
    if size is not None and picture.size != (size, size):
        width, height = (max(size, round(side * size / min(picture.size))) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
    pixels: Pixels = np.array(picture)
    return pixels[..., None] if grey else pixels


def _stack(names: Sequence[str], pictures: Sequence[Pixels], where: str) -> Tensor:
    """[H, W, C] each -> [N, C, H, W]; grey ones become RGB where others have colour."""
    first = pictures[0].shape
    odd = [i for i, picture in enumerate(pictures) if picture.shape[:2] != first[:2]]
    if odd:
        height, width = pictures[odd[0]].shape[:2]
        raise EbdiffError(
            f"images in {where} differ in size",
            expected=f"{first[1]}x{first[0]} like {names[0]}",
            got=f"{width}x{height} in {_few([names[i] for i in odd])}",
            remedy="pass size= to scale and crop them all",
        )
    channels = max(picture.shape[2] for picture in pictures)
    same = [picture if picture.shape[2] == channels else picture.repeat(channels, axis=2) for picture in pictures]
    return torch.from_numpy(np.stack(same)).permute(0, 3, 1, 2).contiguous()


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}[{i}]" for i in range(count)]


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
