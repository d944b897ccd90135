"""Stages: each works in its own folder, writes its result last, and returns at once when that is already there."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EbdiffError
from ..files import read_json, sync, write_json

__all__ = ["Tick", "Work", "busy", "done", "finish", "locked", "while_alive", "write_folder"]

_DONE = "done.json"


@dataclass(frozen=True)
class Tick:
    """So much work was done.

    Args:
        stage: its name, as in `Work`.
        macs: multiply-accumulates since the last tick of this stage.
        note: a few words for whoever watches.
        before: the work was done by an earlier process.
        kept: closing what yields this loses nothing of it.
    """

    stage: str
    macs: float
    note: str = ""
    before: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Work:
    """What a stage will do.

    Args:
        stage: its name.
        macs: multiply-accumulates, backward passes included.
        steps: optimizer steps, 0 where nothing is trained.
        note: for a dry run.
    """

    stage: str
    macs: float
    steps: int = 0
    note: str = ""


def done(folder: Path) -> dict[str, Any] | None:
    """The facts a finished stage left, None where it has not finished."""
    if not (folder / _DONE).exists():
        return None
    facts: dict[str, Any] = read_json(folder / _DONE)
    return facts


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Declare a stage finished."""
    write_json(folder / _DONE, facts)


def needed(folder: Path, command: str) -> dict[str, Any]:
    """The facts of a stage that must have finished.

    Raises:
        EbdiffError: it has not; names the command that does it.
    """
    facts = done(folder)
    if facts is None:
        raise EbdiffError(
            f"{folder.name} is not finished",
            expected=str(folder / _DONE),
            got="nothing",
            remedy=f"run `{command}` first",
        )
    return facts


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder that is either whole or absent. One that is there already stays as it is."""
    if folder.exists():
        return
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    for file in beside.rglob("*"):
        sync(file)
    sync(beside)
    os.replace(beside, folder)
    sync(folder.parent)


def while_alive(ticks: Iterator[Tick], parent: int | None) -> Iterator[Tick]:
    """Stop when the process that started this one is gone, or ends it: the command that is run again starts its own."""
    ended: list[int] = []
    if parent is not None:
        signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    for tick in ticks:
        if ended or (parent is not None and os.getppid() != parent):
            sys.exit(3)
        yield tick


@contextmanager
def locked(folder: Path, patience_seconds: float = 30) -> Iterator[None]:
    """Hold a folder against other processes; the lock goes when the process goes, however it ends.

    Raises:
        EbdiffError: another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        until = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise EbdiffError(
                        f"another process works in {folder}", remedy="wait for it, or end it and run this again"
                    ) from None
                time.sleep(0.2)
        yield


def busy(folder: Path) -> str:
    """What `locked` would say of a folder that another process holds; empty where none does."""
    if not (folder / ".lock").exists():
        return ""
    try:
        with locked(folder, patience_seconds=0):
            return ""
    except EbdiffError as error:
        return str(error)
