"""What is installed and what is missing, with the command that adds it; what a folder holds; what SpeeD would gain."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import EbdiffError

if TYPE_CHECKING:
    from .timesteps.profile import NoiseProfile

__all__ = ["describe", "installation", "schedule"]

NEEDED = ("torch", "diffusers", "accelerate", "safetensors", "torchmetrics", "matplotlib", "tensorboard")
OPTIONAL = {
    "triton": ("kernels on the GPU", "pip install 'ebdiff[triton]'"),
    "datasets": ("images from hf:<data set>", "pip install 'ebdiff[datasets]'"),
    "torch_fidelity": ("Inception features, from local weights", "pip install torch-fidelity"),
}
# Served by ebdiff._C where it is built, else by the plain torch beside them in ebdiff.ops.
COMPILED_OPS = ("apply_mask_", "compact", "scatter_back_", "masked_adamw_", "channel_sums", "mask_distance")
TRITON_OP = "group_norm_silu"
ATTENTION_OP = "sparse_attention"  # torch's own attention on gathered blocks, on the CPU
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
CONTINUOUS = ("flow", "edm", "vp", "sub_vp", "ve")


def installation() -> list[str]:
    """Versions and devices, a line each; works without a GPU."""
    import torch

    from . import __version__

    lines = [f"ebdiff {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name} {_version(name)}" for name in NEEDED]
    for name, (use, command) in OPTIONAL.items():
        found = find_spec(name) is not None
        lines.append(f"  {name} {_version(name) if found else 'missing'} ({use}{'' if found else f': {command}'})")
    lines += _compiled()
    if torch.cuda.is_available():
        lines += [f"  GPU: {_gpu(index)}" for index in range(torch.cuda.device_count())]
    else:
        lines.append(f"  no GPU that torch can use; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    weights = os.environ.get("EBDIFF_INCEPTION")
    lines.append(f"  Inception weights: {weights or 'none (set EBDIFF_INCEPTION to a local file for published FIDs)'}")
    return lines


def describe(folder: Path) -> list[str]:
    """What a folder holds: a ticket, a run, or a saved network.

    Raises:
        EbdiffError: none of these, or damaged.
    """
    from .training.pretrained import refuse_pipeline

    if (folder / "ticket.json").exists():
        from .tickets.ticket import Ticket

        ticket = Ticket.load(folder)
        widths = [f"  {s.name}: {int(ticket.mask[s.name].sum())} of {s.size} {s.unit}s kept" for s in ticket.plan]
        return [str(ticket), *widths]
    if (folder / "config.yaml").exists():
        return _run(folder)
    if (folder / "config.json").exists() or (folder / "ebdiff.json").exists():
        from .pruning.save import load
        from .pruning.shrink import shrinks_of

        network = load(folder)
        lines = []
        for part in [network, *getattr(network, "nets", ())]:
            count = sum(parameter.numel() for parameter in part.parameters())
            lines.append(f"{type(part).__name__}, {count / 1e6:.2f}M parameters")
            lines += [f"  {mask}" for mask in shrinks_of(part)]
        return lines
    refuse_pipeline(folder)
    raise EbdiffError(
        f"nothing to describe in {folder}",
        expected="a ticket, a run or a saved network",
        got="another folder" if folder.is_dir() else "no folder",
        remedy="check the path",
    )


def schedule(
    name: str,
    *,
    timesteps: int = 1000,
    betas: tuple[float, float] = (1e-4, 0.02),
    shift: float = 1.0,
    k: float = 5.0,
    r: float = 140.5,
) -> list[str]:
    """What SpeeD makes of a schedule: tau, the share of each area, and what sampling alone can gain at most.

    Args:
        name: a beta schedule of diffusers, or "flow", "edm", "vp", "sub_vp", "ve".
        timesteps: how many; cells, in continuous time.
        betas: the first and the last, of a beta schedule.
        shift: of flow matching.
        k, r: see `SpeeD`.

    Raises:
        EbdiffError: for a schedule that is not known, or settings out of range.
    """
    from .timesteps.densities import LogNormalSigma
    from .timesteps.sampler import Uniform
    from .timesteps.speed import SpeeD

    profile = _profile(name, timesteps, betas, shift)
    speed, uniform = SpeeD(profile, k, r=r), Uniform(profile)
    unit = "cells" if profile.is_continuous else "timesteps"
    where = "alpha-bar never falls to" if speed.areas.convergence is None else "the first where alpha-bar is at most"
    lines = [f"{name}, {timesteps} {unit}: tau = {speed.tau}, {where} 1/{r:g}"]
    for area, region in speed.areas._asdict().items():
        if region is not None:
            timely, drawn = (f"{sampler.mass(region):.1%}" for sampler in (uniform, speed))
            lines.append(f"  {area}: {region}, {timely} of the {unit}, {drawn} of what SpeeD draws")
    often = float(speed.pmf()[0]) * timesteps
    own = []
    if name == "edm" and speed.areas.convergence is not None:
        share = LogNormalSigma(profile).mass(speed.areas.convergence)
        own = [
            f"  EDM's own log-normal density draws {share:.1%} there: over that, sampling has next to nothing to gain"
        ]
    return [
        *lines,
        f"  sampling alone: useful {unit} come {often:.2f} times as often as with uniform sampling (k = {k:g}), "
        f"and never more than T/tau = {speed.bound:.2f} times",
        *own,
    ]


def _profile(name: str, timesteps: int, betas: tuple[float, float], shift: float) -> NoiseProfile:
    from .timesteps.profile import NoiseProfile

    if name == "flow":
        return NoiseProfile.flow(shift, cells=timesteps)
    if name in CONTINUOUS:
        made: NoiseProfile = getattr(NoiseProfile, name)(cells=timesteps)
        return made
    if name in BETAS:
        from diffusers import DDPMScheduler

        return NoiseProfile.from_scheduler(
            DDPMScheduler(timesteps, beta_schedule=name, beta_start=betas[0], beta_end=betas[1])
        )
    raise EbdiffError("--schedule", expected=", ".join((*BETAS, *CONTINUOUS)), got=name, remedy="choose one")


def _compiled() -> list[str]:
    """What is in ebdiff._C, who serves which op because of it, and how to add what is not in it."""
    from .ops import native

    compiled, facts, left_out = native.module(), native.facts(), native.missing()
    if compiled is None:
        said = left_out.get("cpu", {}).get("output", "")
        return [f"  compiled part: {native.why_not()}", *_quoted(said), *_served("reference", "reference")]
    parts = " and ".join(part.upper() for part in facts.get("parts", ()))
    tools = f"{facts.get('compiler', 'an unknown compiler')}, pybind11 {facts.get('pybind11', 'unknown')}"
    lines = [f"  compiled part: {parts}, ABI {compiled.ABI}, by {tools}"]
    if native.has_cuda():
        lines.append(f"    CUDA by nvcc {facts['nvcc']} for {', '.join(facts['architectures'])}")
    elif "cuda" in left_out:
        why = left_out["cuda"]
        lines += [
            f"    no CUDA part: {why['problem']}; {why['remedy']}, then {native.again()}",
            *_quoted(why["output"]),
        ]
    if native.is_outdated():
        lines.append(f"    built from other sources: {native.again()} again")
    return [*lines, *_served(f"C++ {compiled.isa()}", "CUDA" if native.has_cuda() else "reference")]


def _gpu(index: int) -> str:
    import torch

    from .ops import native

    major, minor = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    if native.has_cuda() and not native.covers(major, minor):
        return f"{name}, not served by the CUDA part: EBDIFF_CUDA_ARCHS='{major}{minor}' {native.again()}"
    return name


def _served(cpu: str, cuda: str) -> list[str]:
    gpu = "Triton" if find_spec("triton") else "reference"
    return [
        f"    {', '.join(COMPILED_OPS)}: {cpu} on the CPU, {cuda} on a GPU",
        f"    {TRITON_OP}: {cpu} on the CPU, {gpu} on a GPU",
        f"    {ATTENTION_OP}: torch on the CPU, {gpu} on a GPU",
    ]


def _quoted(message: str) -> list[str]:
    """The lines of a compiler's message that say what is wrong."""
    lines = message.splitlines()
    wrong = [line for line in lines if "error" in line.lower()] or lines
    return [f"      {line.strip()}" for line in wrong[:3]]


def _run(folder: Path) -> list[str]:
    from .files import read_json

    lines = [f"run in {folder}; `ebdiff run --out {folder}` goes on with it"]
    for path in sorted(folder.rglob("done.json")):
        cost = read_json(path)["cost"]
        lines.append(
            f"  {path.parent.relative_to(folder)}: {cost['steps']} steps, {cost['macs'] / 1e12:.3f} TMACs, "
            f"{cost['device_seconds']:.0f} device-seconds"
        )
    lines += [f"  judged: {path.stem}" for path in sorted(folder.glob("evaluation/*.json"))]
    return [*lines, f"  report: {folder / 'report.md'}" if (folder / "report.md").exists() else "  no report yet"]


def _version(name: str) -> str:
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return "missing"
