"""What an EarlyBird watches and when it calls a mask settled, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal, get_args

from ..errors import EbdiffError
from ..pruning.mask import NormMode
from ..timesteps.region import Partition, Region

__all__ = ["Criterion", "Key", "Settings", "refuse_other_settings"]

Criterion = Literal["magnitude", "magnitude-l1", "taylor", "random"]
Key = tuple[str, float, int | None]  # criterion, ratio, number of the region


@dataclass(frozen=True)
class Settings:
    """See `EarlyBird`."""

    ratios: tuple[float, ...]
    criteria: tuple[str, ...]
    window: int
    every: int
    eta: float
    corrected: bool
    fifo: int
    regions: Partition | None
    region_ratios: tuple[float, ...] | None
    norm: NormMode
    multiple_of: int
    taylor_every: int
    seed: int

    def __post_init__(self) -> None:
        self._check_lists()
        for name, least in (("window", 1), ("every", 1), ("fifo", 2), ("taylor_every", 1)):
            if getattr(self, name) < least:
                raise EbdiffError(
                    name, expected=f"at least {least}", got=str(getattr(self, name)), remedy="see EarlyBird"
                )
        if not self.eta > 0:
            raise EbdiffError("eta", expected="a distance > 0", got=str(self.eta), remedy="the paper's is 0.1")
        if self.region_ratios is not None and (self.regions is None or len(self.region_ratios) != len(self.regions)):
            raise EbdiffError(
                "region_ratios",
                expected="one per region of `regions`",
                got=f"{len(self.region_ratios)} for {len(self.regions or ())} regions",
                remedy="pass regions=Partition(...)",
            )

    def _check_lists(self) -> None:
        known = get_args(Criterion)
        for criterion in self.criteria:
            if criterion not in known:
                raise EbdiffError("criterion", expected=f"one of {known}", got=repr(criterion), remedy="choose one")
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise EbdiffError("ratio", expected="a share removed in [0, 1)", got=repr(ratio), remedy="e.g. 0.6")
        for name in ("criteria", "ratios"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise EbdiffError(
                    name, expected="at least one, all different", got=str(values), remedy="name each once"
                )

    @property
    def takes_gradients(self) -> bool:
        """Does some criterion read gradients?"""
        return "taylor" in self.criteria

    @property
    def parts(self) -> int:
        """How many sets of scores are kept apart: one per region."""
        return len(self.regions) if self.regions is not None else 1

    @property
    def fading(self) -> float:
        """Steps after which a gradient weighs 1/e: short against the window, or the average would settle by itself."""
        return self.window / 2

    @property
    def masks_kept(self) -> int:
        """How many masks a history needs so that the window fits; more where that is few, for the picture."""
        return max(64, ceil(self.window / self.every) + self.fifo)

    def is_regional(self, criterion: str) -> bool:
        """Do the scores by this criterion differ between regions?"""
        return criterion == "taylor" and self.regions is not None

    def watched(self) -> list[Key]:
        """Everything watched; magnitude and random once for all regions."""
        keys: list[Key] = []
        for criterion in self.criteria:
            if self.is_regional(criterion):
                own = [(ratio,) for ratio in self.region_ratios] if self.region_ratios else [self.ratios] * self.parts
                keys += [(criterion, ratio, region) for region, ratios in enumerate(own) for ratio in ratios]
            else:
                keys += [(criterion, ratio, None) for ratio in self.ratios]
        return keys

    def number_of(self, region: int | Region | None) -> int | None:
        """The number of a region of the partition.

        Raises:
            EbdiffError: no such region, or no partition.
        """
        if region is None:
            return None
        regions = list(self.regions or ())
        if isinstance(region, Region) and region in regions:
            return regions.index(region)
        if isinstance(region, int) and 0 <= region < len(regions):
            return region
        known = (
            f"0 to {len(regions) - 1} or one of {self.regions}"
            if regions
            else "None: regions=Partition(...) was not given"
        )
        raise EbdiffError("region", expected=known, got=str(region), remedy="number regions in ascending t")

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**listed, "regions": None if self.regions is None else self.regions.to_json()}


def refuse_other_settings(ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse to resume with settings other than the saved ones, naming the first that differs."""
    for name, value in ours.items():
        if saved.get(name) != value:
            raise EbdiffError(
                f"the saved early-bird search had another {name}",
                expected=str(value),
                got=str(saved.get(name)),
                remedy="resume with the settings it was started with, or start a new search",
            )
