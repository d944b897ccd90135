"""What all stages of a run share, built from its configuration: images, network, plan, schedule, regions.

Everything is checked here before the first step; nothing is written.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..data import Images, load_images
from ..errors import EbdiffError
from ..evaluation import FeatureExtractor, extractor_for
from ..pruning.mask import ChannelMask
from ..pruning.plan import ChannelPlan
from ..pruning.trace import trace
from ..timesteps.named import sampler_named
from ..timesteps.profile import NoiseProfile
from ..timesteps.region import Partition, Region
from ..timesteps.sampler import Sampler, Stratified, Within

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """The things a configuration describes, each made when first asked for.

    Args:
        config: the configuration.
        out: the folder of the run.
    """

    config: Config
    out: Path

    def check(self, images: bool = True) -> None:
        """Refuse what cannot work, before anything is written.

        Args:
            images: read the images, too.

        Raises:
            EbdiffError: regions that do not tile the schedule or that the sampler never draws, numbers of ratios or
                steps that differ from the number of regions, unknown model arguments, images that do not fit the model,
                no extractor for the images.
        """
        search, count = self.config.search, len(self.partition)
        lists = {"regions.steps": self.config.regions.steps, "search.ratios": search.ratios}
        for key, values in lists.items():
            if isinstance(values, list) and len(values) != count:
                raise EbdiffError(
                    f"configuration key {key}",
                    expected=f"one value for each of {self.partition}",
                    got=str(values),
                    remedy="list them in ascending t",
                )
        if self.config.regions.branch_at and search.norm == "balanced":
            raise EbdiffError(
                "regions.branch_at shrinks twice",
                expected="search.norm=ragged",
                got="balanced, whose groups would be dealt out twice",
                remedy="use ragged norms, or branch_at=0",
            )
        _ = self.plan, self.device, [Within(region, self.sampler).weights() for region in self.partition]
        shape = tuple(self.data.train.shape[1:]) if images else self.image_shape
        if shape != self.image_shape:
            raise EbdiffError(
                f"images of {self.data.name} do not fit the model",
                expected=f"{self.image_shape} (model.in_channels, sample_size)",
                got=str(shape),
                remedy="set data.size and data.channels, or the model's",
            )
        _ = images and self.extractor

    @cached_property
    def partition(self) -> Partition:
        """The regions; they tile the schedule."""
        bounds, T = self.config.regions.bounds, self.config.schedule.timesteps
        pairs = all(isinstance(bound, list | tuple) for bound in bounds)
        partition = Partition.of(bounds) if pairs else Partition(*bounds)  # type: ignore[arg-type]
        if partition.T != T:
            raise EbdiffError(
                "region outside the schedule" if partition.T > T else "the regions do not tile the schedule",
                expected=f"regions.bounds that end at schedule.timesteps, {T}",
                got=str(partition),
                remedy="change one of the two",
            )
        return partition

    def region_number(self, number: int) -> int:
        """`number` if there is such a region.

        Raises:
            EbdiffError: there is none.
        """
        if not 0 <= number < len(self.partition):
            last = len(self.partition) - 1
            raise EbdiffError("no such region", expected=f"0 to {last}", got=str(number), remedy=str(self.partition))
        return number

    def trained_region(self, number: int) -> Region:
        """The timesteps that region `number` trains on: its own and the overlap above."""
        return self.partition[number].widened(self.config.regions.overlap, self.partition.T)

    @cached_property
    def sampler(self) -> Sampler:
        """Timesteps of the whole schedule, as training draws them."""
        sampler = sampler_named(self.config.train.sampler, NoiseProfile.from_scheduler(self.scheduler))
        return Stratified(sampler) if self.config.train.stratified else sampler

    @cached_property
    def scheduler(self) -> Any:
        """A diffusers DDPMScheduler: noise and prediction type."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(**self._schedule())

    def sampling_scheduler(self) -> Any:
        """A new DDIMScheduler of the same schedule, which visits `sample.steps` timesteps."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            **self._schedule(), timestep_spacing=self.config.sample.spacing, set_alpha_to_one=True
        )
        scheduler.set_timesteps(self.config.sample.steps)
        return scheduler

    def _schedule(self) -> dict[str, Any]:
        schedule = self.config.schedule.model_dump()
        return {"num_train_timesteps": schedule.pop("timesteps"), **schedule}

    @cached_property
    def data(self) -> Images:
        """The images, in memory."""
        d = self.config.data
        return load_images(d.source, size=d.size, channels=d.channels, limit=d.limit)

    @cached_property
    def extractor(self) -> FeatureExtractor | None:
        """What scores look at; None where the configuration says "none"."""
        return extractor_for(self.config.evaluate.extractor, self.data.name)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        net = self._meta.config
        size = net.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return int(net.in_channels), int(height), int(width)

    @cached_property
    def device(self) -> torch.device:
        """Where training runs."""
        name = self.config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise EbdiffError(
                "no such device", expected="one that torch has", got=reason, remedy="device=auto"
            ) from None
        return torch.device(name)

    def network(self) -> Any:
        """The dense network as it is before the first step: the same for search and control."""
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            return self._build()

    def _build(self) -> Any:
        from diffusers import UNet2DModel

        known = [name for name in inspect.signature(UNet2DModel.__init__).parameters if name != "self"]
        for name in self.config.model:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1, 0.5)
                raise EbdiffError(
                    "unknown configuration key",
                    expected="an argument of diffusers' UNet2DModel",
                    got=f"model.{name}",
                    remedy=f"did you mean model.{close[0]}?" if close else f"known: {', '.join(known)}",
                )
        try:
            return UNet2DModel(**self.config.model)
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())
            raise EbdiffError("UNet2DModel refuses its arguments", got=reason, remedy="correct `model`") from None

    @cached_property
    def _meta(self) -> Any:
        with torch.device("meta"):
            return self._build()

    @cached_property
    def plan(self) -> ChannelPlan:
        """The prunable axes of the dense network, traced without memory or compute."""
        return trace_network(self.network(), self.image_shape)

    def example_masks(self) -> list[ChannelMask]:
        """For each region a mask as wide as its ticket will be: widths do not depend on the scores.

        With ratios "auto" each has the mean share of MACs, since their split is known only after the search.
        """
        s = self.config.search
        count = len(self.partition)
        wanted = [{"macs": s.macs}] * count if isinstance(s.ratios, str) else [{"ratio": r} for r in s.ratios]
        scores = {space.name: torch.linspace(1, 0.5, space.size) for space in self.plan}
        return [
            ChannelMask.draw(scores, plan=self.plan, norm=s.norm, multiple_of=s.multiple_of, **share)
            for share in wanted
        ]


def trace_network(network: nn.Module, image_shape: tuple[int, int, int]) -> ChannelPlan:
    """The plan of a network that is called as network(x, t)."""
    return trace(network, torch.zeros(1, *image_shape), torch.zeros(1, dtype=torch.int64))
