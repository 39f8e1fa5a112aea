"""The encodings and options that the tests run over, and samples for each."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUBITS = range(1, 13)
BATCH = 4
PRECISIONS: tuple[Any, ...] = ("complex64", "complex128")
REAL: dict[str, Any] = {"complex64": np.float32, "complex128": np.float64}


def some_pairs(n: int) -> list[tuple[int, int]]:
    """An entanglement list that is none of the named ones: out of order, with gaps."""
    return [] if n < 2 else [(1, 0)] if n == 2 else [(n - 1, 0), (0, n // 2)]


@dataclass(frozen=True)
class Case:
    """One encoding with one set of options."""

    encoding: str
    fixed: dict[str, Any] = field(default_factory=dict)
    features: str = "real"  # "complex", "odd" (length below 2**n) or "bits" where it matters

    def __str__(self) -> str:
        options = (
            f"{k}={v if isinstance(v, int | str) else 'list'}" for k, v in self.fixed.items()
        )
        kind = [] if self.features == "real" else [self.features]
        return "-".join([self.encoding, *kind, *options])

    def options(self, n: int) -> dict[str, Any]:
        """The keywords for n qubits."""
        return {k: v(n) if callable(v) else v for k, v in self.fixed.items()}

    def samples(self, n: int, batch: int = BATCH) -> NDArray[Any]:
        """Samples whose values float32 holds exactly, so both precisions see the same data."""
        rng = np.random.default_rng([zlib.crc32(str(self).encode()), n])
        match self.encoding, self.features:
            case "amplitude", "complex":
                x = rng.normal(size=(batch, 2**n)) + 1j * rng.normal(size=(batch, 2**n))
                return x.astype(np.complex64).astype(np.complex128)
            case "amplitude", kind:
                length = int(rng.integers(1, 2**n)) if kind == "odd" else 2**n
                x = rng.normal(size=(batch, length))
            case "basis", "bits":
                x = rng.integers(0, 2, size=(batch, n)).astype(np.float64)
            case "basis", _:
                x = rng.integers(0, 2**n, size=(batch, 1)).astype(np.float64)
            case _:
                count = reference.num_features(n, self.encoding)
                x = rng.uniform(-np.pi, np.pi, size=(batch, count))
        return x.astype(np.float32).astype(np.float64)

    def cast(self, x: NDArray[Any], precision: str) -> NDArray[Any]:
        """The samples in the element type that gives this precision."""
        return x.astype(precision if np.iscomplexobj(x) else REAL[precision])


ZZ_ENTANGLEMENTS = ("full", "linear", "circular", "none", some_pairs)

CASES = (
    Case("amplitude"),
    Case("amplitude", features="odd"),
    Case("amplitude", features="complex"),
    *(Case("angle", {"rotation": r}) for r in "xyz"),
    Case("basis"),
    Case("basis", features="bits"),
    Case("phase"),
    Case("iqp"),
    Case("iqp-z"),
    Case("zz"),
    *(Case("zz", {"reps": 1, "entanglement": e}) for e in ZZ_ENTANGLEMENTS),
    *(Case("zz", {"reps": 3, "entanglement": e}) for e in ("full", "circular", some_pairs)),
    *(
        Case("zz", {"entanglement": e})
        for e in ("linear", "reverse_linear", "circular", "pairwise", "sca", "none")
    ),
    Case("iqp-embedding"),
    Case("iqp-embedding", {"reps": 2}),
    Case("iqp-embedding", {"reps": 3, "entanglement": some_pairs}),
    Case("iqp-embedding", {"entanglement": "linear"}),
    Case("iqp-embedding", {"entanglement": "none"}),
)

# One case per encoding, for tests about something else than the options.
PLAIN_CASES = tuple({case.encoding: case for case in reversed(CASES) if not case.fixed}.values())
