"""The limits of the machine in this run: what a launch costs, and how fast bytes move.

Of every limit the best of several ways counts, so that it flatters nobody.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _timing import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

HERE = Path(__file__).parent
#: Bytes that a probe writes. Like the bulk rows far more than any cache holds.
GPU_BYTES = 512 << 20
CPU_BYTES = 128 << 20
BLOCK = 256  # of stream.cu

#: What is read and what is written, for each mix that the tables need.
MIXES = (
    (torch.float32, torch.complex64),
    (torch.float64, torch.complex128),
    (torch.float16, torch.complex64),
    (torch.bfloat16, torch.complex64),
    (torch.float64, torch.complex64),
    (torch.float32, torch.complex128),
    (torch.complex64, torch.complex64),
    (torch.complex128, torch.complex128),
)


@dataclass
class Limits:
    """Rates in bytes per second, launches in seconds; None is what could not be measured.

    ``stream`` counts the bytes read and the bytes written. ``ways`` holds the rate of every way
    that was tried, the best first: the limit is that one's.
    """

    launch_torch: float
    launch_bare: float | None
    no_launch_bare: str | None
    write: float
    stream: dict[str, float]
    ways: dict[str, dict[str, float]]
    h2d: float | None = None
    d2h: float | None = None

    @property
    def launch(self) -> float:
        return min(self.launch_torch, self.launch_bare or self.launch_torch)


def mix(dtype: torch.dtype, complex_dtype: torch.dtype) -> str:
    return f"{dtype}->{complex_dtype}".replace("torch.", "")


def probe(device: str, needed: Collection[str], *, quick: bool) -> Limits:
    """Every limit, of the mixes those in ``needed``."""
    seconds = 0.02 if quick else 0.05
    small = torch.rand(64, device=device)
    small_out = torch.empty_like(small)
    launch = measure(
        lambda _: torch.neg(small, out=small_out), [None], device, pipelined=True, seconds=0.3
    )
    bare, reason = bare_launch(device)
    ways = {"write": _rates(_writes(device, quick=quick), device, seconds)}
    for dtype, complex_dtype in MIXES:
        name = mix(dtype, complex_dtype)
        if name not in needed:
            continue
        ways[name] = _rates(_streams(dtype, complex_dtype, device, quick=quick), device, seconds)
    best = {name: next(iter(rates.values())) for name, rates in ways.items()}
    limits = Limits(launch.median_s, bare, reason, best.pop("write"), best, ways)
    if device != "cpu":
        limits.h2d, limits.d2h = _transfers(device, seconds)
        torch.cuda.empty_cache()
    return limits


def write_rate(device: str) -> float:
    """Bytes per second that can be written."""
    return next(iter(_rates(_writes(device, quick=True), device, 0.02).values()))


# Launches


def bare_launch(device: str) -> tuple[float | None, str | None]:
    """Seconds of one cuLaunchKernel, pipelined; or None and why not."""
    if device == "cpu":
        return None, "no GPU"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler (cc, gcc, clang)"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "launch.so"
        flags = ["-O2", "-shared", "-fPIC"]
        command = [compiler, *flags, str(HERE / "launch.c"), "-o", str(library), "-ldl"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return None, f"{compiler} failed: {built.stderr.strip()}"
        function = ctypes.CDLL(str(library)).bare_launch
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_int
    seconds = (ctypes.c_double * 15)()
    torch.cuda.synchronize(device)  # torch has made its context and it is current
    stream = torch.cuda.current_stream(device).cuda_stream
    status = function(stream, 5000, len(seconds), seconds)
    if status:
        return None, f"the driver returned {status}"
    return statistics.median(seconds), None


# Bytes

Way = tuple[str, int, "Callable[[], Any]"]


def _rates(ways: Iterator[Way], device: str, seconds: float) -> dict[str, float]:
    """Bytes per second of every way that works here, the best first."""
    rates = {}
    try:
        for name, moved, call in ways:
            timing = measure(lambda call: call(), [call], device, pipelined=True, seconds=seconds)
            rates[name] = moved / timing.median_s
    except Exception as error:  # noqa: BLE001 (torch's own ways come first and are enough to go on)
        print(f"a probe failed, the limit may be too low: {error}", file=sys.stderr)
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def _writes(device: str, *, quick: bool) -> Iterator[Way]:
    out = torch.empty(_bytes(device) // 16, dtype=torch.complex128, device=device)
    yield "torch zero_", out.nbytes, out.zero_
    yield "torch fill_", out.nbytes, lambda: out.fill_(1)
    for name, kernel in _kernels(torch.float64, out.dtype, device, write_only=True, quick=quick):
        out.fill_(torch.nan)
        kernel(out, out)
        if bool((out != 0).any()):
            raise RuntimeError(f"the write probe '{name}' is wrong")
        yield name, out.nbytes, partial(kernel, out, out)


def _streams(
    dtype: torch.dtype, complex_dtype: torch.dtype, device: str, *, quick: bool
) -> Iterator[Way]:
    out = torch.empty(_bytes(device) // complex_dtype.itemsize, dtype=complex_dtype, device=device)
    x = torch.randn(out.shape, dtype=dtype, device=device)
    moved = x.nbytes + out.nbytes

    def checked(name: str, call: Callable[[], Any], *, imaginary: bool = False) -> Way:
        out.fill_(torch.nan)
        call()
        # Whole tensors, a piece at a time: the comparison needs memory of its own.
        for got, part in zip(_pieces(out), _pieces(x), strict=True):
            want = torch.complex(part, part) if imaginary else part.to(complex_dtype)
            if not torch.equal(got, want):
                raise RuntimeError(f"the probe '{name}' of {mix(dtype, complex_dtype)} is wrong")
        return name, moved, call

    yield checked("torch copy_", lambda: out.copy_(x))
    if (dtype, complex_dtype) in MIXES[:2]:
        yield checked("torch complex", lambda: torch.complex(x, x, out=out), imaginary=True)
    if device == "cpu":
        return
    if importlib.util.find_spec("cupy") and dtype != torch.bfloat16:
        yield checked("cupy ElementwiseKernel", _elementwise(x, out))
    for name, kernel in _kernels(dtype, complex_dtype, device, quick=quick):
        yield checked(name, partial(kernel, x, out))


def _pieces(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.tensor_split(x, 16)


def _bytes(device: str) -> int:
    return CPU_BYTES if device == "cpu" else GPU_BYTES


def _elementwise(x: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    import cupy

    kernel = cupy.ElementwiseKernel("T x", "C y", "y = C(x)", "convert")
    source, target = cupy.from_dlpack(x), cupy.from_dlpack(out)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call() -> None:
        with stream:
            kernel(source, target)

    return call


def _kernels(
    dtype: torch.dtype,
    complex_dtype: torch.dtype,
    device: str,
    *,
    quick: bool,
    write_only: bool = False,
) -> Iterator[tuple[str, Callable[[torch.Tensor, torch.Tensor], None]]]:
    """stream.cu in several widths, where something here compiles it."""
    compiler = None if device == "cpu" else _compiler()
    if compiler is None:
        return
    real = dtype.to_real() if dtype.is_complex else dtype
    read, convert = {
        torch.float16: ("unsigned short", "half_to_float(x)"),
        torch.bfloat16: ("unsigned short", "__uint_as_float(unsigned(x) << 16)"),
        torch.float32: ("float", "OUT(x)"),
        torch.float64: ("double", "OUT(x)"),
    }[real]
    per_store = 16 // complex_dtype.itemsize
    load = {4: "unsigned", 8: "uint2", 16: "uint4"}[per_store * dtype.itemsize]
    source = (HERE / "stream.cu").read_text()
    widths = [(4, 0), (4, 1)] if quick else itertools.product((1, 2, 4, 8), (0, 1))
    for unroll, streaming in widths:
        definitions = {
            "IN": read,
            "OUT": "float" if complex_dtype == torch.complex64 else "double",
            "IN_COMPLEX": int(dtype.is_complex),
            "LOAD": load,
            "CONVERT(x)": convert,
            "WRITE_ONLY": int(write_only),
            "UNROLL": unroll,
            "STREAMING": streaming,
        }
        prefix = "".join(f"#define {name} {value}\n" for name, value in definitions.items())
        launch = compiler(prefix + source)
        amplitudes_per_block = per_store * BLOCK * unroll

        def call(
            x: torch.Tensor,
            out: torch.Tensor,
            launch: Callable[..., None] = launch,
            amplitudes_per_block: int = amplitudes_per_block,
        ) -> None:
            launch(out.numel() // amplitudes_per_block, x, out)

        name = f"kernel, {unroll} x 16 bytes a thread" + (", evict first" if streaming else "")
        yield name, call


def _compiler() -> Callable[[str], Callable[..., None]] | None:
    """What compiles CUDA C++ at run time here: torch, else CuPy, else nothing."""
    if hasattr(torch.cuda, "_compile_kernel"):

        def by_torch(source: str) -> Callable[..., None]:
            kernel = torch.cuda._compile_kernel(source, "stream")  # noqa: SLF001 (no public name)
            return lambda blocks, *tensors: kernel((blocks, 1, 1), (BLOCK, 1, 1), list(tensors))

        return by_torch
    if importlib.util.find_spec("cupy"):
        import cupy

        def by_cupy(source: str) -> Callable[..., None]:
            kernel = cupy.RawKernel(source, "stream")
            return lambda blocks, *tensors: kernel(
                (blocks,), (BLOCK,), tuple(tensor.data_ptr() for tensor in tensors)
            )

        return by_cupy
    return None


def _transfers(device: str, seconds: float) -> tuple[float, float]:
    """Bytes per second between pinned memory and the device, up and down."""
    pinned = torch.empty(GPU_BYTES, dtype=torch.uint8, pin_memory=True)
    lying = torch.empty(GPU_BYTES, dtype=torch.uint8, device=device)

    def rate(call: Callable[[Any], Any]) -> float:
        timing = measure(call, [None], device, pipelined=True, seconds=2 * seconds)
        return GPU_BYTES / timing.median_s

    return (
        rate(lambda _: lying.copy_(pinned, non_blocking=True)),
        rate(lambda _: pinned.copy_(lying, non_blocking=True)),
    )
