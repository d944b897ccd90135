"""The prunable axes of two UNets, from committed lists: benchmarks without diffusers, and without a trace.

python -m benchmarks.axes       # writes the lists anew; needs diffusers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebdiff.ops.channel_mask import Axes
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.plan import ChannelPlan, ChannelSpace, Member

HERE = Path(__file__).parent
NAMES = ("cifar_unet", "sd15_unet")


def traced(name: str) -> ChannelPlan:
    """The plan of google/ddpm-cifar10-32's UNet or of Stable Diffusion 1.5's (860M), traced without memory."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    import ebdiff
    from benchmarks import DDPM_CIFAR10

    with torch.device("meta"):
        if name == "cifar_unet":
            return ebdiff.trace(UNet2DModel(**DDPM_CIFAR10), torch.empty(1, 3, 32, 32), torch.ones(1))
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return ebdiff.trace(model, torch.empty(1, 4, 64, 64), torch.ones(1), torch.empty(1, 77, 768))


def packed(plan: ChannelPlan) -> dict[str, Any]:
    """Shapes in the order of the parameters, and spaces, whose members name a parameter by its number."""
    number = {name: i for i, name in enumerate(plan.shapes)}
    spaces = [
        [
            s.name,
            s.size,
            s.unit,
            [[number[m.parameter], m.dim, m.offset, m.outer, m.period, m.inner] for m in s.members],
        ]
        for s in plan
    ]
    return {"shapes": [[name, *shape] for name, shape in plan.shapes.items()], "spaces": spaces}


def unpacked(value: dict[str, Any]) -> ChannelPlan:
    """The inverse of `packed`: shapes and spaces only, so that costs and norms are unknown."""
    shapes = {name: tuple(shape) for name, *shape in value["shapes"]}
    names = list(shapes)
    spaces = tuple(
        ChannelSpace(name, size, tuple(Member(names[i], *rest) for i, *rest in members), unit)
        for name, size, unit, members in value["spaces"]
    )
    return ChannelPlan(spaces, (), shapes)


def listed(name: str) -> ChannelPlan:
    """The plan of "cifar_unet" or "sd15_unet" from its committed list."""
    return unpacked(json.loads((HERE / f"{name}_axes.json").read_text(encoding="utf-8")))


def write(name: str) -> None:
    """Trace, and write the list: one parameter or space a line."""
    lists = [
        f' "{key}": [\n' + ",\n".join("  " + json.dumps(line, separators=(",", ":")) for line in lines) + "\n ]"
        for key, lines in packed(traced(name)).items()
    ]
    (HERE / f"{name}_axes.json").write_text("{\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")


def random_mask(plan: ChannelPlan, ratio: float) -> ChannelMask:
    """Remove this share of every space, at random but always the same."""
    generator = torch.Generator().manual_seed(0)
    scores = {space.name: torch.rand(space.size, generator=generator) for space in plan}
    return ChannelMask.draw(scores, plan=plan, ratio=ratio)


def tensors_of(plan: ChannelPlan, device: torch.device | str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normal values in the shapes of all parameters."""
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, dtype=dtype).mul_(0.02) for shape in plan.shapes.values()]


def axes_of(plan: ChannelPlan, mask: ChannelMask, lists: int = 1) -> Axes:
    """The masks on all parameters, in their order; on as many such lists, one after another, as `lists` says."""
    return Axes.of([mask.kept(name) for name in plan.shapes] * lists)


def full_size(plan: ChannelPlan, mask: ChannelMask, like: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A mask of every parameter's own shape, as tools without channel masks keep them; 1 and True are kept."""
    masks = []
    for name, tensor in zip(plan.shapes, like, strict=True):
        kept = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        for dim, alive in mask.kept(name).items():
            kept &= alive.to(tensor.device).view([-1 if d == dim else 1 for d in range(tensor.dim())])
        masks.append(kept.to(dtype))
    return masks


def module_of(plan: ChannelPlan, tensors: list[Tensor]) -> nn.Module:
    """Something with these parameters by their names, and nothing to run."""
    root = nn.Module()
    for name, tensor in zip(plan.shapes, tensors, strict=True):
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor))
    return root


if __name__ == "__main__":
    for each in NAMES:
        write(each)
