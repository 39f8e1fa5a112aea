"""QDP beside torch, qumat-qdp and PennyLane, and beside what the machine allows, in one run.

    python benches/peers.py [--device cuda|cpu] [--rows 'amplitude-*'] [--quick]

See README.md for what each row and each column means.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import qdp
import torch
from _contenders import NAMES, UnavailableError, build
from _report import markdown, plot
from _timing import measure, probe, synchronize
from _workloads import ROWS, Row, floor_seconds, make_inputs, max_error

PACKAGES = ("numpy", "torch", "qumat-qdp", "pennylane")


def main() -> int:
    args = parse_arguments()
    device = "cuda:0" if args.device == "cuda" else "cpu"
    threads = qdp.device_info()["cpu_threads"]
    torch.set_num_threads(threads)
    record = describe(device, threads)
    print(f"{record['device']['name']}, {threads} threads for QDP and torch")
    print(", ".join(f"{name} {version}" for name, version in record["versions"].items()))

    seconds = 0.15 if args.quick else 1.0
    record["limits"] = probe(device, seconds=seconds / 2)
    for name, value in record["limits"].items():
        print(f"{name}: " + (f"{value * 1e6:.2f} us" if name == "launch" else rate(value)))

    rows = [row.on(device) for row in ROWS if any(fnmatch.fnmatch(row.name, p) for p in args.rows)]
    names = [name for name in NAMES if name in args.contenders or name == "qdp"]
    record["rows"] = []
    for row in rows:
        print(f"{row.name}", end="", flush=True)
        record["rows"].append(run_row(row, names, device, record["limits"], seconds))
        print(flush=True)

    print("\n" + markdown(record, names))
    path = args.json_dir / f"{record['date'][:10]}-{record['device']['slug']}-peers.json"
    args.json_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nsaved {path}")
    if args.plot:
        plot(record, path.with_suffix(".png"))
        print(f"saved {path.with_suffix('.png')}")
    failed = [row["name"] for row in record["rows"] if "qdp" not in row["times"]]
    if failed:
        print(f"QDP has no result on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        default=[name for name in NAMES if name != "torch.compile"],
        help="default: all but torch.compile, which compiles for minutes",
    )
    parser.add_argument("--json-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument("--plot", action="store_true", help="draw the ratios beside the JSON")
    return parser.parse_args()


def run_row(
    row: Row, names: list[str], device: str, limits: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Verify and time every contender on one workload."""
    inputs = make_inputs(row, device)
    times: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            times[name] = run_contender(name, row, device, inputs, seconds)
        except UnavailableError as reason:
            skipped[name] = str(reason)
        except Exception as error:  # noqa: BLE001 (a peer that fails is a result, not the end)
            skipped[name] = f"{type(error).__name__}: {error}"
            print(f"\n  {name}: {skipped[name]}", file=sys.stderr)
        print("." if name in times else "-", end="", flush=True)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    floor = floor_seconds(row, limits)
    ratios: dict[str, float] = {}
    if "qdp" in times:
        own = times["qdp"]["median_s"]
        ratios = {name: t["median_s"] / own for name, t in times.items() if name != "qdp"}
        ratios["floor"] = floor / own
    return {
        "name": row.name,
        "kind": row.kind,
        "encoding": row.encoding,
        "num_qubits": row.n,
        "dtype": row.dtype.__name__,
        "states": row.states,
        "input_bytes": row.input_bytes,
        "output_bytes": row.output_bytes,
        "input_buffers": len(inputs),
        "floor_s": floor,
        "times": times,
        "skipped": skipped,
        "ratios": ratios,
    }


def run_contender(
    name: str, row: Row, device: str, inputs: list[Any], seconds: float
) -> dict[str, Any]:
    call = build(name, row, device, inputs[0])
    error = None
    if not (name == "qumat-qdp" and row.kind == "loop"):  # its own benchmark returns no states
        result = call(inputs[-1])
        synchronize(device)
        error = max_error(row, result, inputs[-1], device)
        del result
        if not error <= row.tolerance:
            raise ValueError(f"wrong by {error:.2e}, more than {row.tolerance:.0e}")
    timing = measure(call, inputs, device, pipelined=row.pipelined, seconds=seconds)
    return {**asdict(timing), "max_error": error}


def describe(device: str, threads: int) -> dict[str, Any]:
    """Date, machine and versions, for the record."""
    versions = {"qdp": qdp.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {"name": cpu_name(), "threads": threads}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "name": properties.name,
            "host_cpu": cpu_name(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": nvidia_driver(),
            "torch_cuda": torch.version.cuda,
        }
    slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    machine["slug"] = slug if device != "cpu" else f"cpu-{slug}-{threads}t"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine,
        "qdp": qdp.device_info(),
        "versions": versions,
    }


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.machine()


def nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.splitlines()[0].strip()


def rate(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s"


if __name__ == "__main__":
    sys.exit(main())
