"""The rows of every table, with the lines that they must reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from _graphs import NAMES as GRAPHS
from _workloads import Line, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLES = ("bulk", "small", "latency", "host", "coalesce", "graphs", "cpu")
GPU_TABLES = ("bulk", "small", "latency", "host", "coalesce", "graphs")
CPU_TABLES = ("cpu", "latency", "host", "coalesce")

BULK_BYTES = 512 << 20
CPU_BULK_BYTES = 64 << 20
BULK_SIZES = (8, 10, 12, 13, 14, 15, 16, 17, 18, 20, 22, 24)
QUICK_BULK_SIZES = (8, 12, 14, 16, 20, 24)
#: Where the bulk table has peers beside QDP: they are slow, and large tables take their time.
PEER_BULK_SIZES = (10, 16, 20)

#: Qubits and batch of host input: 64 KiB to 2 GiB of float64.
HOST_SIZES = (
    *((10, 8), (10, 64)),
    *((16, 1), (16, 4), (16, 16), (16, 64), (16, 256), (16, 1024), (16, 4096)),
)
QUICK_HOST_SIZES = ((10, 64), (16, 1), (16, 8), (16, 64), (16, 256))

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHORT = {F16: "f16", BF16: "bf16", F32: "f32", F64: "f64", torch.int64: "i64"}
SHORT_COMPLEX = {torch.complex64: "c64", torch.complex128: "c128"}

DIAGONAL = ("iqp", "iqp-z", "iqp-embedding", "zz")
REPS = {"zz": 2, "iqp-embedding": 1}

ALL = ("qdp", "qdp out", "qdp.torch", "qdp.torch out", "qdp plan", "torch", "torch graph")
PEERS = ("qumat-qdp", "pennylane")
#: From pageable and from pinned memory, beside the bare copy.
TRANSFERS = ("qdp", "qdp pinned", "torch", "torch pinned", "qumat-qdp", "pinned copy")


def rows_of(table: str, *, quick: bool) -> list[Row]:
    make = {
        "bulk": bulk,
        "small": small,
        "latency": latency,
        "host": host,
        "coalesce": coalesce,
        "graphs": graphs,
        "cpu": cpu,
    }
    return list(make[table](quick=quick))


def bulk(*, quick: bool) -> Iterator[Row]:
    """Large batches: states of 512 MiB, as a fraction of what the memory allows."""
    sizes = QUICK_BULK_SIZES if quick else BULK_SIZES
    mixes = [(F32, "complex64"), (F64, "complex128")]
    for dtype, precision in [*mixes, (F16, "complex64"), (BF16, "complex64"), (F64, "complex64")]:
        yield from _bulk_rows("amplitude", dtype, precision, sizes)
    for encoding in ("angle", "phase", *DIAGONAL):
        for dtype, precision in mixes:
            yield from _bulk_rows(encoding, dtype, precision, sizes)
    for precision in ("complex64", "complex128"):
        yield from _bulk_rows("basis", torch.int64, precision, sizes)


def _bulk_rows(
    encoding: str, dtype: torch.dtype, precision: str, sizes: tuple[int, ...]
) -> Iterator[Row]:
    for n in sizes:
        row = Row("", "bulk", "device", encoding, n, dtype, precision, REPS.get(encoding))
        state_bytes = row.complex_dtype.itemsize << n
        lines = [_bulk_line(row, contender) for contender in ("qdp.torch out", "qdp.torch")]
        same_width = (dtype, precision) in [(F32, "complex64"), (F64, "complex128")]
        peers = encoding not in ("iqp-z", "iqp-embedding") and same_width and n in PEER_BULK_SIZES
        yield Row(
            f"bulk-{encoding}-{SHORT[dtype]}-{SHORT_COMPLEX[row.complex_dtype]}-n{n}",
            "bulk",
            "device",
            encoding,
            n,
            dtype,
            precision,
            REPS.get(encoding),
            batch=max(1, BULK_BYTES // state_bytes),
            contenders=("qdp.torch out", "qdp.torch", *(("torch", "qumat-qdp") if peers else ())),
            lines=tuple(lines),
            cpu_batch=max(1, CPU_BULK_BYTES // state_bytes),
        )


def _bulk_line(row: Row, contender: str) -> Line:
    if row.encoding == "amplitude":
        return Line(contender, "of limit", 0.88)
    if row.encoding not in DIAGONAL:
        return Line(contender, "of limit", 0.85)
    # A block's shared memory holds 2^14 amplitudes of complex64, a cluster's 2^17.
    larger = int(row.complex_dtype == torch.complex128)
    if row.n <= 14 - larger:
        return Line(contender, "of limit", 0.6)
    if row.n <= 17 - larger:
        return Line(contender, "of limit", 0.35)
    return Line(contender, "of one extra pass", 0.85)


def small(*, quick: bool) -> Iterator[Row]:
    """What a call costs: batches of 64 small states, against a bare launch."""
    lines = (Line("qdp.torch", "launches", 1.6), Line("qdp out", "launches", 1.2))
    contenders = ("qdp.torch", "qdp out", "qdp plan", "qdp plan out", "qdp", "qdp.torch out")
    for encoding in ("amplitude", "angle", "iqp"):
        for dtype in (F32, F64):
            for n in (4, 10) if quick else (2, 4, 6, 8, 10):
                yield Row(
                    f"small-{encoding}-{SHORT[dtype]}-n{n}",
                    "small",
                    "device",
                    encoding,
                    n,
                    dtype,
                    contenders=(*contenders, "torch", "torch graph", "qumat-qdp"),
                    lines=lines,
                )


def latency(*, quick: bool) -> Iterator[Row]:
    """Batches of 64 that lie on the device, QDP beside its peers."""
    # encoding, qubits, input, microseconds that it may take, whether torch.compile joins in
    cases: list[tuple[str, int, torch.dtype, float | None, bool]] = [
        ("amplitude", 10, F32, None, False),
        ("amplitude", 16, F32, None, False),
        ("amplitude", 16, F64, 32, True),
        ("amplitude", 20, F64, None, False),
        ("angle", 8, F64, None, False),
        ("angle", 16, F64, 20, True),
        ("phase", 16, F64, None, False),
        ("basis", 16, torch.int64, None, False),
        ("iqp", 12, F64, 12, False),
        ("iqp", 16, F64, 60, True),
        ("iqp-z", 16, F64, None, False),
        ("iqp-embedding", 12, F64, None, False),
        ("zz", 16, F64, 130, False),
    ]
    for encoding, n, dtype, microseconds, compiled in cases:
        gates = encoding in DIAGONAL and n == 16  # hundreds of them, each a pass over all states
        yield Row(
            f"{encoding}-device-{SHORT[dtype]}-n{n}",
            "latency",
            "device",
            encoding,
            n,
            dtype,
            reps=REPS.get(encoding),
            contenders=(
                *ALL,
                *(("torch.compile",) if compiled and not quick else ()),
                *(PEERS[:1] if gates and quick else PEERS),
            ),
            lines=() if microseconds is None else (Line("qdp.torch", "us", microseconds),),
            cpu_batch=8 if n == 20 or gates else None,
        )
    yield Row(
        "amplitude-device-f64-n16-b1024",
        "latency",
        "device",
        "amplitude",
        16,
        batch=1024,
        contenders=(*ALL, *PEERS),
        cpu_batch=256,
    )


def host(*, quick: bool) -> Iterator[Row]:
    """Input that lies in the host's memory."""
    contenders = ("qdp", "torch", *(("qumat-qdp",) if quick else PEERS))
    yield from _batch_sizes(quick=quick)
    yield Row(
        "amplitude-host-f64-n16-sum", "host", "host-sum", "amplitude", 16, contenders=contenders
    )
    yield Row(
        "amplitude-host-f64-long",
        "host",
        "host",
        "amplitude",
        24 if quick else 28,
        batch=1,
        contenders=TRANSFERS,
        lines=(Line("qdp", "of h2d", 0.85),),
        cpu_n=20,
    )
    yield Row(
        "loop-host-f32-n16",
        "host",
        "loop",
        "amplitude",
        16,
        F32,
        count=200,
        cpu_count=20,
        contenders=contenders,
    )
    yield Row(
        "loop-host-f64-n16-sum",
        "host",
        "loop-sum",
        "amplitude",
        16,
        count=200,
        cpu_count=20,
        contenders=("qdp", "qdp stream", "torch", "qumat-qdp"),
        # The source's bytes at the pinned rate are the time that the copy engine is busy.
        lines=(Line("qdp", "x qumat-qdp", 5), Line("qdp", "of h2d", 0.9)),
    )


def _batch_sizes(*, quick: bool) -> Iterator[Row]:
    """Amplitude from float64 in batches of 64 KiB to 2 GiB: the picture of throughput."""
    lines = {
        ("n10", None): (Line("qdp", "x direct", 1 / 1.3),),
        ("n16", None): (Line("qdp", "of h2d", 0.87), Line("qdp pinned", "of h2d", 0.95)),
        ("n16", "complex64"): (Line("qdp", "of h2d", 1.1),),
    }
    peers = {
        ("n10", None): (*TRANSFERS, "direct"),
        ("n16", None): (*TRANSFERS, *(() if quick else ("pennylane",))),
        ("n16", "complex64"): ("qdp", "qdp pinned", "torch", "qumat-qdp"),
    }
    for n, batch in QUICK_HOST_SIZES if quick else HOST_SIZES:
        name = f"n{n}" if batch == 64 else f"n{n}-b{batch}"
        for precision, output in [(None, ""), ("complex64", "-c64")]:
            yield Row(
                f"amplitude-host-f64{output}-{name}",
                "host",
                "host",
                "amplitude",
                n,
                precision=precision,
                batch=batch,
                contenders=peers.get((name, precision), ("qdp",) if precision else TRANSFERS),
                lines=lines.get((name, precision), ()),
                gpu_only=batch > 64,
            )


def coalesce(*, quick: bool) -> Iterator[Row]:
    """Many small requests: together, through a batcher, and each for itself."""
    contenders = (
        *("qdp scope", "qdp encode_list", "qdp stack", "qdp"),
        *("torch stack only", "torch stack", "torch", "qumat-qdp stack"),
        *(("qumat-qdp",) if quick else PEERS),
    )
    for n, beside_stack in [(8, 1.5), (10, 2.5), (12, 4)]:
        yield Row(
            f"requests-n{n}",
            "coalesce",
            "requests",
            "amplitude",
            n,
            batch=1,
            count=2048,
            contenders=contenders,
            lines=(
                Line("qdp scope", "x torch stack only", beside_stack),
                Line("qdp scope", "x qumat-qdp", 100),
                Line("qdp encode_list", "x qdp scope", 1.3),
            ),
        )
    many = (
        Line("qdp batcher", "x qdp", 10),
        Line("qdp batcher", "idle calls, median", 3),
        Line("qdp batcher", "idle calls, p99", 5),
    )
    for name, kind, callers in [
        ("batcher-16-threads-n10", "threads", 16),
        ("batcher-256-tasks-n10", "tasks", 256),
        ("batcher-lone-caller-n10", "threads", 1),
    ]:
        lone = callers == 1
        yield Row(
            name,
            "coalesce",
            kind,  # type: ignore[arg-type]
            "amplitude",
            10,
            batch=1,
            count=8192,
            cpu_count=4096,
            callers=callers,
            contenders=("qdp batcher", "qdp", *(() if lone else ("qdp alone", "no encode"))),
            lines=(Line("qdp batcher", "x qdp", 1 / 1.3),) if lone else many,
        )


def graphs(*, quick: bool) -> Iterator[Row]:
    """Batches from the host, each by one replay; alone, and with five small inputs."""
    lines = {
        ("angle", 8, 1): (
            Line("qdp graph pinned", "us to enqueue", 9),
            Line("qdp graph pinned", "x torch graphs", 4),
        ),
        ("angle", 8, 6): (Line("qdp graph pinned", "x torch graphs", 3),),
    }
    shapes = [("angle", 8), ("angle", 12), ("amplitude", 8), ("iqp", 8), ("zz", 8)]
    for encoding, n in shapes[:1] if quick else shapes:
        for inputs in (1, 6):
            yield Row(
                f"replay-{encoding}-f64-n{n}" + ("" if inputs == 1 else f"-{inputs}-inputs"),
                "graphs",
                "replays",
                encoding,
                n,
                reps=REPS.get(encoding),
                inputs=inputs,
                contenders=GRAPHS,
                lines=lines.get((encoding, n, inputs), ()),
                gpu_only=True,
            )


def cpu(*, quick: bool) -> Iterator[Row]:
    """The CPU backend beside torch on as many threads, and what one small call costs."""
    speedup = {"amplitude": 2.0, "angle": 5.0, "iqp": 5.0}
    for encoding in ("amplitude", "angle", "phase", "iqp", "zz"):
        for dtype in (F32, F64):
            for n in (4, 10, 16) if quick else (4, 6, 8, 10, 12, 14, 16, 18, 20):
                lined = encoding in speedup and (encoding != "amplitude" or n >= 10)
                yield Row(
                    f"cpu-{encoding}-{SHORT[dtype]}-n{n}",
                    "cpu",
                    "device",
                    encoding,
                    n,
                    dtype,
                    reps=REPS.get(encoding),
                    batch=min(64, max(1, CPU_BULK_BYTES // (2 * dtype.itemsize << n))),
                    contenders=("qdp.torch", "qdp.torch out", "torch"),
                    lines=(Line("qdp.torch", "x torch", speedup[encoding]),) if lined else (),
                )
    for encoding in ("amplitude", "angle", "iqp"):
        for n in (2, 4, 6):
            yield Row(
                f"call-{encoding}-f64-n{n}",
                "cpu",
                "device",
                encoding,
                n,
                batch=1,
                contenders=("qdp.torch", "qdp plan", "qdp out", "qdp", "torch"),
                lines=(Line("qdp.torch", "us", 3), Line("qdp", "us", 3)),
            )
