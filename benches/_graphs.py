"""Replays of batches from the host, by QDP's graphs and in torch's own ways."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import qdp
import torch
from _formulations import formulation
from _timing import no_garbage_collection, synchronize
from _workloads import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _workloads import Row

    Call = Callable[[Any], Any]
    #: A batch: the samples under ``x``, and what comes with them.
    Batch = dict[str, Any]

#: What comes with the samples, where a row has other inputs.
OTHERS = {
    "labels": "int64",
    "indices": "int32",
    "weights": "float32",
    "mask": "uint8",
    "ids": "int64",
}
QDP = ("qdp graph", "qdp graph pinned")
TORCH = ("torch graph copies", "torch graph staged")
NAMES = (*QDP, *TORCH)
#: Calls whose enqueueing is timed one by one.
CALLS = 2000


def make_batches(samples: Sequence[Any], *, inputs: int) -> list[Batch]:
    """A batch of each array of samples, with so many inputs in all."""
    rng = np.random.default_rng(2026)

    def others(batch: int) -> Batch:
        chosen = list(OTHERS.items())[: inputs - 1]
        return {name: rng.integers(0, 2, size=batch).astype(dtype) for name, dtype in chosen}

    return [{"x": x, **others(len(x))} for x in samples]


def in_pinned_memory(batches: Sequence[Batch], *, arrays: bool) -> list[Batch]:
    """The same batches in pinned memory, as NumPy arrays over it or as tensors."""

    def move(array: Any) -> Any:
        tensor = torch.from_numpy(array).pin_memory()
        return tensor.numpy() if arrays else tensor

    return [{name: move(array) for name, array in batch.items()} for batch in batches]


def build(name: str, row: Row, device: str, first: Batch) -> Call:
    """The call of contender ``name`` on a batch."""
    if name in QDP:
        return _qdp(row, device, first)
    if device == "cpu":
        raise UnavailableError("no GPU to capture on")
    return (
        _torch_copies(row, device, first) if name == TORCH[0] else _torch_staged(row, device, first)
    )


def _qdp(row: Row, device: str, first: Batch) -> Call:
    precision: Any = row.precision
    engine = qdp.Engine(device, precision=precision)
    others = {name: ((None,), OTHERS[name]) for name in first if name != "x"}
    dtype = str(row.dtype).removeprefix("torch.")
    capture: Any = engine.capture
    graph = capture(
        row.n, row.encoding, row.batch, input=dtype, inputs=others or None, **row.options
    )
    replay = graph.replay
    if not others:
        return lambda batch: replay(batch["x"])

    def call(batch: Batch) -> Any:
        x, labels, indices, weights, mask, ids = batch.values()
        return replay(x, labels=labels, indices=indices, weights=weights, mask=mask, ids=ids).state

    return call


def _torch_copies(row: Row, device: str, first: Batch) -> Call:
    """A ``copy_`` from pinned memory for each input, then the replay of the encode."""
    encode = formulation(row, device)
    static = {
        name: torch.empty_like(_tensor(values), device=device, pin_memory=False)
        for name, values in first.items()
    }
    static["x"].copy_(_tensor(first["x"]))
    graph, output = _captured(lambda: encode(static["x"]))
    copies = list(static.values())

    # The graph reads the formulation's tables, which nothing else keeps.
    def call(batch: Batch, _tables: Any = encode) -> torch.Tensor:
        for target, source in zip(copies, batch.values(), strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()
        return output

    return call


def _torch_staged(row: Row, device: str, first: Batch) -> Call:
    """Copies on the host to one pinned buffer each, then a graph that uploads and encodes.

    Two sets of buffers and two graphs, so that one is filled while the other is under way.
    """
    encode = formulation(row, device)
    turns = []
    for _ in range(2):
        pinned = {
            name: torch.empty_like(_tensor(values)).pin_memory() for name, values in first.items()
        }
        static = {
            name: torch.empty_like(values, device=device, pin_memory=False)
            for name, values in pinned.items()
        }
        pinned["x"].copy_(_tensor(first["x"]))

        def upload(pinned: Any = pinned, static: Any = static) -> torch.Tensor:
            for name, target in static.items():
                target.copy_(pinned[name], non_blocking=True)
            return encode(static["x"])

        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        turns.append((list(pinned.values()), static, *_captured(upload), done))

    def call(batch: Batch, _tables: Any = encode) -> torch.Tensor:
        turn = turns.pop(0)
        turns.append(turn)
        pinned, _, graph, output, done = turn
        done.synchronize()
        for target, source in zip(pinned, batch.values(), strict=True):
            target.copy_(source)
        graph.replay()
        done.record()
        result: torch.Tensor = output
        return result

    return call


def _captured(encode: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            encode()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = encode()
    return graph, output


def _tensor(values: Any) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(values)


def enqueue_seconds(call: Call, batches: Sequence[Batch], device: str) -> float:
    """Seconds from call to enqueued on an idle device: the median of many calls."""
    seconds = []
    with no_garbage_collection():
        for k in range(CALLS):
            batch = batches[k % len(batches)]
            synchronize(device)
            began = time.perf_counter()
            result = call(batch)
            seconds.append(time.perf_counter() - began)
            del result
    return statistics.median(seconds)
