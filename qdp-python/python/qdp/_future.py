"""The future of an asynchronous encode."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from qdp._qdp import StateBatch

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["EncodeFuture"]


class _Job(Protocol):
    def cancel(self) -> bool: ...
    def is_running(self) -> bool: ...


class EncodeFuture(Future[StateBatch]):
    """The states that :meth:`qdp.Engine.encode_async` is asked for, once they are there.

    It is a :class:`concurrent.futures.Future`, so ``result(timeout)``, ``done()``,
    ``exception()``, ``add_done_callback``, :func:`concurrent.futures.wait` and ``as_completed``
    work as for any other; and ``await`` gives the result in a coroutine, whose cancellation
    cancels an encode that has not started. ``result()`` raises what :meth:`qdp.Engine.encode`
    would have raised about the values of the data.

    Callbacks run on the engine's thread, between two encodes: they should be short, and never
    wait for a later encode of the same engine.
    """

    _job: _Job | None = None

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def result(self, timeout: float | None = None) -> StateBatch:
        """Wait for the states; at most ``timeout`` seconds.

        Raises what the encode raised; :class:`concurrent.futures.CancelledError` where it was
        cancelled, or left behind in the process that this one was forked from.
        """
        self._cancel_left_behind()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; what the encode raised, or None. As :meth:`result` otherwise."""
        self._cancel_left_behind()
        return super().exception(timeout)

    def cancel(self) -> bool:
        """Cancel the encode if it has not started; say whether it is cancelled."""
        if self._job is not None and self._job.cancel():
            return self._cancel_unstarted()
        return self.cancelled()

    def running(self) -> bool:
        """Whether the encode has started and is not done."""
        return self._job is not None and self._job.is_running() and not self.done()

    def _cancel_left_behind(self) -> None:
        # The thread that would set it is not in a forked process.
        if self._process != os.getpid() and not self.done():
            self._cancel_unstarted()

    def _cancel_unstarted(self) -> bool:
        # Whoever waits learns of it from the second call.
        cancelled = super().cancel()
        if cancelled:
            self.set_running_or_notify_cancel()
        return cancelled

    def __await__(self) -> Generator[Any, None, StateBatch]:
        import asyncio

        return asyncio.wrap_future(self).__await__()
