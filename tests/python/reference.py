"""Every encoding straight from its definition, in complex128 NumPy.

Nothing here is fast and nothing is shared with the engine: gates are matrices, products of
qubits are Kronecker products, diagonal phases are summed term by term. The state of a sample is
one row; index i holds the bits of the qubits in the order the convention says.
"""

from __future__ import annotations

from functools import cache, reduce
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Complex = NDArray[np.complex128]

CONVENTIONS: tuple[Any, ...] = ("qdp", "qiskit", "pennylane")

# Mathematically one state has one value; two ways of computing it differ by a few roundings of
# the result plus the rounding of the phases, which grows with the sum of their magnitudes.
ROUNDINGS = 8


def num_features(n: int, encoding: str) -> int:
    """Features per sample where the encoding fixes it."""
    return n * (n + 1) // 2 if encoding == "iqp" else n


def entangled_pairs(n: int, entanglement: str | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The pairs of qubits that an entanglement names."""
    if not isinstance(entanglement, str):
        return [(j, k) for j, k in entanglement]
    chain = list(pairwise(range(n)))
    if entanglement == "none":
        return []
    if entanglement == "full":
        return list(combinations(range(n), 2))
    if entanglement in ("linear", "reverse_linear", "pairwise"):
        return chain
    if entanglement in ("circular", "sca"):
        return chain + ([(n - 1, 0)] if n > 2 else [])
    raise ValueError(entanglement)


@cache
def bits(n: int, convention: str) -> NDArray[np.int64]:
    """Bit of qubit k in index i, shape (2**n, n)."""
    index = np.arange(2**n)[:, None]
    qubit = np.arange(n)[None, :]
    shift = n - 1 - qubit if convention == "pennylane" else qubit
    return (index >> shift) & 1


@cache
def hadamard(n: int) -> NDArray[np.float64]:
    """H on each of n qubits, as one matrix."""
    h = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0)
    product: NDArray[np.float64] = h
    for _ in range(n - 1):
        product = np.kron(product, h)
    return product


def apply_hadamards(states: Complex, n: int) -> Complex:
    """H on every qubit of every row."""
    h = hadamard(n)
    return states.real @ h + 1j * (states.imag @ h)


def zero_state(batch: int, n: int) -> Complex:
    states = np.zeros((batch, 2**n), np.complex128)
    states[:, 0] = 1
    return states


def amplitude(x: NDArray[Any], n: int) -> Complex:
    states = np.zeros((len(x), 2**n), np.complex128)
    for row, sample in zip(states, x, strict=True):
        squares = sample.real**2 + sample.imag**2
        row[: sample.size] = sample / np.sqrt(squares.sum())
    return states


def angle(x: NDArray[Any], n: int, rotation: str, convention: str) -> Complex:
    theta = x if convention == "qdp" else x / 2
    rows = []
    for sample in theta:
        qubits = []
        for t in sample:
            match rotation:
                case "x":
                    qubits.append(np.array([np.cos(t), -1j * np.sin(t)]))
                case "y":
                    qubits.append(np.array([np.cos(t), np.sin(t)], np.complex128))
                case "z":
                    qubits.append(np.array([np.exp(-1j * t), 0]))
        # A Kronecker product has its first factor in the most significant place.
        order = qubits if convention == "pennylane" else qubits[::-1]
        rows.append(reduce(np.kron, order))
    return np.array(rows, np.complex128).reshape(len(x), 2**n)


def basis(x: NDArray[Any], n: int, convention: str) -> Complex:
    states = np.zeros((len(x), 2**n), np.complex128)
    for row, sample in zip(states, x, strict=True):
        if sample.size == 1:
            row[int(sample[0])] = 1
        else:
            row[np.all(bits(n, convention) == sample, axis=1)] = 1
    return states


def phase(x: NDArray[Any], n: int, convention: str) -> Complex:
    theta = x @ bits(n, convention).T
    states: Complex = np.exp(1j * theta) / np.sqrt(2.0**n)
    return states


def iqp(x: NDArray[Any], n: int, convention: str, *, pairs: bool) -> Complex:
    b = bits(n, convention)
    theta = x[:, :n] @ b.T
    if pairs:
        for column, (j, k) in enumerate(combinations(range(n), 2), start=n):
            theta = theta + np.outer(x[:, column], b[:, j] * b[:, k])
    states = apply_hadamards(zero_state(len(x), n), n)
    return apply_hadamards(states * np.exp(1j * theta), n)


def zz(
    x: NDArray[Any], n: int, reps: int, pairs: list[tuple[int, int]], convention: str
) -> Complex:
    b = bits(n, convention)
    theta = 2 * x @ b.T
    for j, k in pairs:
        product = 2 * (np.pi - x[:, j]) * (np.pi - x[:, k])
        theta = theta + np.outer(product, b[:, j] ^ b[:, k])
    states = zero_state(len(x), n)
    for _ in range(reps):
        states = apply_hadamards(states, n) * np.exp(1j * theta)
    return states


def iqp_embedding(
    x: NDArray[Any], n: int, reps: int, pairs: list[tuple[int, int]], convention: str
) -> Complex:
    z = 1 - 2 * bits(n, convention)  # eigenvalues of Z
    theta = -0.5 * x @ z.T
    for j, k in pairs:
        theta = theta - 0.5 * np.outer(x[:, j] * x[:, k], z[:, j] * z[:, k])
    states = zero_state(len(x), n)
    for _ in range(reps):
        states = apply_hadamards(states, n) * np.exp(1j * theta)
    return states


def as_batch(data: ArrayLike) -> NDArray[Any]:
    """The samples as rows, in double precision."""
    x = np.atleast_2d(np.asarray(data))
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def encode(
    data: ArrayLike,
    n: int,
    encoding: str,
    *,
    rotation: str = "y",
    reps: int | None = None,
    entanglement: str | Sequence[Sequence[int]] = "full",
    convention: str = "qdp",
) -> Complex:
    """The states of the samples, shape (batch, 2**n)."""
    x = as_batch(data)
    match encoding:
        case "amplitude":
            return amplitude(x, n)
        case "angle":
            return angle(x, n, rotation, convention)
        case "basis":
            return basis(x, n, convention)
        case "phase":
            return phase(x, n, convention)
        case "iqp":
            return iqp(x, n, convention, pairs=True)
        case "iqp-z":
            return iqp(x, n, convention, pairs=False)
        case "zz":
            return zz(x, n, reps or 2, entangled_pairs(n, entanglement), convention)
        case "iqp-embedding":
            return iqp_embedding(x, n, reps or 1, entangled_pairs(n, entanglement), convention)
    raise ValueError(encoding)


def phase_bound(
    data: ArrayLike,
    n: int,
    encoding: str,
    *,
    reps: int | None = None,
    entanglement: str | Sequence[Sequence[int]] = "full",
    **_: Any,
) -> float:
    """Largest sum of phase magnitudes that any sample's state is made of."""
    x = np.abs(as_batch(data)) if np.size(data) else np.zeros((1, n))
    match encoding:
        case "amplitude" | "basis":
            return 0.0
        case "angle" | "phase" | "iqp" | "iqp-z":
            total = x.sum(axis=1)
        case "zz":
            total = 2 * x.sum(axis=1)
            for j, k in entangled_pairs(n, entanglement):
                total = total + 2 * (np.pi + x[:, j]) * (np.pi + x[:, k])
            total = total * (reps or 2)
        case "iqp-embedding":
            total = 0.5 * x.sum(axis=1)
            for j, k in entangled_pairs(n, entanglement):
                total = total + 0.5 * x[:, j] * x[:, k]
            total = total * (reps or 1)
        case _:
            raise ValueError(encoding)
    return float(total.max())


def tolerance(
    expected: Complex, dtype: Any, data: ArrayLike, n: int, encoding: str, **options: Any
) -> float:
    """Largest absolute error that rounding in ``dtype`` explains."""
    eps = float(np.finfo(dtype).eps)
    scale = float(np.abs(expected).max()) if expected.size else 1.0
    return eps * (ROUNDINGS + 2 * phase_bound(data, n, encoding, **options)) * scale


def assert_states(
    actual: NDArray[Any], data: ArrayLike, n: int, encoding: str, **options: Any
) -> None:
    """The states equal the reference's to rounding in their own dtype."""
    expected = encode(data, n, encoding, **options)
    if actual.ndim == 1:
        expected = expected[0]
    assert_close(actual, expected, data, n, encoding, **options)


def assert_close(
    actual: NDArray[Any],
    expected: Complex,
    data: ArrayLike,
    n: int,
    encoding: str,
    *,
    slack: float = 1.0,
    **options: Any,
) -> None:
    """Two ways to the same states agree to rounding in the dtype of ``actual``.

    ``slack`` widens the tolerance where ``expected`` has rounding errors of its own.
    """
    options.pop("convention", None)
    assert actual.shape == expected.shape
    assert actual.dtype in (np.complex64, np.complex128)
    error = np.abs(actual - expected)
    assert not np.isnan(error).any(), f"{encoding} n={n} {options}: NaN in the states"
    worst = float(error.max()) if error.size else 0.0
    bound = slack * tolerance(expected, actual.dtype, data, n, encoding, **options)
    assert worst <= bound, f"{encoding} n={n} {options}: error {worst:.3g} > {bound:.3g}"
