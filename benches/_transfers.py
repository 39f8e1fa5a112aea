"""What host input is compared with: a bare copy, and the least that a small call can do."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import qdp
import torch
from _timing import synchronize

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


def ring_counters(row: Row, device: str, batches: list[Any]) -> dict[str, Any] | None:
    """What ``engine.stats()`` says after one loop, with events timing copies and kernels.

    On an engine of its own, for the events cost time; None where there are no such counters.
    """
    if not hasattr(qdp.Engine, "stats"):
        return None
    precision: Any = row.precision
    os.environ["QDP_PIPELINE_TIMING"] = "1"
    try:
        engine: Any = qdp.Engine(device, precision=precision)
    finally:
        del os.environ["QDP_PIPELINE_TIMING"]
    for batch in batches:
        engine.encode(batch, row.n, row.encoding, **row.options)
    engine.synchronize()
    synchronize(device)
    stats = engine.stats()
    if not isinstance(stats, Mapping):
        names = [name for name in dir(stats) if not name.startswith("_")]
        stats = {name: getattr(stats, name) for name in names}
    return {key: value for key, value in stats.items() if isinstance(value, int | float)}
