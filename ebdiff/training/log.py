"""metrics.jsonl, always, and tensorboard: one record every few steps, cut back to where a resumed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import write_bytes
from .loop import StepReport

__all__ = ["StepLog", "read_log"]

FILE = "metrics.jsonl"


class StepLog:
    """Writes the means over every `every` steps.

    Args:
        folder: of the stage.
        step: the step the run goes on from; later records are of a run that was interrupted, and go.
        every: steps between records.
    """

    def __init__(self, folder: Path, step: int, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read_log(folder) if record["step"] <= step]
        write_bytes(folder / FILE, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.every = every
        self.losses: list[float] = []

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()
        self.board.close()

    def add(self, report: StepReport, device_seconds: float) -> None:
        """Take one step's report."""
        self.losses.append(report.loss)
        if report.step % self.every:
            return
        record = {
            "step": report.step,
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "images": report.images,
            "device_seconds": device_seconds,
        }
        self.losses.clear()
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name in ("loss", "grad_norm", "lr"):
            self.board.add_scalar(name, record[name], report.step)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a stage; lines that are none are left out: the last may be cut short, and others damaged."""
    path = folder / FILE
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    found = [_record(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in found if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
