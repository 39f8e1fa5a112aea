"""The tables of one run, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _probes import Limits

    Record = dict[str, Any]

MISSED = "!"  # stands behind every figure that is on the wrong side of its line


def limits_text(limits: Limits) -> str:
    """One line for each limit, with the way that reached it."""
    bare = f"bare {_us(limits.launch_bare)} us" if limits.launch_bare else limits.no_launch_bare
    lines = [f"launch: torch {_us(limits.launch_torch)} us, {bare}"]
    for name, ways in limits.ways.items():
        way, rate = next(iter(ways.items()))
        lines.append(f"{name}: {_rate(rate)} ({way}; torch {_rate(_best_of_torch(ways))})")
    if limits.h2d and limits.d2h:
        lines.append(f"pinned memory: to the device {_rate(limits.h2d)}, back {_rate(limits.d2h)}")
    return "\n".join(lines)


def _best_of_torch(ways: dict[str, float]) -> float:
    return max(rate for way, rate in ways.items() if way.startswith("torch"))


def markdown(record: Record) -> str:
    """Every table of the run."""
    parts: list[str] = []
    for table in dict.fromkeys(row["table"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["table"] == table]
        parts.append(f"## {table}")
        if table == "bulk":
            parts += _bulk(rows)
        elif table == "cpu":
            parts += _speedups([row for row in rows if row["name"].startswith("cpu-")])
            parts += _times([row for row in rows if not row["name"].startswith("cpu-")])
        elif table == "small":
            parts += _small(rows, record["limits"]["launch_bare"])
        elif table == "host":
            parts += _times(rows)
            parts += _host(rows, record["limits"]["h2d"])
        elif table == "coalesce":
            parts += _coalesce(rows)
        elif table == "graphs":
            parts += _times(rows)
            parts += _enqueued(rows)
        else:
            parts += _times(rows)
    return "\n\n".join(parts)


def missed(record: Record) -> Iterator[str]:
    """One line of text for each contender and table whose line was missed somewhere."""
    for table in dict.fromkeys(row["table"] for row in record["rows"]):
        lines = [
            (row, line) for row in record["rows"] if row["table"] == table for line in row["lines"]
        ]
        if lines:
            held = sum(line["holds"] for _, line in lines)
            yield f"{table}: {held} of {len(lines)} lines hold"
        for row, line in lines:
            if not line["holds"]:
                figures = f"{line['reached']:.2f} {line['unit']}, line {line['line']:.2f}"
                yield f"  missed: {row['name']}, {line['contender']}: {figures}"


# Each table


def _bulk(rows: list[Record]) -> Iterator[str]:
    """For each call: fractions of the limit, a line for each encoding, a column for each n."""
    sizes = sorted({row["num_qubits"] for row in rows})
    for contender in ("qdp.torch out", "qdp.torch"):
        groups: dict[tuple[str, str], dict[int, Record]] = {}
        for row in rows:
            mix = f"{row['input']} -> {row['output']}"
            groups.setdefault((row["encoding"], mix), {})[row["num_qubits"]] = row
        table = [[f"{contender}, fraction of limit", "limit", *map(str, sizes), "lines"]]
        for (encoding, mix), by_size in groups.items():
            limit = "write" if next(iter(by_size.values()))["limit"] == "write" else "stream"
            cells = [_fraction(by_size.get(n), contender) for n in sizes]
            lines = [
                f"{_line(row, contender)['line']:.2f}"
                for row in by_size.values()
                if _line(row, contender)
            ]
            text = ", ".join(dict.fromkeys(lines))
            table.append([f"{encoding}, {mix}", limit, *cells, text])
        yield _table(table)
    peers = [row for row in rows if {"torch", "qumat-qdp"} & row["times"].keys()]
    if peers:
        yield from _times(peers)


def _line(row: Record | None, contender: str) -> Record:
    lines = row["lines"] if row else []
    return next((line for line in lines if line["contender"] == contender), {})


def _line_cell(row: Record | None, contender: str, digits: int = 2) -> str:
    line = _line(row, contender)
    if not line:
        return ""
    return f"{line['reached']:.{digits}f}" + ("" if line["holds"] else MISSED)


def _fraction(row: Record | None, contender: str) -> str:
    """Of the limit: of the line where there is one, else of the floor."""
    if row is None or _line(row, contender):
        return _line_cell(row, contender)
    median = _median(row, contender)
    return f"{row['floor_s'] / median:.2f}" if median else ""


def _small(rows: list[Record], bare: float | None) -> Iterator[str]:
    """Microseconds, and launches for the calls that have a line."""
    names = _names(rows)
    judged = [name for name in names if any(_line(row, name) for row in rows)]
    limits = {name: next(_line(row, name)["line"] for row in rows) for name in judged}
    launch = f"bare launch {_us(bare)} us" if bare else "no bare launch"
    heads = [f"{name} in launches (line {limits[name]:.1f})" for name in judged]
    table = [[f"us per call, {launch}", *names, *heads]]
    for row in rows:
        cells = [_us(_median(row, name)) for name in names]
        table.append([row["name"], *cells, *(_line_cell(row, name) for name in judged)])
    yield _table(table)


def _host(rows: list[Record], h2d: float | None) -> Iterator[str]:
    """Source bytes as a fraction of a pinned upload, every line, and the ring's own counters."""
    if h2d:
        kinds = ("host", "host-sum", "loop", "loop-sum")
        chosen = [row for row in rows if row["kind"] in kinds]
        names = _names(chosen)
        for how in ("back to back", "one call at a time"):
            single = how != "back to back"
            heads = ["source", *(f"{name} ±" for name in names)]
            table = [[f"of the pinned rate, {_rate(h2d)}, {how}", *heads]]
            for row in chosen:
                ideal = row["input_bytes"] / h2d
                timings = [row["times"].get(name, {}) for name in names]
                shown = [timing.get("single", {}) if single else timing for timing in timings]
                cells = [_with_spread(ideal, timing) for timing in shown]
                if any(cells):
                    table.append([row["name"], _bytes(row["input_bytes"]), *cells])
            if len(table) > 1:
                yield _table(table)
    yield from _lines(rows)
    for row in rows:
        if row.get("ring"):
            ring = row["ring"]
            counters = ", ".join(f"{name} {value:,}" for name, value in ring.items())
            busy = ring["copy_ns"] / ring["wall_ns"]
            yield f"{row['name']}, with events on: copying for {busy:.2f} of the time; {counters}"


def _coalesce(rows: list[Record]) -> Iterator[str]:
    """Requests per second, time as a multiple of QDP's, latencies of callers, every line."""
    names = _names(rows)
    rates = [["requests per second", *names]]
    ratios = [["time as a multiple of", *names]]
    for row in rows:
        medians = [_median(row, name) for name in names]
        rates.append([row["name"], *(f"{row['states'] / m:,.0f}" if m else "" for m in medians)])
        own = _median(row, row["own"])
        if own:
            cells = [f"{median / own:.2f}" if median else "" for median in medians]
            ratios.append([f"{row['name']}: {row['own']}", *cells])
    yield _table(rates)
    yield _table(ratios)
    latencies = [["us of a request", "callers", "contender", "median", "p99", "worst"]]
    for row in rows:
        for name, timing in row["times"].items():
            if "latency" in timing:
                callers = 1 if name == "qdp alone" else row["callers"]
                figures = [_us(timing["latency"][f"{key}_s"]) for key in latencies[0][3:]]
                latencies.append([row["name"], str(callers), name, *figures])
    if len(latencies) > 1:
        yield _table(latencies)
    yield from _lines(rows)


def _lines(rows: list[Record]) -> Iterator[str]:
    """Every line of the rows, and what was reached."""
    judged = [["line", "contender", "reached", "asked for"]]
    for row in rows:
        for line in row["lines"]:
            figures = [
                f"{line['reached']:.2f}{_missed(line)} {line['unit']}",
                f"{line['line']:.2f}",
            ]
            judged.append([row["name"], line["contender"], *figures])
    if len(judged) > 1:
        yield _table(judged)


def _with_spread(ideal: float, timing: Record) -> str:
    """``ideal`` seconds as a fraction of the median; half the distance of the extremes."""
    if not timing:
        return ""
    spread = (ideal / timing["best_s"] - ideal / timing["worst_s"]) / 2
    return f"{ideal / timing['median_s']:.2f} {spread:.2f}"


def _missed(line: Record) -> str:
    return "" if line["holds"] else MISSED


def _speedups(rows: list[Record]) -> Iterator[str]:
    """How many times as fast as torch, a line for each encoding, a column for each n."""
    sizes = sorted({row["num_qubits"] for row in rows})
    for contender in ("qdp.torch", "qdp.torch out"):
        table = [[f"{contender}, times as fast as torch", *map(str, sizes), "line"]]
        for key in dict.fromkeys((row["encoding"], row["input"]) for row in rows):
            group = [row for row in rows if (row["encoding"], row["input"]) == key]
            cells = {row["num_qubits"]: _speedup(row, contender) for row in group}
            lines = [f"{line['line']:.0f}" for row in group if (line := _line(row, contender))]
            text = ", ".join(dict.fromkeys(lines))
            table.append([f"{key[0]}, {key[1]}", *(cells.get(n, "") for n in sizes), text])
        if rows:
            yield _table(table)


def _speedup(row: Record, contender: str) -> str:
    own, torch = _median(row, contender), _median(row, "torch")
    if own is None or torch is None:
        return ""
    line = _line(row, contender)
    return f"{torch / own:.1f}" + (MISSED if line and not line["holds"] else "")


def _times(rows: list[Record]) -> Iterator[str]:
    """Microseconds per call, and how many times as long as QDP the others take."""
    names = _names(rows)
    peers = [name for name in names if not name.startswith("qdp")]
    lined = any(line["unit"] == "us" for row in rows for line in row["lines"])
    times = [["us per call", "states", *names, "floor", *(["line"] if lined else [])]]
    ratios = [["times QDP", *peers, "QDP / floor", "QDP states/s"]]
    for row in rows:
        cells = [_us(_median(row, name)) + _mark(row, name) for name in names]
        line = [f"{line['line']:.0f}" for line in row["lines"][:1] if line["unit"] == "us"]
        tail = [*line, ""][:1] if lined else []
        times.append([row["name"], f"{row['states']:,}", *cells, _us(row["floor_s"]), *tail])
        own = _median(row, row["own"])
        against = [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in peers]
        floor = f"{own / row['floor_s']:.2f}" if own else ""
        ratios.append([row["name"], *against, floor, f"{row['states'] / own:,.0f}" if own else ""])
    if rows:
        yield _table(times)
        yield _table(ratios)


def _enqueued(rows: list[Record]) -> Iterator[str]:
    """Microseconds from call to enqueued, and how many times as fast as torch's fastest graph."""
    names = _names(rows)
    table = [["us from call to enqueued", *names, "x torch's fastest", "lines"]]
    for row in rows:
        times = {name: row["times"][name]["enqueue_s"] for name in names if name in row["times"]}
        torch = [_median(row, name) for name in names if name.startswith("torch graph")]
        fastest = min((median for median in torch if median), default=None)
        own = _median(row, "qdp graph pinned")
        ratio = f"{fastest / own:.1f}" if fastest and own else ""
        lines = ", ".join(
            f"{line['line']:.0f} {line['unit']}" + ("" if line["holds"] else MISSED)
            for line in row["lines"]
        )
        table.append([row["name"], *(_us(times.get(name)) for name in names), ratio, lines])
    if rows:
        yield _table(table)


def _names(rows: list[Record]) -> list[str]:
    """Contenders with a time in any of these rows, in the order of the tables."""
    from _contenders import NAMES

    return [name for name in NAMES if any(name in row["times"] for row in rows)]


def _median(row: Record, name: str) -> float | None:
    timing = row["times"].get(name)
    return timing["median_s"] if timing else None


def _mark(row: Record, name: str) -> str:
    line = _line(row, name)
    return MISSED if line and line["unit"] == "us" and not line["holds"] else ""


# Figures


def _us(seconds: float | None) -> str:
    if seconds is None:
        return ""
    digits = 2 if seconds < 1e-5 else 1 if seconds < 1e-3 else 0
    return f"{seconds * 1e6:,.{digits}f}"


def _bytes(value: int) -> str:
    for unit, size in [("GiB", 1 << 30), ("MiB", 1 << 20)]:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1024:.3g} KiB"


def _rate(value: float) -> str:
    return f"{value / 1e9:,.0f} GB/s" if value >= 1e11 else f"{value / 1e9:.1f} GB/s"


def _table(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])
