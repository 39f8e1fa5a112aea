"""What host input is compared with: a bare copy, and the least that a small call can do."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import qdp
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from _workloads import Row

#: Pinned buffers of ``direct``, so that one is filled while the copy of another is under way.
SLOTS = 4


def pinned_copy(first: torch.Tensor, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Copy pinned input to the device, and nothing else."""
    lying = torch.empty_like(first, device=device, pin_memory=False)
    return lambda x: lying.copy_(x, non_blocking=True)


def direct(row: Row, device: str, first: Any) -> Callable[[Any], torch.Tensor]:
    """By hand: one NumPy copy into pinned memory, one asynchronous copy, one encode with ``out=``.

    On one stream; a pinned buffer is filled again when the copy out of it is done.
    """
    dtype = torch.from_numpy(first).dtype
    pinned = [torch.empty(first.shape, dtype=dtype, pin_memory=True) for _ in range(SLOTS)]
    slots = itertools.cycle(
        [(tensor.numpy(), tensor, torch.cuda.Event()) for tensor in pinned]  # type: ignore[no-untyped-call]
    )
    lying = torch.empty(first.shape, dtype=dtype, device=device)
    shape = (len(first), 1 << row.n)
    out = torch.full(shape, torch.nan, dtype=row.complex_dtype, device=device)
    precision: Any = row.precision
    plan: Any = qdp.Engine(device, precision=precision).plan(row.n, row.encoding, **row.options)
    encode = getattr(plan, "torch", plan.encode)

    def call(x: Any) -> torch.Tensor:
        array, tensor, copied = next(slots)
        copied.synchronize()
        np.copyto(array, x)
        lying.copy_(tensor, non_blocking=True)
        copied.record()
        encode(lying, out=out)
        return out

    return call


def ring_counters(row: Row, device: str, batches: list[Any]) -> dict[str, Any]:
    """What ``engine.stats()`` says after one loop, and the loop's ``wall_ns``.

    On an engine of its own, for the events that time copies and kernels cost time themselves.
    """
    precision: Any = row.precision
    engine = qdp.Engine(device, precision=precision, pipeline=qdp.PipelineConfig(timing=True))
    engine.encode(batches[0], row.n, row.encoding, **row.options)
    engine.synchronize()
    before, began = engine.stats(), time.perf_counter_ns()
    for batch in batches:
        engine.encode(batch, row.n, row.encoding, **row.options)
    engine.synchronize()
    wall = time.perf_counter_ns() - began
    counted = {name: value - before[name] for name, value in engine.stats().items()}
    return {**counted, "wall_ns": wall}
