"""For all tests: one thread, no network, no display, fixed hypothesis seeds in CI, GPU tests only with a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch, diffusers and matplotlib are imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from ebdiff.nn.replace import deferred

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a GPU machine may lack it: the tests that are marked gpu do without
    pass
else:
    settings.register_profile("local", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def fewest_positions() -> Iterator[int]:
    """Networks of tests are small, and their norms are to be fused on the CPU all the same. Yields what it is else."""
    fewest, deferred._FEWEST = deferred._FEWEST, 16
    yield fewest
    deferred._FEWEST = fewest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums over several threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
