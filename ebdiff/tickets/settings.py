"""What an EarlyBird watches and when it calls a mask settled, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal, Self, get_args

from ..errors import EbdiffError
from ..numbers import as_real, as_whole
from ..pruning.mask import NormMode, Scope
from ..timesteps.region import Partition, Region
from .attention import Attention
from .bits import BitHistory

__all__ = ["Criterion", "Key", "Pace", "Settings", "parts_of", "refuse_other_settings"]

Criterion = Literal["magnitude", "magnitude-l1", "taylor", "random"]
Key = tuple[str, float, int | None]  # criterion, ratio, number of the region


@dataclass(frozen=True)
class Pace:
    """When masks are drawn and count as settled, of channels and of blocks of attention. See `EarlyBird`."""

    window: int
    every: int
    eta: float
    corrected: bool
    fifo: int
    regions: Partition | None

    @classmethod
    def of(
        cls,
        window: int = 1000,
        every: int | None = None,
        eta: float | None = None,
        corrected: bool = False,
        fifo: int = 5,
        regions: Partition | None = None,
    ) -> Self:
        """With what follows from the rest where it is None."""
        every = max(1, (as_whole(window) or 0) // 20) if every is None else every
        return cls(window, every, (0.2 if corrected else 0.1) if eta is None else eta, corrected, fifo, regions)

    def __post_init__(self) -> None:
        self._check_least(window=1, every=1, fifo=2)
        eta = as_real(self.eta)
        if eta is None or not eta > 0:
            raise EbdiffError("eta", expected="a distance > 0", got=repr(self.eta), remedy="the paper's is 0.1")
        object.__setattr__(self, "eta", eta)

    def _check_least(self, **least: int) -> None:
        for name, bound in least.items():
            value = as_whole(getattr(self, name))
            if value is None or value < bound:
                got = repr(getattr(self, name))
                raise EbdiffError(name, expected=f"a whole number, at least {bound}", got=got, remedy="see EarlyBird")
            object.__setattr__(self, name, value)

    @property
    def parts(self) -> int:
        """How many sets of scores are kept apart: one per region."""
        return len(self.regions) if self.regions is not None else 1

    @property
    def fading(self) -> float:
        """Steps after which a sample weighs 1/e: short against the window, or the average would settle by itself."""
        return self.window / 2

    @property
    def masks_kept(self) -> int:
        """How many masks a history needs so that the window fits; more where that is few, for the picture."""
        return max(64, ceil(self.window / self.every) + self.fifo)

    def settled(self, history: BitHistory) -> bool:
        """Has the newest mask of this history settled?"""
        return history.settled(self.window, eta=self.eta, fifo=self.fifo, corrected=self.corrected)

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
        number = as_whole(region)
        if number is not None and 0 <= number < len(regions):
            return number
        known = (
            f"0 to {len(regions) - 1} or one of {self.regions}"
            if regions
            else "None: regions=Partition(...) was not given"
        )
        raise EbdiffError("region", expected=known, got=str(region), remedy="number regions in ascending t")

    def part_of(self, region: int | Region | None) -> int:
        """The number of the set of scores that a step belongs to.

        Raises:
            EbdiffError: there are regions, and it was not said which.
        """
        number = self.number_of(region)
        if number is None and self.regions is not None:
            raise EbdiffError(
                "step() of a search by region",
                expected="the number of the region this step's timesteps came from",
                got="None",
                remedy="draw each batch's timesteps from one region and pass it: watch.step(report.region)",
            )
        return number or 0


@dataclass(frozen=True)
class Settings(Pace):
    """See `EarlyBird`."""

    ratios: tuple[float, ...]
    criteria: tuple[str, ...]
    region_ratios: tuple[float, ...] | None
    norm: NormMode
    multiple_of: int
    scope: Scope
    taylor_every: int
    seed: int
    attention: Attention | None = None

    def __post_init__(self) -> None:
        self._check_lists()
        super().__post_init__()
        self._check_least(taylor_every=1)
        if self.regions is not None and not isinstance(self.regions, Partition):
            raise EbdiffError(
                "regions", expected="a Partition", got=repr(self.regions), remedy="Partition(0, 240, 440, 1000)"
            )
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
        for name in ("ratios", "region_ratios"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, tuple(map(_ratio, given)))
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

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**listed, "regions": None if self.regions is None else self.regions.to_json()}


def _ratio(value: Any) -> float:
    found = as_real(value)
    if found is None or not 0 <= found < 1:
        raise EbdiffError("ratio", expected="a share removed in [0, 1)", got=repr(value), remedy="e.g. 0.6")
    return found


def parts_of(state: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The tensors and the facts of a saved state.

    Raises:
        EbdiffError: it is none.
    """
    tensors, facts = (state.get(name) if isinstance(state, Mapping) else None for name in ("tensors", "facts"))
    if isinstance(tensors, Mapping) and isinstance(facts, Mapping) and isinstance(facts.get("settings", {}), Mapping):
        return tensors, facts
    got = ", ".join(map(str, state)) or "nothing" if isinstance(state, Mapping) else type(state).__name__
    raise EbdiffError("no state of a search", expected="tensors and facts", got=got, remedy="pass state_dict()'s")


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
