"""A variational circuit on batches of states, in plain torch and the same in PennyLane.

Each layer rotates every qubit by RY and entangles neighbours on a ring by CZ; what is read out is
the expectation of Z on every qubit. Wire 0 is the most significant bit, as in PennyLane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


class Circuit(nn.Module):
    """Expectations of Z, shape ``(batch, num_qubits)``, of states ``(batch, 2**num_qubits)``.

    The gates of half of the qubits make one matrix, so that a layer is two matrix products.
    """

    ring: Tensor
    signs: Tensor

    def __init__(self, num_qubits: int, layers: int) -> None:
        super().__init__()
        self.halves = (num_qubits // 2, num_qubits - num_qubits // 2)
        self.angles = nn.Parameter(0.1 * torch.randn(layers, num_qubits))
        index = torch.arange(1 << num_qubits)
        bits = (index[:, None] >> torch.arange(num_qubits - 1, -1, -1)) & 1
        both = bits[:, [pair[0] for pair in ring(num_qubits)]]
        both = both * bits[:, [pair[1] for pair in ring(num_qubits)]]
        self.register_buffer("ring", 1.0 - 2.0 * (both.sum(dim=1) % 2))
        self.register_buffer("signs", 1.0 - 2.0 * bits)

    def forward(self, states: Tensor) -> Tensor:
        """Expectations of Z."""
        high, low = self.halves
        # Every gate is real: real and imaginary parts go side by side. The matrices of both halves
        # come from the right, which is one product for all states; in between halves change place.
        parts = torch.view_as_real(states).movedim(-1, 0).reshape(-1, 1 << high, 1 << low)
        diagonal = self.ring.reshape(1 << high, 1 << low).T
        for angles in self.angles:
            parts = (parts @ rotations(angles[high:]).T).transpose(1, 2)
            parts = ((parts @ rotations(angles[:high]).T) * diagonal).transpose(1, 2)
        probabilities = parts.reshape(2, len(states), -1).square().sum(dim=0)
        return probabilities @ self.signs


def rotations(angles: Tensor) -> Tensor:
    """The matrix of RY gates on as many qubits, the first the most significant."""
    cos, sin = (angles / 2).cos(), (angles / 2).sin()
    gates = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
    matrix = torch.ones(1, 1, dtype=angles.dtype, device=angles.device)
    for gate in gates:
        matrix = torch.kron(matrix, gate)
    return matrix


def ring(num_qubits: int) -> list[tuple[int, int]]:
    """Neighbours on a ring, each pair once."""
    if num_qubits < 3:
        return [(0, 1)] if num_qubits == 2 else []
    return [(qubit, (qubit + 1) % num_qubits) for qubit in range(num_qubits)]


def pennylane_circuit(
    num_qubits: int, embed: Callable[[Any], None]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The same on PennyLane's ``default.qubit``: expectations from features and angles.

    ``embed`` prepares the states of a batch of features.
    """
    import pennylane as qml

    def circuit(features: Tensor, angles: Tensor) -> Any:
        if features.is_cuda:  # else its states would begin on the CPU
            ground = torch.zeros(1 << num_qubits, dtype=torch.complex128, device=features.device)
            ground[0] = 1
            qml.StatePrep(ground, wires=range(num_qubits))
        embed(features)
        for layer in angles:
            for qubit in range(num_qubits):
                qml.RY(layer[qubit], wires=qubit)
            for pair in ring(num_qubits):
                qml.CZ(wires=pair)
        return [qml.expval(qml.PauliZ(qubit)) for qubit in range(num_qubits)]

    device = qml.device("default.qubit", wires=num_qubits)
    node = qml.QNode(circuit, device, interface="torch", diff_method="backprop")

    def expectations(features: Tensor, angles: Tensor) -> Tensor:
        return torch.stack(node(features, angles), dim=1)

    return expectations
