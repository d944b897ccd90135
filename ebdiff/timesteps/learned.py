"""A sampler that learns from the losses where to draw, without ever waiting for the device that they are on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EbdiffError
from .profile import NoiseProfile
from .region import Region
from .sampler import Sampler, Wrapped
from .tables import Tables, conditional, normalised

__all__ = ["Learned", "of_all_ranks"]


@dataclass
class State:
    """What a sampler has learned; one object for all copies of the sampler that `at` makes."""

    tensors: dict[str, Tensor]
    updates: int = 0
    version: int = 0

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device) -> None:
        """Follow the losses: a copy once, when the first ones come."""
        if self.device != device:
            self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}


class Learned(Wrapped):
    """A proposal for the objective of another sampler, the prior: for its density times its weights.

    State moves to where the losses are with the first `update`. To draw there waits for nothing; `pmf` and `weights`,
    and samplers around this one that ask for them, copy to the CPU (`Stratified` does not ask).

    Args:
        prior: the objective.
        profile: tells the cell of a t in continuous time.
        state: tensors on the CPU, by name.
    """

    def __init__(self, prior: Sampler | int, profile: NoiseProfile | None, **state: Tensor) -> None:
        super().__init__(prior)
        self.profile = profile
        self.state = State(state)
        self._held: tuple[object, tuple[Tensor, Tensor, Tensor | None]] | None = None

    @abstractmethod
    def proposal(self, prior: Tensor, weight: Tensor) -> Tensor:
        """float64[T]: the density to draw from, above 0 wherever the prior is and 0 elsewhere.

        Args:
            prior: float64[T], the prior's density, where the state is.
            weight: float64[T], the prior's weights there.
        """

    @abstractmethod
    def learn(self, cell: Tensor, losses: Tensor) -> bool:
        """Add the losses, float64[B], of cells, int64[B], to the state. Whether `proposal` is another now."""

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from a batch. Losses that are not finite are left out. Nothing waits for the device.

        Ranks learn from each other's losses, in the order of the ranks: call it on all of them, with equally many.

        Args:
            t: [B], the timesteps drawn.
            losses: [B], each sample's loss, without its weight.

        Raises:
            EbdiffError: unless both have one entry per sample; on the CPU, for what is no timestep. Nothing is learned
                then.
        """
        if t.dim() != 1 or t.shape != losses.shape:
            raise EbdiffError(
                "losses without timesteps",
                expected="t and losses of one length",
                got=f"{list(t.shape)} and {list(losses.shape)}",
                remedy="pass each sample's loss: the mean over its own elements, before the weight",
            )
        losses = losses.detach()
        self.state.to(losses.device)
        cell = t.to(losses.device) if self.profile is None else self.profile.cells(t.to(losses.device))
        everyone = of_all_ranks(torch.stack([cell.to(torch.float64), losses.to(torch.float64)]))
        cell = everyone[:, 0].flatten().long()
        if cell.is_cpu and not torch.equal(cell, cell.clamp(0, self.T - 1)):
            raise EbdiffError(
                "losses of what is no timestep",
                expected=f"t in [0, {self.T})",
                got=f"{int(cell.min())} to {int(cell.max())}",
                remedy="pass t as the sampler drew it",
            )
        self.state.updates += 1
        self.state.version += self.learn(cell, everyone[:, 1].flatten())

    def state_dict(self) -> dict[str, Tensor]:
        """What has been learned, the same on all ranks, on the CPU. Waits for the device."""
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self.state.tensors.items()}
        return tensors | {"updates": torch.tensor(self.state.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of such a sampler.

        Raises:
            EbdiffError: for other names or shapes; then nothing has changed.
        """
        tensors = self.state.tensors
        expected = {name: list(tensor.shape) for name, tensor in tensors.items()} | {"updates": []}
        got = {name: list(tensor.shape) for name, tensor in state.items()}
        if expected != got:
            raise EbdiffError(
                f"no state of this {type(self).__name__}",
                expected=str(expected),
                got=str(got),
                remedy="make the sampler with the settings of the run that saved it",
            )
        self.state.tensors = {name: state[name].detach().to(was, copy=True) for name, was in tensors.items()}
        self.state.updates = int(state["updates"])
        self.state.version += 1

    @property
    def version(self) -> int:
        return self.sampler.version + self.state.version

    @property
    def learner(self) -> Learned:
        return self

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.sampler.spread(n, generator, device)

    def pmf(self) -> Tensor:
        prior, weight, _ = self._objective()
        return self.proposal(prior, weight).cpu()

    def weights(self) -> Tensor:
        prior, weight, _ = self._objective()
        return _corrected(prior, weight, self.proposal(prior, weight)).cpu()

    def weights_in(self, region: Region) -> Tensor:
        """The prior's weights in the region, corrected: the objective there stays the prior's too."""
        pmf = self.pmf()
        corrected = _corrected(self.sampler.pmf(), self.sampler.weights_in(region), pmf)
        return normalised(corrected, conditional(pmf, region.lo, region.hi))

    def _read(self, device: torch.device) -> Tables:
        prior, weight, edges = self._objective()
        pmf = self.proposal(prior, weight)
        return Tables.of(pmf, _corrected(prior, weight, pmf), edges, device, lasting=False)

    def _objective(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The prior's density, its weights and the cells' borders, where the state is; copied there once."""
        device = self.state.device
        key = (self.sampler, self.sampler.version, device)
        if self._held is None or self._held[0] != key:
            edges = None if self.edges is None else self.edges.to(device, non_blocking=True)
            prior, weight = self.sampler.pmf(), self.sampler.weights().double()
            self._held = key, (prior.to(device, non_blocking=True), weight.to(device, non_blocking=True), edges)
        return self._held[1]


def _corrected(prior: Tensor, weight: Tensor, pmf: Tensor) -> Tensor:
    """float32[T]: the prior's weight times its density over that drawn from; mean 1 under the latter."""
    return torch.where(prior > 0, weight * prior / pmf, 0.0).float()


def of_all_ranks(tensor: Tensor) -> Tensor:
    """[world, ...]: the tensor of each rank, the same bits on all."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)
