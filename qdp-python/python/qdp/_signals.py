"""Exceptions that signals' handlers raise."""

from __future__ import annotations

import functools
import signal
import threading
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["raised_by_handler"]


def raised_by_handler(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether a signal's handler raised an exception, rather than what it interrupted.

    Python runs handlers on its main thread, between any two steps of other code.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return False
    if not isinstance(error, Exception):
        return True  # Ctrl-C's own handler leaves no frame
    codes = [_code(signal.getsignal(number)) for number in signal.valid_signals()]
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(trace))


def _code(handler: Any) -> Any:
    """What runs where Python calls a handler; ``None`` where that is not Python's."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not callable(handler):
        return None
    return getattr(handler, "__code__", None) or getattr(handler.__call__, "__code__", None)
