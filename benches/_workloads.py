"""What a row of the benchmark is: what is encoded, its input, and what it should reach."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt
    from _probes import Limits

from _probes import mix

Kind = Literal[
    "device", "host", "host-sum", "requests", "threads", "tasks", "loop", "loop-sum", "replays"
]
Table = Literal["bulk", "small", "latency", "host", "coalesce", "graphs", "cpu"]
Unit = Literal[
    "of limit",
    "of one extra pass",
    "us",
    "us to enqueue",
    "launches",
    "of h2d",
    "idle calls, median",
    "idle calls, p99",
    "x torch",
    "x torch stack only",
    "x qumat-qdp",
    "x qdp",
    "x qdp scope",
    "x direct",
    "x torch graphs",
]

#: Pageable arrays to rotate among: a data set that no cache holds. The first beside a GPU.
HOST_BYTES, CPU_HOST_BYTES = 512 << 20, 64 << 20


class UnavailableError(Exception):
    """A contender that cannot run this row here, and why."""


@dataclass(frozen=True)
class Line:
    """What ``contender`` must reach in a row.

    ``of limit``: at least ``value`` of the rate that this run's limits allow; ``of one extra
    pass``: at least ``value`` of the rate at which the states could be written, read and written
    again; ``us``: at most ``value`` microseconds; ``us to enqueue``: as many from call to enqueued;
    ``launches``: at most ``value`` times a bare ``cuLaunchKernel``; ``of h2d``: source bytes at
    ``value`` or more of the rate of a pinned upload; ``idle calls, median`` and ``p99``: the
    latency of one request at most ``value`` times the median latency of ``qdp alone``; ``x NAME``:
    at least ``value`` times as fast as that contender; ``x torch graphs``: as the fastest of
    torch's graphs.
    """

    contender: str
    unit: Unit
    value: float


@dataclass(frozen=True)
class Row:
    """One workload.

    ``kind`` says where the input is and what a call does: ``device``, a tensor that lies on the
    device; ``host``, a NumPy array, or a pinned tensor for the contenders called so; ``host-sum``,
    the same and then abs().sum() of the states by torch; ``requests``, a list of ``count``
    vectors, together or one by one; ``threads`` and ``tasks``, as many vectors sent by ``callers``
    of that kind at once; ``loop`` and ``loop-sum``, ``count`` host batches one after another;
    ``replays``, host batches with ``inputs`` arrays each, encoded by a captured graph.
    ``precision`` None follows ``dtype``, the input's.
    """

    name: str
    table: Table
    kind: Kind
    encoding: str
    n: int
    dtype: torch.dtype = torch.float64
    precision: str | None = None
    reps: int | None = None
    rotation: str | None = None
    batch: int = 64
    count: int = 1
    callers: int = 0
    inputs: int = 1
    contenders: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    cpu_batch: int | None = None
    cpu_count: int | None = None
    cpu_n: int | None = None
    gpu_only: bool = False

    @property
    def features(self) -> int:
        return features(self.encoding, self.n)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of QDP's calls."""
        named = {"rotation": self.rotation, "reps": self.reps}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def complex_dtype(self) -> torch.dtype:
        if self.precision is not None:
            return {"complex64": torch.complex64, "complex128": torch.complex128}[self.precision]
        double = self.dtype in (torch.float64, torch.complex128, torch.int64)
        return torch.complex128 if double else torch.complex64

    @property
    def states(self) -> int:
        """States per call."""
        return self.batch * self.count

    @property
    def input_bytes(self) -> int:
        return self.states * self.features * self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return self.states * self.complex_dtype.itemsize << self.n

    @property
    def pipelined(self) -> bool:
        return self.kind in ("device", "host", "host-sum", "replays") and self.table != "cpu"

    @property
    def summed(self) -> bool:
        """Whether what counts is abs().sum() of the states."""
        return self.kind in ("host-sum", "loop-sum")

    @property
    def looped(self) -> bool:
        return self.kind in ("loop", "loop-sum")

    @property
    def limit(self) -> str:
        """Which rate of this run bounds the row on its device."""
        return mix(self.dtype, self.complex_dtype) if self.encoding == "amplitude" else "write"

    def limits(self, device: str) -> set[str]:
        """Rates of device memory that floor and lines of this row need."""
        if self.kind != "device" and device != "cpu":
            return set()
        extra = any(line.unit == "of one extra pass" for line in self.lines)
        return {self.limit, *([mix(self.complex_dtype, self.complex_dtype)] if extra else [])}

    def on(self, device: str) -> Row:
        """This row, scaled down where it would be too much for a CPU.

        Lines are for the machine that a table is about: of ``cpu`` the CPU, else the GPU.
        """
        on_cpu = device == "cpu"
        lines = self.lines if on_cpu == (self.table == "cpu") else ()
        if not on_cpu:
            return replace(self, lines=lines)
        batch, count = self.cpu_batch or self.batch, self.cpu_count or self.count
        return replace(self, lines=lines, batch=batch, count=count, n=self.cpu_n or self.n)


def features(encoding: str, n: int) -> int:
    """Values per sample; of ``basis`` one index."""
    if encoding == "amplitude":
        return 1 << n
    if encoding == "basis":
        return 1
    return n + (n * (n - 1) // 2 if encoding == "iqp" else 0)


def make_inputs(row: Row, device: str) -> list[Any]:
    """Inputs to rotate among, so many that the cache does not hold them where that is sensible."""
    if row.kind == "device":
        return [_sample(row, row.batch, device) for _ in range(_copies(row, device))]
    if row.kind == "requests":
        return _requests(row, device)
    if row.callers:
        each = row.count // row.callers
        return [
            [vectors[first : first + each] for first in range(0, row.count, each)]
            for vectors in _requests(row, device)
        ]
    batches = _batches(row, device)
    if row.looped:
        return [list(itertools.islice(itertools.cycle(batches), row.count))]
    return batches


def pinned(batches: list[npt.NDArray[Any]]) -> list[torch.Tensor]:
    """The same values in pinned memory, as tensors."""
    shape, dtype = (len(batches), *batches[0].shape), torch.from_numpy(batches[0]).dtype
    tensors = list(torch.empty(shape, dtype=dtype, pin_memory=True))
    for tensor, batch in zip(tensors, batches, strict=True):
        tensor.copy_(torch.from_numpy(batch))
    return tensors


def _batches(row: Row, device: str) -> list[npt.NDArray[Any]]:
    """Consecutive batches of one data set in NumPy's memory: two at least, four where they fit."""
    batch_bytes = row.input_bytes // row.count
    held = CPU_HOST_BYTES if device == "cpu" else HOST_BYTES
    count = min(1024, max(4 if batch_bytes < held else 2, held // batch_bytes))
    return list(
        _data_set(row.dtype, count * row.batch * row.features, device).reshape(
            count, row.batch, row.features
        )
    )


def _requests(row: Row, device: str) -> list[list[npt.NDArray[Any]]]:
    """Lists of ``count`` vectors, each an array of its own, together as large as a data set."""
    held = CPU_HOST_BYTES if device == "cpu" else HOST_BYTES
    lists = max(2, held // row.input_bytes)
    values = _data_set(row.dtype, lists * row.count * row.features, device)
    return [
        [vector.copy() for vector in part]
        for part in values.reshape(lists, row.count, row.features)
    ]


@lru_cache(maxsize=1)
def _data_set(dtype: torch.dtype, values: int, device: str) -> npt.NDArray[Any]:
    """Normal values, made on ``device``: rows of one size in bytes share them."""
    made = torch.randn(values, dtype=dtype, device=device)
    array = np.empty(values, dtype=str(dtype).removeprefix("torch."))
    torch.from_numpy(array).copy_(made)
    return array


def _sample(row: Row, rows: int, device: str) -> torch.Tensor:
    """Random features, of a new seed at every call of one process, the same in every process."""
    shape = (rows, row.features)
    if row.encoding == "basis":
        return torch.randint(1 << row.n, shape, dtype=row.dtype, device=device)
    return torch.randn(shape, dtype=row.dtype, device=device)


def _copies(row: Row, device: str) -> int:
    return min(32, max(2, math.ceil(2 * _cache_bytes(device) / row.input_bytes)))


def _cache_bytes(device: str) -> int:
    if device == "cpu":
        return 32 << 20
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def floor_seconds(row: Row, limits: Limits) -> float:
    """The least time that this run's limits allow: bytes at full rate, at least one launch."""
    if row.kind != "device" and limits.h2d is not None:
        return max(row.input_bytes / limits.h2d, limits.launch)
    return max(_seconds_of_bytes(row, limits), limits.launch)


def _seconds_of_bytes(row: Row, limits: Limits) -> float:
    if row.limit == "write":
        return row.output_bytes / limits.write
    return (row.input_bytes + row.output_bytes) / limits.stream[row.limit]


def judge(
    line: Line, row: Row, times: dict[str, dict[str, Any]], limits: Limits
) -> dict[str, Any] | None:
    """What was reached, what the line asks for and whether it holds; None without either."""
    if line.contender not in times:
        return None
    seconds = times[line.contender]["median_s"]
    reached, wanted, holds = 0.0, line.value, False
    if line.unit in ("of limit", "of one extra pass"):
        bytes_at_rate = _seconds_of_bytes(row, limits)
        reached = bytes_at_rate / seconds
        if line.unit == "of one extra pass":
            copied = 2 * row.output_bytes / limits.stream[mix(row.complex_dtype, row.complex_dtype)]
            wanted = line.value * bytes_at_rate / (bytes_at_rate + copied)
        holds = reached >= wanted
    elif line.unit == "us":
        reached = 1e6 * seconds
        holds = reached <= wanted
    elif line.unit == "us to enqueue":
        reached = 1e6 * times[line.contender]["enqueue_s"]
        holds = reached <= wanted
    elif line.unit == "x torch graphs":
        others = [
            time["median_s"] for name, time in times.items() if name.startswith("torch graph")
        ]
        if not others:
            return None
        reached = min(others) / seconds
        holds = reached >= wanted
    elif line.unit == "launches":
        if limits.launch_bare is None:
            return None
        reached = seconds / limits.launch_bare
        holds = reached <= wanted
    elif line.unit == "of h2d":
        if limits.h2d is None:
            return None
        reached = row.input_bytes / limits.h2d / seconds
        holds = reached >= wanted
    elif line.unit.startswith("idle calls"):
        if "qdp alone" not in times:
            return None
        latency = times[line.contender]["latency"]
        figure = "p99_s" if line.unit.endswith("p99") else "median_s"
        reached = latency[figure] / times["qdp alone"]["latency"]["median_s"]
        holds = reached <= wanted
    else:
        other = times.get(line.unit.removeprefix("x "))
        if other is None:
            return None
        reached = other["median_s"] / seconds
        holds = reached >= wanted
    return {
        "contender": line.contender,
        "unit": line.unit,
        "line": wanted,
        "reached": reached,
        "holds": holds,
    }
