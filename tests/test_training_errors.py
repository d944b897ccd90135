"""What stops training: bad input before the first step, numbers that are not finite before their step is applied."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from kill_me import Seen, net, pictures, steps, training
from torch import Tensor, nn

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.conditions import Conditions
from ebdiff.training.loop import TrainConfig, TrainState


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_what_is_not_finite_stops_and_the_step_is_not_applied(tmp_path: Path, where: str, value: float) -> None:
    model, calls = net(), 0

    def poison(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4 and where == "loss":
            return output * value
        if calls == 4:
            output.register_hook(lambda gradient: gradient * value)
        return output

    model.first.register_forward_hook(poison)
    state = TrainState.begin(model, TrainConfig(lr=1e-2))
    loop = training(state, 9, checkpoints=Checkpoints(tmp_path), checkpoint_every=2, grad_clip=None, precision="bf16")
    for _ in range(3):
        next(loop)
    before, facts = {name: tensor.clone() for name, tensor in state.tensors().items()}, state.facts()
    problem = "loss" if where == "loss" else "gradient norm"
    with pytest.raises(EbdiffError, match=rf"step 4.*finite {problem}.*lower lr.*grad_clip.*float32.*step 2") as error:
        next(loop)
    assert "\n" not in str(error.value)
    assert facts == state.facts()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    saved = Checkpoints(tmp_path).newest()
    assert saved is not None
    assert saved.step == 2


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "images of whole numbers": ("uint8", {"images": torch.zeros(2, 2, 6, 6, dtype=torch.int64)}),
    "one image": ("uint8", {"images": torch.zeros(2, 6, 6, dtype=torch.uint8)}),
    "no image": ("uint8", {"images": torch.zeros(0, 2, 6, 6, dtype=torch.uint8)}),
    "a sampler of another kind of time": ("whole timesteps", {"sampler": ebdiff.Uniform(ebdiff.NoiseProfile.flow())}),
    "another schedule": ("1000 timesteps", {"scheduler": DDPMScheduler(100)}),
    "regions of another schedule": (r"\[0, 500\)", {"regions": ebdiff.Partition(0, 240, 500)}),
    "a prediction of its own": ("prediction_type", {"scheduler": SimpleNamespace(
        config=SimpleNamespace(num_train_timesteps=1000, prediction_type="flow"))}),
}  # fmt: skip


@pytest.mark.parametrize(("problem", "options"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_before_the_first_step(problem: str, options: dict[str, Any]) -> None:
    model = Seen()
    with pytest.raises(EbdiffError, match=problem) as error:
        steps(model, 1, **options)
    assert "\n" not in str(error.value)
    assert not model.t


OTHERS: dict[str, tuple[str, Any]] = {
    "state": ("a TrainState, got Net; .*TrainState.begin", net()),
    "images": ("a Tensor, got ndarray; .*torch.from_numpy", np.zeros((2, 2, 6, 6), np.uint8)),
    "scheduler": ("a scheduler of diffusers, .*got NoneType", None),
    "sampler": (r"a Sampler, got int; .*Uniform\(1000\)", 1000),
    "config": ("a TrainConfig, got dict", {"batch_size": 4}),
    "until": ("a number of steps, got '4'", "4"),
    "checkpoints": (r"a Checkpoints, got str; .*Checkpoints\(folder\)", "folder"),
    "checkpoint_every": ("a whole number of steps, 0 for none, got -1", -1),
    "regions": (r"a Partition, got list; .*ebdiff.Partition\(0, 500, 1000\)", [0, 500, 1000]),
    "conditions": ("a Conditions, got dict", {"class_labels": torch.zeros(2, dtype=torch.int64)}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_things_are_refused_by_the_call_itself(name: str, tmp_path: Path) -> None:
    (words, other), config = OTHERS[name], TrainConfig(batch_size=4)
    good = {
        "state": TrainState.begin(net(), config),
        "images": pictures(),
        "scheduler": DDPMScheduler(1000),
        "sampler": ebdiff.Uniform(1000),
        "config": config,
        "until": 1,
        "checkpoints": Checkpoints(tmp_path),
    }
    with pytest.raises(EbdiffError, match=f"^{name}: expected {words}"):
        ebdiff.train(**{**good, name: other})


@pytest.mark.parametrize("every", [-1, 1.5, "2"])
def test_checkpoints_are_due_after_a_whole_number_of_steps(every: Any, tmp_path: Path) -> None:
    with pytest.raises(EbdiffError, match="checkpoint_every"):
        training(net(), 2, checkpoints=Checkpoints(tmp_path), checkpoint_every=every)


def unet(channels: int, kind: type[UNet2DModel] = UNet2DModel) -> UNet2DModel:
    """A network of diffusers with so many channels in, and two out."""
    return kind(6, channels, 2, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, down_block_types=(
        "DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False)  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_channels_are_refused_before_the_first_step(channels: int) -> None:
    with pytest.raises(EbdiffError, match=f"images: expected {channels} channels, .* got 2"):
        training(unet(channels), 1)


class Twice(UNet2DModel):
    """Sees every image twice."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x], 1), t).sample


def test_low_resolutions_and_what_a_forward_of_one_s_own_adds_are_further_channels() -> None:
    assert len(steps(unet(2), 1)) == 1
    assert len(steps(unet(4, Twice), 1)) == 1
    changed = unet(3)
    changed.conv_in = nn.Conv2d(2, 4, 3, padding=1)
    assert len(steps(changed, 1)) == 1
    assert len(steps(unet(4), 1, conditions=Conditions(factor=2))) == 1
    with pytest.raises(EbdiffError, match=r"images: expected 2 .* got 2 and as many of their low"):
        training(unet(2), 1, conditions=Conditions(factor=2))


def test_a_state_that_does_not_fit_is_refused_before_the_first_step() -> None:
    config, other = TrainConfig(), TrainState.begin(net(width=9), TrainConfig())
    good = TrainState.begin(net(), config)
    compiled = net()
    compiled.compile()
    for state, problem in (
        (TrainState(good.model, other.optimizer, good.ema), "optimizer"),
        (TrainState(good.model, good.optimizer, other.ema), "ema"),
        (TrainState.begin(nn.DataParallel(net()), config), "wrapped"),
        (TrainState.begin(compiled, config), "compiled"),
    ):
        with pytest.raises(EbdiffError, match=problem):
            steps(state, 1)
        assert state.step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"accumulate": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"precision": "fp16"},
        {"grad_clip": 0.0},
        {"betas": (0.9, 1.0)},
        {"ema_decay": 1.5},
        {"weight_decay": -1.0},
        {"lr": "1e-4"},
        {"lr": float("inf")},
        {"lr": True},
        {"batch_size": "8"},
        {"batch_size": 2.5},
        {"accumulate": 1.5},
        {"betas": 0.9},
        {"betas": ("0.9", 0.999)},
        {"betas": "ab"},
        {"seed": "x"},
        {"seed": 0.5},
        {"weight_decay": None},
        {"grad_clip": "1"},
        {"ema_decay": "0.9"},
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(EbdiffError, match=f"TrainConfig: expected.*{next(iter(options))}"):
        TrainConfig(**options)


def test_settings_of_other_libraries_and_lists_of_betas_are_numbers_too() -> None:
    TrainConfig(batch_size=np.int64(2), lr=np.float32(0.1), betas=[0, np.float64(0.9)], seed=np.uint32(7), grad_clip=1)
    TrainConfig(grad_clip=float("inf"))
