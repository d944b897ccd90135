"""Networks on disk: bit-equal, refused by stock loaders, and never believed when edited."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import UNet2DModel
from test_law import random_mask
from torch import Tensor, nn
from unets import inputs, scatter, unet

import ebdiff
from ebdiff.pruning import save as save_module
from ebdiff.pruning.shrink import shrinks_of


@pytest.fixture(scope="module")
def small() -> UNet2DModel:
    model = unet("AttnDownBlock2D", "AttnUpBlock2D", attention_head_dim=None)
    return ebdiff.shrink(model, random_mask(ebdiff.trace(model, *inputs(model)[0]), seed=3))


class Ours(nn.Module):
    """A model of the user's own: tied weights, buffers, a plain tensor, a function and a tuple as attributes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.GroupNorm(2, width)
        self.left, self.out = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2, 1)
        self.right = self.left
        self.act, self.sizes, self.table = nn.functional.silu, (1, 2), torch.arange(3.0)
        self.register_buffer("shift", torch.ones(1), persistent=False)
        self.register_buffer(
            "turns", torch.polar(torch.ones(3, dtype=torch.float64), torch.arange(3.0).double()).conj()
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x)))
        shift = self.table[1] * self.shift + self.turns.imag.sum().float()
        return self.out(self.right(self.left(h))) + shift + t.reshape(-1, 1, 1, 1)


def test_a_shrunken_diffusers_model_comes_back_bit_equal(small: UNet2DModel, tmp_path: Path) -> None:
    ebdiff.save(small, tmp_path)
    args = inputs(small)[0]
    for loaded in (ebdiff.load(tmp_path), ebdiff.ShrunkUNet2DModel.from_pretrained(tmp_path)):  # type: ignore[attr-defined]
        assert type(loaded) is type(small)
        assert torch.equal(loaded(*args).sample, small(*args).sample)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small.parameters(), strict=True))
        assert shrinks_of(loaded)[0] == shrinks_of(small)[0]
        assert not loaded.training
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ShrunkUNet2DModel"
    half = ebdiff.ShrunkUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)  # type: ignore[attr-defined]
    named = ebdiff.ShrunkUNet2DModel.from_pretrained(tmp_path, torch_dtype="bfloat16")  # type: ignore[attr-defined]
    assert named.dtype is half.dtype is torch.bfloat16
    with pytest.raises(ebdiff.EbdiffError, match=r"a torch\.dtype, its name"):
        ebdiff.ShrunkUNet2DModel.from_pretrained(tmp_path, dtype="bf16")  # type: ignore[attr-defined]


def test_a_network_shrunken_twice_comes_back(small: UNet2DModel, tmp_path: Path) -> None:
    args = inputs(small)[0]
    twice = ebdiff.shrink(small, random_mask(ebdiff.trace(small, *args), seed=4, ratio=0.3))
    ebdiff.save(twice, tmp_path)
    loaded = ebdiff.load(tmp_path)
    assert torch.equal(loaded(*args).sample, twice(*args).sample)
    assert len(shrinks_of(loaded)) == 2


def test_stock_loaders_refuse_it(small: UNet2DModel, tmp_path: Path) -> None:
    ebdiff.save(small, tmp_path)
    for options in ({}, {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}):
        with pytest.raises(OSError, match="no file named"):
            UNet2DModel.from_pretrained(tmp_path, **options)


def test_a_dense_diffusers_model_is_saved_as_diffusers_does(tmp_path: Path) -> None:
    model = unet()
    ebdiff.save(model, tmp_path)
    assert torch.equal(ebdiff.load(tmp_path)(*inputs(model)[0]).sample, model(*inputs(model)[0]).sample)
    assert isinstance(UNet2DModel.from_pretrained(tmp_path), UNet2DModel)


def test_the_last_network_saved_into_a_folder_is_the_one_that_is_loaded(small: UNet2DModel, tmp_path: Path) -> None:
    dense = unet("AttnDownBlock2D", "AttnUpBlock2D")
    router = ebdiff.TimestepRouter(ebdiff.Partition(0, 500, 1000), [dense, small])
    networks = {"shrunken": small, "dense": dense, "router": router, "any": scatter(Ours(4))}
    halves = [copy.deepcopy(model).to(torch.float16) for model in (dense, small, router)]
    for first in (*networks.values(), *halves):
        for name, model in networks.items():
            ebdiff.save(first, tmp_path)
            ebdiff.save(model, tmp_path)
            loaded = ebdiff.load(tmp_path)
            assert type(loaded) is type(model), name
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
            assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_nothing_is_saved_under_the_name_of_a_file(small: UNet2DModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for model in (small, unet(), nn.Linear(1, 1)):
        with pytest.raises(ebdiff.EbdiffError, match="is a file"):
            ebdiff.save(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_dtypes_are_those_that_the_stock_loader_gives_the_dense_model(tmp_path: Path) -> None:
    for name in ("Wan", "PixArt", "SD3"):  # Wan keeps its rotary tables and more in float32
        model, arguments = families.build(name, torch.float32)
        small = ebdiff.shrink(model, ebdiff.ChannelMask(ebdiff.trace(model, **arguments), {}))
        for who, network in (("dense", model), ("shrunken", small)):
            network.save_pretrained(tmp_path / name / who)
        half: list[Any] = [
            type(network).from_pretrained(tmp_path / name / who, torch_dtype=torch.bfloat16)
            for who, network in (("dense", model), ("shrunken", small))
        ]
        dense, ours = ({k: v.dtype for k, v in (*m.named_parameters(), *m.named_buffers())} for m in half)
        assert ours == dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dense_diffusers_model_comes_back_in_its_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model, mixed = unet().to(dtype), unet()
    mixed.conv_out.to(dtype)
    router = ebdiff.TimestepRouter([0, 500, 1000], [model, unet().to(dtype)])
    for number, network in enumerate((model, mixed, router)):
        ebdiff.save(network, tmp_path / str(number))
        again = ebdiff.load(tmp_path / str(number))
        ours, theirs = network.state_dict(), again.state_dict()
        assert {name: tensor.dtype for name, tensor in ours.items()} == {
            k: tensor.dtype for k, tensor in theirs.items()
        }
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for wanted in (None, "float32", torch.float32):  # without a dtype as diffusers does
        single = ebdiff.TimestepRouter.from_pretrained(tmp_path / "2", torch_dtype=wanted)
        assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}


def test_a_compiled_network_is_saved_as_what_it_compiles(small: UNet2DModel, tmp_path: Path) -> None:
    for model in (unet(), small, Ours(4)):
        ebdiff.save(torch.compile(model), tmp_path)
        assert type(ebdiff.load(tmp_path)) is type(model)


def test_a_network_made_by_position_comes_back(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, add_attention=False, **blocks).eval()
    small = ebdiff.shrink(model, random_mask(ebdiff.trace(model, torch.randn(1, 1, 8, 8), torch.tensor([1])), seed=3))
    ebdiff.save(small, tmp_path)
    again = ebdiff.load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), small.parameters(), strict=True))


def test_saving_uses_up_no_random_number(tmp_path: Path) -> None:
    model = unet(time_embedding_type="fourier")
    small = ebdiff.shrink(model, random_mask(ebdiff.trace(model, *inputs(model)[0]), seed=3))
    before = torch.get_rng_state()
    ebdiff.save(small, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


class Mine(UNet2DModel):
    """A diffusers model of the user's own."""


def test_a_users_own_diffusers_class_comes_back(tmp_path: Path) -> None:
    model = Mine.from_config(unet().config).eval()
    small = ebdiff.shrink(model, random_mask(ebdiff.trace(model, *inputs(model)[0]), seed=3))
    for name, network in {"dense": model, "small": small}.items():
        ebdiff.save(network, tmp_path / name)
        assert type(ebdiff.load(tmp_path / name)) is type(network)
    ebdiff.save(ebdiff.TimestepRouter([0, 500, 1000], [model, small]), tmp_path / "router")
    assert [type(net) for net in ebdiff.load(tmp_path / "router").nets] == [Mine, type(small)]
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text().replace("Mine", "Gone"))
    with pytest.raises(ebdiff.EbdiffError, match=r"'Gone'.* import the module that defines it"):
        ebdiff.load(tmp_path / "dense")


def test_what_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    model = unet()
    small = ebdiff.shrink(model, random_mask(ebdiff.trace(model, *inputs(model)[0]), seed=3))
    ebdiff.save(small, tmp_path)
    small.extra = nn.Linear(2, 2)
    with pytest.raises(ebdiff.EbdiffError, match=r"extra\.weight.*absent"):
        ebdiff.save(small, tmp_path)
    assert not hasattr(ebdiff.load(tmp_path), "extra")


DAMAGE = {
    "truncated": "no whole UNet2DModel",
    "missing": "no whole UNet2DModel",
    "a pickle instead": "no whole UNet2DModel",
    "other weights": "do not fit",
    "no object": "missing",
    "number": "missing",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_dense_model_is_one_error_and_never_unpickled(damage: str, tmp_path: Path) -> None:
    model = unet()
    ebdiff.save(model, tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage in ("missing", "a pickle instead"):
        weights.unlink()
        if damage == "a pickle instead":
            torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    elif damage == "other weights":
        config.write_text(config.read_text().replace('"add_attention": true', '"add_attention": false'))
    else:
        config.write_text("[1]" if damage == "no object" else "3")
    with pytest.raises(ebdiff.EbdiffError, match=DAMAGE[damage]):
        ebdiff.load(tmp_path)


@pytest.mark.parametrize("shrunken", [False, True])
def test_any_module_comes_back_without_its_constructor(shrunken: bool, tmp_path: Path) -> None:
    model = scatter(Ours(12)).eval()
    args = (torch.randn(2, 2, 5, 5), torch.tensor([1.0, 2.0]))
    if shrunken:
        model = ebdiff.shrink(model, random_mask(ebdiff.trace(model, *args), seed=1))
    ebdiff.save(model, tmp_path)
    loaded = ebdiff.load(tmp_path)
    assert torch.equal(loaded(*args), model(*args))
    assert loaded.left is loaded.right
    assert (loaded.act, loaded.sizes) == (nn.functional.silu, (1, 2))
    assert len(shrinks_of(loaded)) == shrunken


def test_another_process_must_import_the_class_itself(tmp_path: Path) -> None:
    ebdiff.save(scatter(Ours(4)), tmp_path)
    code = f"import ebdiff\ntry: ebdiff.load({str(tmp_path)!r})\nexcept ebdiff.EbdiffError as e: print(e)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert "import test_save first" in out


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = Ours(4)
    model.act = lambda x: x
    with pytest.raises(ebdiff.EbdiffError, match="cannot save attribute act"):
        ebdiff.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def resealed(folder: Path, change: Any) -> None:
    """Edit ebdiff.json as an attacker would, checksum included."""
    path = folder / "ebdiff.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("digest")
    path.write_text(json.dumps({**content, "digest": save_module._digest(content)}))


@pytest.mark.parametrize(
    "attribute",
    [
        {"eval": {"named": "sys:exit"}},
        {"train": {"named": "builtins:print"}},
        {"act": {"named": "os:getcwd"}},
        {"act": {"named": "torch:os.getcwd"}},
        {"_forward_hooks": {"dict": []}},
        {"z": {"object": "tempfile:_TemporaryFileCloser", "attributes": {"name": "/nowhere", "delete": True}}},
    ],
)
def test_a_crafted_file_calls_nothing(attribute: dict[str, Any], tmp_path: Path) -> None:
    ebdiff.save(scatter(Ours(4)), tmp_path)
    resealed(tmp_path, lambda content: content["structure"]["attributes"].update(attribute))
    with pytest.raises(ebdiff.EbdiffError, match="do not load this file"):
        ebdiff.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["truncate tensors", "other tensors", "truncate json", "kept", "class", "resealed class", "missing", "config"],
)
def test_damage_is_one_error(damage: str, small: UNet2DModel, tmp_path: Path) -> None:
    ebdiff.save(small, tmp_path)
    facts, tensors = tmp_path / "ebdiff.json", tmp_path / "ebdiff.safetensors"
    content = json.loads(facts.read_text())
    if damage == "truncate tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "other tensors":
        raw = bytearray(tensors.read_bytes())
        raw[-5] ^= 1
        tensors.write_bytes(bytes(raw))
    elif damage == "truncate json":
        facts.write_text(facts.read_text()[:500])
    elif damage == "kept":
        name = next(iter(content["shrinks"][0]["kept"]))
        content["shrinks"][0]["kept"][name] = content["shrinks"][0]["kept"][name][:-1] or [0, 1]
        facts.write_text(json.dumps(content))
    elif damage == "class":
        content["class"] = "ShrunkNothing"
        facts.write_text(json.dumps(content))
    elif damage == "resealed class":
        resealed(tmp_path, lambda content: content.update({"class": "ShrunkNothing"}))
    elif damage == "config":
        (tmp_path / "config.json").write_text("[]")
    else:
        tensors.unlink()
    with pytest.raises(ebdiff.EbdiffError, match="expected"):
        ebdiff.load(tmp_path)


def test_a_router_is_loaded_like_any_network(small: UNet2DModel, tmp_path: Path) -> None:
    router = ebdiff.TimestepRouter(ebdiff.Partition(0, 500, 1000), [unet("AttnDownBlock2D", "AttnUpBlock2D"), small])
    ebdiff.save(router, tmp_path)
    x, t = inputs(small)[0]
    assert torch.equal(ebdiff.load(tmp_path)(x, t).sample, router(x, t).sample)


def test_a_class_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ebdiff.save(Ours(4), tmp_path)
    monkeypatch.delattr(sys.modules[__name__], "Ours")
    with pytest.raises(ebdiff.EbdiffError, match=r"has no Ours: .* define or import Ours in"):
        ebdiff.load(tmp_path)
