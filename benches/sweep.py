"""Every encoding over sizes, batches, input types and layouts: where does QDP fall off a cliff?

    python benches/sweep.py [--device cuda|cpu] [--quick]

See README.md for what a cliff is.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qdp
import qdp.torch
import torch
from _machine import describe, headline
from _plots import plot_layouts, plot_sweep
from _probes import write_rate
from _timing import measure, no_garbage_collection
from _workloads import features

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ENCODINGS = ("amplitude", "angle", "phase", "basis", "iqp", "iqp-z", "iqp-embedding", "zz")
PRECISIONS = {"complex64": torch.float32, "complex128": torch.float64}
QUBITS = range(1, 27)
BATCHES = tuple(4**k for k in range(9))
INPUTS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
)
LAYOUTS = ("contiguous", "x[:, 1:]", "every second column", "transposed", "expanded")
LAYOUT_QUBITS = (2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 22)

#: States of one point at most.
GPU_BYTES, CPU_BYTES = 4 << 30, 256 << 20
#: States of one point of the types and layouts, where the size allows.
GPU_LAYOUT_BYTES, CPU_LAYOUT_BYTES = 256 << 20, 16 << 20
#: A point is a cliff when it takes more than this times what its neighbours lead to expect.
CLIFF = 2.0
#: So many of them are measured once more.
AGAIN = 300


@dataclass
class Point:
    """One measurement; ``expected`` is the time that the trend of its neighbours gives."""

    encoding: str
    precision: str
    n: int
    batch: int
    input: str
    layout: str
    output_bytes: int
    seconds: float
    expected: float | None = None
    cliff: bool = False

    def expect(self, seconds: Iterable[float]) -> None:
        """The least of what the neighbours lead to expect."""
        self.expected = min(seconds, default=None)
        self.cliff = self.slowness > CLIFF

    @property
    def slowness(self) -> float:
        """Time as a multiple of what is expected."""
        return self.seconds / self.expected if self.expected else 0.0

    @property
    def bytes_moved(self) -> int:
        """Bytes of states and of input; of every second column memory gives the others too."""
        dtype: torch.dtype = getattr(torch, self.input)
        read = self.batch * features(self.encoding, self.n) * dtype.itemsize
        return self.output_bytes + read * (2 if self.layout == "every second column" else 1)

    @property
    def group(self) -> str:
        return f"{self.encoding} {self.input}->{self.precision} {self.layout}"

    @property
    def name(self) -> str:
        return f"{self.group} n={self.n} batch={self.batch}"

    @property
    def story(self) -> str:
        return (
            f"at n={self.n} batch={self.batch}: {self.seconds * 1e6:.1f} us, "
            f"{self.slowness:.2f} times its neighbours' trend"
        )


class Sweep:
    """Measures points, all into one piece of memory."""

    def __init__(self, device: str, *, limit: int, layout_bytes: int, quick: bool) -> None:
        self.device = device
        self.limit = limit
        self.layout_bytes = min(layout_bytes, limit)
        self.seconds = 0.001 if quick else 0.002
        self.memory = torch.empty(limit, dtype=torch.uint8, device=device)
        self.failures: dict[str, str] = {}

    def sizes(self, batches: Sequence[int]) -> list[Point]:
        """Every encoding and precision over qubits and batches."""
        points: list[Point] = []
        for encoding in ENCODINGS:
            for precision, real in PRECISIONS.items():
                dtype = torch.int64 if encoding == "basis" else real
                width = 8 if precision == "complex64" else 16
                grid = [
                    (n, batch)
                    for n in QUBITS
                    for batch in batches
                    if batch * width << n <= self.limit
                ]
                needed = max(batch * features(encoding, n) for n, batch in grid)
                source = random(needed, dtype, self.device)
                for n, batch in grid:
                    points += self.point(encoding, precision, n, batch, source, "contiguous")
                del source
                print(f"{encoding} {precision}", flush=True)
        return points

    def layouts(self) -> list[Point]:
        """Amplitude over input types and layouts of rows."""
        points: list[Point] = []
        for dtype in INPUTS:
            double = dtype in (torch.float64, torch.complex128, torch.int64)
            precision = "complex128" if double else "complex64"
            width = 16 if double else 8
            sizes = [n for n in LAYOUT_QUBITS if width << n <= self.layout_bytes]
            source = random(2 * self.layout_bytes // width, dtype, self.device)
            for layout in LAYOUTS:
                for n in sizes:
                    batch = min(65536, self.layout_bytes // (width << n))
                    points += self.point("amplitude", precision, n, batch, source, layout)
            del source
            print(f"amplitude {short(dtype)}", flush=True)
        return points

    def point(
        self, encoding: str, precision: str, n: int, batch: int, source: torch.Tensor, layout: str
    ) -> Iterator[Point]:
        """A point measured, with values from ``source``; none where it fails."""
        size = batch * (8 if precision == "complex64" else 16) << n
        point = Point(encoding, precision, n, batch, short(source.dtype), layout, size, math.inf)
        try:
            self.time(point, source, self.seconds)
        except (qdp.QdpError, RuntimeError) as error:
            self.failures[point.name] = f"{type(error).__name__}: {error}"
            return
        yield point

    def again(self, points: list[Point]) -> None:
        """Measure these once more, for longer: what was a hiccup of the machine is no cliff."""
        for point in points:
            count = 2 * point.batch * features(point.encoding, point.n)
            source = random(count, getattr(torch, point.input), self.device)
            self.time(point, source, 5 * self.seconds)

    def time(self, point: Point, source: torch.Tensor, seconds: float) -> None:
        """Encode, check the norm of the last state, measure, and keep the least time so far."""
        x = laid_out(source, point.batch, features(point.encoding, point.n), point.layout)
        if point.encoding == "basis":
            x = x & ((1 << point.n) - 1)
        dtype: torch.dtype = getattr(torch, point.precision)
        out = self.memory[: point.output_bytes].view(dtype).view(point.batch, 1 << point.n)
        options: dict[str, Any] = {"precision": point.precision}

        def call(_: None) -> None:
            qdp.torch.encode(x, point.n, point.encoding, out=out, **options)

        out[-1].fill_(torch.nan)
        call(None)
        norm = float(torch.linalg.vector_norm(out[-1], dtype=torch.complex128))
        if not abs(norm - 1) < 1e-3:
            raise RuntimeError(f"the last state has norm {norm}")
        timing = measure(call, [None], self.device, pipelined=True, seconds=seconds, repeats=5)
        point.seconds = min(point.seconds, timing.best_s)


def random(count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values without zeros; of integers from 1 to 100, or any index for int64."""
    if dtype == torch.int64:
        return torch.randint(1, 1 << 26, (count,), dtype=dtype, device=device)
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(1, 101, (count,), dtype=dtype, device=device)
    return torch.randn(count, dtype=dtype, device=device)


def laid_out(source: torch.Tensor, batch: int, columns: int, layout: str) -> torch.Tensor:
    """Rows of ``columns`` values, ``batch`` of them, in memory as ``layout`` says."""
    if layout == "x[:, 1:]":
        return source[: batch * (columns + 1)].view(batch, columns + 1)[:, 1:]
    if layout == "every second column":
        return source[: 2 * batch * columns].view(batch, 2 * columns)[:, ::2]
    if layout == "transposed":
        return source[: batch * columns].view(columns, batch).T
    if layout == "expanded":
        return source[:columns].expand(batch, columns)
    return source[: batch * columns].view(batch, columns)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mark_sizes(points: list[Point]) -> None:
    """Compare every point with its neighbours along the qubits and along the batch.

    The trend through two neighbours is their geometric mean: times grow by a factor at every step.
    The smaller neighbour alone has a say too, at its own rate, so that a drop that lasts is found
    where it begins.
    """
    series: dict[tuple[str, str], dict[tuple[int, int], Point]] = {}
    for point in points:
        series.setdefault((point.encoding, point.precision), {})[point.n, point.batch] = point
    for grid in series.values():
        batches = sorted({batch for _, batch in grid})
        place = {batch: index for index, batch in enumerate(batches)}
        steps = {(n, place[batch]): point for (n, batch), point in grid.items()}
        for (n, step), point in steps.items():
            pairs = [((n - 1, step), (n + 1, step)), ((n, step - 1), (n, step + 1))]
            point.expect(
                expectation
                for before, after in pairs
                for expectation in along(steps.get(before), point, steps.get(after))
            )


def along(before: Point | None, point: Point, after: Point | None) -> Iterator[float]:
    """Seconds that the neighbours on one line lead to expect."""
    if before is None:
        return
    yield before.seconds * point.output_bytes / before.output_bytes
    if after is not None:
        yield math.sqrt(before.seconds * after.seconds)


def mark_layouts(points: list[Point]) -> None:
    """Compare every point with its neighbours in qubits, layout and input type.

    Batches shrink as the qubits grow, so along the qubits it is the rate that has a trend. Next to
    the same input in contiguous rows, and contiguous rows next to those of the output's own real
    type, more time is granted for more bytes only.
    """
    found = {(point.input, point.layout, point.n): point for point in points}
    sizes = sorted({point.n for point in points})
    for (kind, layout, n), point in found.items():
        place = sizes.index(n)
        sides = [
            found.get((kind, layout, sizes[at]))
            for at in (place - 1, place + 1)
            if 0 <= at < len(sizes)
        ]
        rates = [side.output_bytes / side.seconds for side in sides if side]
        expectations = []
        if len(rates) == 2:
            expectations.append(point.output_bytes / math.sqrt(math.prod(rates)))
        own = "float32" if point.precision == "complex64" else "float64"
        plain = found.get((kind if layout != "contiguous" else own, "contiguous", n))
        if plain is not None and plain is not point:
            expectations.append(plain.seconds * max(1, point.bytes_moved / plain.bytes_moved))
        point.expect(expectations)


def main() -> int:
    began = time.perf_counter()
    args = parse_arguments()
    device = "cuda:0" if args.device == "cuda" else "cpu"
    on_cpu = device == "cpu"
    threads = qdp.device_info()["cpu_threads"]
    torch.set_num_threads(threads)
    torch.manual_seed(2026)
    record = describe(device, threads)
    print(headline(record))
    record["write"] = write_rate(device)

    limit = args.bytes or (CPU_BYTES if on_cpu else GPU_BYTES) // (8 if args.quick else 1)
    layout_bytes = (CPU_LAYOUT_BYTES if on_cpu else GPU_LAYOUT_BYTES) // (4 if args.quick else 1)
    sweep = Sweep(device, limit=limit, layout_bytes=layout_bytes, quick=args.quick)
    gc.collect()
    gc.freeze()
    with no_garbage_collection():
        sizes = sweep.sizes(BATCHES[::2] if args.quick else BATCHES)
        layouts = sweep.layouts()
        for _ in range(2):
            mark_sizes(sizes)
            mark_layouts(layouts)
            sweep.again([point for point in sizes + layouts if point.cliff][:AGAIN])
    mark_sizes(sizes)
    mark_layouts(layouts)
    record["seconds"] = round(time.perf_counter() - began, 1)

    points = sizes + layouts
    cliffs = [point for point in points if point.cliff]
    print("\n" + report(points, cliffs, sweep.failures))
    record["failures"] = sweep.failures
    record["cliffs"] = [asdict(point) for point in cliffs]
    record["columns"] = list(asdict(points[0]))
    record["points"] = [list(asdict(point).values()) for point in points]
    save(record, sizes, layouts, args.json_dir)
    print(f"{record['seconds']} seconds")
    return 1 if sweep.failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument(
        "--bytes",
        type=int,
        help=f"states of one point at most; default {GPU_BYTES >> 30} GiB, "
        f"on a CPU {CPU_BYTES >> 20} MiB, an eighth of it with --quick",
    )
    parser.add_argument("--json-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="smaller, every other batch")
    return parser.parse_args()


def report(points: list[Point], cliffs: list[Point], failures: dict[str, str]) -> str:
    """Failures, the cliffs of each kind, and the point that is nearest to being one."""
    lines = [f"{len(points)} points, {len(cliffs)} cliffs, {len(failures)} failures"]
    lines += [f"failed: {name}: {text[:200]}" for name, text in list(failures.items())[:20]]
    groups: dict[str, list[Point]] = {}
    for point in cliffs:
        groups.setdefault(point.group, []).append(point)
    for group, found in sorted(groups.items(), key=lambda item: -max(p.slowness for p in item[1])):
        worst = max(found, key=lambda point: point.slowness)
        lines.append(f"{group}: {len(found)} cliffs, the worst {worst.story}")
    rest = [point for point in points if point.expected and not point.cliff]
    nearest = max(rest, key=lambda point: point.slowness, default=None)
    if nearest is not None:
        lines.append(f"nearest to a cliff: {nearest.group}, {nearest.story}")
    return "\n".join(lines)


def save(record: dict[str, Any], sizes: list[Point], layouts: list[Point], folder: Path) -> None:
    """JSON, and pictures beside it where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date'][:10]}-{record['device']['slug']}"
    path = folder / f"{stem}-sweep.json"
    path.write_text(json.dumps(record) + "\n")
    print(f"saved {path}")
    try:
        plot_sweep(record, sizes, folder / f"{stem}-sweep.png")
        plot_layouts(record, layouts, folder / f"{stem}-layouts.png")
    except ImportError as missing:
        print(f"no pictures: {missing}", file=sys.stderr)
    else:
        print(f"saved {stem}-sweep.png and {stem}-layouts.png beside it")


if __name__ == "__main__":
    sys.exit(main())
