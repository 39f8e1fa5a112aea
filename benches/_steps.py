"""Training steps: the same model and numbers, encoded by QDP, by torch and by PennyLane."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qdp.torch
import torch
from _formulations import formulation
from _workloads import Row, UnavailableError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from circuit import Circuit, pennylane_circuit

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = 10
LAYERS = 4
WARM_UPS = 3


class Linear(nn.Module):
    """A linear layer over the real and imaginary parts of the amplitudes."""

    def __init__(self, num_qubits: int) -> None:
        super().__init__()
        self.scores = nn.Linear(2 << num_qubits, CLASSES)

    def forward(self, states: Tensor) -> Tensor:
        scores: Tensor = self.scores(torch.view_as_real(states).flatten(1))
        return scores


class Model(nn.Module):
    """Class scores: a trainable map of the angles, the states, and a head on them."""

    def __init__(self, contender: str, head: str, num_qubits: int, device: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.weight = nn.Parameter(torch.rand(num_qubits))
        self.bias = nn.Parameter(torch.rand(num_qubits))
        self.head = (
            Linear(num_qubits)
            if head == "linear"
            else nn.Sequential(Circuit(num_qubits, LAYERS), nn.Linear(num_qubits, CLASSES))
        )
        self.to(device)
        self.states: Callable[[Tensor], Tensor] | None = None
        self.expectations: Callable[[Tensor, Tensor], Tensor] | None = None
        if contender == "pennylane":
            self.expectations = pennylane(num_qubits)
        elif contender == "torch":
            self.states = formulation(
                Row("", "latency", "device", "angle", num_qubits, torch.float32), device
            )
        else:
            self.states = lambda x: qdp.torch.encode(x, num_qubits, "angle")

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight + self.bias
        if self.states is not None:
            scores: Tensor = self.head(self.states(x))
            return scores
        assert self.expectations is not None
        assert isinstance(self.head, nn.Sequential)
        circuit, linear = self.head
        values = self.expectations(x, circuit.get_parameter("angles"))
        return linear(values.to(x.dtype))  # type: ignore[no-any-return]


def pennylane(num_qubits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Encoding and circuit by PennyLane; qubit 0 of QDP is its last wire."""
    if importlib.util.find_spec("pennylane") is None:
        raise UnavailableError("not installed: pip install pennylane")
    import pennylane as qml

    wires = range(num_qubits - 1, -1, -1)
    return pennylane_circuit(num_qubits, lambda x: qml.AngleEmbedding(2 * x, wires, rotation="Y"))


class Step:
    """A step of training on one batch; on a GPU, but for PennyLane's, a CUDA graph."""

    def __init__(self, contender: str, head: str, num_qubits: int, batch: int, device: str) -> None:
        self.model = Model(contender, head, num_qubits, device)
        generator = torch.Generator().manual_seed(11)
        self.x = torch.rand(batch, num_qubits, generator=generator).to(device)
        self.y = torch.randint(CLASSES, (batch,), generator=generator).to(device)
        captured = device != "cpu" and contender != "pennylane"
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01, capturable=captured)
        self.loss = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()
        else:
            for _ in range(WARM_UPS):
                self._step()

    def __call__(self, _: Any = None) -> Tensor:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        return self.loss

    def losses(self, steps: int) -> list[float]:
        """The loss before each of the next steps."""
        return [float(self()) for _ in range(steps)]

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(self.model(self.x), self.y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.loss = loss.detach()

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
