"""What training gives and costs: gradients, a step, kernel matrices. QDP, torch and PennyLane.

    python benches/training.py [--device cuda|cpu] [--tables gradients backward ...] [--quick]

See README.md for what each table does.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qdp
import qdp.torch
import torch
from _formulations import formulation
from _gradients import Compared, gradients
from _machine import describe, headline
from _probes import mix, probe
from _steps import Step
from _timing import measure, synchronize
from _workloads import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _probes import Limits

    Call = Callable[[Any], Any]

TABLES = ("gradients", "backward", "step", "gram")
STATE_BYTES, CPU_STATE_BYTES = 512 << 20, 16 << 20
ENCODINGS = ("amplitude", "angle", "phase", "iqp", "zz", "iqp-embedding")
REPS = {"zz": 2, "iqp-embedding": 1}
MIXES = {torch.float32: torch.complex64, torch.float64: torch.complex128}
#: How far gradients may be apart, as a fraction of the largest: of the second way of the two.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}


@dataclass
class Measured:
    """A row: seconds of each contender, and the least that the bytes allow, where they do."""

    name: str
    table: str
    own: str
    times: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    floor_s: float | None = None
    error: float | None = None
    #: What it must reach: of the floor's rate, or so many times as fast as a contender.
    lines: dict[str, float] = field(default_factory=dict)

    def reached(self) -> dict[str, float]:
        """Of every line what was reached."""
        if self.own not in self.times:
            return {}
        own = self.times[self.own]["median_s"]
        found = {name: row["median_s"] / own for name, row in self.times.items()}
        if self.floor_s is not None:
            found["of limit"] = self.floor_s / own
        return {name: found[name] for name in self.lines if name in found}

    @property
    def failed(self) -> bool:
        """Whether QDP has no time."""
        return self.own not in self.times

    def record(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {**asdict(self), "reached": self.reached()}

    def text(self) -> str:
        """A row for people."""
        times = ", ".join(
            f"{name} {1e6 * time['median_s']:,.1f} us" for name, time in self.times.items()
        )
        reached = self.reached()
        lines = ", ".join(
            f"{reached[name]:.2f}{'' if reached[name] >= line else '!'} {name} (line {line:g})"
            for name, line in self.lines.items()
            if name in reached
        )
        skipped = "".join(f"; {name}: {reason[:200]}" for name, reason in self.skipped.items())
        error = "" if self.error is None else f"; apart by {self.error:.1e}"
        lines = f"; {lines}" if lines else ""
        return f"{self.name}: {times}{lines}{error}{skipped}"


def main() -> int:
    args = parse_arguments()
    device = "cuda:0" if args.device == "cuda" else "cpu"
    threads = qdp.device_info()["cpu_threads"]
    torch.set_num_threads(threads)
    torch.manual_seed(2026)
    record = describe(device, threads)
    print(headline(record), flush=True)
    makers: dict[str, Callable[..., Iterator[Measured | Compared]]]
    makers = {"gradients": gradients, "backward": backward, "step": step, "gram": gram}
    rows: list[Measured | Compared] = []
    for table in args.tables:
        began = time.perf_counter()
        for row in makers[table](device, quick=args.quick):
            rows.append(row)
            if device == "cpu" and isinstance(row, Measured):
                row.lines = {}  # they are about a GPU
            print(row.text(), flush=True)
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
        print(f"{table}: {time.perf_counter() - began:.0f} s", flush=True)
    record["rows"] = [row.record() for row in rows]
    save(record, [row for row in rows if isinstance(row, Measured)], args.json_dir)
    return 1 if any(row.failed for row in rows) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--json-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="fewer rows, shorter measurements")
    return parser.parse_args()


def run(row: Measured, name: str, call: Call, device: str, seconds: float) -> None:
    """Time one contender."""
    try:
        timing = measure(call, [None], device, pipelined=True, seconds=seconds)
    except Exception as failure:  # noqa: BLE001 (a peer that fails is a result, not the end)
        row.skipped[name] = f"{type(failure).__name__}: {failure}"
    else:
        row.times[name] = asdict(timing)


# Gradients of large batches


def backward(device: str, *, quick: bool) -> Iterator[Measured]:
    """Cotangents of 512 MB: the gradient by the features, and torch's own of its formulation.

    The least that it takes is to read cotangents and features once and to write the gradient, at
    the rate of a copy.
    """
    needed = {mix(states, states) for states in MIXES.values()}
    limits = probe(device, needed, quick=True)
    for encoding in ENCODINGS:
        for dtype in MIXES:
            for n in (10, 16) if quick else (8, 10, 12, 14, 16, 18, 20):
                yield _backward(encoding, n, dtype, device, limits, 0.03 if quick else 0.06)


def _backward(
    encoding: str, n: int, dtype: torch.dtype, device: str, limits: Limits, seconds: float
) -> Measured:
    states = MIXES[dtype]
    held = CPU_STATE_BYTES if device == "cpu" else STATE_BYTES
    batch = max(1, held // (states.itemsize << n))
    workload = Row("", "bulk", "device", encoding, n, dtype, reps=REPS.get(encoding), batch=batch)
    name = f"backward-{encoding}-{str(dtype).removeprefix('torch.')}-n{n}"
    row = Measured(name, "backward", "qdp", lines={"of limit": 0.75, "torch": 1.0})
    moved = workload.output_bytes + 2 * workload.input_bytes
    row.floor_s = moved / limits.stream[mix(states, states)]
    x = torch.randn(batch, workload.features, dtype=dtype, device=device, requires_grad=True)
    cotangent = torch.randn(batch, 1 << n, dtype=states, device=device)
    encoders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "qdp": lambda x: qdp.torch.encode(x, n, encoding, **workload.options),
        "torch": formulation(workload, device),
    }
    gradients = {}
    for contender, encode in encoders.items():
        try:
            psi = encode(x)
            call = _gradient_of(psi, x, cotangent)
            gradients[contender] = call(None)
        except Exception as failure:  # noqa: BLE001 (as above; memory, for one)
            row.skipped[contender] = f"{type(failure).__name__}: {failure}"
            continue
        run(row, contender, call, device, seconds)
        del psi, call
    if len(gradients) == 2:
        ours, theirs = gradients["qdp"].double(), gradients["torch"].double()
        row.error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not row.error <= TOLERANCE[dtype]:
            row.skipped["qdp"] = f"wrong by {row.error:.1e}"
            del row.times["qdp"]
    return row


def _gradient_of(psi: torch.Tensor, x: torch.Tensor, cotangent: torch.Tensor) -> Call:
    def call(_: Any) -> torch.Tensor:
        return torch.autograd.grad(psi, x, cotangent, retain_graph=True)[0]

    return call


# A training step


def step(device: str, *, quick: bool) -> Iterator[Measured]:
    """Trainable map, encoding, head, loss, backward and Adam.

    On a GPU QDP's and torch's steps are each one CUDA graph; PennyLane's cannot be captured.
    """
    for head in ("linear", "circuit"):
        n, batch = (12, 256) if device != "cpu" else (8, 64)
        lines = {"torch": 1.0, **({"pennylane": 3.0} if head == "circuit" else {})}
        row = Measured(f"step-{head}-n{n}-b{batch}", "step", "qdp", lines=lines)
        contenders = ["qdp", "torch"] + (["pennylane"] if head == "circuit" else [])
        losses = {}
        for contender in contenders:
            try:
                made = Step(contender, head, n, batch, device)
                losses[contender] = made.losses(20)
            except Exception as failure:  # noqa: BLE001 (as above)
                row.skipped[contender] = f"{type(failure).__name__}: {failure}"
                continue
            run(row, contender, made, device, 0.1 if quick else 0.3)
        # They start from the same numbers and see the same batch.
        own = losses.pop("qdp", None)
        if own and losses:
            row.error = max(
                abs(ours - theirs)
                for other in losses.values()
                for ours, theirs in zip(own, other, strict=True)
            )
        yield row


# Kernel matrices


def gram(device: str, *, quick: bool) -> Iterator[Measured]:
    """Fidelities of all pairs of samples: in closed form, and from states.

    The states of angles are real, and torch multiplies them so.
    """
    count, n = (20_000, 16) if device != "cpu" else (1_000, 10)
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
        name = f"gram-angle-{str(dtype).removeprefix('torch.')}-n{n}-{count}"
        row = Measured(name, "gram", "qdp", lines={"torch": 10.0})
        x = torch.rand(count, n, dtype=dtype, device=device)
        workload = Row("", "bulk", "device", "angle", n, dtype)
        encode = formulation(workload, device)

        def states(
            part: torch.Tensor,
            encode: Callable[[torch.Tensor], torch.Tensor] = encode,
        ) -> torch.Tensor:
            return encode(part).real

        def by_states(
            _: Any,
            x: torch.Tensor = x,
            states: Callable[[torch.Tensor], torch.Tensor] = states,
        ) -> torch.Tensor:
            rows = torch.cat([states(part) for part in torch.split(x, 1024)])
            return torch.cat([(part @ rows.T).square_() for part in torch.split(rows, 4096)])

        def own(_: Any, x: torch.Tensor = x) -> torch.Tensor:
            result: torch.Tensor = qdp.gram(x, encoding="angle")
            return result

        found = {}
        for contender, call in (("qdp", own), ("torch", by_states)):
            try:
                found[contender] = call(None)[:64].double()
                synchronize(device)
            except Exception as failure:  # noqa: BLE001 (as above)
                row.skipped[contender] = f"{type(failure).__name__}: {failure}"
                continue
            run(row, contender, call, device, 0.2)
        if len(found) == 2:
            row.error = float((found["qdp"] - found["torch"]).abs().max())
        yield row


def save(record: dict[str, Any], rows: list[Measured], folder: Path) -> None:
    """The record as JSON, and a picture beside it where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date'][:10]}-{record['device']['slug']}-training"
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {path}")
    try:
        plot(record, rows, folder / f"{stem}.png")
    except ImportError as missing:
        print(f"no picture: {missing}", file=sys.stderr)


def plot(record: dict[str, Any], rows: list[Measured], path: Path) -> None:
    """Draw how many times as long as QDP the others and the floor take."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.failed]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for name, marker in {"torch": "o", "pennylane": "^", "limit": "|"}.items():
        points = []
        for y, row in enumerate(shown):
            own = row.times[row.own]["median_s"]
            other = row.floor_s if name == "limit" else row.times.get(name, {}).get("median_s")
            if other is not None:
                points.append((other / own, y))
        if points:
            x, y_values = zip(*points, strict=True)
            color = "black" if name == "limit" else None
            axes.plot(x, y_values, marker, label=name, markersize=7, markeredgewidth=2, color=color)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel("time as a multiple of QDP's (right of 1: slower than QDP)")
    axes.set_title(f"{record['device']['name']}, {record['date'][:10]}")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


if __name__ == "__main__":
    sys.exit(main())
