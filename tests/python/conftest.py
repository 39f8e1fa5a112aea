"""Fixtures: a device to run on, engines for it, and the libraries that may be missing."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import qdp
from devices import DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def why_no_gpu() -> str:
    """What keeps this machine's GPU from being used, or nothing."""
    try:
        qdp.Engine(DEVICE)
    except qdp.DeviceUnavailableError as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A gpu test needs a GPU: it is skipped only where nobody asked for one."""
    if item.get_closest_marker("gpu") is None or not (reason := why_no_gpu()):
        return
    if os.environ.get("QDP_REQUIRE_GPU") == "1":
        pytest.fail(f"QDP_REQUIRE_GPU=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@cache
def _engine(device: str, precision: Any) -> qdp.Engine:
    return qdp.Engine(device, precision=precision)


@pytest.fixture
def engine(device: str) -> qdp.Engine:
    """A shared engine whose precision follows the input."""
    return _engine(device, None)


@pytest.fixture
def engine_for(device: str) -> Callable[[Any], qdp.Engine]:
    """Shared engines of a named precision."""
    return lambda precision: _engine(device, precision)


@pytest.fixture
def cpu() -> qdp.Engine:
    return _engine("cpu", None)


@pytest.fixture
def gpu() -> qdp.Engine:
    """A GPU engine of the test's own: its deferred errors stay with it."""
    return qdp.Engine(DEVICE)


def library(name: str) -> Any:
    """A fixture that is the library, or skips where it is not installed."""

    @pytest.fixture(name=name.partition(".")[0])
    def importable() -> Any:
        return pytest.importorskip(name, exc_type=ImportError)

    return importable


torch = library("torch")
cupy = library("cupy")
jax = library("jax")
pyarrow = library("pyarrow")
polars = library("polars")
pennylane = library("pennylane")
qiskit = library("qiskit")
