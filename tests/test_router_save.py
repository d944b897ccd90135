"""A router comes back from every save as it was, also as a part of a pipeline, or not at all."""

import json
import logging
import subprocess
import sys

import diffusers
import numpy
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from routers import PARTITION, images, named, router, unet

import ebdiff
from ebdiff import TimestepRouter
from ebdiff.errors import EbdiffError


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
    # Where weights lie in memory may change the last bit of a product, on Intel's CPUs: they come from a file here.
    numpy.testing.assert_allclose(numpy.load(out), expected, rtol=0, atol=1e-5)


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
        """Stands in for a shrunken class: its own file, and no options that matter."""

        __module__ = "ebdiff"

        def save_pretrained(self, save_directory):
            super().save_pretrained(save_directory)

        @classmethod
        def from_pretrained(cls, path, **_):
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
    with pytest.raises(EbdiffError, match="safetensors"):
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
    (tmp_path / "router/net1/config.json").write_text("[]")
    with pytest.raises(EbdiffError, match="expected a JSON object, got list"):
        TimestepRouter.from_pretrained(tmp_path / "router")
    (tmp_path / "router/net1/config.json").unlink()
    with pytest.raises(EbdiffError, match="missing"):
        TimestepRouter.from_pretrained(tmp_path / "router")
    weights = tmp_path / "router/net0/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EbdiffError, match="net0 holds no whole UNet2DModel"):
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
