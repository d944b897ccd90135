"""A plugin of fixtures: CPU tensors served by ebdiff.ops.native_cuda and its kernels, run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebdiff.ops import adamw, channel_mask, channel_mask_reference, cuda_table, native, native_cuda, serve

from .build import Emulator, build
from .memory import behind_wall, bytes_of

__all__ = ["emulator", "machine"]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Built once, for all tests."""
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def emulator(machine: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """CPU tensors are served by ebdiff.ops.native_cuda and the emulated kernels."""

    def not_here(*arguments: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(native, "module", lambda: machine.module)
    for module in (serve, channel_mask, adamw):
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda tensor: native_cuda)
    for name in ("apply_mask_", "compact", "scatter_back_", "masked_adamw_", "channel_sums", "mask_distance"):
        monkeypatch.setattr(channel_mask_reference, name, not_here)
    for module in (cuda_table, native_cuda):
        monkeypatch.setattr(module, "stream_of", lambda device: 0)
    monkeypatch.setattr(cuda_table, "is_capturing", lambda device: False)
    monkeypatch.setattr(cuda_table, "upload", lambda table, device: behind_wall(bytes_of(table)))
    cuda_table._tables.clear()
    machine.launches()
    yield machine
    machine.order(0)
    machine.blocks()
    machine.fail("")
