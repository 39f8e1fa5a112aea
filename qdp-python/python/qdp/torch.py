"""PyTorch in, PyTorch out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdp._qdp import check_tensors, encode_tensor

if TYPE_CHECKING:
    from typing import Any, Literal

    import torch

    from qdp._types import Convention, Entanglement, Precision

__all__ = ["check", "encode"]


def encode(
    x: torch.Tensor,
    num_qubits: int,
    encoding: str = "amplitude",
    *,
    rotation: Literal["x", "y", "z"] | None = None,
    reps: int | None = None,
    entanglement: Entanglement | None = None,
    convention: Convention = "qdp",
    precision: Precision | None = None,
    validate: Literal["deferred", "now"] = "deferred",
    out: torch.Tensor | None = None,
) -> Any:
    """Encode a tensor and return a tensor on the same device.

    ``x`` has shape ``(features,)`` or ``(batch, features)``; the result has shape
    ``(batch, 2**num_qubits)`` and dtype complex64 or complex128. A CUDA tensor is encoded on
    torch's current stream as one more kernel: nothing waits, and the call is legal inside
    ``torch.cuda.graph`` capture. The result is ``out``, or new; on CUDA it is made by torch's own
    allocator.

    See :meth:`qdp.Engine.encode` for the other arguments.
    """
    return encode_tensor(
        x,
        num_qubits,
        encoding,
        rotation=rotation,
        reps=reps,
        entanglement=entanglement,
        convention=convention,
        precision=precision,
        validate=validate,
        out=out,
    )


def check() -> None:
    """Wait for every :func:`encode` so far and raise the first bad value that one of them met.

    A CUDA tensor is validated where it is encoded, and nothing waits for what is found: it raises
    at a later call. This is the way to ask now, after a training step, say. It raises what
    :meth:`qdp.Engine.check` raises.
    """
    check_tensors()
