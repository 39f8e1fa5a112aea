"""Worst error of every encoding against PennyLane, Qiskit and torch, as a table.

    python tests/python/equality_table.py -o FILE.json

One row per encoding, convention and dtype; the error is the largest absolute difference of two
amplitudes over every option of the encoding and every number of qubits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import live
import numpy as np
import qdp
from cases import CASES, PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Sequence


def measure(
    device: str | None, *, max_qubits: int = 12, libraries: Sequence[str] = tuple(live.LIBRARIES)
) -> list[dict[str, Any]]:
    """The worst error per library, encoding, convention and dtype."""
    engines = {p: qdp.Engine(device, precision=p) for p in PRECISIONS}
    worst: dict[tuple[str, str, str, str], float] = {}
    for library in libraries:
        for case in CASES:
            for n in range(1, max_qubits + 1):
                x, options = case.samples(n, batch=2), case.options(n)
                conventions = live.states_by_convention(library, x, n, case.encoding, **options)
                for convention, expected in conventions.items():
                    for precision, engine in engines.items():
                        states = engine.encode(
                            case.cast(x, precision),
                            n,
                            case.encoding,
                            convention=convention,
                            **options,
                        )
                        error = float(np.abs(states.numpy() - expected).max())
                        key = (library, case.encoding, convention, precision)
                        worst[key] = max(error, worst.get(key, 0.0))
    names = ("library", "encoding", "convention", "dtype")
    return [{**dict(zip(names, key, strict=True)), "error": e} for key, e in worst.items()]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line per encoding, convention and dtype, one column per library."""
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        key = (row["encoding"], row["convention"], row["dtype"])
        lines.setdefault(key, {})[row["library"]] = row["error"]
    table = [
        "| encoding | convention | dtype | " + " | ".join(libraries) + " |",
        "|---|---|---|" + "---|" * len(libraries),
    ]
    for key, errors in sorted(lines.items()):
        cells = [*key, *(f"{errors[name]:.1e}" for name in libraries)]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table) + "\n"


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of what was compared."""
    found = {name: importlib.metadata.version(name) for name in ("numpy", *libraries)}
    return {"qdp": qdp.__version__, "python": platform.python_version(), **found}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="save the rows here as JSON")
    parser.add_argument("-d", "--device", help='"cpu" or "cuda:N"; the GPU where there is one')
    parser.add_argument("-n", "--max-qubits", type=int, default=12)
    arguments = parser.parse_args()
    libraries = [name for name in live.LIBRARIES if find_spec(name)]
    rows = measure(arguments.device, max_qubits=arguments.max_qubits, libraries=libraries)
    if arguments.output:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": qdp.Engine(arguments.device).device,
            "max_qubits": arguments.max_qubits,
            "versions": versions(libraries),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(markdown(rows))


if __name__ == "__main__":
    main()
