"""What is right, straight from the definitions, and how far a result is off."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    from _workloads import Row


def picks(rows: int) -> list[int]:
    """The samples that are compared."""
    return sorted({0, rows // 2, rows - 1})


def expected(row: Row, data: Any, device: str) -> torch.Tensor:
    """States of a few samples, shape ``(len(picks), 2**n)``.

    Where a row is summed, the sum of all absolute values, of shape ``(1, 1)``.
    """
    x = _samples(row, data).to(device)
    if row.summed:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        total: torch.Tensor = (x.abs() / norms).sum()
        return total.to(torch.complex128).reshape(1, 1)
    return states(row, x[picks(len(x))])


def states(row: Row, x: torch.Tensor) -> torch.Tensor:
    """States of every sample in ``x``, on its device."""
    n = row.n
    if row.encoding == "basis":
        return torch.nn.functional.one_hot(x[:, 0], 1 << n).to(torch.complex128)
    x = x.double()
    if row.encoding == "amplitude":
        unit: torch.Tensor = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return unit.to(torch.complex128)
    if row.encoding == "angle":
        product = torch.ones(len(x), 1, dtype=torch.complex128, device=x.device)
        for k in range(n):
            cos, sin = x[:, k, None].cos(), x[:, k, None].sin()
            if row.rotation == "z":
                low, high = cos - 1j * sin, 0 * sin
            else:
                low, high = cos, -1j * sin if row.rotation == "x" else sin
            product = torch.cat([low * product, high * product], dim=1)
        return product
    diagonal = torch.exp(1j * _phases(row, x))
    uniform = 2 ** (-n / 2)
    if row.encoding == "phase":
        return diagonal * uniform
    if row.encoding in ("zz", "iqp-embedding"):
        layered = diagonal * uniform
        for _ in range((row.reps or 1) - 1):
            layered = _hadamard(layered, n) * diagonal
        return layered
    return _hadamard(diagonal * uniform, n)


def _phases(row: Row, x: torch.Tensor) -> torch.Tensor:
    """Phase of every basis state: a constant, a term for each bit and one for each pair of bits."""
    n = row.n
    constant = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
    single = x[:, :n].clone()
    pair = torch.zeros(len(x), n, n, dtype=torch.float64, device=x.device)
    upper = torch.triu_indices(n, n, 1)
    if row.encoding == "iqp":
        pair[:, upper[0], upper[1]] = x[:, n:]
    elif row.encoding == "zz":  # b_j xor b_k = b_j + b_k - 2 b_j b_k
        y = math.pi - x
        weight = 2 * y[:, :, None] * y[:, None, :] * (1 - torch.eye(n, device=x.device))
        single = 2 * x + weight.sum(dim=2)
        pair = -2 * weight
    elif row.encoding == "iqp-embedding":  # -1/2 (sum x_k z_k + sum x_j x_k z_j z_k), z = 1 - 2 b
        weight = x[:, :, None] * x[:, None, :] * (1 - torch.eye(n, device=x.device))
        constant = -(x.sum(dim=1) + weight.sum(dim=(1, 2)) / 2)[:, None] / 2
        single = x + weight.sum(dim=2)
        pair = -2 * weight
    phases = constant
    for k in range(n):
        term = single[:, k, None]  # of bit k, for every value of the bits below it
        for j in range(k):
            term = torch.cat([term, term + pair[:, j, k, None]], dim=1)
        phases = torch.cat([phases, phases + term], dim=1)
    return phases


def _hadamard(states: torch.Tensor, n: int) -> torch.Tensor:
    """Hadamard gate on every qubit."""
    for qubit in range(n):
        split = states.reshape(len(states), -1, 2, 1 << qubit)
        low, high = split[:, :, 0], split[:, :, 1]
        states = torch.stack([low + high, low - high], dim=2) * math.sqrt(0.5)
    return states.reshape(len(states), -1)


def error(row: Row, result: Any, reference: torch.Tensor) -> float:
    """Largest distance of a state from the right one, as a fraction of its norm."""
    if isinstance(result, list):
        result = torch.cat([_tensor(result[index]) for index in picks(len(result))])
    else:
        result = _tensor(result)
        result = result.reshape(1, 1) if row.summed else result[picks(len(result))]
    difference = result.to(reference.device, torch.complex128) - reference
    norms = torch.linalg.vector_norm(reference, dim=1)
    return float((torch.linalg.vector_norm(difference, dim=1) / norms).max())


def tolerance(row: Row) -> float:
    """Error that rounding explains: a few units for each qubit and for each radian of phase."""
    pairs = row.n * (row.n - 1) / 2
    radians = {
        "iqp": row.n + pairs,
        "iqp-embedding": (row.reps or 1) * (row.n + pairs),
        "zz": (row.reps or 1) * (2 * row.n + 10 * pairs),
    }.get(row.encoding, row.n)
    if row.summed:
        radians = 1000  # the sum of many roundings
    unit = float(np.finfo(np.float32 if row.complex_dtype == torch.complex64 else float).eps)
    return unit * (16 + 2 * radians)


def _samples(row: Row, data: Any) -> torch.Tensor:
    if row.kind == "requests":
        return torch.from_numpy(np.stack(data))
    if row.callers:  # each returns its last result
        return torch.from_numpy(np.stack([vectors[-1] for vectors in data]))
    if row.looped:
        return torch.from_numpy(data[-1])
    if row.kind == "replays":
        return torch.from_numpy(data["x"])
    return data if isinstance(data, torch.Tensor) else torch.from_numpy(data)


def _tensor(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else from_dlpack(result)
