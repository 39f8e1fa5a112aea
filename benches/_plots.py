"""The pictures of one run. A function that has nothing to draw returns False."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from sweep import Point

    Record = dict[str, Any]

PEERS = {
    "torch": "o",
    "torch.compile": "v",
    "torch graph": "s",
    "qumat-qdp": "D",
    "pennylane": "^",
    "floor": "|",
}


def plot_ratios(record: Record, path: Path) -> bool:
    """Draw, on a logarithmic scale, how many times as long as QDP the peers and the floor take."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["table"] not in ("bulk", "cpu") and row["ratios"]]
    if not rows:
        return False
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for name, marker in PEERS.items():
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
    axes.set_title(_title(record))
    figure.legend(loc="outside lower center", ncols=len(PEERS), frameon=False)
    figure.savefig(path, dpi=150)
    return True


def plot_bulk(record: Record, path: Path) -> bool:
    """Draw fractions of the limit against n for every encoding, and the lines that they face."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["table"] == "bulk" and row["lines"]]
    if not rows:
        return False
    encodings = list(dict.fromkeys(row["encoding"] for row in rows))
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for axes, encoding in zip(panels, encodings, strict=False):
        chosen = [row for row in rows if row["encoding"] == encoding]
        for kind in dict.fromkeys((row["input"], row["output"]) for row in chosen):
            points = [row for row in chosen if (row["input"], row["output"]) == kind]
            x = [row["num_qubits"] for row in points]
            label = f"{kind[0]}, {kind[1]}".replace("complex", "c").replace("float", "f")
            (drawn,) = axes.plot(
                x, [row["lines"][0]["reached"] for row in points], "o-", markersize=4, label=label
            )
            wanted = [row["lines"][0]["line"] for row in points]
            axes.step(x, wanted, "--", where="mid", color=drawn.get_color(), linewidth=0.8)
        axes.set_title(encoding)
        axes.set_xlabel("qubits")
        axes.grid(linewidth=0.3)
        axes.set_ylim(0, 1.1)
        axes.legend(fontsize="x-small", loc="lower left")
    figure.suptitle(f"{_title(record)}: fraction of the limit, out= (dashed: the line)")
    figure.savefig(path, dpi=130)
    return True


def plot_sweep(record: Record, points: list[Point], path: Path) -> None:
    """Draw GB/s of states against n, a panel for each encoding, a color for each batch."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    encodings = list(dict.fromkeys(point.encoding for point in points))
    batches = sorted({point.batch for point in points})
    shown = batches if len(batches) < 6 else batches[::2]
    colors = colormaps["viridis"].resampled(len(shown) + 1)
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for axes, encoding in zip(panels, encodings, strict=False):
        axes.axhline(record["write"] / 1e9, color="gray", linewidth=1)
        for index, batch in enumerate(shown):
            for precision, style in [("complex64", "-"), ("complex128", ":")]:
                line = [
                    point
                    for point in points
                    if (point.encoding, point.precision, point.batch)
                    == (encoding, precision, batch)
                ]
                label = f"batch {batch}" if style == "-" else None
                axes.plot(*_rates(line), style, color=colors(index), label=label, linewidth=1.3)
        cliffs = [point for point in points if point.encoding == encoding and point.cliff]
        axes.plot(*_rates(cliffs), "rx", markersize=9)
        axes.set_title(encoding)
        axes.set_xlabel("qubits")
        axes.set_yscale("log")
        axes.grid(linewidth=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"{_title(record)}: GB/s of states (solid: complex64, dotted: complex128, "
        "gray: write-only, red crosses: cliffs)"
    )
    figure.savefig(path, dpi=130)


def plot_layouts(record: Record, points: list[Point], path: Path) -> None:
    """Draw GB/s of amplitude states against n: a panel for a layout, a color for an input type."""
    from matplotlib.figure import Figure

    layouts = list(dict.fromkeys(point.layout for point in points))
    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, len(layouts), sharex=True, sharey=True)
    for axes, layout in zip(panels, layouts, strict=True):
        for kind in dict.fromkeys(point.input for point in points):
            line = [point for point in points if (point.input, point.layout) == (kind, layout)]
            axes.plot(*_rates(line), ".-", label=kind, linewidth=1.2)
        axes.plot(*_rates([p for p in points if p.layout == layout and p.cliff]), "rx")
        axes.set_title(layout)
        axes.set_xlabel("qubits")
        axes.set_yscale("log")
        axes.grid(linewidth=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{_title(record)}: amplitude, GB/s of states (red crosses: cliffs)")
    figure.savefig(path, dpi=130)


def _rates(points: list[Point]) -> tuple[list[int], list[float]]:
    """Qubits and gigabytes of states per second."""
    x = [point.n for point in points]
    return x, [point.output_bytes / point.seconds / 1e9 for point in points]


def _title(record: Record) -> str:
    return f"{record['device']['name']}, {record['date'][:10]}"
