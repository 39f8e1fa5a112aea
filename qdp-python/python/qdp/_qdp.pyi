"""Types of the native module."""

from asyncio import AbstractEventLoop, Future
from collections.abc import Iterable, Mapping, Sequence
from types import GenericAlias
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, final, overload

import numpy as np
import numpy.typing as npt
from torch import Tensor
from typing_extensions import disjoint_base

from qdp._batcher import Batcher
from qdp._future import EncodeFuture
from qdp._stream import StateStream
from qdp._types import Convention, Entanglement, Precision

__all__ = [
    "BatcherCore",
    "BatcherRequest",
    "CoalesceHandle",
    "Coalescer",
    "Engine",
    "Graph",
    "GraphInput",
    "Pinned",
    "PipelineConfig",
    "Plan",
    "Replay",
    "StateBatch",
    "__version__",
    "check",
    "device_info",
    "encode",
    "encode_backward",
    "encode_values",
    "pin",
    "restore_plan",
]

__version__: str

_Replayed_co = TypeVar("_Replayed_co", covariant=True)

@final
class CoalesceHandle:
    """The states of one request, once they are there."""

    def result(self) -> StateBatch: ...
    def exception(self) -> Exception | None: ...
    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...

@final
class Coalescer:
    """Collects requests and encodes them together: made by :meth:`qdp.Engine.coalesce`."""

    @property
    def states(self) -> StateBatch: ...
    def submit(self, data: Any) -> CoalesceHandle: ...
    def flush(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, exception: object, *_rest: object) -> None: ...

@final
class Engine:
    """Encodes classical data into batches of quantum states on one device.

    ``device`` is ``"cpu"``, ``"cuda"`` (the first GPU), ``"cuda:N"`` or ``None`` (``"cuda:0"``
    where it is usable, else ``"cpu"``). ``precision`` is ``"complex64"``, ``"complex128"`` or
    ``None``, which follows each input: float64, complex128 and 64-bit integers give complex128,
    everything else complex64. An engine may be shared by threads.

    Raises :class:`qdp.DeviceUnavailableError` when a device is named and cannot be opened.
    """

    def __new__(
        cls,
        device: str | None = None,
        *,
        precision: Precision | None = None,
        pipeline: PipelineConfig | None = None,
    ) -> Engine: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> Precision | None: ...
    def encode(
        self,
        data: Any,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
        stream: Any = None,
        out: Any = None,
    ) -> StateBatch: ...
    def encode_async(
        self,
        data: Any,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
        stream: Any = None,
        out: Any = None,
    ) -> EncodeFuture: ...
    def stream(
        self,
        source: Any,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        batch_size: int | None = None,
        prefetch: int | None = None,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
        stream: Any = None,
    ) -> StateStream: ...
    def encode_list(
        self,
        data: Iterable[Any],
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
        stream: Any = None,
    ) -> StateBatch: ...
    def coalesce(
        self,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
        stream: Any = None,
        max_samples: int | None = None,
        max_bytes: int | None = None,
    ) -> Coalescer: ...
    def plan(
        self,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
    ) -> Plan: ...
    @overload
    def capture(  # type: ignore[overload-overlap]
        self,
        num_qubits: int,
        encoding: str,
        batch_size: int | Sequence[int],
        *,
        input: Any = None,
        features: int | None = None,
        inputs: None = None,
        constants: None = None,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
    ) -> Graph[StateBatch]:
        """Capture an encoding of batches of ``batch_size`` samples, to replay it.

        One launch brings a batch to the device, encodes it and records the event behind the
        states. ``encoding`` is a name, or a sequence of several for the same samples, names or
        pairs of a name and its options: the samples are brought once and encoded side by side.
        ``batch_size`` is a size or several: a smaller batch is padded to the next size. ``input``
        is the samples' element type, a name or NumPy's or torch's (float64), and ``features`` the
        number of their values, by default as many as the encoding takes.

        ``inputs`` names small arrays that come with each batch, with a shape of one or two
        dimensions and an element type: ``{"labels": ((None,), "int64")}``, where ``None`` stands
        for the number of samples. They travel with the samples in one copy. ``constants`` are
        arrays by name that are copied now; all replays share them. ``validate`` is for samples on
        the device.

        Returns a :class:`qdp.Graph`, whose ``replay(data, **inputs)`` returns a
        :class:`qdp.StateBatch`, or a :class:`qdp.Replay` where there are several encodings,
        ``inputs`` or ``constants``. On the CPU a replay is an encode.
        """

    @overload
    def capture(
        self,
        num_qubits: int,
        encoding: str | Sequence[str | tuple[str, Mapping[str, Any]]],
        batch_size: int | Sequence[int],
        *,
        input: Any = None,
        features: int | None = None,
        inputs: dict[str, tuple[Sequence[int | None], Any]] | None = None,
        constants: dict[str, Any] | None = None,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        validate: Literal["deferred", "now"] = "deferred",
    ) -> Graph[Replay]: ...
    def batcher(
        self,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        max_delay_us: float = 0.0,
        max_batch_bytes: int | None = None,
        max_batch_samples: int | None = None,
        queue: int | None = None,
        when_full: Literal["wait", "raise"] = "wait",
    ) -> Batcher: ...
    def check(self) -> None: ...
    def synchronize(self) -> None: ...
    def memory_info(self) -> dict[str, int]: ...
    def stats(self) -> dict[str, int]: ...
    def estimate(
        self,
        num_qubits: int,
        encoding: str = "amplitude",
        batch_size: int | None = None,
        *,
        dtype: str = "float64",
        num_features: int | None = None,
        on_device: bool = False,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
    ) -> dict[str, int]: ...
    def num_features(self, num_qubits: int, encoding: str) -> int: ...

@disjoint_base
class BatcherCore:
    """What :class:`qdp.Batcher` is built on."""

    def __new__(
        cls,
        engine: Engine,
        num_qubits: int,
        encoding: str = "amplitude",
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention = "qdp",
        max_delay_us: float = 0.0,
        max_batch_bytes: int | None = None,
        max_batch_samples: int | None = None,
        queue: int | None = None,
        when_full: Literal["wait", "raise"] = "wait",
    ) -> Self: ...
    @property
    def num_qubits(self) -> int: ...
    @property
    def encoding(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    def encode(
        self,
        data: Any,
        num_qubits: int | None = None,
        encoding: str | None = None,
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention | None = None,
        deadline: float | None = None,
        priority: int = 0,
    ) -> StateBatch:
        """Encode a sample or several, together with what others ask for meanwhile.

        ``data`` is what :meth:`qdp.Engine.encode` takes: a sample, shape ``(features,)``, or
        several, shape ``(rows, features)``. What is named takes the place of what the batcher was
        made with; options of another encoding have to be named with it. ``deadline`` is in seconds
        from now: a request that has not started by then raises
        :class:`qdp.DeadlineExceededError`. Requests of higher ``priority`` start first.

        Raises what :meth:`qdp.Engine.encode` raises about this request,
        :class:`qdp.QueueFullError` and :class:`qdp.BatcherClosedError`. Data on a device, and
        requests larger than a batch, are encoded by themselves.
        """

    def submit(
        self,
        event_loop: AbstractEventLoop,
        data: Any,
        num_qubits: int | None = None,
        encoding: str | None = None,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention | None = None,
        deadline: float | None = None,
        priority: int = 0,
        /,
    ) -> tuple[Future[StateBatch], BatcherRequest | None]: ...
    def close(self) -> None:
        """Take no more requests, and wait until those that wait are encoded."""

    def stats(self) -> dict[str, Any]:
        """What the batcher has done, by name; ``batch_sizes`` is a dict by powers of two."""

@final
class BatcherRequest:
    """A request of a task's."""

    def cancel(self) -> bool: ...

@final
class Graph(Generic[_Replayed_co]):
    """Encodes captured for batches of fixed sizes: made by :meth:`qdp.Engine.capture`.

    Attributes: ``sizes``, the batch sizes, ascending; ``num_features`` and ``dtype`` of a sample;
    ``device``; ``slots``, how many batches there is memory for at the moment.

    Threads may share it; each that replays at the same time takes memory of its own.
    """

    @classmethod
    def __class_getitem__(cls, item: Any) -> GenericAlias: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def num_features(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def slots(self) -> int: ...
    def replay(self, data: Any, /, **inputs: Any) -> _Replayed_co:
        """Encode a batch of at most the largest size; a smaller one is padded to the next size.

        ``data`` has the captured element type and shape ``(batch, num_features)`` or
        ``(num_features,)``. What it returns never changes: its memory is used again when nobody
        holds it, or a tensor made of it, any more, behind everything that the streams it was
        handed to did with it. Whoever holds more than the last batch makes the graph take memory
        for as many more, until :meth:`trim`.

        Samples on the host are copied and validated before this returns. A CUDA tensor is copied
        on its stream, and validated by the kernel. Inputs are named as at the capture, and on the
        host.

        Raises :class:`qdp.ShapeError` (with the sizes), :class:`qdp.DTypeError`,
        :class:`qdp.DeviceMismatchError` and :class:`qdp.InvalidArgumentError` for what the graph
        was not captured for, :class:`qdp.CaptureError` while the tensor's stream is being
        captured, and what :meth:`qdp.Engine.encode` raises.
        """

    def trim(self) -> None:
        """Give back the memory that no replay is using, and what the driver keeps for graphs.

        The next replay takes memory anew and updates its graph in place, which takes a while.
        """

@final
class Replay:
    """What a replay made of a batch.

    ``states`` has a :class:`qdp.StateBatch` for each encoding, ``state`` is the first of them;
    ``inputs`` has a :class:`qdp.GraphInput` for each input beside the samples and each constant.
    """

    @property
    def states(self) -> tuple[StateBatch, ...]: ...
    @property
    def state(self) -> StateBatch: ...
    @property
    def inputs(self) -> dict[str, GraphInput]: ...

@final
class GraphInput:
    """An input of a replay, or a constant of its graph, on the graph's device.

    On a CUDA device it may not be there yet: whoever imports it waits on its stream.

    The memory of an input is its replay's own. That of a constant is shared by all replays and is
    not to be written to: :meth:`torch`, and on the CPU ``__dlpack__``, give copies.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def numpy(self) -> npt.NDArray[Any]:
        """As a NumPy array: without a copy on the CPU, where constants are read-only."""

    def torch(self) -> Any:
        """As a torch tensor on the same device, ready on torch's current stream.

        Without a copy, but of a constant, which all replays share.
        """

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class PipelineConfig:
    """How host input is brought to a device.

    Whatever is not named keeps its default, or what the environment names
    (``QDP_PIPELINE_SLOTS`` and so on).
    """

    def __new__(
        cls,
        *,
        slots: int | None = None,
        min_chunk_bytes: int | None = None,
        max_chunk_bytes: int | None = None,
        direct_bytes: int | None = None,
        staging_threads: int | None = None,
        max_batch_bytes: int | None = None,
        max_batch_samples: int | None = None,
        timing: bool | None = None,
    ) -> PipelineConfig: ...
    @property
    def slots(self) -> int: ...
    @property
    def min_chunk_bytes(self) -> int: ...
    @property
    def max_chunk_bytes(self) -> int: ...
    @property
    def direct_bytes(self) -> int: ...
    @property
    def staging_threads(self) -> int: ...
    @property
    def max_batch_bytes(self) -> int | None: ...
    @property
    def max_batch_samples(self) -> int | None: ...
    @property
    def timing(self) -> bool: ...

@final
class Plan:
    """An encoding resolved once: call it on one batch after another."""

    @property
    def num_qubits(self) -> int: ...
    @property
    def encoding(self) -> str: ...
    @property
    def convention(self) -> Convention: ...
    def encode(
        self,
        data: Any,
        *,
        validate: Literal["deferred", "now"] = "deferred",
        stream: Any = None,
        out: Any = None,
    ) -> StateBatch: ...
    def torch(
        self, data: Any, *, validate: Literal["deferred", "now"] = "deferred", out: Any = None
    ) -> Any: ...

@final
class StateBatch:
    """A batch of state vectors, shape ``(batch, 2**num_qubits)``, complex64 or complex128."""

    __dlpack_c_exchange_api__: ClassVar[Any]

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def device(self) -> str: ...
    @property
    def num_qubits(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: int | slice, /) -> StateBatch: ...
    def check(self) -> None: ...
    def synchronize(self) -> None: ...
    def numpy(self) -> npt.NDArray[Any]: ...
    def torch(self) -> Any: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def check() -> None:
    """Wait for every :func:`qdp.torch.encode` so far; raise the first bad value one of them met.

    A CUDA tensor is validated where it is encoded, and nothing waits for what is found: it raises
    at a later call. This is the way to ask now, after a training step, say. It raises what
    :meth:`qdp.Engine.check` raises.
    """

def encode(
    x: Tensor,
    num_qubits: int,
    encoding: str = "amplitude",
    *,
    rotation: Literal["x", "y", "z"] | None = None,
    reps: int | None = None,
    entanglement: Entanglement | None = None,
    convention: Convention = "qdp",
    precision: Precision | None = None,
    validate: Literal["deferred", "now"] = "deferred",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Any:
    """Encode a tensor and return a tensor on the same device: :func:`qdp.torch.encode`.

    ``x`` has shape ``(features,)`` or ``(batch, features)``; the result has shape
    ``(batch, 2**num_qubits)`` and dtype complex64 or complex128. A CUDA tensor is encoded on
    torch's current stream as one more kernel: nothing waits, and the call is legal inside
    ``torch.cuda.graph`` capture. The result is ``out``, or new; on CUDA it is made by torch's own
    allocator.

    With ``weight`` or ``bias``, shape ``(features,)``, of a real floating dtype and on the device
    of ``x``, the features ``weight * x + bias`` are encoded: mapped by the encode itself, in
    double, or for "amplitude", whose map is as large as the state, by torch's operations first, in
    float32 or wider. The dtype of the result is that of the mapped features' states. "basis" takes
    neither.

    The result is differentiable where ``x``, ``weight`` or ``bias`` requires a gradient or has a
    tangent. The function may be compiled by ``torch.compile``, traced, by ``torch.jit`` too, and
    transformed by ``torch.func``: it is then the operator ``torch.ops.qdp.encode``. Its states are
    the kernels' whatever is derived. Its gradient is computed from ``x`` and keeps nothing of the
    states' size; derivatives beyond the first, and forward-mode ones, are taken through torch's own
    operations, which do, in the precision of the states, with phases in double. ``out`` has no
    gradient, and "basis" neither.

    See :meth:`qdp.Engine.encode` for the other arguments.
    """

#: :func:`encode` without its operator: what the operator runs on a tensor that has values.
encode_values = encode

def encode_backward(
    grad: Tensor,
    x: Tensor,
    num_qubits: int,
    encoding: str = "amplitude",
    *,
    rotation: Literal["x", "y", "z"] | None = None,
    reps: int | None = None,
    entanglement: Entanglement | None = None,
    convention: Convention = "qdp",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Any:
    """The gradient of a loss by a tensor, given its gradient by the states that encoding it gives.

    ``grad`` has shape ``(batch, 2**num_qubits)`` and dtype complex64 or complex128, which is also
    the precision of the computation: as torch's gradients of complex tensors,
    ``dL/d(real part) + i dL/d(imaginary part)``. ``x`` is what was encoded, shape ``(features,)``
    or ``(batch, features)``, of a floating dtype. The result is ``out``, or new, with the shape,
    dtype and device of ``x``; a complex ``x`` has a complex gradient of the same kind. All are
    tensors on one device and may have any strides; the rows of ``out`` are without gaps. On CUDA
    the work is enqueued on torch's current stream and nothing waits; the call is legal inside
    ``torch.cuda.graph`` capture.

    A sample that has no state (a value that is not finite, or a norm of zero) gets a gradient of
    NaN. With ``weight`` or ``bias``, which "amplitude" does not take here, the gradient is that by
    the mapped features, ``weight * x + bias``.

    Raises :class:`qdp.InvalidArgumentError` for ``"basis"``, which has no gradient, and for tensors
    that require one; :class:`qdp.DTypeError` for integers and for a ``grad`` that is not complex;
    :class:`qdp.ShapeError`, :class:`qdp.FeatureCountError` and :class:`qdp.DeviceMismatchError`
    for tensors that do not belong together. See :meth:`qdp.Engine.encode` for the other arguments.
    """

def device_info() -> dict[str, Any]: ...

@final
class Pinned:
    """An array whose memory is page-locked: made by :func:`qdp.pin`."""

    @property
    def array(self) -> Any: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def pinned(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

def pin(array: Any) -> Pinned:
    """Page-lock an array's memory in place, so that a GPU copies from it at the speed of the link.

    ``array`` is a NumPy array, a CPU tensor of torch's, or anything else on the host with
    ``__dlpack__``, of any shape and element type, whose elements fill one range of memory without
    gaps. Without a usable GPU nothing is locked: the result says ``pinned == False``, and works
    the same otherwise.

    Raises :class:`qdp.InvalidArgumentError` for anything that is no array, an array with gaps, an
    empty one, and one that is page-locked already; :class:`qdp.DeviceMismatchError` for one on a
    device; :class:`qdp.OutOfMemoryError` where the system does not lock as much;
    :class:`qdp.DriverError` for memory that cannot be locked.
    """

def restore_plan(device: str, precision: Precision | None, arguments: dict[str, Any]) -> Plan: ...
