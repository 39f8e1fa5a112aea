"""PennyLane's circuits that give the states of every encoding."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from _workloads import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from _workloads import Row
    from qdp._types import Convention


def circuit(row: Row, convention: Convention = "qdp") -> Callable[[Any], Any]:
    """From samples to states, in the order and with the angles of ``convention``: QDP's or
    PennyLane's own.

    PennyLane's wire 0 is the most significant bit, and QDP's qubit 0 the least; its rotations take
    half of QDP's angles.
    """
    if importlib.util.find_spec("pennylane") is None:
        raise UnavailableError("not installed: pip install pennylane")
    import pennylane as qml

    n, own = row.n, convention == "pennylane"
    wires = range(n) if own else range(n - 1, -1, -1)
    pairs = [(j, k) for j in range(n) for k in range(j + 1, n)]

    def hadamards() -> None:
        for wire in range(n):
            qml.Hadamard(wire)

    def embed(x: Any) -> None:
        if row.encoding == "amplitude":
            qml.AmplitudeEmbedding(x, wires=range(n), normalize=True)
        elif row.encoding == "angle":
            rotation = (row.rotation or "y").upper()
            qml.AngleEmbedding(x if own else 2 * x, wires=wires, rotation=rotation)
        elif row.encoding == "basis":
            qml.BasisEmbedding(x, wires=range(n))
        elif row.encoding == "iqp-embedding":
            qml.IQPEmbedding(x, wires=wires, n_repeats=row.reps)
        elif row.encoding == "zz":
            for _ in range(row.reps or 1):
                hadamards()
                zz_layer(x)
        else:
            hadamards()
            for qubit in range(n):
                qml.PhaseShift(x[:, qubit], wires[qubit])
            if row.encoding == "iqp":
                for column, (j, k) in enumerate(pairs, start=n):
                    qml.ControlledPhaseShift(x[:, column], [wires[j], wires[k]])
            if row.encoding in ("iqp", "iqp-z"):
                hadamards()

    def zz_layer(x: Any) -> None:
        for qubit in range(n):
            qml.PhaseShift(2 * x[:, qubit], wires[qubit])
        for j, k in pairs:
            qml.CNOT([wires[j], wires[k]])
            qml.PhaseShift(2 * (math.pi - x[:, j]) * (math.pi - x[:, k]), wires[k])
            qml.CNOT([wires[j], wires[k]])

    def states(x: Any) -> Any:
        embed(x)
        return qml.state()

    return states
