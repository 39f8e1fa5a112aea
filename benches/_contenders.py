"""What runs each workload: QDP, torch, qumat-qdp and PennyLane."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import qdp
import qdp.torch
import torch
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from _workloads import Row

    Call = Callable[[Any], Any]

#: Every contender in the order of the table. ``qdp`` is what the ratios are about.
NAMES = (
    "qdp",
    "qdp.torch",
    "qdp.torch out",
    "torch",
    "torch.compile",
    "torch graph",
    "qumat-qdp",
    "pennylane",
)


class UnavailableError(Exception):
    """A contender that cannot run this row here, and why."""


def build(name: str, row: Row, device: str, first: Any) -> Call:
    """The call of contender ``name``; ``first`` is the first of the row's inputs."""
    if name.startswith("qdp"):
        return _qdp(name, row, device)
    if name == "qumat-qdp":
        return _qumat(row, device)
    if name == "pennylane":
        return _dispatch(row, _pennylane(row, device))
    if name == "torch graph":
        return _torch_graph(row, device, first)
    encode = _torch_encode(row, device)
    if name == "torch.compile":
        if row.kind != "device":
            raise UnavailableError("only on device rows")
        encode = torch.compile(encode, dynamic=False)
    return _dispatch(row, lambda data: encode(_upload(data, device)))


def _dispatch(row: Row, encode: Call) -> Call:
    """What a call of ``row`` does with an encoder of batches."""
    if row.kind == "host-sum":
        return lambda data: torch.as_tensor(encode(data)).abs().sum()
    if row.kind == "requests":
        return lambda vectors: [encode(vector) for vector in vectors]
    if row.kind == "stack":
        return lambda vectors: encode(np.stack(vectors))
    if row.kind == "loop":
        return lambda batches: _last(encode, batches)
    return encode


def _last(encode: Call, batches: Any) -> Any:
    """Encode one batch after another; of the states only the last ones are kept."""
    for batch in batches:
        states = encode(batch)
    return states


def _upload(data: Any, device: str) -> torch.Tensor:
    tensor: torch.Tensor = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
    return tensor.to(device).reshape(-1, tensor.shape[-1])


# QDP


def _qdp(name: str, row: Row, device: str) -> Call:
    if name == "qdp":
        engine = _qdp_engine(device)
        if row.kind == "host-sum":
            return lambda x: from_dlpack(engine.encode(x, row.n, row.encoding)).abs().sum()
        return _dispatch(row, lambda x: engine.encode(x, row.n, row.encoding))
    if row.kind != "device":
        raise UnavailableError("only on device rows")
    if name == "qdp.torch":
        return lambda x: qdp.torch.encode(x, row.n, row.encoding)
    complex_dtype = torch.complex64 if row.dtype is np.float32 else torch.complex128
    out = torch.empty(row.batch, 1 << row.n, dtype=complex_dtype, device=device)
    return lambda x: qdp.torch.encode(x, row.n, row.encoding, out=out)


@cache
def _qdp_engine(device: str) -> qdp.Engine:
    return qdp.Engine(device)


# torch: for each encoding the fastest that eager operations allow


def _torch_encode(row: Row, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if row.encoding == "amplitude":
        return _torch_amplitude
    if row.encoding == "angle":
        return _torch_angle
    return _torch_iqp(row.n, device)


def _torch_amplitude(x: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return unit.to(torch.complex64 if x.dtype == torch.float32 else torch.complex128)


def _torch_angle(x: torch.Tensor) -> torch.Tensor:
    """Build the product states of the low and of the high half, then one outer product."""
    factors = torch.stack([x.cos(), x.sin()], dim=2)

    def product(qubits: range) -> torch.Tensor:
        state: torch.Tensor = factors[:, qubits[0]]
        for qubit in qubits[1:]:
            state = (factors[:, qubit, :, None] * state[:, None, :]).flatten(1)
        return state

    n = x.shape[1]
    low, high = product(range(n // 2)), product(range(n // 2, n))
    state = (high[:, :, None] * low[:, None, :]).flatten(1)
    dtype = torch.complex64 if x.dtype == torch.float32 else torch.complex128
    return state.to(dtype)


def _torch_iqp(n: int, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """All phases as one matrix product, then Walsh-Hadamard as one on each half of the qubits."""
    index = torch.arange(1 << n, device=device)
    bits = (index[:, None] >> torch.arange(n, device=device)) & 1
    pairs = torch.combinations(torch.arange(n, device=device))
    terms = torch.cat([bits, bits[:, pairs[:, 0]] * bits[:, pairs[:, 1]]], dim=1).T.double()
    terms = terms.contiguous()

    def hadamard(qubits: int) -> torch.Tensor:
        h = torch.ones(1, 1, dtype=torch.float64, device=device)
        gate = torch.tensor([[0.5, 0.5], [0.5, -0.5]], dtype=torch.float64, device=device)
        for _ in range(qubits):
            h = torch.kron(h, gate)
        return h

    left, right = hadamard(n - n // 2), hadamard(n // 2)

    def encode(x: torch.Tensor) -> torch.Tensor:
        phase = (x @ terms).reshape(len(x), len(left), len(right))
        real = left @ phase.cos() @ right
        imag = left @ phase.sin() @ right
        return torch.complex(real, imag).flatten(1)

    return encode


def _torch_graph(row: Row, device: str, first: Any) -> Call:
    """Eager torch captured once; a call copies its input in and replays."""
    if row.kind != "device" or device == "cpu":
        raise UnavailableError("only on device rows of a GPU")
    encode = _torch_encode(row, device)
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

    def call(x: torch.Tensor) -> torch.Tensor:
        static_input.copy_(x)
        graph.replay()
        return static_output

    return call


# qumat-qdp


def _qumat(row: Row, device: str) -> Call:
    if device == "cpu":
        raise UnavailableError("has no CPU backend")
    if row.kind == "loop":
        return _qumat_benchmark(row, device)
    engine = _qumat_engine(device, "float32" if row.dtype is np.float32 else "float64")
    if row.kind == "host-sum":
        return lambda x: from_dlpack(engine.encode(x, row.n, row.encoding)).abs().sum()
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
    if importlib.util.find_spec("pennylane") is None:
        raise UnavailableError("not installed: pip install pennylane")
    if row.kind == "loop":
        raise UnavailableError("the host row says the same")
    import pennylane as qml

    n = row.n
    wires = range(n - 1, -1, -1)  # wire 0 is the most significant bit; qubit 0 of QDP the least

    def embed(x: Any) -> None:
        if row.encoding == "amplitude":
            qml.AmplitudeEmbedding(x, wires=range(n), normalize=True)
        elif row.encoding == "angle":
            qml.AngleEmbedding(2 * x, wires=wires, rotation="Y")
        else:
            for wire in range(n):
                qml.Hadamard(wire)
            for qubit in range(n):
                qml.PhaseShift(x[:, qubit], wires[qubit])
            pairs = [(j, k) for j in range(n) for k in range(j + 1, n)]
            for column, (j, k) in enumerate(pairs, start=n):
                qml.ControlledPhaseShift(x[:, column], [wires[j], wires[k]])
            for wire in range(n):
                qml.Hadamard(wire)

    def circuit(x: Any) -> Any:
        embed(x)
        return qml.state()

    node = qml.QNode(circuit, qml.device("default.qubit", wires=n), diff_method=None)
    return lambda data: node(_upload(data, device))
