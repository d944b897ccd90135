"""What a network is told: it stays with its image, is dropped in the share asked for, and guides as the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from kill_me import pictures, whole
from torch import Tensor, nn
from unets import unet

import ebdiff
from ebdiff.data import to_model
from ebdiff.errors import EbdiffError
from ebdiff.evaluation import likeness, loss_per_bin
from ebdiff.training.batches import Batches
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.conditions import LOW_RES, Asked, Conditions, ask, guided, low_resolution
from ebdiff.training.loop import TrainConfig, TrainState, train
from ebdiff.training.network import build

COUNT, CLASSES = 10, 4
LABELS = torch.arange(COUNT) % CLASSES


class Sum(nn.Module):
    """x plus its label times ten, and notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(())), list[tuple[Tensor, Tensor]]()

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        self.calls.append((x, class_labels))
        return self.weight + x + 10 * class_labels.view(-1, 1, 1, 1)


def labelled(dropout: float = 0.25) -> Conditions:
    return Conditions.of_labels(LABELS, CLASSES, dropout)


def batches(conditions: Conditions, **options: Any) -> Batches:
    images = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None].expand(COUNT, 1, 4, 4).contiguous()
    return Batches(images, ebdiff.Uniform(1000), TrainConfig(**options), conditions=conditions)


def numbers(clean: Tensor) -> Tensor:
    return ((clean[:, 0, 0, 0] + 1) * 127.5).round().long()


# What is told in training


def test_labels_follow_their_images_and_are_dropped_in_the_share_asked_for() -> None:
    seen = [batches(labelled(), batch_size=8, accumulate=3)(step) for step in range(50)]
    labels, images = torch.cat([b.told["class_labels"] for b in seen]), torch.cat([numbers(b.clean) for b in seen])
    untold = labels == CLASSES
    assert torch.equal(labels[~untold], images[~untold] % CLASSES)
    assert float(untold.float().mean()) == pytest.approx(0.25, abs=0.05)
    assert len(images[untold].unique()) == COUNT
    none = torch.cat([batches(labelled(0), batch_size=8)(step).told["class_labels"] for step in range(9)])
    assert int(none.max()) < CLASSES


def test_what_is_told_depends_on_seed_and_step_alone() -> None:
    draw = batches(labelled(), batch_size=64)
    later = draw(3)
    assert torch.equal(draw(3).told["class_labels"], later.told["class_labels"])
    assert torch.equal(batches(labelled(), batch_size=64)(3).told["class_labels"], later.told["class_labels"])
    dropped = [
        batches(labelled(), batch_size=64, seed=seed)(step).told["class_labels"] == CLASSES
        for seed, step in ((0, 3), (0, 4), (1, 3))
    ]
    assert len({tuple(each.tolist()) for each in dropped}) == 3
    parts = [later.told_part(start, 16, torch.device("cpu"))["class_labels"] for start in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts), later.told["class_labels"]), "processes see parts of one batch"


def test_the_low_resolution_is_of_the_image_as_it_is_seen() -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draw = Batches(images, ebdiff.Uniform(9), TrainConfig(batch_size=40, flip=True), conditions=Conditions(factor=2))
    batch = draw(0)
    told = batch.told[LOW_RES]
    kept = told.flatten(1).abs().sum(1) > 0
    assert torch.equal(told[kept], low_resolution(batch.clean[kept], 2))
    assert 0 < int((~kept).sum()) < 15, "a tenth is told nothing"
    even = torch.full((1, 1, 8, 8), 0.5)
    assert torch.allclose(low_resolution(even, 4), even)
    squares = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4)[None, None]
    assert torch.allclose(low_resolution(squares, 2), torch.full((1, 1, 8, 8), 0.5)), "what is finer is gone"


def state(config: TrainConfig) -> TrainState:
    torch.manual_seed(0)
    return TrainState.begin(unet(num_class_embeds=CLASSES + 1), config)


def go(state: TrainState, config: TrainConfig, until: int, **options: Any) -> None:
    images = pictures(COUNT).repeat(1, 1, 2, 2)[:, :, :8, :8]
    scheduler, sampler = DDPMScheduler(1000), ebdiff.Uniform(1000)
    list(train(state, images, scheduler=scheduler, sampler=sampler, config=config, until=until, **options))


def test_going_on_with_labels_is_never_having_stopped(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=3, lr=1e-2, accumulate=2)
    straight, first, second, untold = (state(config) for _ in range(4))
    go(straight, config, 6, conditions=labelled())
    go(first, config, 2, conditions=labelled(), checkpoints=Checkpoints(tmp_path))
    second.restore(whole(Checkpoints(tmp_path)))
    go(second, config, 6, conditions=labelled())
    ours, theirs = straight.tensors(), second.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    go(untold, config, 6, conditions=Conditions.of_labels(LABELS.flip(0), CLASSES))
    assert not torch.equal(ours["model.conv_in.weight"], untold.tensors()["model.conv_in.weight"])


def test_rows_that_do_not_fit_are_refused() -> None:
    config = TrainConfig(batch_size=2)
    with pytest.raises(EbdiffError, match="10 rows, one per image, got 9"):
        go(state(config), config, 1, conditions=Conditions.of_labels(LABELS[:9], CLASSES))
    for wrong in (LABELS - 1, LABELS + 1, LABELS.float()):
        with pytest.raises(EbdiffError, match="at least 0 and below 4"):
            Conditions.of_labels(wrong, CLASSES)
    for options in ({"dropout": 1.0}, {"factor": 0}, {"rows": {"a": LABELS}}, {"rows": {"a": LABELS, "b": LABELS[:2]}}):
        with pytest.raises(EbdiffError, match="a row that says nothing"):
            Conditions(**options)  # type: ignore[arg-type]


# Guidance


def told_and_silent(count: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    x, t = torch.randn(count, 2, 8, 8), torch.tensor(300)
    told = labelled().of(torch.arange(count), x)
    return x, t, told, labelled().silenced(told, torch.ones(count, dtype=torch.bool))


def test_guidance_is_the_papers_sum_and_its_ends_are_the_predictions_themselves() -> None:
    network = unet(num_class_embeds=CLASSES + 1).eval()
    x, t, told, silent = told_and_silent()
    assert silent["class_labels"].tolist() == [CLASSES] * 5
    with torch.no_grad():
        c, u = (network(x, t, **keywords).sample for keywords in (told, silent))
        assert not torch.allclose(c, u)
        assert torch.equal(guided(network, told, silent, 1)(x, t), c)
        assert torch.equal(guided(network, told, silent, 0)(x, t), u)
        torch.testing.assert_close(guided(network, told, silent, 3.5)(x, t), u + 3.5 * (c - u), rtol=1e-4, atol=1e-4)


def test_one_call_of_the_network_where_one_is_enough() -> None:
    x, t, told, silent = told_and_silent(2)
    for scale, rows in ((1, 2), (0, 2), (2.0, 4)):
        network = Sum()
        guided(network, told, silent, scale)(x, t)
        assert [len(seen) for seen, _ in network.calls] == [rows]
    network = nn.Conv2d(2, 2, 1)
    assert torch.equal(guided(lambda x, t: network(x), {}, {}, 7.0)(x, t), network(x))


def test_held_out_images_are_told_what_is_theirs() -> None:
    """A network that knows each image by its label predicts its noise exactly."""
    images = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None].expand(COUNT, 1, 4, 4).contiguous()
    scheduler = DDPMScheduler(1000, prediction_type="sample")
    conditions = Conditions.of_labels(torch.arange(COUNT), COUNT)

    class Knows(nn.Module):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return to_model(images)[class_labels]

    profile = loss_per_bin(Asked(Knows()), images, scheduler, bins=2, per_bin=30, told=conditions.of)
    assert profile.total == 0


# Networks


def text_unet(seed: int) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_a_router_is_its_networks_for_what_each_sample_is_told() -> None:
    nets = [text_unet(0), text_unet(1)]
    model, t = ebdiff.TimestepRouter([0, 500, 1000], nets), torch.tensor([3, 999, 500, 499])
    x, texts = torch.randn(4, 2, 8, 8), torch.randn(4, 7, 6)
    conditions = Conditions.of_embeddings(texts.half())
    told = conditions.of(torch.tensor([3, 2, 1, 0]), x)
    with torch.no_grad():
        mixed = ask(model, x, t, told)
        for row, net in enumerate([nets[0], nets[1], nets[1], nets[0]]):
            text = texts.half().float()[3 - row][None]
            single = net(x[row : row + 1], t[row : row + 1], encoder_hidden_states=text).sample
            torch.testing.assert_close(mixed[row : row + 1], single, rtol=1e-5, atol=1e-5)


def test_low_resolution_channels_stand_behind_the_noisy_ones() -> None:
    x, low = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    seen = ask(lambda x, t: (x,), x, torch.tensor(0), {LOW_RES: low})
    assert torch.equal(seen, torch.cat([x, low], 1))


SMALL = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "norm_num_groups": 2}
UNET = {**SMALL, "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
DIT = {**SMALL, "class": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}


@pytest.mark.parametrize("model", [UNET, DIT], ids=["UNet2DModel", "DiT"])
def test_there_is_a_class_for_no_class_and_only_the_loop_drops_labels(model: dict[str, Any]) -> None:
    network, x, t = build(model, "labels", CLASSES), torch.randn(2, 2, 8, 8), torch.tensor([7, 8])
    assert type(network).__name__ == model.get("class", "UNet2DModel")
    for labels in ([0, 1], [CLASSES, CLASSES]):
        draws = [network.train()(x, t, class_labels=torch.tensor(labels)).sample for _ in range(9)]
        assert all(torch.equal(draw, draws[0]) for draw in draws)
    with pytest.raises(IndexError):
        network(x, t, class_labels=torch.tensor([CLASSES + 1] * 2))


@pytest.mark.parametrize(
    ("model", "by", "words"),
    [
        ({**UNET, "class": "UNet3000"}, None, "model.class"),
        ({**UNET, "class": "DDIMScheduler"}, None, "model.class"),
        ({"class": "SD3Transformer2DModel"}, None, "network\\(x, timestep"),
        ({**UNET, "num_class_embeds": 9}, "labels", "expected model.num_class_embeds=5, got model.num_class_embeds=9"),
        (UNET, "embeddings", "UNet2DModel takes no embeddings"),
        ({**DIT, "num_layer": 1}, None, "did you mean model.num_layers"),
    ],
)
def test_networks_that_cannot_be_told_so(model: dict[str, Any], by: str | None, words: str) -> None:
    with pytest.raises(EbdiffError, match=words):
        build(model, by, CLASSES)


# Super-resolution


def test_likeness_of_equal_images_is_that_of_rounding() -> None:
    """An image of one colour is its own low resolution; a level's rounding has a mean square of 1/12 of it."""
    real = torch.full((2, 1, 16, 16), 7, dtype=torch.uint8)
    assert likeness(real, real)["psnr"] == pytest.approx(58.92, abs=0.01)  # 20 log10(255) + 10 log10(12)
    made = real.clone()
    made[1] += 10
    assert likeness(real, made)["psnr"] == pytest.approx((58.92 + 28.13) / 2, abs=0.01)


def test_likeness_by_hand() -> None:
    real = torch.randint(0, 200, (3, 1, 12, 12), dtype=torch.uint8)
    assert likeness(real, real)["ssim"] == pytest.approx(1)
    assert likeness(real, real + 10)["psnr"] == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    for wrong in (real[:2], real[..., :10]):
        with pytest.raises(EbdiffError, match="images to compare"):
            likeness(real, wrong)
