"""Every encoding in torch: for each the fastest that we know in eager operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from _workloads import Row

    Encode = Callable[[torch.Tensor], torch.Tensor]


def formulation(row: Row, device: str) -> Encode:
    """States from a batch of features; constant tables are made here, once."""
    dtype = row.complex_dtype
    if row.encoding == "amplitude":
        return lambda x: _amplitude(x, dtype)
    if row.encoding == "angle":
        return lambda x: _product(torch.stack([x.cos(), x.sin()], dim=2)).to(dtype)
    if row.encoding == "phase":
        return lambda x: _product(_phase_factors(x)).to(dtype)
    if row.encoding == "basis":
        return lambda x: x.new_zeros(len(x), 1 << row.n, dtype=dtype).scatter_(1, x, 1)
    return _diagonal(row, device)


def _amplitude(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype.itemsize < 4:
        x = x.float()
    unit: torch.Tensor = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return unit.to(dtype)


def _phase_factors(x: torch.Tensor) -> torch.Tensor:
    half = math.sqrt(0.5)
    one = torch.full_like(x, half)
    return torch.stack([torch.polar(one, torch.zeros_like(x)), torch.polar(one, x)], dim=2)


def _product(factors: torch.Tensor) -> torch.Tensor:
    """Product states of shape ``(batch, 2**n)`` from factors ``(batch, n, 2)``.

    The low and the high half of the qubits first, then one outer product.
    """
    n = factors.shape[1]

    def product(qubits: range) -> torch.Tensor:
        state: torch.Tensor = factors[:, qubits[0]]
        for qubit in qubits[1:]:
            state = (factors[:, qubit, :, None] * state[:, None, :]).flatten(1)
        return state

    if n == 1:
        return product(range(1))
    low, high = product(range(n // 2)), product(range(n // 2, n))
    return (high[:, :, None] * low[:, None, :]).flatten(1)


def _diagonal(row: Row, device: str) -> Encode:
    """Phases as one matrix product, Walsh-Hadamard as one on each half of the qubits."""
    n = row.n
    real = torch.float32 if row.complex_dtype == torch.complex64 else torch.float64
    index = torch.arange(1 << n, device=device)
    bits = (index[:, None] >> torch.arange(n, device=device)) & 1
    first, second = torch.combinations(torch.arange(n, device=device)).T
    singles, pairs = bits, bits[:, first] * bits[:, second]
    if row.encoding == "iqp-z":
        pairs = pairs[:, :0]
    elif row.encoding == "zz":
        pairs = bits[:, first] ^ bits[:, second]
    elif row.encoding == "iqp-embedding":
        signs = 1 - 2 * bits
        singles, pairs = signs, signs[:, first] * signs[:, second]
    table = torch.cat([singles, pairs], dim=1).T.to(real).contiguous()

    def features(x: torch.Tensor) -> torch.Tensor:
        if row.encoding == "zz":
            y = math.pi - x
            return torch.cat([2 * x, 2 * y[:, first] * y[:, second]], dim=1)
        if row.encoding == "iqp-embedding":
            return torch.cat([x, x[:, first] * x[:, second]], dim=1) * -0.5
        return x

    def hadamard(qubits: int) -> torch.Tensor:
        h = torch.ones(1, 1, dtype=real, device=device)
        gate = torch.tensor([[1, 1], [1, -1]], dtype=real, device=device) * math.sqrt(0.5)
        for _ in range(qubits):
            h = torch.kron(h, gate)
        return h.contiguous()

    left, right = hadamard(n - n // 2), hadamard(n // 2)
    uniform = torch.tensor(2 ** (-n / 2), dtype=real, device=device)
    uniform_left = left * uniform  # what scales the states is in a table, not in a pass of its own

    final_hadamard = row.encoding in ("iqp", "iqp-z")

    def encode(x: torch.Tensor) -> torch.Tensor:
        phase = (features(x) @ table).reshape(len(x), len(left), len(right))
        repeats = (row.reps or 1) - 1  # after the first, each a Walsh-Hadamard and the phases again
        if not final_hadamard and not repeats:
            return torch.polar(uniform.expand(phase.shape), phase).flatten(1)
        cos, sin = phase.cos(), phase.sin()
        state = torch.complex(uniform_left @ cos @ right, uniform_left @ sin @ right)
        if not final_hadamard:
            layer = torch.complex(cos, sin)
            state *= layer
            for _ in range(repeats - 1):
                state = torch.complex(left @ state.real @ right, left @ state.imag @ right) * layer
        return state.flatten(1)

    return encode
