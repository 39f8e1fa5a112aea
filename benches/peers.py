"""QDP beside torch, qumat-qdp and PennyLane, and beside what the machine allows, in one run.

    python benches/peers.py [--device cuda|cpu] [--tables bulk small] [--rows 'angle-*'] [--quick]

See README.md for what each table, row and column means.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _graphs
import qdp
import torch
from _callers import Callers
from _contenders import NAMES, PINNED, build
from _machine import describe, headline
from _plots import plot_bulk, plot_coalesce, plot_host, plot_ratios
from _probes import Limits, probe
from _reference import error, expected, tolerance
from _report import limits_text, markdown, missed
from _tables import CPU_TABLES, GPU_TABLES, TABLES, rows_of
from _timing import measure, synchronize
from _transfers import ring_counters
from _workloads import Row, UnavailableError, floor_seconds, judge, make_inputs, pinned

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds that one contender is timed on one row.
SECONDS = {
    "bulk": 0.05,
    "small": 0.1,
    "latency": 0.25,
    "host": 0.15,
    "coalesce": 0.3,
    "graphs": 0.2,
    "cpu": 0.1,
}
QUICK_SECONDS = {
    "bulk": 0.03,
    "small": 0.05,
    "latency": 0.1,
    "host": 0.08,
    "coalesce": 0.15,
    "graphs": 0.1,
    "cpu": 0.03,
}
#: QDP's own call of each table: the ratios of its rows are to this one.
OWN = {
    "bulk": "qdp.torch out",
    "small": "qdp.torch",
    "latency": "qdp.torch",
    "host": "qdp",
    "graphs": "qdp graph",
}


def main() -> int:
    began = time.perf_counter()
    args = parse_arguments()
    device = "cuda:0" if args.device == "cuda" else "cpu"
    threads = qdp.device_info()["cpu_threads"]
    torch.set_num_threads(threads)
    torch.manual_seed(2026)
    qdp.Engine(device)  # where it cannot be opened, nothing is worth measuring
    gc.collect()
    gc.freeze()  # what is imported by now stays: collections between the rows are short
    record = describe(device, threads)
    print(headline(record))

    tables = args.tables or (CPU_TABLES if device == "cpu" else GPU_TABLES)
    chosen = {table: rows(table, device, args.rows, quick=args.quick) for table in tables}
    needed = {limit for part in chosen.values() for row in part for limit in row.limits(device)}
    limits = probe(device, needed, quick=args.quick)
    record["limits"] = asdict(limits)
    print(limits_text(limits), flush=True)

    seconds = QUICK_SECONDS if args.quick else SECONDS
    record["rows"], record["seconds"] = [], {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for table in tables:
            started = time.perf_counter()
            for row in chosen[table]:
                names = contenders(row, args.contenders)
                print(row.name, end="", flush=True)
                record["rows"].append(run_row(row, names, device, limits, seconds[table]))
                print(flush=True)
            record["seconds"][table] = round(time.perf_counter() - started, 1)
    except KeyboardInterrupt:
        # What was measured is kept, and where it ends is said.
        record["ended_before"] = row.name
        print(f"\nended before {row.name}", file=sys.stderr)
    record["seconds"]["all"] = round(time.perf_counter() - began, 1)

    print("\n" + markdown(record))
    save(record, args.json_dir)
    print(f"seconds: {', '.join(f'{key} {value}' for key, value in record['seconds'].items())}")
    for text in missed(record):
        print(text)
    failed = [row["name"] for row in record["rows"] if row["own"] not in row["times"]]
    if failed:
        print(f"QDP has no result on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or "ended_before" in record else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        help=f"default: {', '.join(GPU_TABLES)}; on a CPU {', '.join(CPU_TABLES)}",
    )
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        help="only these and QDP; torch.compile, which takes its time, then runs on every row",
    )
    parser.add_argument("--json-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="fewer rows, shorter measurements")
    return parser.parse_args()


def rows(table: str, device: str, patterns: Sequence[str], *, quick: bool) -> list[Row]:
    """Rows of ``table`` that run on ``device`` and whose name fits a pattern."""
    return [
        row.on(device)
        for row in rows_of(table, quick=quick)
        if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)
        and not (row.gpu_only and device == "cpu")
    ]


def contenders(row: Row, chosen: Sequence[str] | None) -> list[str]:
    """Names of what runs in ``row``, in the order of the tables."""
    if chosen is None:
        return [name for name in NAMES if name in row.contenders]
    compiled = {"torch.compile"} if row.kind == "device" else set()
    wanted = ({own(row)} | set(chosen)) & (set(row.contenders) | compiled)
    return [name for name in NAMES if name in wanted]


def own(row: Row) -> str:
    if row.table == "coalesce":
        return "qdp batcher" if row.callers else "qdp scope"
    return OWN.get(row.table, "qdp.torch")


def run_row(
    row: Row, names: list[str], device: str, limits: Limits, seconds: float
) -> dict[str, Any]:
    """Verify and time every contender on one workload."""
    inputs = make_inputs(row, device)
    if row.kind == "replays":
        inputs = _graphs.make_batches(inputs[:64], inputs=row.inputs)
    reference = expected(row, inputs[-1], device)
    times: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            times[name] = run_contender(name, row, device, inputs, reference, seconds)
        except UnavailableError as reason:
            skipped[name] = str(reason)
        except Exception as failure:  # noqa: BLE001 (a peer that fails is a result, not the end)
            skipped[name] = f"{type(failure).__name__}: {failure}"
            print(f"\n  {name}: {skipped[name][:300]}", file=sys.stderr)
        print("." if name in times else "-", end="", flush=True)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    medians = {name: time["median_s"] for name, time in times.items()}
    floor = floor_seconds(row, limits)
    ratios: dict[str, float] = {}
    if own(row) in medians:
        base = medians[own(row)]
        ratios = {name: median / base for name, median in medians.items() if name != own(row)}
        ratios["floor"] = floor / base
    judged = [judge(line, row, times, limits) for line in row.lines]
    counters = None
    if row.kind == "loop-sum" and "qdp" in times and device != "cpu":
        try:
            counters = ring_counters(row, device, inputs[0])
        except Exception as failure:  # noqa: BLE001 (an explanation of the times, not one of them)
            print(f"\n  no counters: {failure}", file=sys.stderr)
    return {
        "name": row.name,
        "table": row.table,
        "kind": row.kind,
        "encoding": row.encoding,
        "num_qubits": row.n,
        "input": str(row.dtype).removeprefix("torch."),
        "output": str(row.complex_dtype).removeprefix("torch."),
        "batch": row.batch,
        "states": row.states,
        "callers": row.callers,
        "inputs": row.inputs,
        "input_bytes": row.input_bytes,
        "output_bytes": row.output_bytes,
        "input_buffers": len(inputs),
        "limit": row.limit,
        "floor_s": floor,
        "own": own(row),
        "times": times,
        "skipped": skipped,
        "ratios": ratios,
        "lines": [line for line in judged if line is not None],
        **({} if counters is None else {"ring": counters}),
    }


def run_contender(
    name: str,
    row: Row,
    device: str,
    inputs: list[Any],
    reference: torch.Tensor,
    seconds: float,
) -> dict[str, Any]:
    if row.kind == "replays" and name != "qdp graph":
        inputs = _graphs.in_pinned_memory(inputs, arrays=name == "qdp graph pinned")
    elif name in PINNED and device != "cpu":
        inputs = pinned(inputs)
    call = build(name, row, device, inputs[0])
    off = None
    # A bare copy makes no states, and qumat-qdp's own benchmark returns none.
    if name not in ("pinned copy", "torch stack only", "no encode") and not (
        name == "qumat-qdp" and row.kind == "loop"
    ):
        result = call(inputs[-1])
        synchronize(device)
        off = error(row, result, reference)
        del result
        if not off <= tolerance(row):
            raise ValueError(f"wrong by {off:.2e}, more than {tolerance(row):.0e}")
    timing = measure(call, inputs, device, pipelined=row.pipelined, seconds=seconds)
    times = {**asdict(timing), "error": off}
    if isinstance(call, Callers):
        times["latency"] = call.latency(timing.calls * timing.repeats)
    if row.kind == "replays":
        times["enqueue_s"] = _graphs.enqueue_seconds(call, inputs, device)
    if row.table == "host" and row.pipelined and device != "cpu":
        single = measure(call, inputs, device, pipelined=False, seconds=seconds / 2)
        times["single"] = asdict(single)
    return times


def save(record: dict[str, Any], folder: Path) -> None:
    """The record as JSON, and pictures beside it where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date'][:10]}-{record['device']['slug']}"
    path = folder / f"{stem}-peers.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nsaved {path}")
    try:
        plots = [
            ("peers", plot_ratios),
            ("bulk", plot_bulk),
            ("host", plot_host),
            ("coalesce", plot_coalesce),
        ]
        for name, plot in plots:
            if plot(record, folder / f"{stem}-{name}.png"):
                print(f"saved {folder / f'{stem}-{name}.png'}")
    except ImportError as missing:
        print(f"no pictures: {missing}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
