"""Samples from a file batch by batch, states to a ``.npy`` file that grows: constant memory."""

from __future__ import annotations

import csv
import importlib
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

__all__ = ["InputError", "Source", "StateWriter", "human_bytes", "open_source", "require"]

Array: TypeAlias = npt.NDArray[Any]

#: Smallest block of a CSV file that is parsed at once. A block must hold at least one line.
CSV_BLOCK_BYTES = 4 << 20


class InputError(Exception):
    """A file, column or package that the command line asked for cannot be used."""


@dataclass(frozen=True)
class Source:
    """Samples of one file.

    ``rows`` is the expected number of samples, or ``None`` where only reading to the end tells;
    for CSV it is a count of lines, which blank or quoted line breaks can make too high.
    ``batches(size)`` yields arrays of shape ``(k, features)`` with ``1 <= k <= size``.
    ``left_out`` are the columns of a table that are no features.
    """

    rows: int | None
    batches: Callable[[int], Iterator[Array]]
    left_out: Sequence[str] = ()


def require(module: str, extra: str) -> Any:
    """Import an optional module, or say which extra of QDP brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f'{package} is not installed: pip install "qdp[{extra}]"') from error


def human_bytes(count: float) -> str:
    """``count`` bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def open_source(
    path: Path, columns: Sequence[str] | None = None, header: bool | None = None
) -> Source:
    """Open a ``.npy``, ``.parquet``, ``.arrow``/``.feather`` (file or stream) or ``.csv`` file.

    Of a table, ``columns`` are the features; by default all numeric columns, or the one list
    column. ``header`` says whether a CSV file has one; ``None`` looks at its first line.
    Raises :class:`InputError` where the file cannot be understood, also while it is being read.
    """
    suffix = path.suffix.lower()
    with _understood(path):
        if suffix == ".npy":
            if columns:
                raise InputError("--columns is for tables; a .npy file has none")
            return _open_npy(path)
        if suffix in (".parquet", ".pq"):
            return _open_parquet(path, columns)
        if suffix in (".arrow", ".arrows", ".feather", ".ipc"):
            return _open_arrow(path, columns)
        if suffix == ".csv":
            return _open_csv(path, columns, header)
    raise InputError(f"{path}: expected a .npy, .parquet, .arrow, .feather or .csv file")


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Name the file in what NumPy and Arrow say about it (Arrow's errors are ValueErrors)."""
    try:
        yield
    except (ValueError, KeyError, EOFError, NotImplementedError) as error:
        raise InputError(f"{path}: {str(error).strip()}") from error


def _open_npy(path: Path) -> Source:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind not in "biufc":
        raise InputError(f"{path}: expected numbers, got dtype {array.dtype}")
    if array.ndim not in (1, 2):
        raise InputError(f"{path}: expected shape (samples, features), got {array.shape}")
    # As everywhere in QDP, a 1-D array is one sample.
    rows = 1 if array.ndim == 1 else array.shape[0]
    dtype = np.dtype(np.uint8) if array.dtype.kind == "b" else array.dtype.newbyteorder("=")

    def batches(size: int) -> Iterator[Array]:
        for start in range(0, rows, size):
            # A mapping of its own per batch: the pages of batches already read are given back.
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            yield np.atleast_2d(mapped)[start : start + size].astype(dtype, copy=False)

    return Source(rows, batches)


def _open_parquet(path: Path, columns: Sequence[str] | None) -> Source:
    parquet = require("pyarrow.parquet", "cli")
    # Buffered column reads: a row group is decoded piece by piece, however large it is.
    options = {"buffer_size": 1 << 20, "pre_buffer": False}
    with parquet.ParquetFile(path, **options) as file:
        names, left_out = _feature_columns(path, file.schema_arrow, columns)
        rows = file.metadata.num_rows

    def record_batches(size: int) -> Iterator[Any]:
        with parquet.ParquetFile(path, **options) as file:
            yield from file.iter_batches(batch_size=size, columns=names)

    return Source(rows, lambda size: _matrices(path, record_batches(size), names, size), left_out)


def _open_arrow(path: Path, columns: Sequence[str] | None) -> Source:
    pa = require("pyarrow", "cli")
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"  # the stream format has no magic number
    with pa.memory_map(os.fspath(path)) as mapped:
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(mapped)
        names, left_out = _feature_columns(path, reader.schema, columns)
        # The batches are mapped, not read: this looks at their headers.
        rows = (
            sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
            if is_file
            else None
        )

    def record_batches() -> Iterator[Any]:
        with pa.memory_map(os.fspath(path)) as mapped:
            if is_file:
                reader = pa.ipc.open_file(mapped)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
            else:
                yield from pa.ipc.open_stream(mapped)

    return Source(rows, lambda size: _matrices(path, record_batches(), names, size), left_out)


def _open_csv(path: Path, columns: Sequence[str] | None, header: bool | None) -> Source:
    pa = require("pyarrow", "cli")
    arrow_csv = require("pyarrow.csv", "cli")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as text:
        first_line = text.readline()
    if not first_line:
        raise InputError(f"{path}: the file is empty")
    if header is None:
        header = not any(_is_number(field) for field in next(csv.reader([first_line])))
    read = arrow_csv.ReadOptions(
        autogenerate_column_names=not header,
        block_size=max(CSV_BLOCK_BYTES, 8 * len(first_line)),
    )
    with arrow_csv.open_csv(path, read_options=read) as reader:
        names, left_out = _feature_columns(path, reader.schema, columns)
    # Arrow infers types from the first block only: an integer there may be 0.5 further down.
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.float64()), include_columns=names
    )

    def record_batches() -> Iterator[Any]:
        with arrow_csv.open_csv(path, read_options=read, convert_options=convert) as reader:
            yield from reader

    rows = _count_lines(path) - header
    return Source(rows, lambda size: _matrices(path, record_batches(), names, size), left_out)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")


def _is_list(dtype: Any) -> bool:
    types = require("pyarrow", "cli").types
    return bool(
        types.is_fixed_size_list(dtype) or types.is_list(dtype) or types.is_large_list(dtype)
    )


def _is_numeric(dtype: Any) -> bool:
    types = require("pyarrow", "cli").types
    return bool(types.is_integer(dtype) or types.is_floating(dtype))


def _feature_columns(
    path: Path, schema: Any, columns: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """The names of the columns that are features, and of those left out."""
    for name in columns or ():
        if schema.get_field_index(name) < 0:
            raise InputError(
                f"{path}: expected one column named {name!r}, got {', '.join(schema.names)}"
            )
    names = list(columns or schema.names)
    types = {name: schema.field(name).type for name in names}
    numeric = [name for name in names if _is_numeric(types[name])]
    lists = [
        name for name in names if _is_list(types[name]) and _is_numeric(types[name].value_type)
    ]
    if columns and len(numeric) + len(lists) < len(names):
        wrong = next(name for name in names if name not in numeric and name not in lists)
        raise InputError(f"{path}: column {wrong!r} is {types[wrong]}, which holds no numbers")
    if not numeric and not lists:
        raise InputError(f"{path}: no numeric column among {', '.join(schema.names)}")
    if lists and (numeric or len(lists) > 1):
        raise InputError(
            f"{path}: expected numeric columns or one list column, got both or several "
            f"({', '.join(numeric + lists)}); choose with --columns"
        )
    features = numeric or lists
    return features, [name for name in schema.names if name not in features]


def _matrices(
    path: Path, record_batches: Iterator[Any], names: Sequence[str], size: int
) -> Iterator[Array]:
    """Cut record batches into matrices of at most ``size`` rows."""
    first, width = 0, None
    with _understood(path):
        for record_batch in record_batches:
            for start in range(0, record_batch.num_rows, size):
                piece = record_batch.slice(start, size)
                matrix = _matrix(path, piece, names, first)
                width = matrix.shape[1] if width is None else width
                if matrix.shape[1] != width:
                    raise InputError(
                        f"{path}: sample {first} has {matrix.shape[1]} values, "
                        f"those before it have {width}"
                    )
                yield matrix
                first += len(matrix)


def _matrix(path: Path, batch: Any, names: Sequence[str], first: int) -> Array:
    """The columns ``names`` of a record batch whose first row is sample ``first``."""
    columns = []
    for name in names:
        column = batch.column(name)
        if column.null_count:
            sample = first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise InputError(f"{path}: column {name!r} has no value for sample {sample}")
        if _is_list(column.type):
            return _list_matrix(path, column, name, first)
        columns.append(column.to_numpy(zero_copy_only=False))
    return np.column_stack(columns)


def _list_matrix(path: Path, column: Any, name: str, first: int) -> Array:
    values = column.flatten()  # unlike .values it respects the slice
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    width = int(lengths[0])
    if (lengths != width).any():
        row = int(np.argmax(lengths != width))
        raise InputError(
            f"{path}: sample {first + row} has {lengths[row]} values, those before it have {width}"
        )
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // width
        raise InputError(f"{path}: column {name!r} lacks a value in sample {first + row}")
    matrix: Array = values.to_numpy(zero_copy_only=False).reshape(len(column), width)
    return matrix


class StateWriter:
    """A ``.npy`` file that grows batch by batch and bears its name only once it is complete.

    Use it as a context manager: leaving it normally renames ``PATH.PID.partial`` to ``PATH``,
    leaving it by an exception removes it. ``rows`` is the expected number of states, for the check
    of free disk space before the first byte is written.

    The file is written, not mapped: on a full disk a write is an error that can be reported,
    where a store into a mapping kills the process.
    """

    def __init__(self, path: Path, rows: int | None) -> None:
        self.path = path
        # Of this process alone: another one may be writing to the same place.
        self.partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self.expected_rows = rows
        self.rows = 0
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] | None = None
        self._row_bytes = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, states: Array) -> None:
        """Append states of shape ``(k, 2**n)``; every call must bring the same row and dtype."""
        if self._file is None:
            self._start(states)
        assert self._file is not None
        if states.dtype != self.dtype or states.shape[1:] != self.shape[1:]:
            raise ValueError(f"{states.dtype}{states.shape} after {self.dtype}{self.shape}")
        self._file.write(np.ascontiguousarray(states).data)
        self.rows += len(states)
        self.shape = (self.rows, *states.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of states written so far."""
        return self.rows * self._row_bytes

    def _start(self, states: Array) -> None:
        self._row_bytes = states[0].nbytes
        needed = (self.expected_rows or len(states)) * self._row_bytes
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise InputError(
                f"{self.path} needs {human_bytes(needed)}, "
                f"but {human_bytes(free)} are free on its disk"
            )
        self.dtype, self.shape = states.dtype, (0, *states.shape[1:])
        self._file = self.partial.open("xb")
        self._data_offset = self._write_header()

    def _write_header(self) -> int:
        """Write the header for the current shape and return where the data begins."""
        assert self._file is not None
        assert self.dtype is not None
        # NumPy pads the header so that the first extent may grow in place to any int64.
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "shape": self.shape,
                "fortran_order": False,
                "descr": np.lib.format.dtype_to_descr(self.dtype),
            },
        )
        return self._file.tell()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        try:
            with self._file as file:
                if kind is None:
                    file.seek(0)
                    if self._write_header() != self._data_offset:
                        raise RuntimeError("the .npy header changed its length")
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)
