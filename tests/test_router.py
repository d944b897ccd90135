"""TimestepRouter is the network of t's region, for every caller."""

from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from routers import PARTITION, Names, images, named, router, unet
from torch import nn

from ebdiff import TimestepRouter
from ebdiff.errors import EbdiffError


@pytest.mark.parametrize(("t", "number"), [(0, 0), (239, 0), (240, 1), (439, 1), (440, 2), (999, 2), (439.9, 1)])
def test_a_scalar_t_calls_its_network_once_with_the_very_arguments(t, number):
    model, x = named(), torch.ones(3, 1, 2, 2)
    for each in (t, torch.tensor(t), torch.tensor([t]), torch.full((3,), t)):
        out = model(x, each, class_labels="kept")[0]
        assert torch.equal(out, torch.full((3,), 1.0 + number))
    for index, net in enumerate(model.nets):
        assert len(net.calls) == (4 if index == number else 0)
    (args, kwargs) = model.nets[number].calls[1]
    assert args[0] is x
    assert kwargs == {"class_labels": "kept"}


def test_a_mixed_batch_is_each_sample_through_its_own_network():
    model = router()
    x, t = torch.randn(7, 1, 8, 8), torch.tensor([440, 0, 999, 240, 239, 439, 500])
    with torch.no_grad():
        mixed = model(x, t).sample
        single = torch.cat([model(x[i : i + 1], int(t[i])).sample for i in range(7)])
    torch.testing.assert_close(mixed, single, rtol=1e-5, atol=1e-5)


def test_a_mixed_batch_calls_each_network_once_and_divides_what_is_batch_shaped():
    model, x, t = named(), torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor([999, 0, 300, 1])
    extra = {
        "class_labels": torch.tensor([10, 11, 12, 13]),
        "added_cond_kwargs": {"ids": torch.arange(8).reshape(4, 2), "scale": 0.5},
        "residuals": (torch.arange(4), [torch.arange(3)]),
        "return_dict": False,
    }
    mean, nested, none = model(hidden_states=x, timestep=t, **extra)
    assert mean.tolist() == [2.0, 1.0, 3.0, 3.0]
    assert nested["twice"][0].flatten().tolist() == [0.0, 2.0, 4.0, 6.0]
    assert none is None
    assert [len(net.calls) for net in model.nets] == [1, 1, 1]
    (_, kwargs) = model.nets[0].calls[0]
    assert kwargs["timestep"].tolist() == [0, 1]
    assert kwargs["class_labels"].tolist() == [11, 13]
    assert kwargs["added_cond_kwargs"]["ids"].tolist() == [[2, 3], [6, 7]]
    assert kwargs["added_cond_kwargs"]["scale"] == 0.5
    assert kwargs["residuals"][0].tolist() == [1, 3]
    assert kwargs["residuals"][1][0].tolist() == [0, 1, 2]  # another length than the batch: not divided
    assert kwargs["return_dict"] is False


def test_gradients_reach_exactly_the_networks_of_the_batch():
    model = router().train()
    x, t = torch.randn(4, 1, 8, 8, requires_grad=True), torch.tensor([0, 999, 3, 998])
    model(x, t).sample.square().sum().backward()
    reached = [all(p.grad is not None for p in net.parameters()) for net in model.nets]
    untouched = [all(p.grad is None for p in net.parameters()) for net in model.nets]
    assert reached == [True, False, True]
    assert untouched == [False, True, False]
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("t", [torch.tensor([0, 999]), torch.tensor([0, 1]), 500])
def test_the_output_is_of_the_networks_own_type(t):
    model, x = router(), torch.randn(2, 1, 8, 8)
    rich, plain = model(x, t), model(x, t, return_dict=False)
    assert type(rich) is UNet2DOutput
    assert type(plain) is tuple
    assert torch.equal(rich.sample, plain[0])


def test_dtype_and_state_follow_the_whole_model():
    model = router().to(torch.float64)
    assert (model.dtype, model.device.type) == (torch.float64, "cpu")
    out = model(torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 999])).sample
    assert out.dtype == torch.float64
    other = router().to(torch.float64)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scaled_timesteps_reach_the_region_of_the_whole_one(dtype):
    # Flux passes t / 1000: 0.44 is below 440 / 1000 in every dtype, 1.0 is flow matching's first step.
    model, x = named(timestep_scale=1000), torch.zeros(1, 1, 1, 1)
    for t, number in ((0, 0), (236, 0), (240, 1), (436, 1), (440, 2), (1000, 2)):
        assert model(x, torch.tensor([t], dtype=torch.float64).div(1000).to(dtype))[0].item() == number
    assert model(x, 0.44)[0].item() == 2
    assert model(x, 0.4399)[0].item() == 1


@pytest.mark.parametrize(
    "t", [-1, 1000, torch.tensor(1000), torch.tensor([0, 1000]), 1000.1, -0.5, torch.tensor(float("nan"))]
)
def test_a_timestep_outside_the_schedule_is_refused(t):
    with pytest.raises(EbdiffError, match="0 <= t < 1000"):
        named()(torch.zeros(2, 1, 1, 1), t)


def test_a_call_that_cannot_be_divided_is_refused():
    model, x = named(), torch.zeros(4, 1, 1, 1)
    with pytest.raises(EbdiffError, match=r"expected t of shape \[4\], got \[2\]"):
        model(x, torch.tensor([0, 999]))
    with pytest.raises(EbdiffError, match="several regions"):
        model(x, torch.tensor([[0, 999]] * 4))
    with pytest.raises(EbdiffError, match="no timestep"):
        model(x)


def test_networks_must_match_the_regions_and_each_other():
    for networks in ([unet(8), unet(8)], [unet(8), unet(8), "net"], []):
        with pytest.raises(EbdiffError, match="3 modules for"):
            TimestepRouter(PARTITION, networks)
    for scale in (0, -1, float("nan"), float("inf"), "1000", None):
        with pytest.raises(EbdiffError, match="timestep_scale: expected a number > 0"):
            router(timestep_scale=scale)
    with pytest.raises(EbdiffError, match="in_channels differ"):
        TimestepRouter([0, 5, 9], [unet(8), UNet2DModel.from_config({**unet(8).config, "in_channels": 2})])
    with pytest.raises(EbdiffError, match="no partition"):
        TimestepRouter([0, 5, 5], [unet(8), unet(8)])


def test_the_config_is_what_the_networks_share():
    config = router(timestep_scale=1).config
    assert (config.sample_size, config.in_channels, config.out_channels) == (8, 1, 1)
    assert (config.partition, config.timestep_scale) == ([0, 240, 440, 1000], 1)
    assert "block_out_channels" not in config
    assert issubclass(TimestepRouter, diffusers.ModelMixin)
    assert issubclass(TimestepRouter, diffusers.ConfigMixin)


@pytest.mark.parametrize(("kind", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_a_pipeline_runs_each_region_with_its_network(kind, scheduler):
    same = [unet(8, seed=1) for _ in range(3)]
    alike = images(kind(unet=TimestepRouter(PARTITION, same), scheduler=scheduler()))
    assert (alike == images(kind(unet=same[0], scheduler=scheduler()))).all()
    calls = []
    for number, net in enumerate(same):
        net.register_forward_hook(lambda *_, number=number: calls.append(number))
    images(kind(unet=TimestepRouter(PARTITION, same), scheduler=scheduler()))
    assert calls == [2, 2, 1, 0, 0]  # t = 800, 600, 400, 200, 0


def test_a_transformer_takes_timestep_by_name_and_labels_by_sample():
    torch.manual_seed(0)
    small = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "num_layers": 1, "sample_size": 4}
    nets = [diffusers.DiTTransformer2DModel(**small, norm_num_groups=2).eval() for _ in range(2)]
    model = TimestepRouter([0, 500, 1000], nets)
    x, labels = torch.randn(4, 2, 4, 4), torch.tensor([1, 2, 3, 1000])
    t = torch.tensor([0, 999, 1, 700])
    with torch.no_grad():
        mixed = model(x, timestep=t, class_labels=labels).sample
        for row in range(4):
            one = slice(row, row + 1)
            single = nets[int(t[row] >= 500)](x[one], timestep=t[one], class_labels=labels[one]).sample
            torch.testing.assert_close(mixed[one], single, rtol=1e-5, atol=1e-5)


def test_cache_context_and_reset_reach_the_networks_that_have_them():
    seen = []

    class Cached(Names):
        @contextmanager
        def cache_context(self, name, **where):
            seen.append((name, where))
            yield
            seen.append("left")

        def _reset_stateful_cache(self, recurse=True):
            seen.append("reset")

    model = TimestepRouter([0, 5, 9], [Cached(0), Names(1)])
    with model.cache_context("cond", step_index=3):
        assert seen == [("cond", {"step_index": 3})]
    model._reset_stateful_cache()
    assert seen[1:] == ["left", "reset"]


def test_a_compiled_router_is_the_router():
    class Scale(nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    model = TimestepRouter(PARTITION, [Scale(2, 2) for _ in range(3)])
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 2)
    for t in (300, torch.tensor(300), torch.tensor([0, 300, 999])):
        assert torch.equal(compiled(x, t), model(x, t))
