"""QDP: classical data to quantum state vectors, at the speed of the memory system.

>>> import qdp
>>> engine = qdp.Engine("cpu")
>>> state = engine.encode([3.0, 4.0], 1, "amplitude")
>>> state.numpy()
array([[0.6+0.j, 0.8+0.j]])
"""

from __future__ import annotations

from qdp._batcher import Batcher
from qdp._future import EncodeFuture
from qdp._gram import gram, gram_blocks
from qdp._qdp import (
    CoalesceHandle,
    Coalescer,
    Engine,
    Pinned,
    PipelineConfig,
    Plan,
    StateBatch,
    __version__,
    device_info,
    pin,
)
from qdp._stream import StateStream
from qdp.exceptions import (
    BasisValueError,
    BatcherClosedError,
    CaptureError,
    DeadlineExceededError,
    DeviceMismatchError,
    DeviceUnavailableError,
    DriverError,
    DTypeError,
    FeatureCountError,
    InvalidArgumentError,
    InvalidDataError,
    NonFiniteError,
    NormOverflowError,
    OutOfMemoryError,
    QdpError,
    QueueFullError,
    ShapeError,
    ZeroNormError,
)

__all__ = [
    "BasisValueError",
    "Batcher",
    "BatcherClosedError",
    "CaptureError",
    "CoalesceHandle",
    "Coalescer",
    "DTypeError",
    "DeadlineExceededError",
    "DeviceMismatchError",
    "DeviceUnavailableError",
    "DriverError",
    "EncodeFuture",
    "Engine",
    "FeatureCountError",
    "InvalidArgumentError",
    "InvalidDataError",
    "NonFiniteError",
    "NormOverflowError",
    "OutOfMemoryError",
    "Pinned",
    "PipelineConfig",
    "Plan",
    "QdpError",
    "QueueFullError",
    "ShapeError",
    "StateBatch",
    "StateStream",
    "ZeroNormError",
    "__version__",
    "device_info",
    "gram",
    "gram_blocks",
    "pin",
]
