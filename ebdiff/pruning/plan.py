"""What belongs together: channel spaces, and the plan that holds all of a model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EbdiffError

if TYPE_CHECKING:
    from .mask import ChannelMask

__all__ = ["Along", "ChannelPlan", "ChannelSpace", "Frozen", "Member", "ModuleSize", "Norm", "Terms"]

# A polynomial in kept sizes: each term is (coefficient, names of spaces), its value the coefficient times the product
# of those spaces' kept sizes.
Terms = tuple[tuple[float, tuple[str, ...]], ...]
Unit = Literal["channel", "head", "head_dim", "residual"]


@dataclass(frozen=True, slots=True)
class Member:
    """One slice of one parameter (or buffer) that follows a space.

    Channel c sits at positions ``offset + o * period + c * inner + i`` of dimension `dim`, for o < outer, i < inner:
    `offset` in a concatenation, `outer` and `inner` repeats in a product such as heads x head_dim.
    """

    parameter: str
    dim: int
    offset: int = 0
    outer: int = 1
    period: int = 0
    inner: int = 1

    def positions(self, size: int) -> Tensor:
        """int64 [outer, size, inner]: where the channels of a space of this size lie along the dimension."""
        outer, channel, inner = (torch.arange(n, device="cpu") for n in (self.outer, size, self.inner))
        return self.offset + outer[:, None, None] * self.period + channel[:, None] * self.inner + inner


@dataclass(frozen=True)
class ChannelSpace:
    """One prunable axis: `size` channels that every member slices by the same indices.

    `unit` is "channel", "head" (one index is a whole attention head), "head_dim" (one index is the same dimension of
    every one of several heads; pruned only on request) or "residual" (a stream that blocks add to and normalise, such
    as a transformer's width; pruned only on request).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    unit: Unit = "channel"


@dataclass(frozen=True)
class Frozen:
    """An axis that will not be pruned, and why."""

    name: str
    size: int
    reason: str


class Along(NamedTuple):
    """A dimension of what goes into or comes out of a module has the axis of dimension `axis` of a parameter."""

    dim: int
    parameter: str
    axis: int


@dataclass(frozen=True)
class Norm:
    """A module that takes statistics over channels that may be pruned; the law's statistics are over kept ones.

    Kind "group": a group normalisation, whose statistics depend on which channels share a group. Kind "statistics": any
    other module without children (LayerNorm, RMSNorm, a weight-normalised convolution), with the prunable dimensions of
    its only input and its output.
    """

    module: str
    group_sizes: tuple[int, ...] = ()
    kind: Literal["group", "statistics"] = "group"
    inputs: tuple[Along, ...] = ()
    outputs: tuple[Along, ...] = ()

    @property
    def weight(self) -> str:
        """The name of a group normalisation's weight."""
        return f"{self.module}.weight" if self.module else "weight"


@dataclass(frozen=True)
class ModuleSize:
    """An integer that a module keeps about an axis, such as the `channels` that diffusers' Downsample2D asserts."""

    module: str
    attribute: str
    terms: Terms


@dataclass(frozen=True)
class ChannelPlan:
    """Every prunable axis of a model, and what was frozen and why.

    Args:
        spaces: disjoint channel spaces.
        frozen: axes that stay whole, with reasons.
        shapes: shape of every parameter and buffer, by its first name.
        buffers: which of these names are buffers.
        aliases: further names of tied parameters -> first name.
        norms: the modules whose statistics follow the kept channels.
        cost: multiply-accumulates of one sample.
        sizes: integers that modules keep about their axes.
        transposed: weights of transposed convolutions, whose second dimension is what they make.
    """

    spaces: tuple[ChannelSpace, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[Norm, ...] = ()
    cost: Terms = ()
    sizes: tuple[ModuleSize, ...] = ()
    transposed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [space.name for space in self.spaces]
        if len(set(names)) < len(names):
            raise EbdiffError("channel plan", expected="distinct space names", got=str(sorted(names)), remedy="rename")
        for space in self.spaces:
            for member in space.members:
                self._check_fits(space, member)

    def _check_fits(self, space: ChannelSpace, member: Member) -> None:
        shape = self.shapes.get(member.parameter, ())
        end = member.offset + (member.outer - 1) * member.period + space.size * member.inner
        if member.dim >= len(shape) or end > shape[member.dim]:
            raise EbdiffError(
                f"channel space {space.name}",
                expected=f"{member} inside its parameter",
                got=f"shape {tuple(shape)}",
                remedy="trace the model again",
            )

    def __getitem__(self, name: str) -> ChannelSpace:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[ChannelSpace]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    @cached_property
    def group_norms(self) -> tuple[Norm, ...]:
        """The group normalisations met."""
        return tuple(norm for norm in self.norms if norm.kind == "group")

    @cached_property
    def _by_name(self) -> dict[str, ChannelSpace]:
        return {space.name: space for space in self.spaces}

    @cached_property
    def by_parameter(self) -> dict[str, dict[int, list[tuple[ChannelSpace, Member]]]]:
        """{parameter: {dim: [(space, member)]}}."""
        table: dict[str, dict[int, list[tuple[ChannelSpace, Member]]]] = {}
        for space in self.spaces:
            for member in space.members:
                table.setdefault(member.parameter, {}).setdefault(member.dim, []).append((space, member))
        return table

    def kept(self, keep: Mapping[str, Tensor], parameter: str) -> dict[int, Tensor]:
        """{dim: bool [size of dim], True = kept} for each dimension of a parameter that some space covers."""
        result = {}
        for dim, slices in self.by_parameter.get(parameter, {}).items():
            alive = torch.ones(self.shapes[parameter][dim], dtype=torch.bool, device="cpu")
            for space, member in slices:
                alive[member.positions(space.size)] &= keep[space.name][:, None]
            result[dim] = alive
        return result

    def macs(self, mask: ChannelMask | None = None) -> float:
        """Multiply-accumulates of one sample: convolutions, linear layers and both products of attention."""
        return self.macs_of({} if mask is None else {name: int(mask.keep[name].sum()) for name in mask})

    def macs_of(self, widths: Mapping[str, int]) -> float:
        """As `macs`, for kept sizes by name; spaces not named are whole."""
        return self.value(self.cost, widths)

    def value(self, terms: Terms, widths: Mapping[str, int]) -> float:
        """The value of a polynomial in kept sizes; spaces not named are whole."""
        total = 0.0
        for coefficient, names in terms:
            for name in names:
                coefficient *= widths[name] if name in widths else self[name].size
            total += coefficient
        return total

    def parameters(self, mask: ChannelMask | None = None) -> int:
        """Number of elements of all parameters."""
        total = 0
        for name, shape in self.shapes.items():
            if name in self.buffers:
                continue
            kept = {} if mask is None else self.kept(mask.keep, name)
            count = 1
            for dim, length in enumerate(shape):
                count *= int(kept[dim].sum()) if dim in kept else length
            total += count
        return total

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over the names and sizes of all parameters and spaces."""
        facts = [sorted((k, list(v)) for k, v in self.shapes.items()), [(s.name, s.size) for s in self.spaces]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are not those of the traced one.

        Raises:
            EbdiffError: names both fingerprints and the first parameter that differs.
        """
        shapes = dict(tensor_shapes(model))
        wrong = [name for name, shape in self.shapes.items() if shapes.get(name) != shape]
        wrong += [name for name in shapes if name not in self.shapes and name not in self.aliases]
        if wrong:
            name, theirs = wrong[0], fingerprint_of(shapes)
            raise EbdiffError(
                "this ticket or mask belongs to another architecture",
                expected=f"{fingerprint_of(self.shapes)} ({name}: {self.shapes.get(name, 'absent')})",
                got=f"{theirs} ({name}: {shapes.get(name, 'absent')})",
                remedy="trace this model and draw its own ticket",
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "spaces": [asdict(space) for space in self.spaces],
            "frozen": [asdict(axis) for axis in self.frozen],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "buffers": sorted(self.buffers),
            "aliases": dict(self.aliases),
            "norms": [asdict(norm) for norm in self.norms],
            "cost": self.cost,
            "sizes": [asdict(size) for size in self.sizes],
            "transposed": sorted(self.transposed),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChannelPlan:
        """The inverse of `to_json`."""
        try:
            return cls(
                spaces=tuple(
                    ChannelSpace(s["name"], s["size"], tuple(Member(**m) for m in s["members"]), s["unit"])
                    for s in value["spaces"]
                ),
                frozen=tuple(Frozen(**axis) for axis in value["frozen"]),
                shapes={name: tuple(shape) for name, shape in value["shapes"].items()},
                buffers=frozenset(value["buffers"]),
                aliases=dict(value["aliases"]),
                norms=tuple(map(_norm_from, value["norms"])),
                cost=_terms_from(value["cost"]),
                sizes=tuple(ModuleSize(s["module"], s["attribute"], _terms_from(s["terms"])) for s in value["sizes"]),
                transposed=frozenset(value.get("transposed", ())),
            )
        except (KeyError, TypeError) as error:
            raise EbdiffError("damaged channel plan", got=repr(error), remedy="trace the model again") from None

    def __str__(self) -> str:
        lines = [
            f"{len(self.spaces)} prunable axes, "
            f"{self.parameters() / 1e6:.2f}M parameters, {self.macs() / 1e9:.3f} GMACs a sample"
        ]
        lines += [
            f"  {s.name}: {s.size} {s.unit.replace('residual', 'residual channel')}s in {len(s.members)} slices"
            for s in self.spaces
        ]
        lines += [f"frozen ({len(self.frozen)}):"] if self.frozen else []
        lines += [f"  {axis.name}: {axis.size}, {axis.reason}" for axis in self.frozen]
        return "\n".join(lines)


def _norm_from(value: Mapping[str, Any]) -> Norm:
    """Plans of before there were kinds hold group normalisations only."""
    sides = (tuple(Along(*entry) for entry in value.get(side, ())) for side in ("inputs", "outputs"))
    return Norm(value["module"], tuple(value["group_sizes"]), value.get("kind", "group"), *sides)


def _terms_from(value: Iterable[Any]) -> Terms:
    return tuple((float(coefficient), tuple(names)) for coefficient, names in value)


def tensor_shapes(model: nn.Module) -> Iterable[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter and buffer, tied ones once."""
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            yield name, tuple(tensor.shape)


def fingerprint_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Sixteen hexadecimal digits over the names and shapes of a model's tensors."""
    facts = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
