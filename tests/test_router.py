"""TimestepRouter is the network of t's region, for every caller and after every save."""

import json
import logging
import subprocess
import sys
from contextlib import contextmanager

import diffusers
import numpy
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from torch import nn

import ebdiff
from ebdiff import Partition, TimestepRouter
from ebdiff.errors import EbdiffError

PARTITION = Partition(0, 240, 440, 1000)


def unet(width: int, seed: int = 0, **config) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **config,
    ).eval()


def router(**options) -> TimestepRouter:
    return TimestepRouter(PARTITION, [unet(8), unet(12), unet(16)], **options).eval()


class Names(nn.Module):
    """Returns its own number plus the mean of each sample, and records what it was called with."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(float(number)))
        self.calls: list[tuple[tuple, dict]] = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        x = args[0] if args else kwargs["hidden_states"]
        return (x.mean(dim=(1, 2, 3)) + self.bias, {"twice": [2 * x]}, None)


def named(**options) -> TimestepRouter:
    return TimestepRouter(PARTITION, [Names(0), Names(1), Names(2)], **options)


def images(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=5, output_type="np", **options).images


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


def test_a_saved_router_comes_back_bit_equal(tmp_path):
    model = router(timestep_scale=0.5)
    model.save_pretrained(tmp_path / "router")
    names = sorted(path.name for path in (tmp_path / "router").iterdir())
    assert names == ["config.json", "net0", "net1", "net2"]
    again = TimestepRouter.from_pretrained(tmp_path, subfolder="router")
    assert not again.training
    assert again.partition == PARTITION
    assert [net.config.block_out_channels for net in again.nets] == [[8, 16], [12, 24], [16, 32]]
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 600, 1999])
    with torch.no_grad():
        assert torch.equal(model(x, t).sample, again(x, t).sample)
    half = TimestepRouter.from_pretrained(tmp_path / "router", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    reborn = TimestepRouter.from_config(model.config, networks=list(model.nets))
    assert reborn.partition == PARTITION


# The traps of a custom model inside a diffusers pipeline.


def test_a_pipeline_comes_back_bit_equal_without_a_complaint(tmp_path, caplog):
    pipeline = DDIMPipeline(unet=router(), scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "model_index.json").read_text())
    assert recorded["unet"] == ["ebdiff", "TimestepRouter"]  # written in users' files: never to be moved
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        again = DiffusionPipeline.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(again.unet) is TimestepRouter
    assert (images(again) == images(pipeline)).all()


def test_a_pipeline_loads_in_a_process_that_has_merely_imported_ebdiff(tmp_path):
    pipeline = DDPMPipeline(unet=router(), scheduler=DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    expected = images(pipeline)
    code = (
        "import ebdiff, sys, numpy, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "options = dict(batch_size=2, generator=generator, num_inference_steps=5, output_type='np')\n"
        "numpy.save(sys.argv[2], pipeline(**options).images)"
    )
    out = tmp_path / "images.npy"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pipeline"), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (numpy.load(out) == expected).all()


def test_diffusers_does_not_take_the_router_for_a_part_of_itself():
    assert _fetch_class_library_tuple(router()) == ("ebdiff", "TimestepRouter")
    assert TimestepRouter.__module__ == "ebdiff"
    for folder in ("nn", "pruning", "timesteps", "tickets", "training", "evaluation", "ops", "ebdiff"):
        assert not hasattr(diffusers.pipelines, folder)


def test_the_front_door_shows_the_loader_what_it_looks_for_and_no_more():
    assert ebdiff.ModelMixin is diffusers.ModelMixin
    assert "ModelMixin" not in ebdiff.__all__
    assert getattr(ebdiff, "SchedulerMixin", None) is None


def test_a_network_is_restored_as_the_class_its_own_config_names(tmp_path, monkeypatch):
    class ShrunkUNet2DModel(UNet2DModel):
        """Stands in for a shrunken class: its own file, and no options."""

        def save_pretrained(self, save_directory):
            super().save_pretrained(save_directory)

        @classmethod
        def from_pretrained(cls, path):
            return super().from_pretrained(path)

    monkeypatch.setitem(vars(ebdiff), "ShrunkUNet2DModel", ShrunkUNet2DModel)
    shrunken = ShrunkUNet2DModel.from_config(unet(8).config)
    model = TimestepRouter([0, 500, 1000], [unet(12), shrunken])
    DDPMPipeline(unet=model, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path).unet
    assert [type(net) for net in again.nets] == [UNet2DModel, ShrunkUNet2DModel]
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(again(x, 999).sample, shrunken.eval()(x, 999).sample)


def test_tickets_of_one_network_make_a_pipeline(tmp_path):
    dense, x = unet(8), torch.randn(1, 1, 8, 8)
    plan = ebdiff.trace(dense, x, 0)
    scores = ebdiff.importance(dense, plan)
    masks = [ebdiff.ChannelMask.draw(scores, plan=plan, ratio=ratio) for ratio in (0.2, 0.4, 0.6)]
    pipeline = DDIMPipeline(
        unet=TimestepRouter(PARTITION, [ebdiff.shrink(dense, mask) for mask in masks]), scheduler=DDIMScheduler()
    )
    assert pipeline.unet.config.block_out_channels == dense.config.block_out_channels
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert [type(net).__name__ for net in again.unet.nets] == ["ShrunkUNet2DModel"] * 3
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in again.unet.nets]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[0]
    assert (images(again) == images(pipeline)).all()


def test_a_pickle_is_never_read(tmp_path):
    router().save_pretrained(tmp_path)
    unet(8).save_pretrained(tmp_path / "net0", safe_serialization=False)
    (tmp_path / "net0/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        TimestepRouter.from_pretrained(tmp_path)


def test_a_router_routes_between_routers(tmp_path):
    model = TimestepRouter([0, 500, 1000], [TimestepRouter([0, 100, 1000], [unet(8), unet(12)]), unet(16)]).eval()
    model.save_pretrained(tmp_path)
    again, x = TimestepRouter.from_pretrained(tmp_path), torch.randn(3, 1, 8, 8)
    t = torch.tensor([0, 100, 500])
    assert torch.equal(again(x, t).sample, model(x, t).sample)


def test_what_cannot_be_restored_is_not_saved(tmp_path):
    with pytest.raises(EbdiffError, match=r"Names can neither be saved.*save each yourself"):
        named().save_pretrained(tmp_path / "router")
    with pytest.raises(EbdiffError, match="never pickled"):
        router().save_pretrained(tmp_path / "router", safe_serialization=False)
    assert not (tmp_path / "router").exists()


def test_a_folder_that_is_no_whole_router_is_refused(tmp_path):
    with pytest.raises(EbdiffError, match="missing"):
        TimestepRouter.from_pretrained(tmp_path / "nothing")
    unet(8).save_pretrained(tmp_path / "unet")
    with pytest.raises(EbdiffError, match="holds no router"):
        TimestepRouter.from_pretrained(tmp_path / "unet")
    router().save_pretrained(tmp_path / "router")
    config = json.loads((tmp_path / "router/net1/config.json").read_text())
    for name in ("Unheard", "DDPMScheduler", "ShrunkUnheard", None):
        (tmp_path / "router/net1/config.json").write_text(json.dumps({**config, "_class_name": name}))
        with pytest.raises(EbdiffError, match="expected a diffusers model"):
            TimestepRouter.from_pretrained(tmp_path / "router")
    (tmp_path / "router/net1/config.json").unlink()
    with pytest.raises(EbdiffError, match="missing"):
        TimestepRouter.from_pretrained(tmp_path / "router")


def test_a_save_that_stops_half_way_leaves_no_router(tmp_path, monkeypatch):
    model = router()
    model.save_pretrained(tmp_path)

    def stop(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(model.nets[1], "save_pretrained", stop, raising=False)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    with pytest.raises(EbdiffError, match="missing"):
        TimestepRouter.from_pretrained(tmp_path)


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
