"""What a run depends on, section by section.

Every number of steps is fixed here and costs that decide anything are MACs: no timing decides what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Conditional", "Config"]

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are refused, so are infinity and NaN; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which images; see `ebdiff.data.load_images`. "latents:FILE" is what `ebdiff encode` made, of images by the VAE
    in the folder `vae`, which decodes what is drawn."""

    source: str = "fashion16"
    size: int | None = Field(default=None, ge=1)
    channels: Literal[1, 3] | None = None
    limit: int | None = Field(default=None, ge=1)
    vae: str | None = None

    @model_validator(mode="after")
    def _latents(self) -> Data:
        latents = self.source.startswith("latents:")
        if latents != (self.vae is not None):
            raise ValueError("vae: the folder of the VAE, with source: latents:FILE and only with it")
        if latents and (self.size or self.channels):
            raise ValueError("size, channels: of images only; latents are as `ebdiff encode` made them")
        return self


class Conditional(Section):
    """What the network is told about each image, and how much more of it sampling wants (Ho & Salimans 2022).

    `by`: the label of the image; the embedding of its caption; or the image `factor` times smaller, for
    super-resolution. `classes`: how many labels there are; "auto" counts them, and 1 is for networks
    that must be told one: then every image has label 0, whatever the data say. `dropout`: share of the images in
    training about which it is told nothing. `guidance`: drawn by u + guidance (c - u), with c predicted when told and u
    when told nothing; 1 is without. Their defaults are 0.1 and 1.5, of low_res 0 and 1.
    """

    by: Literal["labels", "embeddings", "low_res"] = "labels"
    classes: int | Literal["auto"] = "auto"
    factor: int = Field(default=2, ge=2)
    dropout: float = Field(ge=0, lt=1)
    guidance: float = Field(ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        dropout, guidance = (0.0, 1.0) if values.get("by") == "low_res" else (0.1, 1.5)
        return {"dropout": dropout, "guidance": guidance, **values}

    @model_validator(mode="after")
    def _learned(self) -> Conditional:
        if self.guidance != 1 and not self.dropout:
            raise ValueError("guidance: 1 without dropout, since what is never trained when told nothing cannot guide")
        if self.classes != "auto" and self.classes < 1:
            raise ValueError(f'classes: at least 1, or "auto", got {self.classes}')
        return self


class Schedule(Section):
    """The noise: DDPM's schedule (Ho et al. 2020) by default."""

    timesteps: int = Field(default=1000, ge=2)
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"


class Train(Section):
    """What all training runs share: the search, every region and the dense control.

    `sampler`: how timesteps are drawn and weighted, one of `ebdiff.timesteps.SAMPLERS`, with settings of its own as
    in "speed(k=2)"; `stratified`: spread them evenly over each batch. `channels_last`, `accelerate`, `compile`: for
    speed; see `ebdiff.training.state.TrainConfig`.
    """

    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float | None = Field(default=1.0, gt=0)
    accumulate: int = Field(default=1, ge=1)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    precision: Literal["no", "bf16"] = "no"
    flip: bool = True
    sampler: str = "speed"
    stratified: bool = True
    channels_last: bool = False
    accelerate: bool = False
    compile: bool | Literal["reduce-overhead"] = False
    checkpoint_every: int = Field(default=1000, ge=1)
    log_every: int = Field(default=50, ge=1)

    @model_validator(mode="after")
    def _graphs(self) -> Train:
        if self.compile == "reduce-overhead" and self.accumulate > 1:
            raise ValueError("compile: reduce-overhead reuses the memory of gradients, so it needs accumulate: 1")
        return self


class Search(Section):
    """The dense run that tickets are drawn from; see `ebdiff.EarlyBird`.

    `steps`: with 0 masks are drawn from the network as it is before its first step, which has no gradients yet.
    `until`: with "settled" it ends as soon as every ticket has settled, after `steps` at the latest.
    `criterion`: "diff-pruning" (Fang et al. 2023) scores channels once, when the search ends, by the losses of one
    batch at about 100 timesteps of the schedule. `attention`: also watch the attention of 2048 tokens and more; tickets
    then keep this share of its blocks (see `ebdiff.tickets.attention.Attention`).
    `ratios` is the share of channels REMOVED per region; "auto" splits `macs`, the share of the dense MACs KEPT on
    average over all timesteps, by each region's predicted loss increase. `scope`: "cost" removes more where channels
    cost more, see `ebdiff.ChannelMask.draw`; ratios are then shares of all channels together.
    """

    steps: int = Field(ge=0)
    until: Literal["steps", "settled"] = "steps"
    ratios: list[float] | Literal["auto"] = [0.3, 0.6, 0.8]
    macs: float | None = Field(default=None, gt=0, lt=1)
    criterion: Literal["magnitude", "magnitude-l1", "taylor", "diff-pruning", "random"] = "taylor"
    window: int = Field(ge=1)
    every: int | None = Field(default=None, ge=1)
    eta: float | None = Field(default=None, gt=0)
    corrected: bool = False
    norm: Literal["ragged", "balanced"] = "ragged"
    multiple_of: int = Field(default=1, ge=1)
    scope: Literal["local", "cost"] = "local"
    attention: float | None = Field(default=None, gt=0, lt=1)

    @property
    def how(self) -> dict[str, Any]:
        """What masks are drawn with, beside scores and budget."""
        return {"norm": self.norm, "multiple_of": self.multiple_of, "scope": self.scope}

    @model_validator(mode="after")
    def _auto(self) -> Search:
        if (self.ratios == "auto") != (self.macs is not None):
            raise ValueError("ratios: auto goes with macs, the share of the dense MACs to keep; a list goes without")
        if self.ratios == "auto" and self.criterion != "taylor":
            raise ValueError("ratios: auto predicts the loss from gradients, so it needs criterion: taylor")
        if self.criterion == "taylor" and not self.steps:
            raise ValueError("criterion: taylor reads the gradients of training, so it needs steps of at least 1")
        if self.attention is not None and not self.steps:
            raise ValueError("attention: is watched while it trains, so it needs steps of at least 1")
        if self.criterion == "diff-pruning" and self.until == "settled":
            raise ValueError("until: steps with criterion: diff-pruning, which draws once, when the search ends")
        return self


class Regions(Section):
    """Which timesteps each ticket serves: bounds that tile the schedule, or a list of [lo, hi) pairs.

    `overlap`: so many more timesteps upward in training. `steps`: training steps of each region after the search; or
    one number for all, whose cost at equal shares is spent in proportion to what the sampler draws from each region.
    `branch_at`: first train one network, of the channels that any region keeps, for so many steps on all timesteps.
    `start`: the weights of each region's network. "search": those at the end of the search, with Adam's moments and the
    EMA. "initial": those before the first step, cut by the ticket. "fresh": drawn anew, at the widths of the ticket.
    `lr`: the learning rate of tickets, by default `train.lr`, which the search and the dense control keep.
    """

    bounds: list[int] | list[tuple[int, int]] = [0, 240, 440, 1000]
    overlap: int = Field(default=20, ge=0)
    steps: list[int] | int
    branch_at: int = Field(default=0, ge=0)
    start: Literal["search", "initial", "fresh"] = "search"
    lr: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _trained(self) -> Regions:
        steps = self.steps if isinstance(self.steps, list) else [self.steps]
        if not steps or min(steps) < 1:
            raise ValueError(f"steps: a whole number of at least 1 for each region, or one for all, got {self.steps}")
        if self.branch_at and self.start != "search":
            raise ValueError(f"branch_at: regions branch from what the search made, so not with start: {self.start}")
        return self


class Sample(Section):
    """DDIM (Song et al. 2021) without noise."""

    steps: int = Field(default=100, ge=1)
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    batch_size: int = Field(default=128, ge=1)
    grid: int = Field(default=64, ge=1)


class Evaluate(Section):
    """How both arms are judged.

    `control`: train the dense control; without it the tickets are judged alone.
    `marks`: at which shares of the regions' training both arms are compared at equal MACs; 0 is the end of the search,
    1 (always included) the end. `score_marks`: at which of them images are drawn and scored, too.
    `margin`: relative difference below which the report calls two scores equal.
    """

    marks: list[float] = [0.0, 0.5, 1.0]
    score_marks: list[float] = [1.0]
    samples: int = Field(default=50_000, ge=5)
    extractor: str = "auto"
    loss_bins: int = Field(default=20, ge=1)
    loss_per_bin: int = Field(default=256, ge=1)
    margin: float = Field(default=0.05, ge=0)
    control: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Evaluate:
        if any(not 0 <= mark <= 1 for mark in self.marks) or sorted(set(self.marks)) != self.marks:
            raise ValueError("marks: rising shares in [0, 1]")
        if 1.0 not in self.marks or 1.0 not in self.score_marks or not set(self.score_marks) <= set(self.marks):
            raise ValueError("marks and score_marks end with 1.0, and every score mark is one of the marks")
        return self


class Config(Section):
    """Everything a run depends on.

    `model`: the arguments of diffusers' UNet2DModel, or of the class of diffusers that `class` names;
    `in_channels` are the image's. `pretrained`: the folder of a dense network of this `model`, as its save_pretrained
    wrote it, whose weights are the first instead of random ones. `conditional`: none by default.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    model: dict[str, Any]
    pretrained: str | None = None
    data: Data = Data()
    conditional: Conditional | None = None
    schedule: Schedule = Schedule()
    train: Train = Train()
    search: Search
    regions: Regions
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _of_images(self) -> Config:
        if self.data.vae is not None and self.train.flip:
            raise ValueError("train.flip: false with latents, whose mirror is not the latent of the mirrored image")
        if self.data.vae is not None and self.conditional is not None and self.conditional.by == "low_res":
            raise ValueError("conditional.by: low_res is of images, not of latents")
        if self.sample.steps > self.schedule.timesteps:
            raise ValueError(f"sample.steps: at most schedule.timesteps, {self.schedule.timesteps}")
        if self.train.compile and self.search.attention is not None:
            raise ValueError("train.compile: false with search.attention, which cannot look into a compiled network")
        return self

    def to_yaml(self) -> str:
        """The whole configuration, defaults included."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
        return text
