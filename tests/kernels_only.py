"""A fixture for the tests of an operator on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


def only_kernels_of(operator: ModuleType) -> Any:
    """A fixture for every test of a module: a fall back of the operator to its reference is a failure."""

    @pytest.fixture(autouse=True)
    def only_kernels() -> Iterator[None]:
        pytest.importorskip("triton")
        before = operator.fallbacks.copy()
        yield
        assert operator.fallbacks == before

    return only_kernels
