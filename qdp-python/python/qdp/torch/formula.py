"""The encodings written out in torch's own operations, differentiable to any order.

What derivatives beyond the first and forward-mode differentiation are taken through. It keeps many
tensors of the size of the states. Angles and phases are computed in double, as they may be large,
and without matrix products, which torch may be set to round their factors for.
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
    if encoding == "amplitude":
        return pad(normalised(x, dtype), (0, 2**n - x.shape[1]))
    x = x.to(torch.float64)
    match encoding:
        case "angle":
            angles = x if convention == "qdp" else x / 2
            return rotated(angles, rotation or "y", dtype, big_endian=big_endian)
        case "phase":
            return layers(combined(x, bits(n, x, big_endian=big_endian)), n, 1, dtype)
        case "iqp" | "iqp-z":
            b = bits(n, x, big_endian=big_endian)
            both = [b[:, j] * b[:, k] for j, k in combinations(range(n), 2)]
            terms = [*b.unbind(1), *(both if encoding == "iqp" else [])]
            return hadamard(layers(combined(x, torch.stack(terms, 1)), n, 1, dtype), n)
        case "zz":
            b = bits(n, x, big_endian=big_endian)
            theta = combined(2 * x, b)
            for j, k in coupled(n, entanglement, pairs):
                product = 2 * (math.pi - x[:, j]) * (math.pi - x[:, k])
                theta = theta + torch.outer(product, (b[:, j] - b[:, k]).abs())
            return layers(theta, n, 2 if reps is None else reps, dtype)
        case "iqp-embedding":
            z = 1 - 2 * bits(n, x, big_endian=big_endian)
            theta = combined(-0.5 * x, z)
            for j, k in coupled(n, entanglement, pairs):
                theta = theta - 0.5 * torch.outer(x[:, j] * x[:, k], z[:, j] * z[:, k])
            return layers(theta, n, 1 if reps is None else reps, dtype)
    raise InvalidArgumentError(f"encoding: expected one that has derivatives, got {encoding!r}")


def normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows divided by their norms, which are sums of squares that neither overflow nor vanish."""
    x = x.to(torch.promote_types(x.dtype, dtype if x.is_complex() else dtype.to_real()))
    x = x / x.detach().abs().amax(dim=1, keepdim=True)
    return (x / (x * x.conj()).real.sum(dim=1, keepdim=True).sqrt()).to(dtype)


def bits(n: int, like: Tensor, *, big_endian: bool) -> Tensor:
    """Bit of qubit k in index i, shape ``(2**n, n)``."""
    shifts = torch.arange(n, device=like.device)
    index = torch.arange(2**n, device=like.device)
    b = (index[:, None] >> (shifts.flip(0) if big_endian else shifts)) & 1
    return b.to(like.dtype)


def combined(x: Tensor, terms: Tensor) -> Tensor:
    """``x @ terms.T``."""
    theta = torch.outer(x[:, 0], terms[:, 0])
    for k in range(1, x.shape[1]):
        theta = theta + torch.outer(x[:, k], terms[:, k])
    return theta


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


def rotated(angles: Tensor, rotation: str, dtype: torch.dtype, *, big_endian: bool) -> Tensor:
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
    qubits = torch.stack([ones, others], dim=-1).to(dtype).unbind(1)
    states = torch.ones_like(qubits[0][:, :1])
    for qubit in reversed(qubits) if big_endian else qubits:
        states = (qubit[:, :, None] * states[:, None, :]).flatten(1)
    return states


def layers(theta: Tensor, n: int, reps: int, dtype: torch.dtype) -> Tensor:
    """H on every qubit of zero and the phases ``theta``, ``reps`` times."""
    phases = torch.polar(torch.ones_like(theta), theta).to(dtype)
    states = phases * 2 ** (-n / 2)
    for _ in range(reps - 1):
        states = hadamard(states, n) * phases
    return states


def hadamard(states: Tensor, n: int) -> Tensor:
    """H on every qubit of every row."""
    shape = states.shape
    for qubit in range(n):
        zero, one = states.reshape(shape[0], 2 ** (n - 1 - qubit), 2, 2**qubit).unbind(2)
        states = torch.stack([zero + one, zero - one], dim=2)
    return states.reshape(shape) * 2 ** (-n / 2)
