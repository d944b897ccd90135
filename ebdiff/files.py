"""Files that are either whole or absent: JSON and safetensors, written beside their place and then renamed into it.

Nothing is ever pickled or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from .errors import EbdiffError

__all__ = [
    "checksum",
    "digest",
    "dtypes_in",
    "read_json",
    "read_object",
    "read_tensors",
    "sync",
    "write_bytes",
    "write_json",
    "write_tensors",
]

_WIDE = "ebdiff.complex128"  # names of the tensors that lie in a file as pairs of real numbers


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably: a crash at any point leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: str | Path) -> None:
    """Make what was written to a file, or renamed within a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """The JSON value at `path`.

    Raises:
        EbdiffError: the file is missing, truncated or edited into something that is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise EbdiffError("file missing", expected=str(path), got="nothing there", remedy="check the path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EbdiffError(
            f"{path} is damaged", expected="JSON", got=str(error), remedy="restore it or write it again"
        ) from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object at `path`.

    Raises:
        EbdiffError: the file is missing, truncated or edited into something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise EbdiffError(
            f"{path} is damaged",
            expected="a JSON object",
            got=type(value).__name__,
            remedy="restore it or write it again",
        )
    return value


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    """Write named tensors as safetensors, atomically. Tensors may live on any device and share storage."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    wide = [name for name, tensor in plain.items() if tensor.dtype == torch.complex128]  # safetensors has no such dtype
    plain |= {name: torch.view_as_real(plain[name]) for name in wide}
    metadata |= {_WIDE: json.dumps(wide)} if wide else {}
    write_bytes(path, to_safetensors(plain, metadata=metadata or None))


def dtypes_in(path: str | Path) -> dict[str, torch.dtype]:
    """{name: dtype} of a safetensors file, whose tensors stay on the disk; empty where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def read_tensors(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        EbdiffError: the file is missing, truncated or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise EbdiffError("file missing", expected=str(path), got="nothing there", remedy="check the path")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Clones are aligned; tensors as they lie in the file are not, and CPU convolutions round by alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
            for name in json.loads(metadata.pop(_WIDE, "[]")):
                tensors[name] = torch.view_as_complex(tensors[name])
            return tensors, metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise EbdiffError(
            f"{path} is damaged",
            expected="a whole safetensors file",
            got=str(error),
            remedy="restore it or write it again",
        ) from None


def checksum(path: str | Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value, in hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
