"""One model(x, t) out of several networks, each of which serves its own region of timesteps.

diffusers writes the module and the name of a class into users' files, so the router is `ebdiff.TimestepRouter` there,
wherever this file lives, and a pipeline that holds one loads after `import ebdiff`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor, nn

import ebdiff

from ..errors import EbdiffError
from ..files import read_object, write_bytes
from .folders import from_folder, model_class

__all__ = ["TimestepRouter"]


class TimestepRouter(UNet2DModel):  # type: ignore[misc]
    """Sends every sample to the network of its timestep's region: `networks[i]` serves `partition[i]`, in ascending t.

    It stands wherever one of its networks would: as `unet` or `transformer` of a pipeline, in a training loop. A scalar
    t, or a batch of t from one region, calls one network with exactly the arguments that came; a mixed batch calls each
    network once with its own samples. Then every tensor whose first dimension is the batch is divided with the samples,
    those inside dicts, lists and tuples too. Choosing a network needs t's value, so a t on the GPU is waited for; the
    schedulers of DDPM and DDIM keep theirs on the CPU.

    It is a ModelMixin and ConfigMixin; it derives from UNet2DModel only because DDPMPipeline and DDIMPipeline log a
    complaint about any other class. Its `config` holds what the configs of its networks agree on (pipelines read
    sample_size, in_channels, ...), besides `partition` and `timestep_scale`.

    Args:
        partition: the regions, or their bounds, for example [0, 240, 440, 1000].
        networks: one per region, lowest noise first; any modules that share one call signature.
        timestep_scale: what t has to be multiplied with to lie in [0, T): 1000 for Flux, which is given t / 1000.

    Raises:
        EbdiffError: unless there is one module per region, their configs agree on the shape of input and output, and
            the scale is positive; when called, for a t outside [0, T). Of continuous (floating-point) t, T itself
            counts to the last region.
    """

    __module__ = "ebdiff"
    config: Any

    def __init__(
        self,
        partition: ebdiff.Partition | Sequence[int],
        networks: Sequence[nn.Module],
        *,
        timestep_scale: float = 1,
    ) -> None:
        ModelMixin.__init__(self)
        if not isinstance(partition, ebdiff.Partition):
            partition = ebdiff.Partition.from_json(partition)
        if len(networks) != len(partition) or not all(isinstance(net, nn.Module) for net in networks):
            raise EbdiffError(
                "a router needs one network per region",
                expected=f"{len(partition)} modules for {partition}",
                got=f"{len(networks)} of {', '.join(sorted({type(net).__name__ for net in networks})) or 'nothing'}",
                remedy="list the networks in ascending t",
            )
        if not isinstance(timestep_scale, int | float) or not 0 < timestep_scale < float("inf"):
            got, remedy = repr(timestep_scale), "1, or 1000 where t is t / 1000"
            raise EbdiffError("timestep_scale", expected="a number > 0", got=got, remedy=remedy)
        self.partition = partition
        self.timestep_scale = timestep_scale
        self.nets: Any = nn.ModuleList(networks)
        self.register_to_config(
            **{**_shared_config(networks), "partition": partition.to_json(), "timestep_scale": timestep_scale}
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the networks return for these arguments; the timestep is `timestep=` or the second of them.

        t may be a number, a 0-d tensor, or one per sample: [B].
        """
        if "timestep" not in kwargs and len(args) < 2:
            raise EbdiffError("no timestep", expected="model(x, t) or timestep=", got="neither", remedy="pass one")
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        numbers = self._regions(t) or [0]
        if len(set(numbers)) == 1:
            return self.nets[numbers[0]](*args, **kwargs)
        batch = next(
            v.shape[0] for v in (*args, *kwargs.values(), t) if isinstance(v, Tensor) and v.dim() and v is not t
        )
        if t.dim() != 1 or len(t) != batch:
            raise EbdiffError(
                "timesteps of several regions do not fit the batch",
                expected=f"t of shape [{batch}]",
                got=str(list(t.shape)),
                remedy="pass one t per sample",
            )
        outputs, order = [], []
        for number in sorted(set(numbers)):
            rows = [row for row, other in enumerate(numbers) if other == number]
            index = torch.tensor(rows)
            outputs.append(self.nets[number](*_rows(args, index, batch), **_rows(kwargs, index, batch)))
            order += rows
        return _joined(outputs, torch.tensor(order).argsort())

    def _regions(self, t: float | Tensor) -> list[int]:
        """The region number of every element of t."""
        if isinstance(t, Tensor):
            values: list[float] = t.reshape(-1).tolist()
            roundoff = torch.finfo(t.dtype).eps / 2 if t.is_floating_point() else 0.0
        else:
            values, roundoff = [t], 0.0 if hasattr(t, "__index__") else 2.0**-53
        return [self._region(value * self.timestep_scale, roundoff) for value in values]

    def _region(self, t: float, roundoff: float) -> int:
        """The number of the region that holds t, which its dtype may have rounded.

        t / 1000 in float32 or bfloat16 is often a little less than the boundary it stands for, or T itself.
        """
        top = self.partition.T
        if roundoff and t <= top * (1 + roundoff):
            t = min(t * (1 + 1.02 * roundoff), top - 1)
        return self.partition.index(t)

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """diffusers' cache_context of every network that has one: which of them is called is known only later."""
        with ExitStack() as stack:
            for net in self.nets:
                if hasattr(net, "cache_context"):
                    stack.enter_context(net.cache_context(name, **where))
            yield

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Pipelines call this between images, on models that have it."""
        for net in self.nets:
            if hasattr(net, "_reset_stateful_cache"):
                net._reset_stateful_cache(recurse=recurse)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write each network into a subfolder net0, net1, ... by its own save_pretrained, and last the router's config.

        Raises:
            EbdiffError: before anything is written, when a network is no diffusers model, or pickles were asked for.
        """
        if not safe_serialization:
            raise EbdiffError(
                "a router is never pickled", expected="safe_serialization=True", got="False", remedy="leave it out"
            )
        for net in self.nets:
            _class_named(type(getattr(net, "_orig_mod", net)).__name__)
        if not is_main_process:
            return
        config_file = Path(save_directory, self.config_name)
        config_file.unlink(missing_ok=True)  # so that a folder half written is no router
        for number, net in enumerate(self.nets):
            options = {"variant": variant, "max_shard_size": max_shard_size}
            net.save_pretrained(str(config_file.with_name(f"net{number}")), **_accepted(net.save_pretrained, options))
        write_bytes(config_file, self.to_json_string().encode())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "", **options: Any
    ) -> TimestepRouter:
        """The router that `save_pretrained` wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder; of a router on the Hub, the one that
                `huggingface_hub.snapshot_download` returns.
            subfolder: the folder inside it, as a pipeline's "unet".
            options: torch_dtype, device_map, variant, ...: for the networks' own from_pretrained. With
                torch_dtype="auto" every tensor has the dtype that it was saved in.

        Raises:
            EbdiffError: when there is no whole router in the folder.
        """
        folder = Path(pretrained_model_name_or_path, subfolder)
        config = read_object(folder / cls.config_name)
        if config.get("_class_name") != cls.__name__ or "partition" not in config:
            raise EbdiffError(
                f"{folder} holds no router",
                expected=f"_class_name {cls.__name__} and a partition",
                got=str(config.get("_class_name")),
                remedy="pass the folder that save_pretrained wrote",
            )
        partition, networks = ebdiff.Partition.from_json(config["partition"]), []
        for number in range(len(partition)):
            home = folder / f"net{number}"
            kind = _class_named(read_object(home / cls.config_name).get("_class_name"))
            networks.append(_aligned(from_folder(kind, home, **options)))
        router = cls(partition, networks, timestep_scale=config.get("timestep_scale", 1))
        router.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return router.eval()  # type: ignore[no-any-return]


def _shared_config(networks: Sequence[Any]) -> dict[str, Any]:
    """The entries that the configs of all diffusers models among the networks have in common."""
    configs = [net.config for net in networks if isinstance(getattr(net, "config", None), Mapping)]
    for key in ("sample_size", "in_channels", "out_channels"):
        values = {str(config[key]) for config in configs if key in config}
        if len(values) > 1:
            raise EbdiffError(
                f"the networks' {key} differ",
                expected="one",
                got=", ".join(sorted(values)),
                remedy="route alike networks",
            )
    first, *others = configs or [{}]
    return {
        key: value
        for key, value in first.items()
        if not key.startswith("_") and all(key in other and other[key] == value for other in others)
    }


def _class_named(name: Any) -> Any:
    """The diffusers model class, or ebdiff's own, of this name: the only ones that a config may name."""
    ours = str(name).startswith("Shrunk") or name == "TimestepRouter"
    found: Any = None
    with suppress(AttributeError):
        found = getattr(ebdiff, str(name)) if ours else model_class(str(name))
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise EbdiffError(
            f"{name} can neither be saved nor loaded by a router",
            expected="a diffusers model or a shrunken one",
            got=str(name),
            remedy="such networks route all the same; save each yourself and build the router anew",
        )
    return found


def _aligned(net: nn.Module) -> nn.Module:
    """The network with its weights where torch's own allocations lie: at multiples of 64 bytes.

    Memory-mapped ones begin anywhere, and there CPU convolutions round differently in the last bit (torch 2.13).
    """
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return net


def _accepted(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the function takes."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def _rows(value: Any, index: Tensor, batch: int) -> Any:
    """The samples numbered `index` of every tensor in `value` whose first dimension is the batch."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value.index_select(0, index.to(value.device))
    if isinstance(value, dict):
        return {key: _rows(each, index, batch) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_rows(each, index, batch) for each in value])
    return value


def _joined(parts: Sequence[Any], inverse: Tensor) -> Any:
    """One output, of the type of the parts, with the samples back in the batch's order."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)).index_select(0, inverse.to(first.device))
    if isinstance(first, Mapping):
        return type(first)(**{key: _joined([part[key] for part in parts], inverse) for key in first})
    if isinstance(first, list | tuple):
        return type(first)([_joined(each, inverse) for each in zip(*parts, strict=True)])
    return first
