"""The encoding as functions of ``torch.autograd``: what runs eagerly, and under ``torch.func``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qdp import _qdp
from qdp.torch import formula

if TYPE_CHECKING:
    from torch import Tensor

    from qdp._types import Entanglement

__all__ = ["Backward", "Encode", "TransformedEncode"]


def native(
    *, entanglement: str | None = None, pairs: list[int] | None = None, **options: Any
) -> dict[str, Any]:
    """An operator's arguments as those of the native functions, which take pairs as pairs."""
    if pairs is None:
        return {"entanglement": entanglement, **options}
    return {"entanglement": list(zip(pairs[::2], pairs[1::2], strict=True)), **options}


def schema(*, entanglement: Entanglement | None = None, **options: Any) -> dict[str, Any]:
    """The native functions' arguments as those of an operator, which has no type for pairs."""
    if entanglement is None or isinstance(entanglement, str):
        return {"entanglement": entanglement, **options}
    return {"pairs": [qubit for pair in entanglement for qubit in pair], **options}


def has_values(x: Tensor) -> bool:
    """Whether a tensor is what it looks like, and torch watches no call: the native functions take
    it as it is.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0  # noqa: SLF001
        and type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # noqa: SLF001
        and not torch._is_functional_tensor(x)  # noqa: SLF001
        and not x.is_meta
    )


class Encode(torch.autograd.Function):
    """Samples to states, eagerly. ``spec`` is what the native functions for states and for their
    gradient both take, ``options`` what only the first does.
    """

    # Not in the newer form, with setup_context: torch calls that several times as slowly.
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """The states. Of the samples and them, only the former are kept for the gradient."""
        ctx.save_for_backward(x)
        ctx.spec = spec
        states: Tensor = _qdp.encode_values(x.detach(), **spec, **options)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient by the samples."""
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return Backward.apply(grad, x, schema(**ctx.spec)), None, None
        return gradient_of(grad, x, ctx.spec), None, None


class TransformedEncode(torch.autograd.Function):
    """Samples to states under ``torch.func``. ``spec`` is what ``qdp::encode`` and
    ``qdp::encode_backward`` both take, ``options`` what only the first does.
    """

    @staticmethod
    def forward(x: Tensor, spec: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """The states."""
        states: Tensor = _qdp.encode(x.detach(), **native(**spec), **options)
        return states

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, dict[str, Any], dict[str, Any]], output: Tensor
    ) -> None:
        """Keep the samples."""
        del output
        x, ctx.spec, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient by the samples."""
        (x,) = ctx.saved_tensors
        return Backward.apply(grad, x, ctx.spec), None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, Any, Any],
        x: Tensor,
        spec: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """What is mapped over is more samples."""
        rows = as_rows(x, in_dims[0], info.batch_size)
        states = TransformedEncode.apply(rows.flatten(0, 1), spec, options)
        return states.unflatten(0, rows.shape[:2]), 0


class Backward(torch.autograd.Function):
    """The gradient by the samples, from that by the states."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, spec: dict[str, Any]) -> Tensor:
        """The gradient, with the shape and dtype of ``x``."""
        return gradient_of(grad, x, native(**spec))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, dict[str, Any]], output: Tensor
    ) -> None:
        """Keep what second derivatives are computed from."""
        del output
        grad, x, ctx.spec = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Second derivatives."""
        grad, x = ctx.saved_tensors
        return *second_gradient(grad, x, cotangent, ctx.spec), None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, int | None, Any],
        grad: Tensor,
        x: Tensor,
        spec: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """What is mapped over is more samples."""
        grads = as_rows(grad, in_dims[0], info.batch_size)
        rows = as_rows(x, in_dims[1], info.batch_size)
        gradient = Backward.apply(grads.flatten(0, 1), rows.flatten(0, 1), spec)
        single = x.dim() - (in_dims[1] is not None) == 1
        return gradient if single else gradient.unflatten(0, rows.shape[:2]), 0


def gradient_of(grad: Tensor, x: Tensor, spec: dict[str, Any]) -> Tensor:
    """The gradient by samples, computed natively or by whatever watches or maps."""
    if has_values(grad) and has_values(x):
        gradient: Tensor = _qdp.encode_backward(grad.detach(), x.detach(), **spec)
    else:
        gradient = torch.ops.qdp.encode_backward(grad, x, **schema(**spec))
    return gradient


def second_gradient(
    grad: Tensor, x: Tensor, cotangent: Tensor, spec: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The gradients by ``grad`` and ``x`` of ``cotangent`` times the first gradient, through the
    encoding written out in torch's operations.
    """

    def first(grad: Tensor, x: Tensor) -> Any:
        _, pullback, *_ = torch.func.vjp(lambda x: formula.encode(x, grad.dtype, **spec), x)
        return pullback(grad)[0]

    _, pullback, *_ = torch.func.vjp(first, grad, x)
    by_grad, by_x = pullback(cotangent)
    return by_grad, by_x


def as_rows(x: Tensor, batch_dim: int | None, size: int) -> Tensor:
    """Samples of every element of a vmap, shape ``(size, batch, values)``."""
    x = x.unsqueeze(0).expand(size, *x.shape) if batch_dim is None else x.movedim(batch_dim, 0)
    return x.unsqueeze(1) if x.dim() == 2 else x
