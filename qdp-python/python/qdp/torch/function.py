"""The encoding as functions of ``torch.autograd``: what runs eagerly, and under ``torch.func``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qdp import _qdp
from qdp.torch import affine, formula

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """Samples, and the map of their features, to states, eagerly. ``spec`` is what the native
    functions for states and for their gradient both take, ``options`` what only the first does.
    """

    # Not in the newer form, with setup_context: torch calls that several times as slowly.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: dict[str, Any],
        options: dict[str, Any],
    ) -> Tensor:
        """The states. They are not kept for the gradient, which is computed from the samples."""
        ctx.save_for_backward(x, weight, bias)
        ctx.spec = spec
        states: Tensor = _qdp.encode_values(
            x.detach(), weight=detached(weight), bias=detached(bias), **spec, **options
        )
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the samples and the map."""
        x, weight, bias = ctx.saved_tensors
        wide = affine.widened(x, weight, bias)
        if torch.is_grad_enabled():
            by_mapped = Backward.apply(grad, wide, weight, bias, schema(**ctx.spec))
        else:
            by_mapped = gradient_of(grad, wide, weight, bias, ctx.spec)
        return *affine.gradients(by_mapped, x, weight, bias, ctx.needs_input_grad), None, None


class TransformedEncode(torch.autograd.Function):
    """The same under ``torch.func``. ``spec`` is what ``qdp::encode`` and ``qdp::encode_backward``
    both take, ``options`` what only the first does.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: dict[str, Any],
        options: dict[str, Any],
    ) -> Tensor:
        """The states."""
        states: Tensor = _qdp.encode(
            x.detach(), **native(**spec), weight=detached(weight), bias=detached(bias), **options
        )
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the samples: the gradient is computed from them, not from the states."""
        del output
        *tensors, ctx.spec, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the samples and the map."""
        x, weight, bias = ctx.saved_tensors
        by_mapped = Backward.apply(grad, affine.widened(x, weight, bias), weight, bias, ctx.spec)
        needed = ctx.needs_input_grad
        return *affine.gradients(by_mapped, x, weight, bias, needed), None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """What is mapped over is more samples."""
        rows, weight, bias = as_mapped_rows(in_dims, info.batch_size, x, weight, bias)
        states = TransformedEncode.apply(rows.flatten(0, 1), weight, bias, spec, options)
        return states.unflatten(0, rows.shape[:2]), 0


class Backward(torch.autograd.Function):
    """The gradient by the mapped samples, from that by the states."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: dict[str, Any],
    ) -> Tensor:
        """The gradient, with the shape and dtype of ``x``."""
        return gradient_of(grad, x, weight, bias, native(**spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what second derivatives are computed from."""
        del output
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives."""
        gradients = second_gradients(ctx.saved_tensors, cotangent, ctx.spec, ctx.needs_input_grad)
        return *gradients, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """What is mapped over is more samples."""
        grads = as_rows(grad, in_dims[0], info.batch_size)
        rows, weight, bias = as_mapped_rows(in_dims[1:], info.batch_size, x, weight, bias)
        gradient = Backward.apply(grads.flatten(0, 1), rows.flatten(0, 1), weight, bias, spec)
        single = x.dim() - (in_dims[1] is not None) == 1
        return gradient if single else gradient.unflatten(0, rows.shape[:2]), 0


def gradient_of(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: dict[str, Any]
) -> Tensor:
    """The gradient by mapped samples, computed natively or by whatever watches or maps."""
    tensors = (grad, x, weight, bias)
    if all(tensor is None or has_values(tensor) for tensor in tensors):
        gradient: Tensor = _qdp.encode_backward(
            grad.detach(), x.detach(), weight=detached(weight), bias=detached(bias), **spec
        )
    else:
        gradient = torch.ops.qdp.encode_backward(*tensors, **schema(**spec))
    return gradient


def detached(tensor: Tensor | None) -> Any:
    """The tensor without its history, where there is one."""
    return None if tensor is None else tensor.detach()


def second_gradients(
    saved: tuple[Any, ...], cotangent: Tensor, spec: dict[str, Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by ``grad``, ``x``, ``weight`` and ``bias``, which were saved, of ``cotangent``
    times the first gradient by the mapped features, through the encoding written out in torch's
    operations.
    """
    grad, x, weight, bias = saved

    def first(grad: Tensor, x: Tensor) -> Any:
        _, pullback, *_ = torch.func.vjp(lambda x: formula.encode(x, grad.dtype, **spec), x)
        return pullback(grad)[0]

    features = affine.mapped(x, weight, bias)
    _, pullback, *_ = torch.func.vjp(first, grad, features)
    by_grad, by_features = pullback(cotangent.to(features.dtype))
    return by_grad, *affine.gradients(by_features, x, weight, bias, needed[1:])


def as_mapped_rows(
    in_dims: tuple[int | None, ...],
    size: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Samples of every element of a vmap, and the map that all share: none where each has its own,
    which is then applied.
    """
    rows = as_rows(x, in_dims[0], size)
    # What has no dimension of its own may be left out of a dispatcher's arguments.
    dims = (*in_dims[1:], None, None)
    if dims[0] is None and dims[1] is None:
        return rows, weight, bias
    weight, bias = (
        values if values is None or dim is None else values.movedim(dim, 0)
        for values, dim in zip((weight, bias), dims, strict=False)
    )
    return affine.mapped_each(rows, weight, bias), None, None


def as_rows(x: Tensor, batch_dim: int | None, size: int) -> Tensor:
    """Samples of every element of a vmap, shape ``(size, batch, values)``."""
    x = x.unsqueeze(0).expand(size, *x.shape) if batch_dim is None else x.movedim(batch_dim, 0)
    return x.unsqueeze(1) if x.dim() == 2 else x
