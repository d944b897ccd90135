"""The main job when the network is told something: labels, captions, low resolutions; on images and on latents."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline
from tiny import TINY, TWO, ebdiff, run, same, tiny, weights

from ebdiff import report
from ebdiff.data import load_images, load_latents
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json
from ebdiff.pruning.save import load
from ebdiff.pruning.shrink import shrinks_of
from ebdiff.training import job
from ebdiff.training.judge import draw_images, macs_per_image
from ebdiff.training.sampling import drawn_about, in_turn, of_label

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = (*TWO, "search.steps=8")
TEXT = (
    "model={class: UNet2DConditionModel, sample_size: 8, in_channels: 1, out_channels: 1, layers_per_block: 1, "
    "block_out_channels: [8, 16], down_block_types: [CrossAttnDownBlock2D, DownBlock2D], "
    "up_block_types: [UpBlock2D, CrossAttnUpBlock2D], attention_head_dim: 4, norm_num_groups: 4}"
)
DIT = (
    "model={class: DiTTransformer2DModel, sample_size: 8, in_channels: 2, num_attention_heads: 2, "
    "attention_head_dim: 4, num_layers: 1, norm_num_groups: 2}"
)
GREY = DIT.replace("in_channels: 2", "in_channels: 1").replace("groups: 2", "groups: 1")
ODD = ("data.size=15", "evaluate.extractor=none")


def test_labels_from_the_search_to_the_pictures_and_again_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "whole", tmp_path / "again"
    assert ebdiff(monkeypatch, "run", "--preset", "smoke", "--conditional", "--out", out, *TINY, *SHORT) == 0
    world = tiny(again, *SHORT, "conditional={}")
    assert (world.classes, world.guidance) == (10, 1.5)
    for ticks in (5, 14, 22):  # in the search, in a region, in the control
        job.prepare(world)
        list(islice(job.run(world), ticks))
    run(world)
    assert same(weights(again), weights(out))
    network = load(out / "regions" / "0" / "nets" / "1")
    assert network.config.num_class_embeds == 11
    (mask,) = shrinks_of(network)
    macs = macs_per_image(world, network)
    assert macs == {"uniform": world.plan.macs(mask), "sampler": 2 * world.plan.macs(mask)}, "guidance asks twice"
    assert "guidance 1.5" in (out / "report.md").read_text()

    drawn = []
    for options in ([], ["--label", "3"], ["--label", "4"], ["conditional.guidance=1"]):
        picture = tmp_path / "images.png"
        assert ebdiff(monkeypatch, "sample", "--out", out, "-n", "5", "--to", picture, *options) == 0
        drawn.append(picture.read_bytes())
    assert len(set(drawn)) == 4
    capsys.readouterr()
    assert ebdiff(monkeypatch, "sample", "--out", out, "--label", "10") == 2
    assert "no such label: expected 0 to 9, got 10" in capsys.readouterr().err


def test_images_are_drawn_about_held_out_ones(tmp_path: Path) -> None:
    world = tiny(tmp_path, "conditional={}", "data.limit=30")
    held_out = world.data.test_labels
    assert held_out is not None
    about = drawn_about(world, 60, 3)
    assert sorted(about.tolist()) == sorted([*range(30)] * 2)
    assert torch.equal(world.told_about(about)["class_labels"], held_out[about])


def test_labels_that_only_some_images_have(tmp_path: Path) -> None:
    """Of six images in either split not every class is there: all are counted, and those held out are drawn."""
    world = tiny(tmp_path, "conditional={}", "data.limit=6")
    assert world.data.labels is not None
    assert world.data.test_labels is not None
    known = world.data.test_labels.unique()
    assert int(world.data.labels.max()) < int(known.max()) == world.classes - 1
    assert torch.equal(in_turn(world, 2 * len(known)), known.repeat_interleave(2))
    (absent, *_) = set(range(world.classes)) - set(known.tolist())
    network, about = world.network().eval(), drawn_about(world, 4, 0)
    ours, others = (
        torch.cat(list(draw_images(world, network, about, 0, of_label(world, label, 4))))
        for label in (absent, int(known[0]))
    )
    assert not torch.equal(ours, others), "an image of a class that no held-out image has"
    with pytest.raises(EbdiffError, match="told no labels"):
        of_label(tiny(tmp_path), 0, 4)


def test_without_anything_told_drawing_is_the_ddim_pipeline(tmp_path: Path) -> None:
    world = tiny(tmp_path, "sample.batch_size=4")
    network = world.network().eval()
    ours = torch.cat(list(draw_images(world, network, torch.arange(6), 1)))
    pipeline = DDIMPipeline(network, world.sampling_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    for number, count in ((0, 4), (1, 2)):
        generator = torch.Generator().manual_seed(100_003 + number)
        images = pipeline(count, generator, num_inference_steps=3, output_type="np").images
        theirs = torch.as_tensor(images).permute(0, 3, 1, 2) * 255
        assert float((ours[4 * number : 4 * number + count] - theirs).abs().max()) < 0.501


def test_images_are_drawn_with_any_seed(tmp_path: Path) -> None:
    world = tiny(tmp_path, "sample.steps=1", f"seed={2**63 - 1}")
    (images,) = draw_images(world, world.network(), torch.arange(2), world.config.seed)
    assert images.shape == (2, 1, 16, 16)


def test_super_resolution(tmp_path: Path) -> None:
    world = tiny(tmp_path, *SHORT, "conditional.by=low_res", "conditional.factor=4")
    run(world)
    network = load(tmp_path / "dense" / "nets" / "1")
    assert (network.config.in_channels, network.config.out_channels, world.image_shape) == (2, 1, (1, 16, 16))
    likeness = read_json(tmp_path / "evaluation" / "tickets-1.json")["likeness"]
    assert likeness["low_res"] == read_json(tmp_path / "evaluation" / "dense-1.json")["likeness"]["low_res"]
    assert 10 < likeness["low_res"]["psnr"] < 40
    assert likeness["drawn"]["psnr"] < likeness["low_res"]["psnr"], "it has learned nothing in these few steps"
    report.write(world)
    assert "PSNR" in (tmp_path / "report.md").read_text()


def test_captions(tmp_path: Path) -> None:
    data = load_images("fashion16", limit=40, size=8)
    texts = torch.nn.functional.one_hot(torch.arange(40) % 5, 6).float()[:, None].expand(40, 3, 6).numpy()
    parts = {"x": data.train.numpy(), "x_test": data.test.numpy(), "embeddings": texts, "embeddings_test": texts}
    np.savez(tmp_path / "told.npz", **parts, null_embedding=np.ones((3, 6), np.float32))
    source = (f"data.source={tmp_path / 'told.npz'}", "conditional.by=embeddings", "evaluate.extractor=none")
    world = tiny(tmp_path / "run", TEXT, *SHORT, *source)
    run(world)
    network = load(tmp_path / "run" / "dense" / "nets" / "1")
    assert network.config.cross_attention_dim == 6
    assert torch.equal(world.conditions.nothing["encoder_hidden_states"], torch.ones(3, 6))


def vae(folder: Path, widths: tuple[int, ...] = (4, 8), channels: int = 2) -> Path:
    """Each width but the first halves height and width."""
    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=channels,
        norm_num_groups=2,
    ).save_pretrained(folder)
    return folder


def test_latents_of_a_vae_by_a_class_conditional_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = vae(tmp_path / "vae"), tmp_path / "l.safetensors"
    assert ebdiff(monkeypatch, "encode", "--vae", folder, "--out", file, "--limit", "64", "--dry-run") == 0
    assert not file.exists()
    assert ebdiff(monkeypatch, "encode", "--vae", folder, "--out", file, "--limit", "64") == 0
    assert load_latents(file).train.shape == (64, 2, 8, 8)
    capsys.readouterr()
    assert ebdiff(monkeypatch, "encode", "--vae", folder, "--out", file) == 2
    assert "there already" in capsys.readouterr().err
    source = (f"data.source=latents:{file}", f"data.vae={folder}", "train.flip=false", "conditional={}")
    world = tiny(tmp_path / "run", DIT, *SHORT, *source)
    run(world)
    scores = read_json(tmp_path / "run" / "evaluation" / "tickets-1.json")["scores"]
    assert (scores["n_real"], scores["extractor"][:9]) == (64, "fashion16"), "scores are of images, not of latents"
    (images, *_) = draw_images(world, load(tmp_path / "run" / "router"), torch.arange(3), 0)
    assert (images.shape, images.dtype) == ((3, 1, 16, 16), torch.uint8)
    report.write(world)
    for other in (vae(tmp_path / "large", widths=(4,)), vae(tmp_path / "deep", channels=3)):
        with pytest.raises(EbdiffError, match="did not make"):
            tiny(tmp_path / "x", DIT, *SHORT, *source, f"data.vae={other}").check()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["conditional.classes=9"], "at least 0 and below 9"),
        (["conditional.classes=0"], "at least 1"),
        (["conditional.by=embeddings"], "fashion16 has no embeddings"),
        (["conditional.by=captions"], "'labels', 'embeddings' or 'low_res'"),
        (["conditional.dropout=0"], "guidance: 1 without dropout"),
        (["conditional.dropout=1"], "less than 1"),
        (["conditional.by=low_res", "conditional.factor=3"], "multiples of the factor, 3, got 16x16"),
        (["conditional.by=low_res", "conditional.factor=32"], "multiples of the factor"),
        (["conditional.by=low_res", "data.size=8", "model.sample_size=8"], "at least 11 pixels"),
        (["conditional.guidance=.inf"], "conditional.guidance"),
        (["conditional.drop=0"], "did you mean conditional.dropout"),
        (["conditional={}", "model.num_class_embeds=10"], "do not fit the model"),
        (["data.vae=/nowhere"], "latents:FILE"),
        (["data.source=latents:/nowhere.npz", "data.vae=/nowhere", "train.flip=false"], "no latents there"),
        (["data.source=latents:/nowhere.npz", "data.vae=/nowhere"], "train.flip"),
        (["model.class=UNet2D"], "model.class"),
        ([TEXT], "cannot do without encoder_hidden_states: expected conditional.by=embeddings, got no conditional"),
        ([GREY], r"cannot be called with images of 8x8: expected an answer to \(x, t\), got TypeError"),
        ([GREY, "conditional={}", "model.sample_size=15", *ODD], r"\[1, 15, 15\], got \[1, 14, 14\]"),
        (["model.sample_size=15", *ODD], "cannot be called with images of 15x15"),
    ],
)
def test_what_cannot_be_told_is_refused_before_anything_is_written(
    overrides: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(EbdiffError, match=words):
        run(tiny(tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()


def test_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "cats.npz"
    images = np.arange(20 * 256, dtype=np.int64).reshape(20, 16, 16).astype(np.uint8)
    settings = [f"data.source={file}", "evaluate.extractor=none"]
    np.savez(file, x=images)
    for _ in range(2):
        job.prepare(tiny(tmp_path / "run", *settings))
    np.savez(file, x=images[:-1])
    with pytest.raises(EbdiffError, match="results of other images"):
        job.prepare(tiny(tmp_path / "run", *settings))
