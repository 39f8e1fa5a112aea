"""Exceptions that signals' handlers raise."""

from __future__ import annotations

import inspect
import threading
import traceback
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType

__all__ = ["raised_by_handler"]


def raised_by_handler(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether a signal's handler raised an exception, rather than what it interrupted.

    Python runs handlers on its main thread, between any two steps of other code.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return False
    if not isinstance(error, Exception):
        return True  # Ctrl-C's own handler leaves no frame
    return any(_is_handlers(frame) for frame, _ in traceback.walk_tb(trace))


def _is_handlers(frame: FrameType) -> bool:
    """Whether a frame was called as handlers are, with the number of a signal and the frame that it
    interrupts, which is the caller's: which handlers are installed may have changed since.
    """
    code, interrupted = frame.f_code, frame.f_back
    values = frame.f_locals
    arguments = [values.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        others: Any = values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        arguments += others if isinstance(others, tuple) else ()
    return interrupted is not None and any(
        isinstance(number, int) and given is interrupted for number, given in pairwise(arguments)
    )
