"""Which sources a compiled part was built from.

Its build loads this file by path, since ebdiff itself needs torch: standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["ABI", "STATUS", "digest_of"]

ABI = 3
"""The interface of ebdiff._C that ebdiff.ops calls; csrc/bindings.cpp has the same number. Change both together."""

STATUS = "_build.json"
"""Beside ebdiff/__init__.py: what the last build left out, and why."""


def digest_of(csrc: Path) -> str:
    """sha256 of the names and contents of all sources in a folder, in hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(csrc).as_posix()} {content}\n".encode())
    return total.hexdigest()
