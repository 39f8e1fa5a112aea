"""How long a call takes."""

from __future__ import annotations

import gc
import itertools
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
#: Of a call that alone takes longer than the time set aside.
SLOW_REPEATS = 3
#: A call slower than this is timed once; checking its result has warmed it up.
SLOW_CALL_S = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: of ``repeats`` means over ``calls`` calls the median and the extremes."""

    median_s: float
    best_s: float
    worst_s: float
    calls: int
    repeats: int


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(
    call: Call,
    inputs: Sequence[Any],
    device: str,
    *,
    pipelined: bool,
    seconds: float,
    repeats: int = REPEATS,
) -> Timing:
    """Time ``call`` on ``inputs`` in turn for about ``seconds``.

    Pipelined calls are enqueued one after another with one synchronisation at the end of each
    repeat, as a training loop does; the others are synchronised one by one, as a caller who waits
    for each result sees it. The result of a call is dropped when the next one has returned.
    """
    turns = itertools.cycle(inputs)

    def repeat(calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for data in itertools.islice(turns, calls):
            result = call(data)
            if not pipelined:
                synchronize(device)
        synchronize(device)
        elapsed = time.perf_counter() - began
        del result
        return elapsed / calls

    with no_garbage_collection():
        first = repeat(1)
        if first > SLOW_CALL_S:
            return Timing(first, first, first, 1, 1)
        if first > seconds:
            repeats = min(repeats, SLOW_REPEATS)
        budget = seconds / repeats
        estimate = first if first > budget else repeat(min(20, max(3, len(inputs))))
        calls = max(1, min(20_000, int(budget / estimate)))
        if calls > 1:
            repeat(calls)  # the clocks of an idle device need a while
        means = [repeat(calls) for _ in range(repeats)]
    return Timing(statistics.median(means), min(means), max(means), calls, repeats)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not before the block ends; within another such block do nothing."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
