"""How long a call takes, and what the machine could do at best."""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Call = Callable[[Any], Any]

REPEATS = 7
#: A call slower than this is timed once; checking its result has warmed it up.
SLOW_CALL_S = 2.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the least of ``repeats`` means over ``calls`` calls."""

    median_s: float
    best_s: float
    calls: int
    repeats: int


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(
    call: Call, inputs: Sequence[Any], device: str, *, pipelined: bool, seconds: float
) -> Timing:
    """Time ``call`` on ``inputs`` in turn for about ``seconds``.

    Pipelined calls are enqueued one after another with one synchronisation at the end of each
    repeat, as a training loop does; the others are synchronised one by one, as a caller who waits
    for each result sees it. The result of a call is dropped when the next one has returned.
    """

    def repeat(calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for index in range(calls):
            result = call(inputs[index % len(inputs)])
            if not pipelined:
                synchronize(device)
        synchronize(device)
        elapsed = time.perf_counter() - began
        del result
        return elapsed / calls

    with _no_garbage_collection():
        first = repeat(1)
        if first > SLOW_CALL_S:
            return Timing(first, first, 1, 1)
        estimate = repeat(min(20, max(3, len(inputs))))
        budget = seconds / REPEATS
        calls = max(1, min(20_000, int(budget / estimate)))
        repeat(calls)  # the clocks of an idle device need a while
        repeats = [repeat(calls) for _ in range(REPEATS)]
    return Timing(statistics.median(repeats), min(repeats), calls, REPEATS)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def probe(device: str, *, seconds: float) -> dict[str, float]:
    """The limits of this machine in this run: rates in bytes per second, ``launch`` in seconds."""
    on_gpu = device.startswith("cuda")
    values = (1 << 26) if on_gpu else (1 << 24)
    real = torch.rand(values, dtype=torch.float64, device=device)
    real_out = torch.empty_like(real)
    complex_out = torch.empty(values, dtype=torch.complex128, device=device)
    small, small_out = real[:64].clone(), real_out[:64].clone()

    def best(call: Call, *, pipelined: bool = True) -> float:
        return measure(call, [None], device, pipelined=pipelined, seconds=seconds).best_s

    limits = {
        "launch": best(lambda _: torch.neg(small, out=small_out)),
        "copy": 2 * real.nbytes / best(lambda _: real_out.copy_(real)),
        "write": complex_out.nbytes / best(lambda _: complex_out.zero_()),
        # Two ways to read one real and write one complex; the hardware allows the better one.
        "read1_write2": 3
        * real.nbytes
        / min(
            best(lambda _: complex_out.copy_(real)),
            best(lambda _: torch.complex(real, real, out=complex_out)),
        ),
    }
    if on_gpu:
        pinned = torch.empty(values, dtype=torch.float64, pin_memory=True)
        upload = best(lambda _: real.copy_(pinned, non_blocking=True))
        download = best(lambda _: pinned.copy_(real, non_blocking=True))
        limits |= {"h2d": real.nbytes / upload, "d2h": real.nbytes / download}
    return limits
