"""Types of arguments, for annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

__all__ = ["Convention", "Entanglement", "Precision"]

Precision: TypeAlias = Literal["complex64", "complex128"]
Convention: TypeAlias = Literal["qdp", "qiskit", "pennylane"]
Entanglement: TypeAlias = (
    Literal["full", "linear", "reverse_linear", "circular", "pairwise", "sca", "none"]
    | Sequence[Sequence[int]]
)
