"""The rows of the benchmark: what is encoded, and how fast the machine allows it to be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

Kind = Literal["device", "host", "host-sum", "requests", "stack", "loop"]


@dataclass(frozen=True)
class Row:
    """One workload.

    ``kind`` says where the input is and what a call does: ``device``, a tensor that lies on the
    device; ``host``, a pageable NumPy array; ``host-sum``, the same and then abs().sum() of the
    states by torch; ``requests``, ``count`` vectors encoded one by one; ``stack``, the same
    vectors stacked and encoded at once; ``loop``, ``count`` host batches one after another.
    """

    name: str
    kind: Kind
    encoding: str
    n: int
    dtype: type[np.floating[Any]] = np.float64
    batch: int = 64
    count: int = 1
    cpu_batch: int | None = None
    cpu_count: int | None = None

    @property
    def features(self) -> int:
        pairs = self.n * (self.n - 1) // 2
        return {"amplitude": 1 << self.n, "angle": self.n, "iqp": self.n + pairs}[self.encoding]

    @property
    def states(self) -> int:
        """States per call."""
        return self.batch * self.count

    @property
    def input_bytes(self) -> int:
        return self.states * self.features * np.dtype(self.dtype).itemsize

    @property
    def output_bytes(self) -> int:
        return self.states * (2 << self.n) * np.dtype(self.dtype).itemsize

    @property
    def pipelined(self) -> bool:
        return self.kind == "device"

    @property
    def tolerance(self) -> float:
        return 5e-6 if self.dtype is np.float32 else 1e-12

    def on(self, device: str) -> Row:
        """This row, scaled down where it would be too much for a CPU."""
        if device != "cpu":
            return self
        return replace(self, batch=self.cpu_batch or self.batch, count=self.cpu_count or self.count)


F32 = np.float32

ROWS = (
    Row("amplitude-device-f32-n10", "device", "amplitude", 10, F32),
    Row("amplitude-device-f32-n16", "device", "amplitude", 16, F32),
    Row("amplitude-device-f64-n16", "device", "amplitude", 16),
    Row("amplitude-device-f64-n16-b1024", "device", "amplitude", 16, batch=1024, cpu_batch=256),
    Row("amplitude-device-f64-n20", "device", "amplitude", 20, cpu_batch=8),
    Row("amplitude-host-f64-n16", "host", "amplitude", 16),
    Row("amplitude-host-f64-n16-sum", "host-sum", "amplitude", 16),
    Row("requests-n8", "requests", "amplitude", 8, batch=1, count=2048),
    Row("requests-n8-stack", "stack", "amplitude", 8, batch=1, count=2048),
    Row("requests-n10", "requests", "amplitude", 10, batch=1, count=2048),
    Row("requests-n10-stack", "stack", "amplitude", 10, batch=1, count=2048),
    Row("angle-device-f64-n8", "device", "angle", 8),
    Row("angle-device-f64-n16", "device", "angle", 16),
    Row("iqp-device-f64-n12", "device", "iqp", 12),
    Row("iqp-device-f64-n16", "device", "iqp", 16),
    Row("loop-host-f32-n16", "loop", "amplitude", 16, F32, count=200, cpu_count=20),
)


def make_inputs(row: Row, device: str) -> list[Any]:
    """Inputs to rotate among, so many that the cache does not hold them where that is sensible."""
    rng = np.random.default_rng(2026)

    def sample(rows: int) -> Array:
        return rng.standard_normal((rows, row.features)).astype(row.dtype)

    if row.kind in ("requests", "stack"):
        return [[vector.copy() for vector in sample(row.count)] for _ in range(2)]
    if row.kind == "loop":
        pool = [sample(row.batch) for _ in range(4)]
        return [[pool[index % len(pool)] for index in range(row.count)]]
    copies = min(32, max(2, math.ceil(2 * _cache_bytes(device) / row.input_bytes)))
    arrays = [sample(row.batch) for _ in range(copies)]
    if row.kind == "device":
        return [torch.from_numpy(array).to(device) for array in arrays]
    return arrays


def _cache_bytes(device: str) -> int:
    if device == "cpu":
        return 32 << 20
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def floor_seconds(row: Row, limits: dict[str, float]) -> float:
    """The least time that this run's limits allow: bytes at full rate, at least one launch."""
    if row.kind == "requests":
        return row.count * limits["launch"]
    if row.kind != "device" and "h2d" in limits:
        seconds = row.input_bytes / limits["h2d"]
    elif row.encoding == "amplitude":
        seconds = (row.input_bytes + row.output_bytes) / limits["read1_write2"]
    else:
        seconds = row.output_bytes / limits["write"]
    return max(seconds, limits["launch"])


def expected(row: Row, data: Any, device: str) -> torch.Tensor:
    """States of a few samples in complex128, straight from the definitions: what is right.

    For ``host-sum`` the sum of all absolute values, of shape ``(1, 1)``.
    """
    x = _samples(row, data).to(device, torch.float64)
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if row.kind == "host-sum":
        return (x.abs() / norms).sum().to(torch.complex128).reshape(1, 1)
    chosen = picks(len(x))
    x, norms = x[chosen], norms[chosen]
    index = torch.arange(1 << row.n, device=device)
    bits = (index[:, None] >> torch.arange(row.n, device=device)) & 1
    if row.encoding == "amplitude":
        return (x / norms).to(torch.complex128)
    if row.encoding == "angle":
        factors = torch.where(bits.bool(), x.sin()[:, None, :], x.cos()[:, None, :])
        return factors.prod(dim=2).to(torch.complex128)
    pairs = torch.combinations(torch.arange(row.n, device=device))
    ones = torch.cat([bits, bits[:, pairs[:, 0]] * bits[:, pairs[:, 1]]], dim=1)
    states = torch.exp(1j * (x @ ones.to(torch.float64).T))
    for qubit in range(row.n):
        split = states.reshape(len(x), -1, 2, 1 << qubit)
        low, high = split[:, :, 0], split[:, :, 1]
        states = torch.stack([low + high, low - high], dim=2)
    return states.reshape(len(x), -1) / (1 << row.n)


def picks(rows: int) -> list[int]:
    """The samples that are compared."""
    return sorted({0, rows // 2, rows - 1})


def _samples(row: Row, data: Any) -> torch.Tensor:
    if row.kind in ("requests", "stack"):
        return torch.from_numpy(np.stack(data))
    if row.kind == "loop":
        return torch.from_numpy(data[-1])
    return data if isinstance(data, torch.Tensor) else torch.from_numpy(data)


def max_error(row: Row, result: Any, data: Any, device: str) -> float:
    """Largest absolute difference between what a contender returned and what is right."""
    if isinstance(result, list):
        result = torch.cat([as_tensor(result[index]) for index in picks(len(result))])
    else:
        result = as_tensor(result)
        result = result.reshape(1, 1) if row.kind == "host-sum" else result[picks(len(result))]
    reference = expected(row, data, device)
    error = float((result.to(device, torch.complex128) - reference).abs().max())
    return error / float(reference.abs()) if row.kind == "host-sum" else error


def as_tensor(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else from_dlpack(result)
