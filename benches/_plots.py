"""The pictures of one run. A function that has nothing to draw returns False."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from sweep import Point

    Record = dict[str, Any]

PEERS = {
    "torch": "o",
    "torch pinned": "p",
    "torch.compile": "v",
    "torch graph": "s",
    "torch graph copies": "P",
    "torch graph staged": "X",
    "qumat-qdp": "D",
    "pennylane": "^",
    "floor": "|",
}
#: Contender and output of each line in the picture of the host table.
HOST_LINES = {
    ("qdp", "complex128"): ("QDP, pageable, to complex128", "o-C0"),
    ("qdp", "complex64"): ("QDP, pageable, to complex64", "s-C1"),
    ("qdp pinned", "complex128"): ("QDP, pinned", "^-C2"),
    ("torch", "complex128"): ("torch, pageable", "o--C3"),
    ("torch pinned", "complex128"): ("torch, pinned", "^--C4"),
    ("qumat-qdp", "complex128"): ("qumat-qdp, pageable", "D--C5"),
    ("pinned copy", "complex128"): ("pinned copy alone", "k:"),
}


def plot_ratios(record: Record, path: Path) -> bool:
    """Draw, on a logarithmic scale, how many times as long as QDP the peers and the floor take."""
    from matplotlib.figure import Figure

    rows = [
        row
        for row in record["rows"]
        if row["table"] not in ("bulk", "coalesce", "cpu")
        and row["ratios"].keys() & (PEERS.keys() - {"floor"})
    ]
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


def plot_host(record: Record, path: Path) -> bool:
    """Draw GB/s of source bytes against the bytes of a batch, and the rate of a pinned upload."""
    from matplotlib.figure import Figure

    rows = [
        row
        for row in record["rows"]
        if (row["table"], row["kind"]) == ("host", "host") and row["num_qubits"] <= 16
    ]
    if len({row["input_bytes"] for row in rows}) < 2:
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, timing in zip(panels, ("back to back", "one call at a time"), strict=True):
        for (name, output), (label, style) in HOST_LINES.items():
            # Of two rows of as many bytes the later one, which has the more qubits.
            line = {}
            for row in rows:
                times = row["times"].get(name, {})
                if timing != "back to back":
                    times = times.get("single", {})
                if row["output"] == output and times:
                    line[row["input_bytes"]] = row["input_bytes"] / times["median_s"] / 1e9
            if line:
                x, y = zip(*sorted(line.items()), strict=True)
                axes.plot(x, y, style, label=label, markersize=5)
        if record["limits"]["h2d"]:
            axes.axhline(record["limits"]["h2d"] / 1e9, color="gray", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = [1 << power for power in range(16, 32, 3)]
        axes.set_xticks(ticks, ["64 KiB", "512 KiB", "4 MiB", "32 MiB", "256 MiB", "2 GiB"])
        axes.set_xlabel("bytes of a batch")
        axes.set_title(timing)
        axes.grid(linewidth=0.3)
    panels[0].set_ylabel("GB/s of source bytes")
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{_title(record)}: amplitude, float64 from the host (gray: pinned upload)")
    figure.savefig(path, dpi=130)
    return True


def plot_coalesce(record: Record, path: Path) -> bool:
    """Draw requests per second of every contender, and the latencies of many callers at once."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["table"] == "coalesce" and row["times"]]
    if not rows:
        return False
    figure = Figure(figsize=(12, 2 + 0.75 * len(rows)), layout="constrained")
    rates, latencies = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    found = dict.fromkeys(name for row in rows for name in row["times"])
    colors = {name: colormaps["tab20"](index) for index, name in enumerate(found)}
    for y, row in enumerate(rows):
        height = 0.85 / len(row["times"])
        for index, (name, timing) in enumerate(row["times"].items()):
            at = y - 0.425 + height * (index + 0.5)
            rates.plot(row["states"] / timing["median_s"], at, "o", color=colors[name])
            latency = timing.get("latency")
            if latency:
                low, high = latency["median_s"] * 1e6, latency["p99_s"] * 1e6
                latencies.plot([low, high], [at, at], "-|", color=colors[name], markersize=9)
                latencies.plot(low, at, "o", color=colors[name])
    rates.set_yticks(range(len(rows)), [row["name"] for row in rows])
    rates.set_xlabel("requests per second")
    latencies.set_xlabel("us of one request: median (dot) to p99 (bar)")
    for axes in (rates, latencies):
        axes.set_xscale("log")
        axes.grid(axis="x", which="both", linewidth=0.3)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for y in range(1, len(rows)):
            axes.axhline(y - 0.5, color="gray", linewidth=0.8)
    handles = [rates.plot([], [], "o", color=c, label=name)[0] for name, c in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{_title(record)}: amplitude, single float64 samples from the host")
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
