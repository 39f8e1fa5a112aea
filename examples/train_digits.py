"""Train on handwritten digits: a quantum kernel and a variational model, beside PennyLane.

    python examples/train_digits.py [--device cuda] [--epochs 30]

The 1797 images of scikit-learn's digits are reduced to principal components, one per qubit, and
encoded by rotations. The kernel is the fidelity of two states (``qdp.gram``), in a support vector
machine. The variational model scales and shifts the components by trainable numbers
(``qdp.torch.AngleEncoding(affine=True)``), goes through a circuit of RY and CZ gates and reads out
Z on every qubit; a linear layer makes class scores of that. It is compiled whole by
``torch.compile``, encoding included. PennyLane trains the same model from the same numbers in the
same order, on ``default.qubit`` with backprop. Needs ``pip install "qdp[demo]" torch pennylane``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import qdp
import qdp.torch
import torch
from circuit import Circuit, pennylane_circuit
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

CLASSES = 10
#: Of the first principal component, in radians of a rotation; the others are smaller.
KERNEL_WIDTH, MODEL_WIDTH = 0.6, 1.0
RATE = 0.03


class Model(nn.Module):
    """Class scores of samples, by way of states of as many qubits as a sample has values."""

    def __init__(self, num_qubits: int, layers: int, *, pennylane: bool = False) -> None:
        super().__init__()
        self.encoding = qdp.torch.AngleEncoding(num_qubits, convention="pennylane", affine=True)
        self.circuit = Circuit(num_qubits, layers)
        self.scores = nn.Linear(num_qubits, CLASSES)
        self.expectations = self.pennylane(num_qubits) if pennylane else None

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, shape ``(batch, 10)``."""
        if self.expectations is None:
            values = self.circuit(self.encoding(x))
        else:
            weight, bias = (
                self.encoding.get_parameter("weight"),
                self.encoding.get_parameter("bias"),
            )
            features = x * weight + bias
            values = self.expectations(features, self.circuit.angles).to(x.dtype)
        scores: Tensor = self.scores(values)
        return scores

    @staticmethod
    def pennylane(num_qubits: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Encoding and circuit by PennyLane."""
        import pennylane as qml

        wires = range(num_qubits)
        return pennylane_circuit(num_qubits, lambda x: qml.AngleEmbedding(x, wires, rotation="Y"))


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--qubits", type=positive, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=positive, default=30)
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--no-pennylane", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()

    x, y = load_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = split
    if args.batch > len(x_train):
        parser.error(f"argument --batch: at most {len(x_train)}, the images to train on")
    components = PCA(args.qubits, random_state=0).fit(x_train)
    deviation = components.transform(x_train)[:, 0].std()
    x_train, x_test = (components.transform(part) / deviation for part in (x_train, x_test))

    libraries = ["QDP"] if args.no_pennylane else ["QDP", "PennyLane"]
    results: list[dict[str, Any]] = []
    for library in libraries:
        results.append(kernel(library, (x_train, x_test), (y_train, y_test), args.device))
        print(line(results[-1]), flush=True)
    for library in libraries:
        results.append(train(library, (x_train, x_test), (y_train, y_test), args))
        print(line(results[-1]), flush=True)
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "qdp": qdp.__version__,
            **{name: getattr(args, name) for name in ("qubits", "layers", "epochs", "batch")},
        }
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def positive(text: str) -> int:
    """A number above 0, of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def line(result: dict[str, Any]) -> str:
    """A result for people."""
    seconds = f"{result['seconds']:.3f} s"
    if "first_step_seconds" in result:
        seconds += f" after a first step of {result['first_step_seconds']:.1f} s"
    accuracy = 100 * result["accuracy"]
    return f"{result['model']:<12} {result['library']:<10} accuracy {accuracy:.1f} %, {seconds}"


# The kernel


def kernel(
    library: str,
    samples: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    classes: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    device: str,
) -> dict[str, Any]:
    """A support vector machine on fidelities; seconds are those of both matrices."""
    train_x, test_x = (
        torch.tensor(KERNEL_WIDTH * part, dtype=torch.float64, device=device) for part in samples
    )
    fidelities = qdp_fidelities if library == "QDP" else pennylane_fidelities
    fidelities(train_x[:2], train_x)  # whatever is set up at first
    began = time.perf_counter()
    matrices = [fidelities(x, train_x).cpu().numpy() for x in (train_x, test_x)]
    seconds = time.perf_counter() - began
    machine = SVC(C=10, kernel="precomputed").fit(matrices[0], classes[0])
    accuracy = float(machine.score(matrices[1], classes[1]))
    return {"model": "kernel", "library": library, "accuracy": accuracy, "seconds": seconds}


def qdp_fidelities(x: Tensor, y: Tensor) -> Tensor:
    """From the angles: no state is made."""
    fidelities: Tensor = qdp.gram(x, y, encoding="angle", convention="pennylane")
    return fidelities


def pennylane_fidelities(x: Tensor, y: Tensor) -> Tensor:
    """From the states."""
    import pennylane as qml

    wires = range(x.shape[1])

    def circuit(features: Tensor) -> Any:
        qml.AngleEmbedding(features, wires, rotation="Y")
        return qml.state()

    device = qml.device("default.qubit", wires=wires)
    states = qml.QNode(circuit, device, interface="torch", diff_method=None)
    overlaps: Tensor = states(x).conj() @ states(y).T
    return overlaps.abs().square()


# The variational model


def train(
    library: str,
    samples: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    classes: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train, and score what it learned; seconds are those of all steps but the first."""
    train_x, test_x = (
        torch.tensor(MODEL_WIDTH * part, dtype=torch.float32, device=args.device)
        for part in samples
    )
    train_y, test_y = (torch.tensor(part, device=args.device) for part in classes)
    torch.manual_seed(0)
    model = Model(args.qubits, args.layers, pennylane=library == "PennyLane").to(args.device)
    run = torch.compile(model, fullgraph=True) if library == "QDP" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    shuffle = np.random.default_rng(0)

    def step(index: Tensor) -> None:
        optimizer.zero_grad()
        loss = cross_entropy(run(train_x[index]), train_y[index])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    began = time.perf_counter()
    first_step = None
    for _ in range(args.epochs):
        order = torch.from_numpy(shuffle.permutation(len(train_x))).to(args.device)
        # Batches of one size: nothing is compiled twice.
        for index in order[: len(order) // args.batch * args.batch].reshape(-1, args.batch):
            step(index)
            if first_step is None:
                first_step = synchronized(args.device) - began
    seconds = synchronized(args.device) - began
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(dim=1) == test_y).float().mean())
    return {
        "model": "variational",
        "library": library,
        "accuracy": accuracy,
        "seconds": seconds - (first_step or 0.0),
        "first_step_seconds": first_step,
    }


def synchronized(device: str) -> float:
    """The time when everything enqueued is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
