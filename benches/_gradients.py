"""QDP's gradients by the features, beside those of plain torch and of PennyLane."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import _reference
import qdp.torch
import torch
from _pennylane import circuit
from _workloads import Row, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qdp._types import Convention
    from torch import Tensor

BATCH = 4
SIZES = (4, 8)
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("amplitude", {}),
    *(("angle", {"rotation": rotation}) for rotation in "xyz"),
    ("phase", {}),
    ("iqp", {}),
    ("iqp-z", {}),
    ("zz", {"reps": 2}),
    ("iqp-embedding", {"reps": 1}),
)
STATES = {torch.float32: torch.complex64, torch.float64: torch.complex128}
#: How far a gradient may be from another, as a fraction of the largest. An entry sums the cotangent
#: over all amplitudes: rounding by 2**-24 or 2**-53 each, and once more for every radian of phase
#: where doubles hold it, leaves less than a hundred units.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass
class Compared:
    """A row: how far QDP's gradient is from each peer's, as a fraction of the largest entry."""

    name: str
    tolerance: float
    table: str = "gradients"
    apart: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether QDP gave no gradient, or another than a peer."""
        return "qdp" in self.skipped or any(map(self.wrong, self.apart))

    def wrong(self, peer: str) -> bool:
        """Whether QDP's gradient is not that of a peer; NaN is none's."""
        return not self.apart[peer] <= self.tolerance

    def record(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {**asdict(self), "passed": not self.failed}

    def text(self) -> str:
        """A row for people."""
        apart = ", ".join(
            f"{peer} {error:.1e}{'!' if self.wrong(peer) else ''}"
            for peer, error in self.apart.items()
        )
        skipped = "".join(f"; {name}: {reason[:200]}" for name, reason in self.skipped.items())
        return f"{self.name}: apart by {apart or 'nothing'} (at most {self.tolerance:g}){skipped}"


def gradients(device: str, *, quick: bool) -> Iterator[Compared]:
    """Vector-Jacobian products for random cotangents of random samples.

    Both peers compute in double precision, from the same values: torch differentiates the
    definition, on the same device, and PennyLane its circuit of the same states in its own
    convention, on the host.
    """
    for encoding, options in CASES:
        for dtype in STATES:
            for n in SIZES[:1] if quick else SIZES:
                yield _compared(encoding, options, n, dtype, device)


def _compared(
    encoding: str, options: dict[str, Any], n: int, dtype: torch.dtype, device: str
) -> Compared:
    row = Row("", "bulk", "device", encoding, n, dtype, batch=BATCH, **options)
    rotation = f"-{row.rotation}" if row.rotation else ""
    name = f"gradient-{encoding}{rotation}-{str(dtype).removeprefix('torch.')}-n{n}"
    compared = Compared(name, TOLERANCE[dtype])
    generator = torch.Generator().manual_seed(2026 + n)
    shape = (BATCH, row.features)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    x = (x if encoding == "amplitude" else math.pi * x).to(dtype)
    cotangent = torch.randn(BATCH, 1 << n, generator=generator, dtype=STATES[dtype])

    peers: dict[str, tuple[Convention, str, Callable[[Tensor], Tensor]]] = {
        "torch": ("qdp", device, lambda x: _reference.states(row, x)),
        "pennylane": ("pennylane", "cpu", lambda x: _pennylane(row, x)),
    }
    for peer, (convention, place, encode) in peers.items():
        try:
            theirs = _gradient(encode, x.double(), cotangent.to(torch.complex128), place)
        except UnavailableError as missing:
            compared.skipped[peer] = str(missing)
            continue

        def ours(x: Tensor, convention: Convention = convention) -> Tensor:
            states: Tensor
            states = qdp.torch.encode(x, n, encoding, convention=convention, **row.options)
            return states

        try:
            own = _gradient(ours, x, cotangent, device)
        except Exception as failure:  # noqa: BLE001 (a row that fails is a result, not the end)
            compared.skipped["qdp"] = f"{type(failure).__name__}: {failure}"
            break
        compared.apart[peer] = float((own - theirs).abs().max() / theirs.abs().max())
    return compared


def _gradient(
    encode: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, device: str
) -> Tensor:
    """The gradient by the samples, in double precision on the host."""
    x = x.to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(encode(x), x, cotangent.to(device))
    return gradient.cpu().double()


def _pennylane(row: Row, x: Tensor) -> Tensor:
    gates = circuit(row, convention="pennylane")
    import pennylane as qml

    device = qml.device("default.qubit", wires=row.n)
    node = qml.QNode(gates, device, interface="torch", diff_method="backprop")
    states: Tensor = node(x)
    return states
