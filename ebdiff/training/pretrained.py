"""The weights of a trained network as the first weights of a run. Never out of a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import EbdiffError
from ..files import checksum, digest, read_json

__all__ = ["fingerprint", "refuse_other_architecture", "refuse_pipeline", "take_weights"]

_FREE = ("sample_size", "dropout")  # of the same weights they may differ
_WEIGHTS = "*.safetensors"
_REMEDY = "name a folder that save_pretrained of a dense network wrote; of a pipeline its unet or transformer"


def refuse_other_architecture(network: Any, folder: Path) -> None:
    """Compare what a folder holds with a network of diffusers, by its config; weights are not read.

    Raises:
        EbdiffError: no saved network, none of this class, an argument with another value, or weights only as pickle.
    """
    file, kind = folder / "config.json", type(network)
    config = read_json(file) if file.is_file() else None
    if not isinstance(config, dict) or "_class_name" not in config:
        raise EbdiffError("no pretrained network", expected=str(file), got="none", remedy=_REMEDY)
    if config["_class_name"] != kind.__name__:
        found = str(config["_class_name"])
        raise EbdiffError(f"the pretrained network in {folder}", expected=kind.__name__, got=found, remedy=_REMEDY)
    with torch.device("meta"):
        theirs = dict(kind.from_config(config).config)
    for name, ours in dict(network.config).items():
        if not name.startswith("_") and name not in _FREE and _plain(ours) != _plain(theirs.get(name)):
            raise EbdiffError(
                f"the pretrained network in {folder} has another architecture",
                expected=f"model.{name}={ours}",
                got=str(theirs.get(name)),
                remedy="give `model` its arguments",
            )
    if not any(folder.glob(_WEIGHTS)):
        present = ", ".join(sorted(path.name for path in folder.iterdir() if path != file)) or "none"
        remedy = "load it where you trust it, and save it again with safe_serialization=True"
        raise EbdiffError(f"weights in {folder}", expected="safetensors, no pickle", got=present, remedy=remedy)


def refuse_pipeline(folder: Path) -> None:
    """Refuse a folder that holds networks, and is none itself.

    Raises:
        EbdiffError: a pipeline of diffusers; names the subfolder of its network.
    """
    alone = any((folder / name).exists() for name in ("config.json", "ebdiff.json"))
    if (folder / "model_index.json").is_file() and not alone:
        names = [name for name in ("unet", "transformer") if (folder / name).is_dir()] or ["unet or transformer"]
        raise EbdiffError(f"{folder} is a pipeline, not a network", remedy=f"pass its subfolder {names[0]}")


def take_weights(network: Any, folder: Path) -> None:
    """Give a network, in place, the weights that a folder holds.

    Raises:
        EbdiffError: they cannot be read, or are of another architecture; see `refuse_other_architecture`.
    """
    refuse_other_architecture(network, folder)
    try:
        theirs, about = type(network).from_pretrained(str(folder), use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EbdiffError(f"weights in {folder} cannot be loaded", got=reason, remedy="save them again") from None
    for kind in ("missing", "unexpected"):
        if about[f"{kind}_keys"]:
            raise EbdiffError(
                f"weights in {folder} do not fit",
                expected=f"those of a {type(network).__name__}",
                got=f"{kind}: {sorted(about[f'{kind}_keys'])[0]}",
                remedy="save them again",
            )
    network.load_state_dict(theirs.state_dict())


def fingerprint(folder: Path) -> str:
    """Of the weights in a folder: it changes when they do."""
    return digest({path.name: checksum(path) for path in sorted(folder.glob(_WEIGHTS))})


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
