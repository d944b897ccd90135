"""A network on disk: JSON and safetensors, never pickle. Shrunken diffusers models as importable classes.

A folder holds `ebdiff.json` (class or structure, plan fingerprint, kept indices) and `ebdiff.safetensors`, a name that
stock loaders refuse: with ignore_mismatched_sizes they would fill a shrunken network with random layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import files
from ..errors import EbdiffError
from ..nn.folders import dtype_named, from_folder, model_class
from ..nn.replace.classes import plain_class
from ..nn.sparse_model import ALWAYS, blocks_of, sparsify, taken_out
from .blocks import read_blocks, written
from .mask import ChannelMask
from .plan import ChannelPlan
from .shrink import shrink_, shrinks_of
from .structure import build, describe

__all__ = ["ShrunkBuilder", "load", "save", "shrunk_class", "shrunk_class_named"]

_CONFIG, _FACTS, _TENSORS, _PREFIX = "config.json", "ebdiff.json", "ebdiff.safetensors", "Shrunk"
_DEFAULTED = "_use_default_values"  # diffusers' list of what was not given by name, which from_config leaves out


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a network into a folder, so that `load` gives it back bit for bit.

    Args:
        model: any module. A dense diffusers model is written as diffusers does. Of other modules the structure is
            written (classes by their import path, plain attributes), so their classes must be importable by name.
        folder: made if need be. If the process is killed midway, a folder that held another network may hold neither;
            `load` says so then.

    Raises:
        EbdiffError: an attribute that is neither plain data nor importable, which is named; a shrunken diffusers model
            to which something was added since; or a file of this name.
    """
    if Path(folder).is_file():
        raise EbdiffError(f"{folder} is a file", expected="a folder, or none yet", got="a file", remedy="name another")
    from diffusers import ModelMixin

    model = getattr(model, "_orig_mod", model)  # where it is compiled
    if isinstance(model, ModelMixin):
        model.save_pretrained(str(folder))
        return
    with taken_out(model):
        structure, extra = describe(model)
    _write(model, Path(folder), {"structure": structure}, extra)
    if _class_of(Path(folder)):  # of a diffusers model that was saved here before
        Path(folder, _CONFIG).unlink()


def load(folder: str | Path) -> Any:
    """The network that `save` wrote, in eval mode, on the CPU.

    Parameters and buffers have the dtypes that they were saved in. Classes are imported from torch, diffusers and
    ebdiff only; any other module must have been imported before.

    Raises:
        EbdiffError: the folder is missing, truncated or edited, or a class is not imported yet.
    """
    folder = Path(folder)
    name = _class_of(folder)
    if name:  # a diffusers model, whatever an earlier save left beside it
        return from_folder(_class_in(folder / _CONFIG, name), folder, torch_dtype="auto")
    facts, tensors = _read(folder)
    if "structure" not in facts:
        return _class_in(folder / _FACTS, str(facts.get("class"))).from_pretrained(str(folder))
    blocks = read_blocks(tensors, facts)
    model = build(facts["structure"], tensors)
    vars(model)["_ebdiff_shrinks"] = _shrinks_from(facts)
    sparsify(model, blocks, ALWAYS)
    return nn.Module.eval(model)


def _class_of(folder: Path) -> str:
    """The class of the diffusers model that a folder holds; empty where it holds none."""
    config = files.read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None
    return str(config.get("_class_name") or "") if isinstance(config, dict) else ""


def _class_in(path: Path, name: str) -> Any:
    if name == "TimestepRouter":
        from ..nn.router import TimestepRouter

        return TimestepRouter
    try:
        return shrunk_class_named(name) if name.startswith(_PREFIX) else model_class(name)
    except AttributeError as error:
        raise EbdiffError(
            f"{path}", expected="a diffusers model's class", got=str(error), remedy="import the module that defines it"
        ) from None


# Diffusers models -----------------------------------------------------------------------------------------------------


@cache
def shrunk_class(dense: type) -> type:
    """The class of a shrunken diffusers model: a subclass of its own class, found as ebdiff.Shrunk<Class>."""
    if dense.__name__.startswith(_PREFIX):
        return dense
    body = {
        "__module__": "ebdiff",
        "__doc__": f"A {dense.__name__} with channels removed; its config is the dense one.",
        "save_pretrained": _save_pretrained,
        "from_pretrained": classmethod(cast(Any, _from_pretrained)),
    }
    return type(_PREFIX + dense.__name__, (dense,), body)


def shrunk_class_named(name: str) -> Any:
    """ebdiff.Shrunk<Class> by its name, for a Class that diffusers has."""
    return shrunk_class(model_class(name.removeprefix(_PREFIX)))


def _save_pretrained(self: Any, save_directory: str | Path, **_: Any) -> None:
    """Write config.json (the dense config under this class's name), ebdiff.json and ebdiff.safetensors.

    Raises:
        EbdiffError: before anything is written, where its class and its cuts do not make the parameters that it has.
    """
    folder = Path(save_directory)
    _refuse_others(_tensors_of(self), _tensors_of(_built(type(self), self.config, shrinks_of(self))), "this network")
    _write(self, folder, {"class": type(self).__name__}, {})
    files.write_bytes(folder / _CONFIG, self.to_json_string().encode())


def _from_pretrained(
    cls: Any,
    pretrained_model_name_or_path: str | Path,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    **_: Any,
) -> Any:
    """Build the small network directly (the dense one only as shapes) and load its weights. Local folders only.

    Args:
        subfolder: below the folder.
        torch_dtype, dtype: convert to this, or what is named so; under either name as in diffusers. "auto" keeps what
            was saved. As there, modules that the class keeps in float32 stay so, and buffers in no state dict are
            not narrowed.
    """
    wanted = dtype_named(torch_dtype if dtype is None else dtype)
    folder = Path(pretrained_model_name_or_path) / (subfolder or "")
    facts, tensors = _read(folder)
    if facts.get("class") != cls.__name__:
        got = str(facts.get("class"))
        raise EbdiffError(f"the network in {folder}", expected=cls.__name__, got=got, remedy="load it by ebdiff.load")
    config = files.read_object(folder / _CONFIG)
    model = _built(cls, config, _shrinks_from(facts))
    blocks = read_blocks(tensors, facts)
    _assign(model, tensors, folder)
    sparsify(model, blocks, ALWAYS)
    model.register_to_config(_name_or_path=str(folder))
    if wanted is not None:
        _convert_(model, wanted)
    return model.eval()


def _built(cls: Any, config: Mapping[str, Any], shrinks: Iterable[ChannelMask]) -> Any:
    """The shrunken network, its parameters as shapes only; no random number is used up."""
    from accelerate import init_empty_weights

    dense = cls.__mro__[1]
    config = {key: value for key, value in config.items() if key != _DEFAULTED}
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        try:
            model = dense.from_config({**config, "_class_name": dense.__name__})
        except TypeError as error:
            remedy = "decorate its __init__ with diffusers' register_to_config"
            raise EbdiffError(f"{dense.__name__} from its config", got=str(error), remedy=remedy) from None
    for mask in shrinks:
        shrink_(model, mask)
    return model


class ShrunkBuilder:
    """The `model_cls` of diffusers' EMAModel after a cut: what its from_config makes has the EMA's shapes."""

    def __init__(self, model: nn.Module) -> None:
        self.kind, self.shrinks = plain_class(type(model)), shrinks_of(model)

    def from_config(self, config: Mapping[str, Any], **_: Any) -> Any:
        """The shrunken network with zeros for parameters."""
        model = _built(self.kind, config, self.shrinks)
        zeros = {name: torch.zeros_like(t, device="cpu") if t.is_meta else t for name, t in _tensors_of(model).items()}
        _assign(model, zeros, Path())
        return model


def _convert_(model: nn.Module, dtype: torch.dtype) -> None:
    """What diffusers' loader makes of floating-point tensors: `dtype` but for some, which may be wider."""
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    saved = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if wide.intersection(name.split(".")):
            tensor.data = tensor.data.to(torch.float32)
        else:
            tensor.data = tensor.data.to(dtype if name in saved else torch.promote_types(tensor.dtype, dtype))


# Files ----------------------------------------------------------------------------------------------------------------


def _write(model: nn.Module, folder: Path, facts: Mapping[str, Any], extra: Mapping[str, Tensor]) -> None:
    tensors = {**_tensors_of(model), **extra}
    shrinks = [
        {
            "plan": mask.plan.to_json(),
            "fingerprint": mask.plan.fingerprint(),
            "norm": mask.norm,
            "asked": dict(mask.asked),
            "kept": {name: kept.nonzero()[:, 0].tolist() for name, kept in mask.keep.items()},
        }
        for mask in shrinks_of(model)
    ]
    masks, about = written(blocks_of(model))
    tensors |= masks
    files.write_tensors(folder / _TENSORS, tensors)
    body = {"format": 1, **facts, **about, "shrinks": shrinks, "sha256": files.checksum(folder / _TENSORS)}
    files.write_json(folder / _FACTS, {**body, "digest": _digest(body)})


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts = files.read_json(folder / _FACTS)
    if not isinstance(facts, dict) or facts.get("format") != 1:
        raise EbdiffError(f"{folder / _FACTS}", expected="format 1", got="something else", remedy="save it again")
    recorded = facts.pop("digest", None)
    if recorded != _digest(facts):
        raise EbdiffError(
            f"{folder / _FACTS} was edited",
            expected=str(recorded),
            got=_digest(facts),
            remedy="restore it or save again",
        )
    tensors, _ = files.read_tensors(folder / _TENSORS)
    if files.checksum(folder / _TENSORS) != facts.get("sha256"):
        raise EbdiffError(
            f"{folder / _TENSORS} was edited or belongs to another save",
            expected=f"sha256 {str(facts.get('sha256'))[:16]}",
            got=files.checksum(folder / _TENSORS)[:16],
            remedy="restore both files from the same save",
        )
    return facts, tensors


def _digest(facts: Mapping[str, Any]) -> str:
    return files.digest(facts)[:16]


def _shrinks_from(facts: Mapping[str, Any]) -> list[ChannelMask]:
    masks = []
    for record in facts["shrinks"]:
        plan = ChannelPlan.from_json(record["plan"])
        if plan.fingerprint() != record["fingerprint"]:
            raise EbdiffError(
                "edited channel plan", expected=record["fingerprint"], got=plan.fingerprint(), remedy="restore the file"
            )
        keep = {}
        for name, indices in record["kept"].items():
            keep[name] = torch.zeros(plan[name].size, dtype=torch.bool)
            keep[name][indices] = True
        masks.append(ChannelMask(plan, keep, record["norm"], record["asked"]))
    return masks


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_others(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Names and shapes must be exactly the expected ones."""
    for name in {**expected, **found}:
        shapes = [tuple(each[name].shape) if name in each else "absent" for each in (expected, found)]
        if shapes[0] != shapes[1]:
            raise EbdiffError(
                f"{what} does not fit its class and its cuts: {name}",
                expected=str(shapes[0]),
                got=str(shapes[1]),
                remedy="save a network to which nothing was added since it was shrunken, or keep its state_dict",
            )


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give every parameter and buffer its saved value; names and shapes must be exactly the model's."""
    expected = _tensors_of(model)
    _refuse_others(tensors, expected, str(folder / _TENSORS))
    for name, tensor in expected.items():
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        if name in dict(module.named_parameters(recurse=False)) or isinstance(tensor, nn.Parameter):
            module._parameters[child] = nn.Parameter(tensors[name], requires_grad=tensor.requires_grad)
        else:
            module._buffers[child] = tensors[name]
