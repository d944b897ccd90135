"""What training changes: model, optimizer, EMA, learned densities and the step, as named tensors and plain facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite, nan
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..errors import EbdiffError
from ..numbers import as_real, as_whole
from ..optim import AdamW
from ..timesteps.learned import Learned
from .checkpoint import Saved

__all__ = ["TrainConfig", "TrainState"]

_EMA_FACTS = ("optimization_step", "cur_decay_value")
_LEARNER = "learner."
_OWN = ("params", "param_names")  # what a parameter group holds besides settings


@dataclass(frozen=True)
class TrainConfig:
    """How to train; see `ebdiff.train`.

    Args:
        batch_size: images per micro-batch, over all processes.
        lr, betas, weight_decay: of AdamW.
        grad_clip: largest norm of all gradients together; None leaves them as they are.
        accumulate: micro-batches per optimizer step.
        ema_decay: largest decay of the EMA, which warms up to it.
        precision: "no" (float32) or "bf16" (autocast).
        seed: of data order, flips, noise, timesteps and dropout.
        flip: mirror half of the images.
        channels_last: lay the weights of 2-D convolutions out in this order, which their results follow, and dropout
            in drawing. It pays on CUDA in 16 bits.
        accelerate: run norms and the SiLU behind them as one operator, see `ebdiff.accelerate`; the model stays so.
        compile: torch.compile the network for its training steps; "reduce-overhead" replays them as CUDA graphs, too.
            Its gradients are compared with those of the plain network before the first step.
    """

    batch_size: int = 128
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    accumulate: int = 1
    ema_decay: float = 0.9999
    precision: str = "no"
    seed: int = 0
    flip: bool = False
    channels_last: bool = False
    accelerate: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        checks = {
            "a whole batch_size of at least 1": (as_whole(self.batch_size) or 0) >= 1,
            "a whole accumulate of at least 1": (as_whole(self.accumulate) or 0) >= 1,
            "a whole seed": as_whole(self.seed) is not None,
            "a finite lr above 0": _finite(self.lr) > 0,
            "precision 'no' or 'bf16'": self.precision in ("no", "bf16"),
            "grad_clip above 0, or None": self.grad_clip is None or (as_real(self.grad_clip) or 0) > 0,
            "betas of two numbers in [0, 1)": (
                isinstance(self.betas, list | tuple)
                and len(self.betas) == 2
                and all(0 <= _finite(beta) < 1 for beta in self.betas)
            ),
            "a finite weight_decay of at least 0": _finite(self.weight_decay) >= 0,
            "ema_decay in [0, 1]": 0 <= _finite(self.ema_decay) <= 1,
            "compile of True, False or 'reduce-overhead'": self.compile in (True, False, "reduce-overhead"),
            "accumulate of 1 with 'reduce-overhead', which reuses the memory of gradients": (
                self.compile != "reduce-overhead" or self.accumulate == 1
            ),
        }
        for expected, holds in checks.items():
            if not holds:
                raise EbdiffError("TrainConfig", expected=expected, got=str(asdict(self)), remedy="change it")


@dataclass
class TrainState:
    """A model in training. `ebdiff.shrink_` may change all of it between two steps.

    Args:
        model: called as model(x, t).
        optimizer: `ebdiff.optim.AdamW` or one of torch; its state is saved by parameter name.
        ema: diffusers' EMAModel over ``model.parameters()``; a step of the loop moves it, or the optimizer's does.
        step: optimizer steps taken so far.
        learner: what in the sampler learns from the losses; see `Sampler.learner`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    step: int = 0
    learner: Learned | None = None

    @classmethod
    def begin(cls, model: nn.Module, config: TrainConfig, learner: Learned | None = None) -> TrainState:
        """A model before its first step: AdamW, and an EMA that warms up and moves in AdamW's own pass."""
        ema = EMAModel(
            model.parameters(), decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
        )
        optimizer = AdamW(
            model.named_parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, ema=ema
        )
        return cls(model, optimizer, ema, learner=learner)

    def to(self, device: torch.device) -> None:
        """Move everything to a device, in place."""
        self.model.to(device)
        self.ema.to(device)
        if self.learner is not None:  # before the first draw, which is to be the same after a checkpoint
            self.learner.state.to(device)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        state[key] = value.to(_home(key, parameter, group))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: model.*, ema.*, optimizer.<parameter>.<key>, learner.*."""
        result = self._weights()
        if self.learner is not None:
            result |= {f"{_LEARNER}{name}": tensor for name, tensor in self.learner.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    result[f"optimizer.{name}.{key}"] = value
        return result

    def facts(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {
            "step": self.step,
            "ema": {key: getattr(self.ema, key) for key in _EMA_FACTS},
            "optimizer": self._optimizer_facts(),
        }

    def _weights(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(self.model.named_parameters())
        result = {f"model.{name}": tensor for name, tensor in named.items()}
        result |= {f"model.{name}": tensor for name, tensor in self.model.named_buffers()}
        return result | {f"ema.{name}": shadow for name, shadow in zip(named, self.ema.shadow_params, strict=True)}

    def _optimizer_facts(self) -> dict[str, Any]:
        scalars = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if not isinstance(value, Tensor)
        }
        other = next((name for name, value in scalars.items() if not isinstance(value, int | float | str | None)), None)
        if other is not None:
            raise EbdiffError(
                f"{type(self.optimizer).__name__} cannot be saved",
                expected="tensors and numbers as its state",
                got=f"{other}: {type(scalars[other]).__name__}",
                remedy="use an optimizer like AdamW",
            )
        groups = [
            {key: _plain(value) for key, value in group.items() if key not in _OWN and _is_plain(_plain(value))}
            for group in self.optimizer.param_groups
        ]
        return {
            "kind": type(self.optimizer).__name__,
            "scalars": scalars,
            "groups": groups,
            "parameters": self._groups_by_name(),
        }

    def _groups_by_name(self) -> list[list[str]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names.get(id(p), "?") for p in group["params"]] for group in self.optimizer.param_groups]

    def restore(self, saved: Saved) -> None:
        """Go back to a checkpoint. What a sampler has learned stays behind where there is no `learner`.

        Raises:
            EbdiffError: it belongs to another model, optimizer or learner, or is no training state; nothing was changed
                then.
        """
        self._check(saved)
        if self.learner is not None:
            names = [name for name in saved.tensors if name.startswith(_LEARNER)]
            self.learner.load_state_dict({name.removeprefix(_LEARNER): saved.tensors[name] for name in names})
        present = self._weights()
        with torch.no_grad():
            for name, tensor in present.items():
                tensor.copy_(saved.tensors[name])
        self._restore_optimizer(saved)
        for key in _EMA_FACTS:
            setattr(self.ema, key, saved.facts["ema"][key])
        self.step = saved.facts["step"]

    def _check(self, saved: Saved) -> None:
        absent = [key for key in ("step", "ema", "optimizer") if key not in saved.facts]
        absent = absent or [key for key in self._optimizer_facts() if key not in saved.facts["optimizer"]]
        if absent:
            raise EbdiffError(
                f"the checkpoint of step {saved.step} is no training state",
                expected="the facts of TrainState.facts()",
                got=f"none about {', '.join(absent)}",
                remedy="hand over the part that was made by it",
            )
        self._check_model(saved)
        self._check_optimizer(saved)

    def _check_model(self, saved: Saved) -> None:
        wanted = {name: _kind(tensor) for name, tensor in self._weights().items()}
        found = {name: _kind(tensor) for name, tensor in saved.tensors.items() if name.startswith(("model.", "ema."))}
        other = next((name for name in {**wanted, **found} if wanted.get(name) != found.get(name)), None)
        if other is not None:
            raise EbdiffError(
                f"the checkpoint of step {saved.step} belongs to another model",
                expected=f"{other}: {wanted.get(other, 'absent')}",
                got=found.get(other, "absent"),
                remedy="resume with the configuration and ticket it was written with",
            )

    def _check_optimizer(self, saved: Saved) -> None:
        kind, facts = type(self.optimizer).__name__, saved.facts["optimizer"]
        ours, theirs = self._groups_by_name(), facts["parameters"]
        expected, got = f"{kind} with {len(ours)} parameter groups", f"{facts['kind']} with {len(theirs)}"
        if kind == facts["kind"] and len(ours) == len(theirs):
            pairs = zip(ours, theirs, strict=True)
            number, name = next(((i, min({*a} ^ {*b})) for i, (a, b) in enumerate(pairs) if {*a} != {*b}), (0, None))
            if name is None:
                return
            holds = {True: f"{name} in parameter group {number}", False: f"{name} elsewhere"}
            expected, got = holds[name in ours[number]], holds[name in theirs[number]]
        raise EbdiffError(
            f"the checkpoint of step {saved.step} belongs to another optimizer",
            expected=expected,
            got=got,
            remedy="resume with the optimizer it was written with",
        )

    def _restore_optimizer(self, saved: Saved) -> None:
        values: dict[str, dict[str, Any]] = {}
        tensors = {
            name.removeprefix("optimizer."): t for name, t in saved.tensors.items() if name.startswith("optimizer.")
        }
        for name, value in {**saved.facts["optimizer"]["scalars"], **tensors}.items():
            parameter_name, _, key = name.rpartition(".")
            values.setdefault(parameter_name, {})[key] = value
        named = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for group, names in zip(self.optimizer.param_groups, self._groups_by_name(), strict=True):
            for name in names:
                for key, value in values.get(name, {}).items():
                    put = _like(value, key, named[name], group) if isinstance(value, Tensor) else value
                    self.optimizer.state[named[name]][key] = put
        for group, facts in zip(self.optimizer.param_groups, saved.facts["optimizer"]["groups"], strict=True):
            for key, value in facts.items():
                present = group.get(key)
                if isinstance(present, Tensor):
                    present.fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(present, tuple) else value


def _finite(value: Any) -> float:
    """NaN, which lies in no range, where it is no finite number."""
    found = as_real(value)
    return found if found is not None and isfinite(found) else nan


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _plain(value: Any) -> Any:
    """A setting of a parameter group as a number: learning rates may be tensors."""
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, int | float | str | None)


def _home(key: str, parameter: Tensor, group: dict[str, Any]) -> torch.device:
    """Where an optimizer wants a tensor of its state: step counts stay on the CPU unless it is fused or capturable."""
    counts = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if counts else parameter.device


def _like(value: Tensor, key: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A copy of a saved tensor where the optimizer wants it, laid out in memory as its parameter is."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(_home(key, parameter, group), copy=True)
