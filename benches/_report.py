"""The table and the picture of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Record = dict[str, Any]


def markdown(record: Record, names: Sequence[str]) -> str:
    """Two tables: microseconds per call, and how many times as long as QDP the others take."""
    rows = record["rows"]
    names = [name for name in names if any(name in row["times"] for row in rows)]
    peers = [name for name in names if not name.startswith("qdp")]
    times = [["us per call", "states", *names, "floor"]]
    ratios = [["times QDP", *peers, "QDP / floor", "QDP states/s"]]
    for row in rows:
        medians = {name: time["median_s"] for name, time in row["times"].items()}
        cells = [_microseconds(medians.get(name)) for name in names]
        times.append([row["name"], f"{row['states']:,}", *cells, _microseconds(row["floor_s"])])
        against = [_ratio(row["ratios"].get(name)) for name in peers]
        own = medians.get("qdp")
        ratios.append(
            [
                row["name"],
                *against,
                _ratio(own / row["floor_s"]) if own else "",
                f"{row['states'] / own:,.0f}" if own else "",
            ]
        )
    return _table(times) + "\n\n" + _table(ratios)


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def plot(record: Record, path: Path) -> None:
    """Draw, on a logarithmic scale, how many times as long as QDP the peers and the floor take."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["ratios"]]
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    markers = {
        "torch": "o",
        "torch.compile": "v",
        "torch graph": "s",
        "qumat-qdp": "D",
        "pennylane": "^",
        "floor": "|",
    }
    for name, marker in markers.items():
        points = [(row["ratios"][name], y) for y, row in enumerate(rows) if name in row["ratios"]]
        if points:
            x, y = zip(*points, strict=True)
            size = 12 if name == "floor" else 7
            color = "black" if name == "floor" else None
            axes.plot(x, y, marker, label=name, markersize=size, markeredgewidth=2, color=color)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel("time as a multiple of QDP's (right of 1: slower than QDP)")
    axes.set_title(f"{record['device']['name']}, {record['date'][:10]}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(markers), frameon=False)
    figure.savefig(path, dpi=150)
