"""The future of an asynchronous encode."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

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
    would have raised about the values of the data. In a process forked from this one it is
    cancelled, if it was not done.

    Callbacks run on the engine's thread, between two encodes: they should be short, and never
    wait for a later encode of the same engine.
    """

    _job: _Job | None = None

    def __init__(self) -> None:
        super().__init__()
        _futures.add(self)

    def cancel(self) -> bool:
        """Cancel the encode if it has not started; say whether it is cancelled."""
        if self._job is not None and self._job.cancel():
            return self._cancel_unstarted()
        return self.cancelled()

    def running(self) -> bool:
        """Whether the encode has started and is not done."""
        return self._job is not None and self._job.is_running() and not self.done()

    def _cancel_unstarted(self) -> bool:
        # Whoever waits learns of it from the second call.
        cancelled = super().cancel()
        if cancelled:
            self.set_running_or_notify_cancel()
        return cancelled

    def _leave_behind(self) -> None:
        """Cancel in a forked process, which does not have the thread that would be done."""
        # The lock may be held by a thread that is not here, either.
        self._condition = threading.Condition()
        if not self.done():
            self._job = None
            self._cancel_unstarted()

    def __await__(self) -> Generator[Any, None, StateBatch]:
        import asyncio

        return asyncio.wrap_future(self).__await__()


#: Futures that somebody may wait for.
_futures: WeakSet[EncodeFuture] = WeakSet()


def _after_fork() -> None:
    for future in list(_futures):
        future._leave_behind()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)
