"""Images in memory: the embedded set, folders, .npz files and Hugging Face data sets, all as uint8 [N, C, H, W].

A source without a test split of its own holds out a tenth. Which images those are depends on a hash of each image's
name (its path in the folder, its position elsewhere), so adding images moves none from one side to the other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import EbdiffError
from .archives import arrays_of
from .examples import Images
from .pictures import Pixels, Source, decoded

__all__ = ["EMBEDDED", "held_out", "load_images"]

EMBEDDED = "fashion16"
TEST_SHARE = 0.1
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class _Split(NamedTuple):
    names: Sequence[str]
    sources: Sequence[Source]
    labels: Tensor | None = None
    embeddings: Tensor | None = None


def load_images(
    spec: str | Path, *, size: int | None = None, channels: int | None = None, limit: int | None = None
) -> Images:
    """Read images into memory.

    Args:
        spec: "fashion16", the embedded set (Fashion-MNIST at 16x16, grey, 20,000 and 10,000); a folder, searched
            recursively for png, jpg, jpeg, bmp and webp, where the folders inside it are the classes, in the order of
            their names, if every image lies in one; a .npz file with `x` (uint8 [N, H, W, C], [N, C, H, W] or
            [N, H, W]), or with `blob` and `off` (encoded image i is blob[off[i]:off[i+1]]), optionally `y` (labels) and
            `embeddings` (of captions: floats [N, L, D]), the same with `_test` appended, and `null_embedding`; or
            "hf:<data set>" or "hf:<data set>:<config>" through the `datasets` extra.
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
    silence: Tensor | None = None
    if spec == EMBEDDED:
        name, splits = EMBEDDED, _embedded()
    elif spec.startswith("hf:"):
        name, splits = spec, _hugging_face(spec.removeprefix("hf:"))
    elif path.is_dir():
        name, splits = f"{path.resolve().name}/", _folder(path)
    elif path.suffix == ".npz" and path.is_file():
        name, (splits, silence) = path.name, _npz(path)
    else:
        raise EbdiffError(
            "no images there",
            expected="'fashion16', an existing folder, an existing .npz file or 'hf:<data set>'",
            got=repr(spec),
            remedy="check the path",
        )
    both = splits if len(splits) == 2 else _hold_out(splits[0], spec)
    train, test = (_pick(split, range(len(split.names))[:limit]) for split in both)
    images = decoded([*train.names, *test.names], [*train.sources, *test.sources], spec, size, channels)
    if name == EMBEDDED and images.shape[1:] != (1, 16, 16):
        name += f"@{'x'.join(map(str, images.shape[1:]))}"  # scores of changed images do not compare
    told = train.labels, test.labels, train.embeddings, test.embeddings, silence
    return Images(images[: len(train.names)], images[len(train.names) :], name, *told)


def _pick(split: _Split, at: Sequence[int]) -> _Split:
    labels, embeddings = (told if told is None else told[list(at)] for told in (split.labels, split.embeddings))
    return _Split([split.names[i] for i in at], [split.sources[i] for i in at], labels, embeddings)


def _hold_out(split: _Split, where: str) -> tuple[_Split, _Split]:
    train, test = held_out(split.names, where)
    return _pick(split, train), _pick(split, test)


def held_out(names: Sequence[str], where: str) -> tuple[list[int], list[int]]:
    """Which to train on and which to hold out, each in the order of their names' sha256. Neither is ever empty.

    Raises:
        EbdiffError: there is but one.
    """
    count = len(names)
    if count < 2:
        raise EbdiffError(f"too few images in {where}", expected="at least 2, one of them held out", got=str(count))
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    order = sorted(range(count), key=lambda i: (hashes[i], names[i]))
    few = min(max(1, sum(h < TEST_SHARE for h in hashes)), count - 1)
    return order[few:], order[:few]


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
    names = [file.relative_to(folder).as_posix() for file in files]
    homes = [name.split("/")[0] for name in names if "/" in name]
    classes = {home: number for number, home in enumerate(sorted(set(homes)))}
    labels = torch.tensor([classes[home] for home in homes]) if len(homes) == len(names) else None
    return [_Split(names, files, labels)]


def _npz(path: Path) -> tuple[list[_Split], Tensor | None]:
    """The splits, and the embedding of no caption."""
    arrays = arrays_of(path)
    suffixes = ("", "_test") if "x_test" in arrays or "blob_test" in arrays else ("",)
    silence = arrays.get("null_embedding")
    return [_npz_split(arrays, suffix, path) for suffix in suffixes], _floats(silence, "null_embedding", path)


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
    embeddings = _floats(arrays.get(f"embeddings{suffix}"), f"embeddings{suffix}", path)
    if embeddings is not None and embeddings.shape[:1] != (len(sources),):
        got = str(list(embeddings.shape))
        raise EbdiffError(f"embeddings{suffix} in {path}", expected=f"[{len(sources)}, L, D]", got=got)
    return _Split(names, sources, None if y is None else torch.from_numpy(y.astype(np.int64)), embeddings)


def _floats(array: NDArray[Any] | None, name: str, path: Path) -> Tensor | None:
    if array is not None and array.dtype.kind != "f":
        raise EbdiffError(f"{name} in {path}", expected="floats", got=f"{array.dtype}{list(array.shape)}")
    return None if array is None else torch.from_numpy(array)


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


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}[{i}]" for i in range(count)]
