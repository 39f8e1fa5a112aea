"""What runs each workload: QDP, torch, qumat-qdp and PennyLane."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import _graphs
import numpy as np
import qdp
import qdp.torch
import torch
from _callers import Callers
from _formulations import formulation
from _pennylane import circuit
from _transfers import direct, pinned_copy
from _workloads import UnavailableError
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _workloads import Row

    Call = Callable[[Any], Any]

#: Every contender in the order of the tables.
NAMES = (
    "qdp scope",
    "qdp encode_list",
    "qdp batcher",
    "qdp stack",
    "qdp",
    "qdp alone",
    "qdp out",
    "qdp.torch",
    "qdp.torch out",
    "qdp plan",
    "qdp plan out",
    "qdp pinned",
    "qdp stream",
    *_graphs.QDP,
    "direct",
    "torch stack only",
    "torch stack",
    "torch",
    "torch pinned",
    "torch.compile",
    "torch graph",
    *_graphs.TORCH,
    "qumat-qdp stack",
    "qumat-qdp",
    "pennylane",
    "pinned copy",
    "no encode",
)
#: Those whose input lies in pinned memory.
PINNED = ("qdp pinned", "torch pinned", "pinned copy")


def build(name: str, row: Row, device: str, first: Any) -> Call:
    """The call of contender ``name``; ``first`` is the first of the row's inputs."""
    if device == "cpu" and (name in PINNED or name == "direct"):
        raise UnavailableError("no GPU to copy to")
    if row.kind == "replays":
        return _graphs.build(name, row, device, first)
    if row.callers:
        return Callers(name, row, device)
    if name.endswith(" stack"):
        encode = build(name.removesuffix(" stack"), replace(row, kind="host"), device, first)
        return lambda vectors: encode(np.stack(vectors))
    if name == "torch stack only":
        return lambda vectors: _upload(np.stack(vectors), device)
    if name in ("qdp scope", "qdp encode_list"):
        return _qdp_together(name, row, device)
    if name == "pinned copy":
        return pinned_copy(first, device)
    if name == "direct":
        return direct(row, device, first)
    if name == "qdp stream":
        return _qdp_stream(row, device)
    if name.startswith("qdp"):
        return _qdp(name, row, device)
    if name == "qumat-qdp":
        return _qumat(row, device)
    if name == "pennylane":
        return _dispatch(row, _pennylane(row, device))
    if name == "torch graph":
        return _torch_graph(row, device, first)
    encode = formulation(row, device)
    if name == "torch.compile":
        if row.kind != "device":
            raise UnavailableError("only on device rows")
        torch.compiler.reset()
        encode = torch.compile(encode, dynamic=False)
    pinned = name in PINNED
    return _dispatch(row, lambda data: encode(_upload(data, device, non_blocking=pinned)))


def _dispatch(row: Row, encode: Call) -> Call:
    """What a call of ``row`` does with an encoder of batches."""
    if row.kind == "host-sum":
        return lambda data: absolute_sum(encode(data))
    if row.kind == "requests":
        return lambda vectors: [encode(vector) for vector in vectors]
    if row.kind == "loop":
        return lambda batches: last(map(encode, batches))
    if row.kind == "loop-sum":
        return lambda batches: last(absolute_sum(encode(batch)) for batch in batches)
    return encode


def absolute_sum(states: Any) -> torch.Tensor:
    tensor: torch.Tensor = states if isinstance(states, torch.Tensor) else from_dlpack(states)
    return tensor.abs().sum()


def last(results: Iterable[Any]) -> Any:
    """The last of one or more results; the others are dropped as they come."""
    for result in results:
        kept = result
    return kept


def _upload(data: Any, device: str, *, non_blocking: bool = False) -> torch.Tensor:
    tensor: torch.Tensor = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
    return tensor.to(device, non_blocking=non_blocking).reshape(-1, tensor.shape[-1])


# QDP


def _qdp(name: str, row: Row, device: str) -> Call:
    """Calls as a user writes them, so with the options that the row needs and no others."""
    n, encoding, options = row.n, row.encoding, row.options
    engine = _qdp_engine(device, row.precision)
    if name in ("qdp", "qdp pinned"):
        return _dispatch(row, lambda x: engine.encode(x, n, encoding, **options))
    if row.kind != "device":
        raise UnavailableError("only on device rows")
    out = None
    if name.endswith(" out"):
        shape = (row.batch, 1 << n)
        out = torch.full(shape, torch.nan, dtype=row.complex_dtype, device=device)
    if name == "qdp out":
        return lambda x: engine.encode(x, n, encoding, out=out, **options)
    if name.startswith("qdp plan"):
        plan: Any = engine.plan(n, encoding, **options)
        call = getattr(plan, "torch", plan.encode)
        return call if out is None else lambda x: call(x, out=out)
    if row.precision is not None:
        options["precision"] = row.precision
    encode = qdp.torch.encode
    if out is None:
        return lambda x: encode(x, n, encoding, **options)
    return lambda x: encode(x, n, encoding, out=out, **options)


def _qdp_stream(row: Row, device: str) -> Call:
    """The loop over batches left to the engine, which prefetches."""
    if row.kind != "loop-sum":
        raise UnavailableError("only where batches follow one another")
    engine: Any = _qdp_engine(device, row.precision)
    if not hasattr(engine, "stream"):
        raise UnavailableError("this version has no Engine.stream")
    return lambda batches: last(
        absolute_sum(states) for states in engine.stream(iter(batches), row.n, row.encoding)
    )


def _qdp_together(name: str, row: Row, device: str) -> Call:
    """All requests as one batch."""
    n, encoding, options = row.n, row.encoding, row.options
    engine = _qdp_engine(device, row.precision)
    if name == "qdp encode_list":
        return lambda vectors: engine.encode_list(vectors, n, encoding, **options)

    def call(vectors: Iterable[Any]) -> qdp.StateBatch:
        with engine.coalesce(n, encoding, **options) as batch:
            for vector in vectors:
                batch.submit(vector)
        return batch.states

    return call


@cache
def _qdp_engine(device: str, precision: Any) -> qdp.Engine:
    return qdp.Engine(device, precision=precision)


# torch


def _torch_graph(row: Row, device: str, first: Any) -> Call:
    """Eager torch captured once; a call copies its input in and replays."""
    if row.kind != "device" or device == "cpu":
        raise UnavailableError("only on device rows of a GPU")
    encode = formulation(row, device)
    static_input = first.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            encode(static_input)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_output = encode(static_input)

    # The graph reads the formulation's tables, which nothing else keeps.
    def call(x: torch.Tensor, _tables: Any = encode) -> torch.Tensor:
        static_input.copy_(x)
        graph.replay()
        return static_output

    return call


# qumat-qdp


def _qumat(row: Row, device: str) -> Call:
    if device == "cpu":
        raise UnavailableError("has no CPU backend")
    if row.encoding in ("zz", "iqp-embedding"):
        raise UnavailableError("has no such encoding")
    if row.kind == "loop":
        return _qumat_benchmark(row, device)
    precision = "float32" if row.complex_dtype == torch.complex64 else "float64"
    engine = _qumat_engine(device, precision)
    return _dispatch(row, lambda x: engine.encode(x, row.n, row.encoding))


def _qumat_module() -> Any:
    if importlib.util.find_spec("qumat_qdp") is None:
        raise UnavailableError("not installed: pip install qumat-qdp==0.2.0")
    import qumat_qdp

    return qumat_qdp


@cache
def _qumat_engine(device: str, precision: str) -> Any:
    return _qumat_module().QdpEngine(torch.device(device).index or 0, precision)


def _qumat_benchmark(row: Row, device: str) -> Call:
    """Its own benchmark, which makes its own data: nothing to compare states with."""
    benchmark = (
        _qumat_module()
        .QdpBenchmark(torch.device(device).index or 0)
        .qubits(row.n)
        .encoding(row.encoding)
        .batches(row.count, row.batch)
    )
    return lambda _: benchmark.run_throughput()


# PennyLane


def _pennylane(row: Row, device: str) -> Call:
    if row.looped:
        raise UnavailableError("the host row says the same")
    states = circuit(row)
    import pennylane as qml

    node = qml.QNode(states, qml.device("default.qubit", wires=row.n), diff_method=None)
    if row.encoding == "basis":  # does not broadcast
        return lambda data: torch.stack([torch.as_tensor(node(i)) for i in data[:, 0].tolist()])
    return lambda data: node(_upload(data, device))
