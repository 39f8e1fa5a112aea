"""Exceptions about arguments, as the native module raises them."""

from __future__ import annotations

from qdp.exceptions import DeviceMismatchError, DTypeError, InvalidArgumentError, ShapeError

__all__ = ["refusal"]

_Error = DTypeError | ShapeError | DeviceMismatchError | InvalidArgumentError


def refusal(kind: type[_Error], argument: str, expected: str, got: str) -> _Error:
    """An exception about an argument."""
    what = "shape " if kind is ShapeError else ""
    error = kind(f"{argument}: expected {what}{expected}, got {got}")
    error.argument, error.expected, error.got = argument, expected, got
    return error
