"""The batcher: many callers share one batch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal, Self

from qdp._qdp import BatcherCore

if TYPE_CHECKING:
    from qdp._qdp import StateBatch
    from qdp._types import Convention, Entanglement

__all__ = ["Batcher"]


class Batcher(BatcherCore):
    """Encodes the requests of many threads and asyncio tasks together.

    :meth:`qdp.Engine.batcher` makes one. Any number of threads call :meth:`encode`, any number of
    tasks await :meth:`encode_async`. Requests that come while a batch is in flight form the next
    one; those of one encoding, element type, length and priority share it. What is wrong with a
    request fails that request alone. The states of a batch share their memory, which stays until
    the last of them is gone.

    Leaving it as a context manager closes it.
    """

    async def encode_async(
        self,
        data: Any,
        num_qubits: int | None = None,
        encoding: str | None = None,
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        convention: Convention | None = None,
        deadline: float | None = None,
        priority: int = 0,
    ) -> StateBatch:
        """Encode without blocking the running loop; the arguments are those of :meth:`encode`.

        ``data`` must not change before the result is there. A task that is cancelled takes its
        request along, if that has not started.
        """
        event_loop = asyncio.get_running_loop()
        future, request = self.submit(
            event_loop,
            data,
            num_qubits,
            encoding,
            rotation,
            reps,
            entanglement,
            convention,
            deadline,
            priority,
        )
        try:
            return await future
        except asyncio.CancelledError:
            if request is not None:
                request.cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
