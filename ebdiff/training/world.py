"""What all stages of a run share, built from its configuration: images, network, plan, schedule, regions.

Everything is checked here before the first step; nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import Images, Latents, decode, load_images, load_latents, load_vae, to_model, to_uint8
from ..errors import EbdiffError
from ..evaluation import FeatureExtractor, extractor_for
from ..evaluation.metrics import HeldOut, refuse_too_few
from ..pruning.mask import ChannelMask
from ..pruning.plan import ChannelPlan
from ..pruning.trace import trace
from ..tickets.budget import split_budget
from ..timesteps.named import sampler_named
from ..timesteps.profile import NoiseProfile
from ..timesteps.region import Partition, Region
from ..timesteps.sampler import Sampler, Stratified, Within
from .attended import check_attention
from .conditions import Conditions, call_of
from .network import build, check_call, in_channels, in_tokens
from .pretrained import refuse_other_architecture, take_weights
from .seen import check_seen
from .told import check_vae, classes_of, conditions_of, made_up

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
                no extractor for the images, too few held-out images for it, a pretrained network of another
                architecture, ratios or MACs that no ticket can have, attention to watch where there is none, a search
                too short to see every region.
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
        if images and isinstance(self.data, Latents):
            check_vae(self.vae, self.data)
        check_call(self._meta, *self._example("meta"))
        if self.pretrained is not None:
            refuse_other_architecture(self._meta, self.pretrained)
            _ = images and self.network()
        if search.macs is not None:
            scores, sizes = [self._example_scores] * count, [len(region) for region in self.partition]
            split_budget(self.plan, scores, sizes, search.macs, **search.how)
        if search.attention is not None:
            check_attention(self._meta, *self._example("meta"), search.attention)
        _ = self.example_masks, self.device, [Within(region, self.sampler).weights() for region in self.partition]
        check_seen(search, self.partition, self.sampler, self.config.seed)
        shape = tuple(self.data.train.shape[1:]) if images else self.image_shape
        if shape != self.image_shape:
            raise EbdiffError(
                f"images of {self.data.name} do not fit the model",
                expected=f"{self.image_shape} (model.in_channels, sample_size)",
                got=str(shape),
                remedy="set data.size and data.channels, or the model's",
            )
        _ = images and (self.conditions, self.held_out_conditions, self.extractor)

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
            **self._schedule(),
            timestep_spacing=self.config.sample.spacing,
            set_alpha_to_one=True,
            clip_sample=self.config.data.vae is None,  # images lie in [-1, 1], latents anywhere
        )
        scheduler.set_timesteps(self.config.sample.steps)
        return scheduler

    def _schedule(self) -> dict[str, Any]:
        schedule = self.config.schedule.model_dump()
        return {"num_train_timesteps": schedule.pop("timesteps"), **schedule}

    @cached_property
    def data(self) -> Images | Latents:
        """The images, in memory, or their latents."""
        d = self.config.data
        if d.vae is not None:
            return load_latents(d.source.removeprefix("latents:"), d.limit)
        return load_images(d.source, size=d.size, channels=d.channels, limit=d.limit)

    @cached_property
    def vae(self) -> Any:
        """What decodes latents."""
        return load_vae(str(self.config.data.vae)).to(self.device)

    def to_images(self, x: Tensor) -> Tensor:
        """What was drawn, float [N, C, H, W], as uint8 images."""
        if isinstance(self.data, Latents):
            return decode(x, self.vae, self.data.scaling, self.data.shift)
        return to_uint8(x.cpu())

    @cached_property
    def held_out(self) -> HeldOut:
        """The images that scores refer to."""
        if isinstance(self.data, Images):
            return self.data
        if self.data.pictures is None:
            raise EbdiffError(
                f"{self.data.name} has no images to compare with",
                expected="pictures_test, uint8 [M, C, H, W]",
                remedy="make it with `ebdiff encode`, or set evaluate.extractor=none",
            )
        return Images(self.data.pictures, self.data.pictures, self.data.source)

    @cached_property
    def conditions(self) -> Conditions:
        """What the network is told about each training image."""
        return self._conditions(held_out=False)

    @cached_property
    def held_out_conditions(self) -> Conditions:
        """The same about each held-out image."""
        return self._conditions(held_out=True)

    def _conditions(self, held_out: bool) -> Conditions:
        c = self.config.conditional
        if c is None:
            return Conditions()  # without, data are not read
        return conditions_of(c, self.data, held_out, in_tokens(self.config.model))

    def made_up_conditions(self, count: int) -> Conditions:
        """What the network is told about so many images that there are not; data are read for captions alone."""
        c = self.config.conditional
        if c is None or c.by == "embeddings":
            some = {key: rows[torch.arange(count) % len(rows)] for key, rows in self.conditions.rows.items()}
            return replace(self.conditions, rows=some)
        return made_up(c, self.classes, count, in_tokens(self.config.model))

    @cached_property
    def classes(self) -> int:
        """How many labels the networks are told; 0 where they are told none."""
        return classes_of(self.config.conditional, lambda: self.data)

    def told_about(self, numbers: Tensor) -> dict[str, Tensor]:
        """What the network is told about the held-out images of these numbers, int64 [N]."""
        return self.held_out_conditions.of(numbers, to_model(self.data.test[numbers]))

    @property
    def guidance(self) -> float:
        """How images are drawn: u + guidance (c - u); see `ebdiff.training.conditions.guided`."""
        return self.config.conditional.guidance if self.config.conditional else 1.0

    @cached_property
    def extractor(self) -> FeatureExtractor | None:
        """What scores look at; None where the configuration says "none"."""
        wanted = self.config.evaluate.extractor
        if wanted == "none":
            return None
        refuse_too_few(len(self.held_out.test), "held-out images")
        name = self.data.source if isinstance(self.data, Latents) else self.data.name
        return extractor_for(wanted, name, self.held_out.test.shape[1:])

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        net, channels = self._meta.config, in_channels(self.config.model)
        made = getattr(net, "out_channels", None) or channels
        size = getattr(net, "sample_size", None)
        sides = size if isinstance(size, list | tuple) else (size, size)
        if made != channels or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise EbdiffError(
                "the network does not predict images",
                expected=f"model.sample_size, and model.out_channels={channels}, those of an image",
                got=f"sample_size {size}, out_channels {made}",
                remedy="correct `model`",
            )
        return channels, sides[0], sides[1]

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
        network = self.new_network(self.config.seed)
        if self.pretrained is not None:
            take_weights(network, self.pretrained)
        return network

    @property
    def pretrained(self) -> Path | None:
        """The folder that the first weights come from; None where they are random."""
        return None if self.config.pretrained is None else Path(self.config.pretrained)

    def new_network(self, seed: int) -> Any:
        """A dense network with random weights of this seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self._build()

    def _build(self) -> Any:
        return build(
            self.config.model, self.config.conditional.by if self.config.conditional else None, self._told_size
        )

    @cached_property
    def _told_size(self) -> int:
        """How many classes, numbers per token or channels the network is told."""
        by = self.config.conditional.by if self.config.conditional else None
        if by == "embeddings":
            return int(self.conditions.nothing["encoder_hidden_states"].shape[-1])
        return self.classes if by == "labels" else in_channels(self.config.model)

    @cached_property
    def _meta(self) -> Any:
        _ = self._told_size  # reads data, which are real
        with torch.device("meta"):
            return self._build().to("meta")  # tables out of numpy are on the CPU

    @cached_property
    def plan(self) -> ChannelPlan:
        """The prunable axes of the dense network, traced without memory or compute."""
        return self.trace(self._meta)

    def trace(self, network: nn.Module) -> ChannelPlan:
        """The plan of a network of this run, which is called as network(x, t) with what it is told."""
        x, t, told = self._example(next(network.parameters()).device)
        x, keywords = call_of(x, told)
        return trace(network, x, t, **keywords)

    def _example(self, place: torch.device | str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """An image, its timestep, and what is told about it, on that device."""
        x, first = torch.zeros(1, *self.image_shape), torch.zeros(1, dtype=torch.int64)
        told = self.made_up_conditions(1).of(first, x)
        return x.to(place), first.to(place), {key: rows.to(place) for key, rows in told.items()}

    @cached_property
    def _example_scores(self) -> dict[str, Tensor]:
        return {space.name: torch.linspace(1, 0.5, space.size) for space in self.plan}

    @cached_property
    def example_masks(self) -> list[ChannelMask]:
        """For each region a mask as wide as its ticket will be: widths do not depend on the scores.

        With ratios "auto" each has the mean share of MACs, since their split is known only after the search.
        """
        s = self.config.search
        draw = partial(ChannelMask.draw, self._example_scores, plan=self.plan, **s.how)
        if isinstance(s.ratios, str):
            return [draw(macs=s.macs)] * len(self.partition)
        return [draw(ratio=ratio) for ratio in s.ratios]
