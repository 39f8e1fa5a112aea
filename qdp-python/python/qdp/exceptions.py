"""The exceptions QDP raises about data, shapes, values and devices.

Every one is a :class:`QdpError` and also the built-in exception a caller would expect, so both
``except qdp.QdpError`` and ``except ValueError`` work. The attributes named in each class carry
the numbers of the message.
"""

from __future__ import annotations

__all__ = [
    "BasisValueError",
    "BatcherClosedError",
    "CaptureError",
    "DTypeError",
    "DeadlineExceededError",
    "DeviceMismatchError",
    "DeviceUnavailableError",
    "DriverError",
    "FeatureCountError",
    "InvalidArgumentError",
    "InvalidDataError",
    "NonFiniteError",
    "NormOverflowError",
    "OutOfMemoryError",
    "QdpError",
    "QueueFullError",
    "ShapeError",
    "ZeroNormError",
]


class QdpError(Exception):
    """Base class of every exception QDP raises."""


class InvalidArgumentError(QdpError, ValueError):
    """An argument has a value it cannot have. Attributes: ``argument``, ``expected``, ``got``."""

    argument: str
    expected: str
    got: str


class ShapeError(QdpError, ValueError):
    """An array has the wrong shape. Attributes: ``argument``, ``expected``, ``got``."""

    argument: str
    expected: str
    got: str


class FeatureCountError(QdpError, ValueError):
    """A sample has a number of values the encoding cannot use.

    Attributes: ``encoding``, ``num_qubits``, ``expected``, ``got``.
    """

    encoding: str
    num_qubits: int
    expected: str
    got: int


class DTypeError(QdpError, TypeError):
    """An array has an element type that cannot be used. Attributes: ``argument``, ``expected``,
    ``got``.
    """

    argument: str
    expected: str
    got: str


class InvalidDataError(QdpError, ValueError):
    """A sample's values name no state. Attribute: ``sample``, its index in the batch."""

    sample: int


class ZeroNormError(InvalidDataError):
    """A sample has zero norm. Attribute: ``sample``."""


class NormOverflowError(InvalidDataError):
    """A sample's sum of squares is beyond float64. Attribute: ``sample``."""


class NonFiniteError(InvalidDataError):
    """A value is NaN or infinite. Attributes: ``sample``, ``position``."""

    position: int


class BasisValueError(InvalidDataError):
    """A basis index is out of range or not an integer. Attributes: ``sample``, ``position``,
    ``num_qubits``.
    """

    position: int
    num_qubits: int


class DeviceMismatchError(QdpError, ValueError):
    """An array lies on a device this call cannot use. Attributes: ``argument``, ``expected``,
    ``got``.
    """

    argument: str
    expected: str
    got: str


class DeviceUnavailableError(QdpError, RuntimeError):
    """A device cannot be opened. Attributes: ``device``, ``reason`` (one of ``"no-driver"``,
    ``"driver-too-old"``, ``"no-such-device"``, ``"kernels-not-built"``, ``"no-kernel-image"``,
    ``"driver"``).
    """

    device: str
    reason: str


class OutOfMemoryError(QdpError, MemoryError):
    """An allocation does not fit. Attributes: ``device``; ``needed``, ``free``, ``total`` bytes."""

    device: str
    needed: int
    free: int
    total: int


class CaptureError(QdpError, RuntimeError):
    """The call is not possible while a CUDA stream is being captured."""


class DriverError(QdpError, RuntimeError):
    """A CUDA driver call failed. Attributes: ``call``, ``name`` (as ``"CUDA_ERROR_..."``)."""

    call: str
    name: str


class QueueFullError(QdpError, RuntimeError):
    """A batcher's queue is full, and it refuses what it has no room for. Attribute: ``queue``, how
    many requests may wait.
    """

    queue: int


class DeadlineExceededError(QdpError, TimeoutError):
    """A request's deadline passed before its batch started."""


class BatcherClosedError(QdpError, RuntimeError):
    """A batcher takes no more requests: it is closed, or another process's."""
