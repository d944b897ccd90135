"""What is known about images besides their pixels: labels and the embeddings of captions stay with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ebdiff.data import load_images
from ebdiff.errors import EbdiffError


def pixels(count: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_folders_inside_a_folder_are_classes(tmp_path: Path) -> None:
    for i, image in enumerate(pixels(20)):
        path = tmp_path / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    data = load_images(tmp_path)
    x = pixels(20).transpose(0, 3, 1, 2)
    for split, labels in ((data.train, data.labels), (data.test, data.test_labels)):
        wanted = [next(i for i in range(20) if np.array_equal(x[i], image.numpy())) % 2 for image in split]
        assert labels.tolist() == wanted
    Image.new("RGB", (8, 8)).save(tmp_path / "beside.png")
    assert load_images(tmp_path).labels is None


def test_embeddings_stay_with_their_images(tmp_path: Path) -> None:
    x = pixels(40)
    texts = x[:, :3, :5, 0].astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, embeddings=texts, null_embedding=np.ones((3, 5), np.float32))
    data = load_images(tmp_path / "a.npz")
    assert torch.equal(data.embeddings, data.train[:, 0, :3, :5].float())
    assert torch.equal(data.test_embeddings, data.test[:, 0, :3, :5].float())
    assert torch.equal(data.null_embedding, torch.ones(3, 5))
    for wrong in ({"embeddings": texts[:3]}, {"embeddings": texts.astype(int)}, {"null_embedding": np.ones(5)}):
        np.savez(tmp_path / "b.npz", **{"x": x, "embeddings": texts, **wrong})
        with pytest.raises(EbdiffError, match="embedding"):
            load_images(tmp_path / "b.npz")
