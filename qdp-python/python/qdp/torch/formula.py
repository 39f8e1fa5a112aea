"""The encodings written out in torch's own operations, differentiable to any order.

What derivatives beyond the first and forward-mode differentiation are taken through. It keeps many
tensors of the size of the states.
"""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from qdp.exceptions import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["encode"]


def encode(
    x: Tensor,
    dtype: torch.dtype,
    *,
    num_qubits: int,
    encoding: str = "amplitude",
    rotation: str | None = None,
    reps: int | None = None,
    entanglement: str | None = None,
    pairs: Sequence[int] | None = None,
    convention: str = "qdp",
) -> Tensor:
    """The states of samples, shape ``(batch, 2**num_qubits)``.

    ``x`` has shape ``(features,)`` or ``(batch, features)``; ``pairs`` is a list of pairs without
    its inner brackets.
    """
    n, big_endian = num_qubits, convention == "pennylane"
    x = x.unsqueeze(0) if x.dim() == 1 else x
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    x = x.to(dtype if x.is_complex() else real)
    match encoding:
        case "amplitude":
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            return pad(x / norm, (0, 2**n - x.shape[1])).to(dtype)
        case "angle":
            angles = x if convention == "qdp" else x / 2
            return rotated(angles, rotation or "y", big_endian)
        case "phase":
            return layers(x @ bits(n, x, big_endian=big_endian).T, n, 1)
        case "iqp" | "iqp-z":
            b = bits(n, x, big_endian=big_endian)
            both = [b[:, j] * b[:, k] for j, k in combinations(range(n), 2)]
            terms = [*b.T, *(both if encoding == "iqp" else [])]
            return hadamard(layers(x @ torch.stack(terms), n, 1), n)
        case "zz":
            b = bits(n, x, big_endian=big_endian)
            theta = 2 * x @ b.T
            for j, k in coupled(n, entanglement, pairs):
                product = 2 * (math.pi - x[:, j]) * (math.pi - x[:, k])
                theta = theta + torch.outer(product, (b[:, j] - b[:, k]).abs())
            return layers(theta, n, 2 if reps is None else reps)
        case "iqp-embedding":
            z = 1 - 2 * bits(n, x, big_endian=big_endian)
            theta = -0.5 * x @ z.T
            for j, k in coupled(n, entanglement, pairs):
                theta = theta - 0.5 * torch.outer(x[:, j] * x[:, k], z[:, j] * z[:, k])
            return layers(theta, n, 1 if reps is None else reps)
    raise InvalidArgumentError(f"encoding: expected one that has derivatives, got {encoding!r}")


def bits(n: int, like: Tensor, *, big_endian: bool) -> Tensor:
    """Bit of qubit k in index i, shape ``(2**n, n)``."""
    shifts = torch.arange(n, device=like.device)
    index = torch.arange(2**n, device=like.device)
    b = (index[:, None] >> (shifts.flip(0) if big_endian else shifts)) & 1
    return b.to(like.dtype)


def coupled(n: int, entanglement: str | None, pairs: Sequence[int] | None) -> list[tuple[int, int]]:
    """The pairs of qubits that an entanglement couples."""
    if pairs is not None:
        return list(zip(pairs[::2], pairs[1::2], strict=True))
    chain = list(pairwise(range(n)))
    match entanglement or "full":
        case "none":
            return []
        case "full":
            return list(combinations(range(n), 2))
        case "circular" | "sca":
            return chain + [(0, n - 1)] * (n > 2)
    return chain


def rotated(angles: Tensor, rotation: str, big_endian: bool) -> Tensor:
    """The product of one rotated qubit per angle."""
    cos, sin = angles.cos(), angles.sin()
    zero = torch.zeros_like(cos)
    match rotation.lower():
        case "x":
            ones, others = torch.complex(cos, zero), torch.complex(zero, -sin)
        case "y":
            ones, others = torch.complex(cos, zero), torch.complex(sin, zero)
        case _:
            ones, others = torch.complex(cos, -sin), torch.complex(zero, zero)
    qubits = torch.stack([ones, others], dim=-1).unbind(1)
    states = torch.ones_like(ones[:, :1])
    for qubit in reversed(qubits) if big_endian else qubits:
        states = (qubit[:, :, None] * states[:, None, :]).flatten(1)
    return states


def layers(theta: Tensor, n: int, reps: int) -> Tensor:
    """H on every qubit of zero and the phases ``theta``, ``reps`` times."""
    phases = torch.polar(torch.ones_like(theta), theta)
    states = phases * 2 ** (-n / 2)
    for _ in range(reps - 1):
        states = hadamard(states, n) * phases
    return states


def hadamard(states: Tensor, n: int) -> Tensor:
    """H on every qubit of every row."""
    shape = states.shape
    for qubit in range(n):
        zero, one = states.reshape(shape[0], -1, 2, 2**qubit).unbind(2)
        states = torch.stack([zero + one, zero - one], dim=2)
    return states.reshape(shape) * 2 ** (-n / 2)
