"""The states that PennyLane, Qiskit and plain torch give, brought to one convention.

Each library is asked for its own state in its own order and with its own angles, through its own
template where it has one and gate by gate where it has none. The result is then reordered, and
the features of ``angle`` doubled, for the convention asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import reference
from numpy.typing import NDArray

Complex = NDArray[np.complex128]
Peer = Callable[..., Complex]


def bit_reverse(states: Complex, n: int) -> Complex:
    """The same states with the qubits in the opposite order."""
    axes = (0, *range(n, 0, -1))
    return states.reshape(-1, *[2] * n).transpose(axes).reshape(-1, 2**n)


def padded(x: NDArray[Any], n: int) -> NDArray[Any]:
    return np.pad(x, ((0, 0), (0, 2**n - x.shape[1])))


# PennyLane: wire 0 is the most significant bit, rotations take half angles.


@cache
def _pennylane_device(n: int) -> Any:
    import pennylane as qml

    return qml.device("default.qubit", wires=n)


def pennylane_circuit(
    n: int,
    encoding: str,
    *,
    rotation: str = "y",
    reps: int | None = None,
    entanglement: str | Sequence[Sequence[int]] = "full",
    hadamards_after: bool = False,
) -> Callable[[Any], Any]:
    """PennyLane's circuit of an encoding, for samples of any interface."""
    import pennylane as qml

    wires = range(n)

    def gates(x: Any) -> None:
        match encoding:
            case "amplitude":
                qml.AmplitudeEmbedding(x, wires=wires, pad_with=0.0, normalize=True)
            case "angle":
                qml.AngleEmbedding(x, wires=wires, rotation=rotation.upper())
            case "basis" if x.size == 1:
                qml.BasisEmbedding(int(x[0]), wires=wires)
            case "basis":
                qml.BasisEmbedding(x.astype(int), wires=wires)
            case "iqp-embedding":
                pattern = None
                if entanglement != "full":
                    pattern = [list(p) for p in reference.entangled_pairs(n, entanglement)]
                qml.IQPEmbedding(x, wires=wires, n_repeats=reps or 1, pattern=pattern)
            case "zz":
                for _ in range(reps or 2):
                    for k in wires:
                        qml.Hadamard(k)
                        qml.PhaseShift(2 * x[:, k], wires=k)
                    for j, k in reference.entangled_pairs(n, entanglement):
                        qml.CNOT([j, k])
                        qml.PhaseShift(2 * (np.pi - x[:, j]) * (np.pi - x[:, k]), wires=k)
                        qml.CNOT([j, k])
            case "phase" | "iqp" | "iqp-z":
                for k in wires:
                    qml.Hadamard(k)
                    qml.PhaseShift(x[:, k], wires=k)
                if encoding == "iqp":
                    for column, pair in enumerate(combinations(wires, 2), start=n):
                        qml.ControlledPhaseShift(x[:, column], wires=pair)
        if hadamards_after or encoding in ("iqp", "iqp-z"):
            for k in wires:
                qml.Hadamard(k)

    def circuit(x: Any) -> Any:
        gates(x)
        return qml.state()

    return circuit


def pennylane(x: NDArray[Any], n: int, encoding: str, **options: Any) -> Complex:
    """PennyLane's states, in its own order."""
    import pennylane as qml

    circuit = pennylane_circuit(n, encoding, **options)
    node = qml.QNode(circuit, _pennylane_device(n), interface=None)
    if encoding == "basis":  # BasisEmbedding takes one sample
        return np.array([node(sample) for sample in x])
    return np.asarray(node(x)).reshape(len(x), 2**n)


# Qiskit: qubit 0 is the least significant bit, rotations take half angles.

# Initialize is synthesised into gates and those are run up to this size. The synthesis takes half
# a minute at 12 qubits; beyond this size the state it would prepare is read from the instruction.
SYNTHESISED_QUBITS = 8


def _pairs_key(entanglement: Any) -> Any:
    return entanglement if isinstance(entanglement, str) else tuple(map(tuple, entanglement))


@cache
def _qiskit_circuit(n: int, encoding: str, rotation: str, reps: int | None, pairs: Any) -> Any:
    from qiskit import QuantumCircuit
    from qiskit.circuit import ParameterVector
    from qiskit.circuit.library import z_feature_map, zz_feature_map

    if encoding == "zz":
        # Qiskit's map of pairs needs two qubits and has no word for "no pairs".
        if n == 1 or pairs in ("none", ()):
            return z_feature_map(n, reps=reps or 2)
        entanglement: Any = pairs
        if not isinstance(pairs, str):  # blocks by their size: single qubits, then pairs
            entanglement = {1: [(k,) for k in range(n)], 2: list(pairs)}
        return zz_feature_map(n, reps=reps or 2, entanglement=entanglement)
    circuit = QuantumCircuit(n)
    x = ParameterVector("x", reference.num_features(n, encoding))
    match encoding:
        case "angle":
            for k in range(n):
                getattr(circuit, f"r{rotation}")(x[k], k)
        case "iqp-embedding":
            for _ in range(reps or 1):
                for k in range(n):
                    circuit.h(k)
                    circuit.rz(x[k], k)
                for j, k in reference.entangled_pairs(n, pairs):
                    circuit.rzz(x[j] * x[k], j, k)
        case "phase" | "iqp" | "iqp-z":
            for k in range(n):
                circuit.h(k)
                circuit.p(x[k], k)
            if encoding == "iqp":
                for column, (j, k) in enumerate(combinations(range(n), 2), start=n):
                    circuit.cp(x[column], j, k)
            if encoding != "phase":
                circuit.h(range(n))
    return circuit


def qiskit_states(circuit: Any, x: NDArray[Any]) -> Complex:
    """The states of a parametrised circuit, one per sample."""
    from qiskit.quantum_info import Statevector

    return np.array([Statevector(circuit.assign_parameters(sample)).data for sample in x])


def qiskit(
    x: NDArray[Any],
    n: int,
    encoding: str,
    *,
    rotation: str = "y",
    reps: int | None = None,
    entanglement: str | Sequence[Sequence[int]] = "full",
) -> Complex:
    """Qiskit's states, in its own order."""
    from qiskit import QuantumCircuit
    from qiskit.circuit.library import Initialize
    from qiskit.quantum_info import Statevector

    states = []
    match encoding:
        case "amplitude":
            for sample in padded(x, n):
                target = Initialize(sample, normalize=True)
                if n > SYNTHESISED_QUBITS:
                    states.append(np.array(target.params, np.complex128))
                    continue
                circuit = QuantumCircuit(n)
                circuit.append(target, range(n))
                states.append(Statevector(circuit).data)
        case "basis":
            for sample in x:
                if sample.size == 1:
                    states.append(Statevector.from_int(int(sample[0]), 2**n).data)
                    continue
                circuit = QuantumCircuit(n)
                for k in np.flatnonzero(sample):
                    circuit.x(int(k))
                states.append(Statevector(circuit).data)
        case _:
            key = _pairs_key(entanglement)
            return qiskit_states(_qiskit_circuit(n, encoding, rotation, reps, key), x)
    return np.array(states)


# torch has no encodings: this is what a user would write, qubit 0 least significant.


def torch(x: NDArray[Any], n: int, encoding: str, **options: Any) -> Complex:
    """The states in plain torch, complex128, with half angles."""
    import torch as tc

    t = tc.from_numpy(np.ascontiguousarray(x))
    states: Complex = torch_states(t, n, encoding, **options).numpy()
    return states


def torch_states(
    t: Any,
    n: int,
    encoding: str,
    *,
    rotation: str = "y",
    reps: int | None = None,
    entanglement: str | Sequence[Sequence[int]] = "full",
) -> Any:
    """The states of a tensor in plain torch, complex128, with half angles; differentiable."""
    import torch as tc

    batch = len(t)
    index = tc.arange(2**n)
    bit = [(index >> k & 1).double() for k in range(n)]
    sign = [1 - 2 * b for b in bit]

    def hadamards(states: Any) -> Any:
        for k in range(n):
            halves = states.reshape(batch, -1, 2, 2**k)
            low, high = halves[:, :, 0], halves[:, :, 1]
            states = tc.stack([low + high, low - high], dim=2).reshape(batch, -1)
        return states / math.sqrt(2**n)

    def one_hot(position: Any) -> Any:
        return tc.nn.functional.one_hot(position, 2**n).to(tc.complex128)

    def phases(terms: Any) -> Any:
        total = tc.zeros(batch, 2**n, dtype=tc.float64)
        for feature, pattern in terms:
            total += feature[:, None] * pattern
        return tc.polar(tc.ones_like(total), total)

    ground = one_hot(tc.zeros(batch, dtype=tc.int64))
    pairs = list(combinations(range(n), 2))
    match encoding:
        case "amplitude":
            states = tc.nn.functional.pad(t, (0, 2**n - t.shape[1])).to(tc.complex128)
            states = states / tc.linalg.vector_norm(states, dim=1, keepdim=True)
        case "angle":
            states = tc.ones(batch, 1, dtype=tc.complex128)
            for k in range(n):
                c, s = tc.cos(t[:, k] / 2), tc.sin(t[:, k] / 2)
                qubit = {
                    "x": tc.complex(tc.stack([c, 0 * c], 1), tc.stack([0 * s, -s], 1)),
                    "y": tc.stack([c, s], 1).to(tc.complex128),
                    "z": tc.complex(tc.stack([c, 0 * c], 1), tc.stack([-s, 0 * s], 1)),
                }[rotation]
                states = (qubit[:, :, None] * states[:, None, :]).reshape(batch, -1)
        case "basis":
            value = t.long()
            if value.shape[1] > 1:
                value = (value << tc.arange(n)).sum(1, keepdim=True)
            states = one_hot(value[:, 0])
        case "phase":
            states = phases((t[:, k], bit[k]) for k in range(n)) / math.sqrt(2**n)
        case "iqp" | "iqp-z":
            terms = [(t[:, k], bit[k]) for k in range(n)]
            if encoding == "iqp":
                terms += [(t[:, n + p], bit[j] * bit[k]) for p, (j, k) in enumerate(pairs)]
            states = hadamards(hadamards(ground) * phases(terms))
        case "zz":
            terms = [(2 * t[:, k], bit[k]) for k in range(n)]
            for j, k in reference.entangled_pairs(n, entanglement):
                factor = 2 * (math.pi - t[:, j]) * (math.pi - t[:, k])
                terms.append((factor, (1 - sign[j] * sign[k]) / 2))
            states = ground
            for _ in range(reps or 2):
                states = hadamards(states) * phases(terms)
        case "iqp-embedding":
            terms = [(-t[:, k] / 2, sign[k]) for k in range(n)]
            for j, k in reference.entangled_pairs(n, entanglement):
                terms.append((-t[:, j] * t[:, k] / 2, sign[j] * sign[k]))
            states = ground
            for _ in range(reps or 1):
                states = hadamards(states) * phases(terms)
        case _:
            raise ValueError(encoding)
    return states


LIBRARIES: dict[str, tuple[Peer, bool]] = {  # function, whether its order is big-endian
    "pennylane": (pennylane, True),
    "qiskit": (qiskit, False),
    "torch": (torch, False),
}


def states_by_convention(
    library: str, x: NDArray[Any], n: int, encoding: str, **options: Any
) -> dict[Any, Complex]:
    """A library's states in the order and with the angles of each convention."""
    peer, big_endian = LIBRARIES[library]
    native = peer(x, n, encoding, **options)
    full_angle = peer(2 * x, n, encoding, **options) if encoding == "angle" else native
    # Order means the same index everywhere for amplitudes and basis indices.
    ordered = encoding != "amplitude" and not (encoding == "basis" and x.shape[1] == 1)
    result = {}
    for convention in reference.CONVENTIONS:
        states = full_angle if convention == "qdp" else native
        opposite = big_endian != (convention == "pennylane")
        result[convention] = bit_reverse(states, n) if ordered and opposite else states
    return result
