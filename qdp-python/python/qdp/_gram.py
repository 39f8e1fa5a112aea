"""Fidelities between samples' states.

The fidelity of two product states is the product of their qubits' fidelities, so no state is made
where an encoding entangles nothing. The qubits are taken in groups: the overlaps of a group's
small states are a matrix product, and the groups' matrices are multiplied element by element. With
groups of one qubit a matrix would be read and written for every qubit; with one group of all, the
small states are the states.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from qdp._errors import refusal
from qdp._qdp import Engine
from qdp.exceptions import (
    BasisValueError,
    DTypeError,
    InvalidArgumentError,
    InvalidDataError,
    NonFiniteError,
    ShapeError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qdp._types import Convention, Entanglement, Precision

__all__ = ["gram", "gram_blocks"]

# What a pass over an element of a matrix costs, in multiplications of a matrix product.
PASS = 64
MAX_INDEX_QUBITS = 50


class Backend(Protocol):
    """The library that samples belong to, in one precision. Arrays are its own."""

    @property
    def edge(self) -> int:
        """Rows and columns of a block that is computed at a time, at most."""

    @property
    def tile(self) -> int:
        """Bytes that states and blocks may take, where nobody says how many."""

    @property
    def itemsize(self) -> int:
        """Bytes of a real number."""

    def samples(self, data: Any, *, double: bool) -> Any:
        """Samples in this precision, or in double precision."""

    def encode(self, x: Any, num_qubits: int, encoding: str, options: dict[str, Any]) -> Any:
        """Their states."""

    def dense(self, states: Any) -> Any:
        """The array without gaps."""

    def indices(self, x: Any, num_qubits: int) -> Any:
        """Basis indices, with NaN in place of what is none, or a refusal of it."""

    def equal(self, a: Any, b: Any) -> Any:
        """1 where indices are equal, else 0; NaN where one of them is."""

    def product(self, a: Any, b: Any) -> Any:
        """The matrix product of ``a`` and the adjoint of ``b``, in this precision."""

    def multiply(self, a: Any, b: Any, out: Any) -> Any:
        """Products of elements, written to ``out`` where it is not None."""

    def empty(self, rows: int, columns: int) -> Any:
        """An uninitialised real matrix."""

    def overlap(self, out: Any, data: Any) -> bool:
        """Whether a result and samples, as they were given, may have bytes in common."""


@dataclass(frozen=True)
class Group:
    """Qubits whose joint state is made: from which features, how, and which part of it matters."""

    features: slice
    num_qubits: int
    encoding: str
    options: dict[str, Any]
    scale: float = 1.0
    width: int | None = None


@dataclass(frozen=True)
class Kernel:
    """How fidelities are computed: from overlaps of groups of qubits or, where there are none, by
    comparing indices.
    """

    backend: Backend
    num_qubits: int
    groups: tuple[Group, ...]
    real: bool

    @property
    def bytes_per_sample(self) -> int:
        """Memory of what :meth:`lift` makes of a sample, at most at a time."""
        amplitudes: int = sum(2**group.num_qubits for group in self.groups)
        return 2 * self.backend.itemsize * amplitudes

    def lift(self, x: Any, argument: str, first: int) -> list[Any]:
        """What is compared, of an argument's samples from its ``first`` on."""
        if self.groups:
            return [self._states(x, group, argument, first) for group in self.groups]
        try:
            return [self.backend.indices(x, self.num_qubits)]
        except InvalidDataError as error:
            raise at(error, argument, first, 0) from None

    def _states(self, x: Any, group: Group, argument: str, first: int) -> Any:
        part = x[:, group.features]
        if group.scale != 1:
            part = part * group.scale
        try:
            states = self.backend.encode(part, group.num_qubits, group.encoding, group.options)
        except InvalidDataError as error:
            raise at(error, argument, first, group.features.start or 0) from None
        if group.width is not None:
            states = states[:, : group.width]
        return self.backend.dense(states.real if self.real else states)

    def block(self, x: list[Any], y: list[Any], out: Any = None) -> Any:
        """The fidelities of lifted samples, written to ``out`` where it is not None."""
        multiply = self.backend.multiply
        if not self.groups:
            equal = self.backend.equal(x[0], y[0])
            return multiply(equal, equal, out)
        overlap = None
        for a, b in zip(x, y, strict=True):
            part = self.backend.product(a, b)
            if overlap is None:
                overlap = part
            else:
                overlap = multiply(overlap, part, None if out is None else overlap)
        if self.real:
            return multiply(overlap, overlap, out)
        real, imag = overlap.real, overlap.imag  # type: ignore[union-attr]
        squares = multiply(real, real, out)
        squares += imag * imag
        return squares


def at(error: InvalidDataError, argument: str, sample: int, position: int) -> InvalidDataError:
    """An error about a part of an argument's samples, as one about all of them."""
    text = str(error).replace("data:", f"{argument}:", 1)
    text = text.replace(f"sample {error.sample}", f"sample {error.sample + sample}", 1)
    error.sample += sample
    if isinstance(error, NonFiniteError | BasisValueError):
        moved = error.position + position
        text = text.replace(f"position {error.position}", f"position {moved}", 1)
        error.position = moved
    error.args = (text,)
    return error


def kernel(
    backend: Backend,
    features: int,
    encoding: str,
    num_qubits: int | None,
    options: dict[str, Any],
    *,
    real: bool,
) -> Kernel:
    """How the fidelities of an encoding's states are computed."""
    n = qubits_of(features, encoding) if num_qubits is None else num_qubits
    # The native module says what is wrong with an argument, or with the number of features.
    plan = cpu_engine().plan(n, encoding, **options)
    plan.encode(np.empty((0, features)))
    options = {name: value for name, value in options.items() if value is not None}

    def groups(encoding: str, scale: float = 1.0, **options: Any) -> tuple[Group, ...]:
        count = min(range(1, n + 1), key=lambda count: count * (PASS + 2 ** -(-n // count)))
        ends = [n * k // count for k in range(count + 1)]
        return tuple(
            Group(slice(start, end), end - start, encoding, options, scale)
            for start, end in pairwise(ends)
        )

    alone = n == 1 or options.get("entanglement") == "none" or options.get("entanglement") == []
    layers = options.get("reps", 2 if encoding == "zz" else 1)
    match encoding:
        case "amplitude":
            # In the samples' own number of dimensions, however many zeros the state has behind.
            needed = qubits_of(features, encoding)
            alike = Group(slice(None), needed, encoding, options, width=features)
            return Kernel(backend, n, (alike,), real)
        case "basis" if features == 1 and n > 1:
            return Kernel(backend, n, (), real=True)
        case "basis":
            return Kernel(backend, n, groups("basis"), real=True)
        case "angle":
            scale = 1.0 if plan.convention == "qdp" else 0.5
            # A rotation about z leaves nothing but a phase of the whole.
            scale = 0.0 if options.get("rotation") in ("z", "Z") else scale
            return Kernel(backend, n, groups("angle", scale), real=True)
        case "phase" | "iqp-z":
            # Phases of x and rotations by x/2 have the same fidelities, and those are real.
            return Kernel(backend, n, groups("angle", 0.5), real=True)
        case "zz" | "iqp-embedding" if alone and layers == 1:
            scale = 1.0 if encoding == "zz" else 0.5
            return Kernel(backend, n, groups("angle", scale), real=True)
        case "zz" | "iqp-embedding" if alone:
            separate = groups(encoding, reps=layers, entanglement="none")
            return Kernel(backend, n, separate, real=False)
    return Kernel(backend, n, (Group(slice(None), n, encoding, options),), real=False)


def qubits_of(features: int, encoding: str) -> int:
    """The number of qubits whose encoding takes a number of features."""
    match encoding:
        case "amplitude":
            return max(1, (features - 1).bit_length())
        case "basis" if features == 1:
            return MAX_INDEX_QUBITS
        case "iqp":
            return max(1, (math.isqrt(8 * features + 1) - 1) // 2)
    return max(1, features)


@cache
def cpu_engine() -> Engine:
    """An engine for samples on the host."""
    return Engine("cpu")


def rows_of(argument: str, x: Any) -> Any:
    """One sample, shape ``(features,)``, or several as rows."""
    if x.ndim not in (1, 2):
        expected = "(features,) or (batch, features)"
        raise refusal(ShapeError, argument, expected, str(tuple(x.shape)))
    return x.reshape(1, -1) if x.ndim == 1 else x


@dataclass(frozen=True)
class NumPy:
    """Samples that are NumPy's, or that NumPy makes an array of."""

    dtype: np.dtype[Any]
    edge = 2048
    tile = 256 << 20

    @classmethod
    def of(cls, *arrays: Any, precision: Precision | None) -> NumPy:
        """NumPy in the precision that samples have together: double, if states of any are."""
        if precision is None:
            double = any(np.asarray(array).dtype.char in "qQlLdDgG" for array in arrays)
        else:
            double = precision == "complex128"
        return cls(np.dtype(np.float64 if double else np.float32))

    @property
    def itemsize(self) -> int:
        """Bytes of a real number."""
        return self.dtype.itemsize

    def samples(self, data: Any, *, double: bool) -> Any:
        """Samples in this precision."""
        x = np.asarray(data)
        if x.dtype.kind not in "biufc":
            raise DTypeError(f"data: expected numbers, got dtype {x.dtype}")
        real = np.float64 if double else self.dtype
        return x.astype(np.result_type(real, np.complex64) if x.dtype.kind == "c" else real)

    def encode(self, x: Any, num_qubits: int, encoding: str, options: dict[str, Any]) -> Any:
        """Their states."""
        return cpu_engine().encode(x, num_qubits, encoding, **options).numpy()

    def dense(self, states: Any) -> Any:
        """The array without gaps."""
        return np.ascontiguousarray(states)

    def indices(self, x: Any, num_qubits: int) -> Any:
        """Basis indices."""
        wrong = np.flatnonzero(~((x >= 0) & (x < 2**num_qubits) & (x == np.floor(x))))
        if wrong.size:
            raise index_error(int(wrong[0]), num_qubits)
        return x[:, 0]

    def equal(self, a: Any, b: Any) -> Any:
        """Whether indices are equal."""
        return (a[:, None] == b).astype(self.dtype)

    def product(self, a: Any, b: Any) -> Any:
        """The matrix product with an adjoint."""
        return a @ b.conj().T

    def multiply(self, a: Any, b: Any, out: Any) -> Any:
        """Products of elements."""
        return np.multiply(a, b, out=out)

    def empty(self, rows: int, columns: int) -> Any:
        """An uninitialised matrix."""
        return np.empty((rows, columns), self.dtype)

    def overlap(self, out: Any, data: Any) -> bool:
        """Whether a result and samples may have bytes in common."""
        return may_overlap(out, np.asarray(data))


def may_overlap(a: Any, b: Any) -> bool:
    """Whether arrays have bytes in common, or that is too hard to say."""
    try:
        return bool(np.shares_memory(a, b, max_work=1000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def index_error(sample: int, num_qubits: int) -> BasisValueError:
    """What encoding raises about a value that is no basis index."""
    error = BasisValueError(
        f"data: sample {sample} holds a value that is no index at position 0; basis encoding of "
        f"{num_qubits} qubit(s) takes an integer from 0 to {2**num_qubits - 1}"
    )
    error.sample, error.position, error.num_qubits = sample, 0, num_qubits
    return error


def fidelities(
    kernel: Kernel, x: Any, y: Any, tile: int, out: Any = None
) -> Iterator[tuple[slice, slice, Any]]:
    """The blocks of a matrix of fidelities, row by row; with ``y`` None, those on and above the
    diagonal. Blocks are written to ``out`` where it is not None.
    """
    symmetric = y is None
    y = x if symmetric else y
    rows, columns = slices(kernel, len(x), tile), slices(kernel, len(y), tile)
    # Where all lifted samples fit the memory they are made once, else once per row of blocks.
    keep = (len(x) + len(y)) * kernel.bytes_per_sample <= tile // 2
    kept: dict[int, list[Any]] = {}
    for row in rows:
        left = kept.pop(row.start, None) if symmetric else None
        if left is None:
            left = kernel.lift(x[row], "x", row.start)
        for column in columns:
            if symmetric and column.start < row.start:
                continue
            right = left if symmetric and column == row else kept.get(column.start)
            if right is None:
                argument = "x" if symmetric else "y"
                right = kernel.lift(y[column], argument, column.start)
                if keep:
                    kept[column.start] = right
            target = None if out is None else out[row, column]
            yield row, column, kernel.block(left, right, target)


def slices(kernel: Kernel, samples: int, tile: int) -> list[slice]:
    """The samples in blocks, so that what is made of two and their fidelities fit the memory."""
    # Half for what the samples are lifted to, half for overlaps, their parts and squares.
    most = math.isqrt(tile // 2 // (6 * kernel.backend.itemsize))
    if kernel.bytes_per_sample:
        most = min(most, tile // 4 // kernel.bytes_per_sample)
    count = -(-samples // max(1, min(most, kernel.backend.edge)))
    ends = [samples * k // count for k in range(count + 1)] if count else []
    return [slice(start, end) for start, end in pairwise(ends)]


def prepare(
    x: Any,
    y: Any,
    encoding: str,
    num_qubits: int | None,
    precision: Precision | None,
    tile: int | None,
    options: dict[str, Any],
) -> tuple[Kernel, Any, Any, int]:
    """The kernel, the samples and the bytes for blocks."""
    backend: Backend
    if precision not in (None, "complex64", "complex128"):
        raise refusal(
            InvalidArgumentError, "precision", '"complex64", "complex128" or None', repr(precision)
        )
    options = {**options, "entanglement": listed(options["entanglement"])}
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(data, torch.Tensor) for data in (x, y)):
        from qdp.torch.fidelity import Torch

        backend = Torch.of(x, y, precision=precision)
    else:
        backend = NumPy.of(x, *(() if y is None else (y,)), precision=precision)
    tile = backend.tile if tile is None else bytes_of(tile)
    double = encoding == "basis"  # whose larger indices single precision does not hold
    x = rows_of("x", backend.samples(x, double=double))
    y = None if y is None else rows_of("y", backend.samples(y, double=double))
    features = x.shape[1]
    if y is not None and y.shape[1] != features:
        raise refusal(
            InvalidArgumentError, "y", f"{features} values per sample, as x has", str(y.shape[1])
        )
    real = not any(data is not None and "complex" in str(data.dtype) for data in (x, y))
    return kernel(backend, features, encoding, num_qubits, options, real=real), x, y, tile


def bytes_of(tile: Any) -> int:
    """``tile`` as a number of bytes."""
    try:
        number = operator.index(tile)
    except TypeError:
        number = 0
    if number < 1:
        raise refusal(InvalidArgumentError, "tile", "a positive number of bytes", repr(tile))
    return number


def listed(entanglement: Any) -> Any:
    """``entanglement`` for those who look at it more than once, as an iterator does not allow."""
    if entanglement is None or isinstance(entanglement, str):
        return entanglement
    try:
        return [tuple(pair) for pair in entanglement]
    except TypeError:
        expected = "a name or a sequence of pairs of qubits"
        raise refusal(InvalidArgumentError, "entanglement", expected, repr(entanglement)) from None


def gram(
    x: Any,
    y: Any = None,
    *,
    encoding: str = "amplitude",
    num_qubits: int | None = None,
    rotation: Literal["x", "y", "z"] | None = None,
    reps: int | None = None,
    entanglement: Entanglement | None = None,
    convention: Convention = "qdp",
    precision: Precision | None = None,
    tile: int | None = None,
    out: Any = None,
) -> Any:
    """The fidelities ``|<psi(x_i)|psi(y_j)>|**2`` of the states of samples, shape
    ``(len(x), len(y))``: the matrix of a quantum kernel. Without ``y``, those of ``x`` with itself.

    ``x`` and ``y`` have shape ``(features,)`` or ``(batch, features)``. Tensors of torch's, on any
    one device, give a tensor there, through which gradients flow to both; anything else gives a
    NumPy array. The result is float64 where the states would be complex128, else float32;
    ``precision`` names one of those. ``encoding`` and the options after it are those of
    :meth:`qdp.Engine.encode`; ``num_qubits`` follows from the number of features.

    States are made only of encodings that entangle, and nothing but the result grows with the
    number of pairs: the rest takes about ``tile`` bytes, in the computation of gradients too. Not
    so that of gradients to be differentiated in turn (``create_graph=True``): it keeps all states,
    or what is in place of them, and several matrices of the result's size. With ``out``, an array
    or a tensor of the result's shape and dtype (a ``numpy.memmap``, say) apart from ``x`` and ``y``
    in memory, the result is written there; :func:`qdp.gram_blocks` is for results that need not be
    kept.

    Neither autocast nor what torch was told about float32 (TF32, say) changes the precision.

    Raises what :meth:`qdp.Engine.encode` raises about arguments and, on the host, about values. A
    bad value on a GPU gives NaN in its row, and :func:`qdp.torch.check` raises. ``torch.func`` and
    forward-mode differentiation are refused with a ``RuntimeError``.
    """
    options = {
        "rotation": rotation,
        "reps": reps,
        "entanglement": entanglement,
        "convention": convention,
    }
    given = [x] if y is None else [x, y]
    compute, x, y, tile = prepare(x, y, encoding, num_qubits, precision, tile, options)
    backend = compute.backend
    if out is not None:
        check_out(out, (len(x), len(x if y is None else y)), given, backend)
    if not isinstance(backend, NumPy):
        from qdp.torch.fidelity import gram as tensor_gram

        return tensor_gram(compute, x, y, tile, out)
    return fill(compute, x, y, tile, out)


def fill(compute: Kernel, x: Any, y: Any, tile: int, out: Any) -> Any:
    """The matrix of fidelities, in ``out`` or in new memory."""
    if out is None:
        out = compute.backend.empty(len(x), len(x if y is None else y))
    for row, column, block in fidelities(compute, x, y, tile, out):
        if y is None and row != column:
            out[column, row] = block.T
    return out


def check_out(out: Any, shape: tuple[int, int], given: list[Any], backend: Backend) -> None:
    """Refuse an ``out`` that the result of the given samples may not be written to."""
    wanted = backend.empty(0, 0)
    if not isinstance(out, type(wanted)):
        raise refusal(
            InvalidArgumentError,
            "out",
            f"a {type(wanted).__name__}, as the result is",
            type(out).__name__,
        )
    if tuple(out.shape) != shape:
        raise refusal(ShapeError, "out", str(shape), str(tuple(out.shape)))
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise refusal(
            InvalidArgumentError, "out", "an array that may be written to", "one that is read-only"
        )
    if out.dtype != wanted.dtype:
        raise refusal(DTypeError, "out", str(wanted.dtype), str(out.dtype))
    # Samples are read again for every block.
    for name, data in zip("xy", given, strict=False):
        if backend.overlap(out, data):
            raise refusal(InvalidArgumentError, "out", f"memory apart from {name}'s", "an overlap")


def gram_blocks(
    x: Any,
    y: Any = None,
    *,
    encoding: str = "amplitude",
    num_qubits: int | None = None,
    rotation: Literal["x", "y", "z"] | None = None,
    reps: int | None = None,
    entanglement: Entanglement | None = None,
    convention: Convention = "qdp",
    precision: Precision | None = None,
    tile: int | None = None,
) -> Iterator[tuple[slice, slice, Any]]:
    """:func:`qdp.gram` block by block: each is ``(rows, columns, block)``, and ``block`` is
    ``gram(x, y)[rows, columns]``. Together they are the whole matrix, in no promised order, and no
    two are in memory but those that the caller keeps. Gradients do not flow through them.

    Arguments and exceptions are those of :func:`qdp.gram`.
    """
    options = {
        "rotation": rotation,
        "reps": reps,
        "entanglement": entanglement,
        "convention": convention,
    }
    compute, x, y, tile = prepare(x, y, encoding, num_qubits, precision, tile, options)
    if isinstance(compute.backend, NumPy):
        return mirrored(fidelities(compute, x, y, tile), symmetric=y is None)
    from qdp.torch.fidelity import blocks

    return mirrored(blocks(compute, x, y, tile), symmetric=y is None)


def mirrored(
    blocks: Iterator[tuple[slice, slice, Any]], *, symmetric: bool
) -> Iterator[tuple[slice, slice, Any]]:
    """The blocks, and those below the diagonal of a symmetric matrix."""
    for row, column, block in blocks:
        yield row, column, block
        if symmetric and row != column:
            yield column, row, block.T
