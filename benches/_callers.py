"""Many callers at once, each sending one request after another: threads, or asyncio tasks."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np
import qdp
from _workloads import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from _workloads import Row

    Vectors = Sequence[npt.NDArray[Any]]
    #: The last result of a caller, and the seconds of each of its requests.
    Served = tuple[Any, list[float]]


class Callers:
    """A call that lets every caller of ``row`` send its requests, and waits for all of them.

    It takes the vectors of each caller and returns each caller's last result. ``qdp batcher``
    sends them through one batcher; ``qdp`` has every caller encode by itself, tasks with
    ``await engine.encode_async``; ``qdp alone`` is a single one that does so with the requests of
    all, and so says what an idle engine takes for one. ``no encode`` is what Python itself allows:
    threads give up its lock and take it back, tasks give their loop a turn.
    """

    def __init__(self, name: str, row: Row, device: str) -> None:
        self.alone = name == "qdp alone" or row.callers == 1
        self.rounds: list[list[float]] = []
        self.tasks = row.kind == "tasks"
        self.send = _sender(name, row, device)

    def __call__(self, parts: Sequence[Vectors]) -> list[Any]:
        served = asyncio.run(self._tasks(parts)) if self.tasks else self._threads(parts)
        self.rounds.append([seconds for _, taken in served for seconds in taken])
        return [last for last, _ in served]

    def latency(self, rounds: int) -> dict[str, float]:
        """Seconds of a request, over the last ``rounds`` calls of this object."""
        taken = np.concatenate(self.rounds[-rounds:])
        median, p99 = np.percentile(taken, [50, 99])
        return {"median_s": float(median), "p99_s": float(p99), "worst_s": float(taken.max())}

    def _threads(self, parts: Sequence[Vectors]) -> list[Served]:
        def serve(vectors: Vectors) -> Served:
            taken, send = [], self.send
            for vector in vectors:
                began = time.perf_counter()
                last = send(vector)
                taken.append(time.perf_counter() - began)
            return last, taken

        if self.alone:
            return [serve(vectors) for vectors in parts]
        all_there = Barrier(len(parts))

        def serve_at_once(vectors: Vectors) -> Served:
            all_there.wait()
            return serve(vectors)

        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(serve_at_once, parts))

    async def _tasks(self, parts: Sequence[Vectors]) -> list[Served]:
        async def serve(vectors: Vectors) -> Served:
            taken, send = [], self.send
            for vector in vectors:
                began = time.perf_counter()
                last = await send(vector)
                taken.append(time.perf_counter() - began)
            return last, taken

        if self.alone:
            return [await serve(vectors) for vectors in parts]
        return await asyncio.gather(*(serve(vectors) for vectors in parts))


def _sender(name: str, row: Row, device: str) -> Callable[[Any], Any]:
    """What encodes one request; for tasks it returns what they await."""
    if name == "no encode":
        if row.kind == "tasks":
            return lambda _: asyncio.sleep(0)
        return lambda _: os.sched_yield()
    n, encoding, options = row.n, row.encoding, row.options
    precision: Any = row.precision
    engine: Any = qdp.Engine(device, precision=precision)
    method = "encode_async" if row.kind == "tasks" else "encode"
    if name == "qdp batcher":
        if not hasattr(engine, "batcher"):
            raise UnavailableError("this version has no Engine.batcher")
        send: Callable[[Any], Any] = getattr(engine.batcher(n, encoding, **options), method)
        return send
    encode = getattr(engine, method)
    return lambda x: encode(x, n, encoding, **options)
