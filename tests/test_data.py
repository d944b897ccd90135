"""Images: what is read is what was stored, nothing reshuffles, and every bad file is named."""

import io
import re
import sys
import zlib
from importlib import resources
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ebdiff.data import Images, load_images, to_model, to_uint8
from ebdiff.errors import EbdiffError


def pixels(count, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def write_folder(folder, count=20, **shape):
    images = pixels(count, **shape)
    for i, image in enumerate(images):
        path = folder / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path)
    return images


def rows(tensor):
    return {tuple(row.flatten().tolist()) for row in tensor}


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


# The embedded set


def test_the_embedded_set_is_balanced_small_and_licensed():
    data = load_images("fashion16")
    assert data.train.shape == (20_000, 1, 16, 16)
    assert data.test.shape == (10_000, 1, 16, 16)
    assert data.labels.bincount().tolist() == [2000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.name == "fashion16"
    assert len(rows(data.train)) > 19_900, "images repeat"
    assert not rows(data.train[:2000]) & rows(data.test), "a test image is trained on"
    assets = resources.files("ebdiff.assets")
    assert len(assets.joinpath("fashion16.npz").read_bytes()) < 5e6
    licence = assets.joinpath("fashion16-LICENSE.txt").read_text()
    assert "Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_a_changed_embedded_set_has_another_name_and_fingerprint():
    plain, large = load_images("fashion16", limit=50), load_images("fashion16", limit=50, size=32, channels=3)
    assert large.train.shape == (50, 3, 32, 32)
    assert large.name != plain.name == "fashion16"
    assert large.fingerprint != plain.fingerprint
    assert plain.fingerprint == load_images("fashion16", limit=50).fingerprint


# Values


def test_model_values_come_back_as_the_same_bytes():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_model(every)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(to_uint8(to_model(every)), every)
    assert to_uint8(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]
    with pytest.raises(EbdiffError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_the_fingerprint_sees_a_byte_the_shape_and_the_split():
    x = torch.from_numpy(pixels(6)).permute(0, 3, 1, 2).contiguous()
    other = x.clone()
    other[0, 0, 0, 0] += 1
    prints = [Images(*parts, "x").fingerprint for parts in ((x[:4], x[4:]), (x[:3], x[3:]), (other[:4], other[4:]))]
    prints.append(Images(x.view(6, 3, 4, 16)[:4], x.view(6, 3, 4, 16)[4:], "x").fingerprint)
    assert len(set(prints)) == 4
    assert Images(x[:4].clone(), x[4:].clone(), "y").fingerprint == prints[0]


def test_images_that_do_not_fit_together_are_refused():
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for train, test in ((x, x[:, :1]), (x, x[:0]), (x.float(), x), (x[0], x)):
        with pytest.raises(EbdiffError, match="images of z"):
            Images(train, test, "z")
    with pytest.raises(EbdiffError, match="labels of z"):
        Images(x, x, "z", labels=torch.zeros(3))


# Folders


def test_a_folder_is_read_recursively_and_exactly(tmp_path):
    images = write_folder(tmp_path / "cats")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    (tmp_path / "cats" / "._hidden.png").write_bytes(b"junk")
    data = load_images(tmp_path / "cats")
    assert data.name == "cats/"
    assert data.train.shape[1:] == (3, 8, 8)
    assert rows(data.train) | rows(data.test) == rows(images.transpose(0, 3, 1, 2))
    assert len(data.train) + len(data.test) == 20
    assert len(data.test) >= 1


def test_adding_files_moves_no_image_between_the_splits(tmp_path):
    write_folder(tmp_path, count=100)
    before = load_images(tmp_path)
    for i, image in enumerate(pixels(100, seed=1)):
        Image.fromarray(image).save(tmp_path / f"new{i}.png")
    after = load_images(tmp_path)
    assert rows(before.test) <= rows(after.test)
    assert rows(before.train) <= rows(after.train)
    assert 5 < len(after.test) < 40  # a tenth of 200
    assert rows(load_images(tmp_path, limit=3).train) <= rows(after.train)


@pytest.mark.parametrize(("channels", "mode", "want"), [(None, "L", 1), (None, "RGB", 3), (1, "RGB", 1), (3, "L", 3)])
def test_channels_follow_the_images_unless_asked(tmp_path, channels, mode, want):
    write_folder(tmp_path, channels=len(mode))
    assert load_images(tmp_path, channels=channels).train.shape[1] == want


def test_a_single_colour_image_makes_all_rgb_and_grey_is_repeated(tmp_path):
    grey = write_folder(tmp_path, channels=1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.jpg")
    data = load_images(tmp_path)
    assert rows(grey.repeat(3, axis=3).transpose(0, 3, 1, 2)) < rows(data.train) | rows(data.test)


def test_the_short_side_is_scaled_and_the_middle_cropped(tmp_path):
    for i in range(4):
        bars = np.zeros((10, 30, 3), np.uint8)
        bars[:, 10:20] = 200  # the middle third
        Image.fromarray(bars).save(tmp_path / f"{i}.bmp")
    assert (load_images(tmp_path, size=10).train == 200).all()
    assert load_images(tmp_path, size=5).train.float().mean() > 190  # only the borders are blended
    assert load_images(tmp_path, size=20).train.shape[1:] == (3, 20, 20)


def test_transparent_sixteen_bit_and_turned_images(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    turned = Image.new("L", (4, 4))
    turned.paste(255, (0, 0, 2, 4))  # left half white; orientation 6 turns it clockwise: top half white
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    data = load_images(tmp_path, channels=1)
    found = rows(data.train) | rows(data.test)
    assert found == {(255,) * 16, (128,) * 16, (255,) * 8 + (0,) * 8}


def test_unreadable_images_are_all_named(tmp_path):
    write_folder(tmp_path)
    whole = (tmp_path / "class0" / "000.png").read_bytes()
    (tmp_path / "class0" / "junk.png").write_bytes(b"this is no image")
    (tmp_path / "class0" / "empty.jpg").write_bytes(b"")
    (tmp_path / "class1" / "cut.png").write_bytes(whole[: len(whole) // 2])
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + whole[24:29]  # 3.6 gigapixels, which Pillow refuses
    bomb = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    (tmp_path / "class1" / "bomb.png").write_bytes(bomb)
    with pytest.raises(EbdiffError, match="4 of 24") as error:
        load_images(tmp_path)
    for name in ("class1/bomb.png", "class0/junk.png", "class0/empty.jpg", "class1/cut.png"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_of_another_size_is_named(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (9, 8)).save(tmp_path / "odd.png")
    with pytest.raises(EbdiffError, match=r"9x8 in odd\.png.*size="):
        load_images(tmp_path)
    assert load_images(tmp_path, size=8).train.shape[1:] == (3, 8, 8)


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    for spec, words in (
        (tmp_path / "empty", "no images in"),
        (tmp_path / "nowhere", "existing folder"),
        ("fashion17", "fashion16"),
    ):
        with pytest.raises(EbdiffError, match=words):
            load_images(spec)
    Image.new("L", (8, 8)).save(tmp_path / "empty" / "one.png")
    with pytest.raises(EbdiffError, match="at least 2"):
        load_images(tmp_path / "empty")
    for wrong in ({"size": 0}, {"channels": 2}, {"limit": 0}):
        with pytest.raises(EbdiffError, match=next(iter(wrong))):
            load_images("fashion16", **wrong)


# npz


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_npz_layouts_are_one(tmp_path, layout):
    x = pixels(12, height=8, width=10, channels=1 if layout == "NHW" else 3)
    stored = {"NHWC": x, "NCHW": x.transpose(0, 3, 1, 2), "NHW": x[..., 0]}[layout]
    np.savez(tmp_path / "a.npz", x=stored, x_test=stored[:3], y=np.arange(12))
    data = load_images(tmp_path / "a.npz")
    assert data.name == "a.npz"
    assert np.array_equal(data.train.numpy(), x.transpose(0, 3, 1, 2))
    assert torch.equal(data.test, data.train[:3])
    assert data.labels.tolist() == list(range(12))
    assert data.test_labels is None


def test_npz_without_a_test_split_holds_some_out_with_their_labels(tmp_path):
    x = pixels(50)
    np.savez(tmp_path / "a.npz", x=x, y=x[:, 0, 0, 0].astype(np.int32))
    data = load_images(tmp_path / "a.npz")
    assert len(data.train) + len(data.test) == 50
    assert not rows(data.train) & rows(data.test)
    assert torch.equal(data.labels, data.train[:, 0, 0, 0].long())
    assert torch.equal(data.test_labels, data.test[:, 0, 0, 0].long())


def test_a_blob_of_encoded_images(tmp_path):
    x = pixels(6)
    parts = [encoded(image) for image in x]
    off = np.cumsum([0, *map(len, parts)])
    blob = np.frombuffer(b"".join(parts), np.uint8)
    np.savez(tmp_path / "b.npz", blob=blob, off=off, y=np.arange(6))
    data = load_images(tmp_path / "b.npz")
    everything = torch.cat([data.train, data.test])[torch.cat([data.labels, data.test_labels]).argsort()]
    assert np.array_equal(everything.numpy(), x.transpose(0, 3, 1, 2))

    damaged = blob.copy()
    damaged[off[3] : off[3] + 20] = 0
    np.savez(tmp_path / "b.npz", blob=damaged, off=off)
    with pytest.raises(EbdiffError, match=re.escape("1 of 6") + r".*train\[3\]"):
        load_images(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", blob=blob[:-10], off=off)
    with pytest.raises(EbdiffError, match="ascending off"):
        load_images(tmp_path / "b.npz")


def test_a_damaged_npz_is_named(tmp_path):
    path = tmp_path / "broken.npz"
    np.savez_compressed(path, x=pixels(100))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    pickled = io.BytesIO()
    np.savez(pickled, x=np.array([{}], dtype=object))
    alone = io.BytesIO()
    np.save(alone, pixels(3))
    for content in (
        whole[: len(whole) // 2],
        whole[:-30],
        bytes(flipped),
        b"",
        b"junk",
        pickled.getvalue(),
        alone.getvalue(),
    ):
        path.write_bytes(content)
        with pytest.raises(EbdiffError, match=r"broken\.npz is damaged"):
            load_images(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": pixels(3)},
        {"x": pixels(3).astype(np.float32)},
        {"x": pixels(3, channels=4)},
        {"x": pixels(0)},
        {"x": pixels(3), "y": np.arange(2)},
        {"x": pixels(3), "y": np.ones(3)},
        {"x": pixels(3), "x_test": pixels(3, channels=1)[:, :4]},
    ],
)
def test_npz_with_the_wrong_arrays(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(EbdiffError, match="expected"):
        load_images(tmp_path / "a.npz")


# Hugging Face


class Rows:
    """What load_images uses of a datasets.Dataset."""

    def __init__(self, columns, features, split):
        self.columns, self.features, self.split = columns, features, split

    def cast_column(self, column, kind):
        assert kind.decode is False
        return self

    def __getitem__(self, key):
        return self.columns if isinstance(key, slice) else self.columns[key]


@pytest.fixture
def fake_datasets(monkeypatch):
    module = ModuleType("datasets")
    module.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    module.ClassLabel = type("ClassLabel", (), {})
    module.load_dataset = lambda name, config: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_images_find_their_column_and_labels(fake_datasets):
    x = pixels(5)
    columns = {"picture": [{"bytes": encoded(image), "path": None} for image in x], "kind": [4, 3, 2, 1, 0]}
    features = {"text": object(), "picture": fake_datasets.Image(), "kind": fake_datasets.ClassLabel()}
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return {"train": Rows(columns, features, "train"), "test": Rows(columns, features, "test")}

    fake_datasets.load_dataset = load_dataset
    data = load_images("hf:someone/things:small")
    assert asked == [("someone/things", "small")]
    assert np.array_equal(data.train.numpy(), x.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [4, 3, 2, 1, 0]


def test_hub_errors_are_one_line(fake_datasets, monkeypatch):
    fake_datasets.load_dataset = lambda name, config: {"train": Rows({}, {"text": object(), "id": object()}, "train")}
    with pytest.raises(EbdiffError, match=r"no image column in words.*text, id"):
        load_images("hf:words")

    def unreachable(name, config):
        raise ConnectionError("no network\nand a long story")

    fake_datasets.load_dataset = unreachable
    with pytest.raises(EbdiffError, match="words cannot be loaded: got no network; check its name"):
        load_images("hf:words")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EbdiffError, match=re.escape("pip install ebdiff[datasets]")):
        load_images("hf:words")
