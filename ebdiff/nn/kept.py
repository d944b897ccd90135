"""A module that sees nothing but the kept channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OnKept"]

Places = Mapping[int, Tensor]  # {dimension: int64 indices of what is kept}


class OnKept(nn.Module):
    """A norm whose statistics are over the kept channels, with zero elsewhere: what its shrunken self gives, unshrunk.

    Args:
        dense: the module it stands in for; its parameters and buffers are taken over, under their names.
        small: the same module, shrunken.
        tensors: what `small` keeps of each parameter and buffer; those not named are whole.
        inputs, outputs: the kept positions of the dimensions of its input and its output.
        sizes: the dense sizes of the dimensions in `outputs`.

    Shape: as `dense`. What the small module writes to its tensors (power iterations) is written to the dense ones.
    """

    def __init__(
        self,
        dense: nn.Module,
        small: nn.Module,
        tensors: Mapping[str, Places],
        inputs: Places,
        outputs: Places,
        sizes: Mapping[int, int],
    ) -> None:
        super().__init__()
        self._parameters.update(dense._parameters)
        self._buffers.update(dense._buffers)
        self._modules.update(dense._modules)
        self.small = [small]  # in a list: no module of this one's
        self.tensors, self.inputs, self.outputs, self.sizes = tensors, inputs, outputs, sizes
        self.train(dense.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        kept = {name: _select(tensor, self.tensors.get(name, {})) for name, tensor in held.items()}
        before = {name: tensor._version for name, tensor in kept.items()}
        small = self.small[0].train(self.training)
        y: Tensor = torch.func.functional_call(small, kept, (_select(x, self.inputs), *args), kwargs)
        with torch.no_grad():
            for name, tensor in kept.items():
                if tensor is not held[name] and tensor._version != before[name]:
                    held[name].copy_(_spread(tensor, self.tensors[name], held[name].shape))
        shape = [self.sizes.get(dim - y.dim() if dim == y.dim() - 1 else dim, n) for dim, n in enumerate(y.shape)]
        return _spread(y, self.outputs, shape)


def _select(tensor: Tensor, places: Places) -> Tensor:
    for dim, indices in places.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def _spread(tensor: Tensor, places: Places, shape: Any) -> Tensor:
    """The inverse of `_select`, zero elsewhere."""
    for dim, indices in places.items():
        wide = [*tensor.shape]
        wide[dim] = shape[dim]
        tensor = tensor.new_zeros(wide).index_copy(dim, indices.to(tensor.device), tensor)
    return tensor
