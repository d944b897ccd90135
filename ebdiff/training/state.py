"""What training changes: model, optimizer, EMA and the step count, as named tensors and plain facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..errors import EbdiffError
from .checkpoint import Saved

__all__ = ["TrainConfig", "TrainState"]

_EMA_FACTS = ("optimization_step", "cur_decay_value")


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

    def __post_init__(self) -> None:
        checks = {
            "batch_size of at least 1": self.batch_size >= 1,
            "accumulate of at least 1": self.accumulate >= 1,
            "lr above 0": self.lr > 0,
            "precision 'no' or 'bf16'": self.precision in ("no", "bf16"),
            "grad_clip above 0, or None": self.grad_clip is None or self.grad_clip > 0,
            "betas of two numbers in [0, 1)": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "weight_decay of at least 0": self.weight_decay >= 0,
            "ema_decay in [0, 1]": 0 <= self.ema_decay <= 1,
        }
        for expected, holds in checks.items():
            if not holds:
                raise EbdiffError("TrainConfig", expected=expected, got=str(asdict(self)), remedy="change it")


@dataclass
class TrainState:
    """A model in training. `ebdiff.shrink_` may change all of it between two steps.

    Args:
        model: called as model(x, t).
        optimizer: of torch; its state is saved by parameter name.
        ema: diffusers' EMAModel over ``model.parameters()``.
        step: optimizer steps taken so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    step: int = 0

    @classmethod
    def begin(cls, model: nn.Module, config: TrainConfig) -> TrainState:
        """A model before its first step: AdamW, and an EMA that warms up."""
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        ema = EMAModel(
            model.parameters(), decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
        )
        return cls(model, optimizer, ema)

    def to(self, device: torch.device) -> None:
        """Move everything to a device, in place."""
        self.model.to(device)
        self.ema.to(device)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    state[key] = value.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: model.*, ema.*, optimizer.<parameter>.<key>."""
        result = self._weights()
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
        groups = [
            {key: value for key, value in group.items() if isinstance(value, int | float | bool | list | tuple | None)}
            for group in ({k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups)
        ]
        return {"kind": type(self.optimizer).__name__, "scalars": scalars, "groups": groups}

    def restore(self, saved: Saved) -> None:
        """Go back to a checkpoint.

        Raises:
            EbdiffError: it belongs to another model or optimizer; nothing was changed then.
        """
        self._check(saved)
        present = self._weights()
        with torch.no_grad():
            for name, tensor in present.items():
                tensor.copy_(saved.tensors[name])
        self._restore_optimizer(saved)
        for key in _EMA_FACTS:
            setattr(self.ema, key, saved.facts["ema"][key])
        self.step = saved.facts["step"]

    def _check(self, saved: Saved) -> None:
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
        ours, theirs = self._optimizer_facts(), saved.facts["optimizer"]
        if (ours["kind"], len(ours["groups"])) != (theirs["kind"], len(theirs["groups"])):
            raise EbdiffError(
                f"the checkpoint of step {saved.step} belongs to another optimizer",
                expected=f"{ours['kind']} with {len(ours['groups'])} parameter groups",
                got=f"{theirs['kind']} with {len(theirs['groups'])}",
                remedy="resume with the optimizer it was written with",
            )

    def _restore_optimizer(self, saved: Saved) -> None:
        scalars = saved.facts["optimizer"]["scalars"]
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            for source, prefix in ((saved.tensors, f"optimizer.{name}."), (scalars, f"{name}.")):
                for key in [key for key in source if key.startswith(prefix) and "." not in key.removeprefix(prefix)]:
                    value = source[key]
                    if isinstance(value, Tensor):
                        value = value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
                    self.optimizer.state[parameter][key.removeprefix(prefix)] = value
        for group, facts in zip(self.optimizer.param_groups, saved.facts["optimizer"]["groups"], strict=True):
            group.update({key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in facts.items()})


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
