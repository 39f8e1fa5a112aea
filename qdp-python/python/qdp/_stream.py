"""A source of any length as a stream of batches of states."""

from __future__ import annotations

from collections import deque
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from qdp.exceptions import InvalidDataError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from qdp._future import EncodeFuture
    from qdp._qdp import Engine, StateBatch

__all__ = ["StateStream"]

# A result is at most this large where nobody says how large a batch is to be.
MAX_RESULT_BYTES = 1 << 30
SHAPES = "(samples, features), an iterable of such batches or an iterable of samples"


class StateStream:
    """Batches of states, in the order of their source: :meth:`qdp.Engine.stream` makes them.

    An iterator of :class:`qdp.StateBatch`, each of shape ``(samples, 2**num_qubits)``; in a
    coroutine, an asynchronous one. While one batch is in use, the next ones are read from the
    source and encoded. Results are new memory each, from the engine's pool: those that are dropped
    are used again, and those that are kept are never overwritten.

    Leaving a ``for`` loop early leaves the batches behind it to be encoded; :meth:`close`, leaving
    a ``with`` block or dropping the last reference cancels them. One thread or task at a time may
    ask for batches.
    """

    def __init__(
        self,
        engine: Engine,
        source: Any,
        dim: int,
        batch_size: int | None,
        prefetch: int,
        arguments: dict[str, Any],
    ) -> None:
        self._engine = engine
        self._arguments = arguments
        self._prefetch = prefetch
        # Encodes under way with the number of samples before each, in order.
        self._pending: deque[tuple[int, EncodeFuture]] = deque()
        self._taken = 0
        # What the source raised, until the batches before it are handed over.
        self._failure: Exception | None = None
        size = batch_size

        def batch_size_for(sample: Any) -> int:
            return size or default_batch_size(engine, dim, prefetch, sample)

        self._batches: Iterator[Any] | None = batches(source, batch_size_for)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StateBatch:
        try:
            first, future = self._next()
            with _placed(first):
                states = future.result()
        except BaseException:
            self.close()
            raise
        # Only now, so that `close` waits for it if a signal's handler raises in `result`.
        self._pending.popleft()
        return states

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StateBatch:
        try:
            first, future = self._next()
            with _placed(first):
                states = await future
        except StopIteration:
            self.close()
            raise StopAsyncIteration from None
        except BaseException:
            self.close()
            raise
        self._pending.popleft()
        return states

    def close(self) -> None:
        """End the stream: cancel what has not been encoded, wait for what is being encoded."""
        batches, running = self._end()
        wait(running)
        if batches is not None:
            batches.close()

    def _end(self) -> tuple[Any, list[EncodeFuture]]:
        """End the stream; return its source, to be closed behind what is being encoded."""
        batches, self._batches = self._batches, None
        pending = [future for _, future in self._pending]
        self._pending.clear()
        # From the last, so that none of them starts because the one before it is gone.
        return batches, [future for future in reversed(pending) if not future.cancel()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Where __init__ raised there is nothing to close.
        if not hasattr(self, "_batches"):
            return
        # Nothing is waited for: the garbage collector may come here on any thread, also on the one
        # that is to end the encode.
        batches, running = self._end()
        if batches is not None and running:
            running[0].add_done_callback(lambda _: batches.close())
        elif batches is not None:
            batches.close()

    def _next(self) -> tuple[int, EncodeFuture]:
        """The next encode, with those behind it on their way."""
        while self._batches is not None and len(self._pending) <= self._prefetch:
            try:
                batch = next(self._batches)
            except StopIteration:
                self._batches = None
            except Exception as error:  # noqa: BLE001 - raised in its place
                self._failure, self._batches = error, None
            else:
                self._submit(batch)
        if self._pending:
            return self._pending[0]
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback refers to this frame
        raise StopIteration

    def _submit(self, batch: Any) -> None:
        first = self._taken
        try:
            with _placed(first):
                future = self._engine.encode_async(batch, **self._arguments)
        except Exception as error:  # noqa: BLE001 - raised in its place
            self._failure, self._batches = error, None
            return
        self._taken += _num_samples(batch)
        self._pending.append((first, future))


@contextmanager
def _placed(first: int) -> Iterator[None]:
    """Notes on an exception about a sample which one of the whole stream it is."""
    try:
        yield
    except InvalidDataError as error:
        error.add_note(f"it is sample {first + error.sample} of the stream")
        raise


def default_batch_size(engine: Engine, dim: int, prefetch: int, sample: Any) -> int:
    """How many states fit: those encoded ahead, the one asked for and the one in use before it."""
    precision = engine.precision or natural_precision(sample)
    row = dim * (16 if precision == "complex128" else 8)
    memory = engine.memory_info()
    free = memory["free"] + max(memory["reserved"] - memory["used"], 0)
    result = min(free // 4 // (prefetch + 2), MAX_RESULT_BYTES)
    return max(int(result // row), 1)


def natural_precision(sample: Any) -> str:
    """The precision of the states of values of this type."""
    name = str(getattr(sample, "dtype", "float64"))
    double = name.endswith(("float64", "complex128", "int64", "f8", "i8", "u8", "c16"))
    return "complex128" if double else "complex64"


def batches(source: Any, batch_size: Any) -> Iterator[Any]:
    """The batches of a source; ``batch_size`` says how many samples like one make a batch."""
    if _is_table(source):
        return _cut(source, batch_size(source))
    array = as_array(source)
    if array is not None:
        return _slices(array, batch_size(array))
    try:
        items = iter(source)
    except TypeError:
        raise shape_error(SHAPES, type(source).__name__) from None
    return _collected(items, batch_size)


def as_array(source: Any, dimensions: tuple[int, ...] = (2,)) -> Any:
    """The source as an array that can be cut where it lies; ``None`` if it is none."""
    if not hasattr(source, "__dlpack__"):
        return None
    if not hasattr(source, "shape") or not hasattr(source, "__getitem__"):
        host = source.__dlpack_device__()[0] in (1, 3)
        if host:
            source = np.from_dlpack(source)
        else:
            from torch.utils.dlpack import from_dlpack

            source = from_dlpack(source)
    if len(source.shape) not in dimensions:
        raise shape_error(SHAPES, str(tuple(source.shape)))
    return source


def _is_table(source: Any) -> bool:
    """Whether its rows are samples, whatever iterating over it gives: Arrow data of rows."""
    arrow = hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__")
    return arrow and callable(getattr(source, "slice", None)) and hasattr(source, "__len__")


def _cut(table: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(table), size):
        yield table.slice(start, min(size, len(table) - start))


def _slices(array: Any, size: int) -> Iterator[Any]:
    for start in range(0, array.shape[0], size):
        yield array[start : start + size]


def _collected(items: Iterator[Any], batch_size: Any) -> Iterator[Any]:
    """Batches as they come; of single samples as many as make one."""
    samples: list[Any] = []
    size = width = 0
    try:
        for item in map(_readable, items):
            if _dimensions(item) != 1:
                if samples:
                    raise shape_error("samples of one dimension, as before", _shape_text(item))
                yield item
                continue
            if not size:
                size, width = batch_size(item), len(item)
            if len(item) != width:
                raise shape_error(f"samples of {width} values, as before", f"{len(item)} values")
            # The source may use the memory again.
            samples.append(item.clone() if _is_tensor(item) else np.array(item))
            if len(samples) == size:
                yield _stacked(samples)
                samples = []
        if samples:
            yield _stacked(samples)
    finally:
        # A generator is closed with the stream, as nobody else may go on with it.
        with suppress(AttributeError):
            items.close()  # type: ignore[attr-defined]


def _readable(item: Any) -> Any:
    """The item, as an array where all it has is ``__dlpack__``; no masked values."""
    if isinstance(item, np.ma.MaskedArray) and np.ma.is_masked(item):
        raise shape_error("samples without masked values", "some that are masked")
    if hasattr(item, "__dlpack__") and not hasattr(item, "shape"):
        return as_array(item, (1, 2))
    return item


def _num_samples(batch: Any) -> int:
    shape = getattr(batch, "shape", None)
    rows: int = shape[0] if shape is not None else len(batch)
    return rows


def _is_tensor(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] == "torch"


def _dimensions(item: Any) -> int:
    shape = getattr(item, "shape", None)
    if shape is not None:
        return len(shape)
    if isinstance(item, list | tuple):
        return 1 + (_dimensions(item[0]) if item else 0)
    # Arrow's arrays and record batches have a length, and only the latter columns.
    if hasattr(item, "__arrow_c_array__"):
        return 2 if hasattr(item, "num_columns") else 1
    return np.ndim(item)


def _shape_text(item: Any) -> str:
    return str(tuple(getattr(item, "shape", ()))) or type(item).__name__


def _stacked(samples: list[Any]) -> Any:
    if _is_tensor(samples[0]):
        import torch

        return torch.stack(samples)
    return np.stack(samples)


def shape_error(expected: str, got: str) -> ShapeError:
    """What the native module raises about a shape."""
    error = ShapeError(f"source: expected {expected}, got {got}")
    error.argument, error.expected, error.got = "source", expected, got
    return error
