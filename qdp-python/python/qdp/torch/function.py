"""The encoding as functions of ``torch.autograd``: the one that runs eagerly, and those that say
what the operators' derivatives are, and what ``torch.func`` makes of them.
"""

# torch.autograd.forward_ad has no types.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from qdp import _qdp
from qdp.exceptions import InvalidArgumentError
from qdp.torch import affine, formula

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from qdp._types import Entanglement

__all__ = ["BackwardOperator", "Encode", "EncodeOperator"]

DOUBLE = {torch.float64, torch.complex128, torch.int64, torch.uint64}


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
    pairs = [qubit for pair in entanglement for qubit in pair]
    # In compiled code an array of them is a tensor.
    if not all(isinstance(qubit, int) for qubit in pairs):
        raise InvalidArgumentError("entanglement: expected pairs of Python integers in an operator")
    return {"pairs": pairs, **options}


def states_dtype(dtype: torch.dtype, precision: str | None) -> torch.dtype:
    """The dtype of the states of samples of a dtype."""
    if precision is None:
        return torch.complex128 if dtype in DOUBLE else torch.complex64
    return torch.complex128 if precision == "complex128" else torch.complex64


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the native functions take tensors as they are: they have values, and torch watches no
    call, whatever its tensors look like, be it in a dispatch mode (tracing to a graph, counting
    operations) or in ``torch.jit.trace``.
    """
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()  # noqa: SLF001
    return not watched and all(tensor is None or has_values(tensor) for tensor in tensors)


def has_values(x: Tensor) -> bool:
    """Whether a tensor is what it looks like."""
    return (
        type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # noqa: SLF001
        and not torch._is_functional_tensor(x)  # noqa: SLF001
        and not x.is_meta
    )


def is_dual(x: Tensor | None) -> bool:
    """Whether a tensor has a tangent. torch has one level of them, zero: that in
    ``forward_ad._current_level`` is every thread's, and not that of compiled code.
    """
    return x is not None and forward_ad.unpack_dual(x, level=0).tangent is not None


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be taken by one of the tensors."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    # What is not plain is not asked: the question is an operation, which would be seen.
    return not is_plain(*tensors) or any(map(is_dual, tensors))


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
        recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0  # noqa: SLF001
        if recorded or not is_plain(grad, wide, weight, bias):
            by_mapped = torch.ops.qdp.encode_backward(
                grad, wide, weight, bias, **schema(**ctx.spec)
            )
        else:
            by_mapped = _qdp.encode_backward(
                grad.detach(),
                wide.detach(),
                weight=detached(weight),
                bias=detached(bias),
                **ctx.spec,
            )
        return *affine.gradients(by_mapped, x, weight, bias, ctx.needs_input_grad), None, None


class EncodeOperator(torch.autograd.Function):
    """Derivatives of ``qdp::encode``, and the operator mapped over. ``arguments`` are its
    keywords.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        """The states."""
        with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001
            states: Tensor = torch.ops.qdp.encode(x, weight, bias, **arguments)
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the samples: derivatives are computed from them, not from the states."""
        *tensors, arguments = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.spec = {k: v for k, v in arguments.items() if k not in ("precision", "validate")}
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the samples and the map."""
        x, weight, bias = ctx.saved_tensors
        wide = affine.widened(x, weight, bias)
        by_mapped = torch.ops.qdp.encode_backward(grad, wide, weight, bias, **ctx.spec)
        return *affine.gradients(by_mapped, x, weight, bias, ctx.needs_input_grad), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        """The tangent of the states: that of their gradient by what it is linear in, backwards."""
        with forward_ad._set_fwd_grad_enabled(True):  # noqa: SLF001
            x, weight, bias = map(primal, ctx.saved_tensors)
            features = mapped(x, weight, bias, ctx.spec)
            direction = affine.direction(x, weight, tangents[:3])
            if direction is None:
                return None
            gradient = gradient_of(ctx.dtype, ctx.spec)
            batch = features.shape[0] if features.dim() == 2 else 1
            zero = features.new_zeros((batch, 2 ** ctx.spec["num_qubits"]), dtype=ctx.dtype)
            direction = direction.to(features.dtype)
            tangent: Tensor = pulled_back(lambda grad: gradient(grad, features), direction, zero)[0]
            return tangent

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """What is mapped over is more samples."""
        # Rows that are mapped here are so in double, whatever they come as.
        dtype = states_dtype(affine.mapped_dtype(x, weight, bias), arguments.get("precision"))
        precision = str(dtype).removeprefix("torch.")
        rows, weight, bias = as_mapped_rows(in_dims, info.batch_size, x, weight, bias, arguments)
        states = torch.ops.qdp.encode(
            rows.flatten(0, 1), weight, bias, **{**arguments, "precision": precision}
        )
        return states.unflatten(0, rows.shape[:2]), 0


class BackwardOperator(torch.autograd.Function):
    """Derivatives of ``qdp::encode_backward``, and the operator mapped over. ``spec`` are its
    keywords.
    """

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: dict[str, Any],
    ) -> Tensor:
        """The gradient by the mapped samples, with the shape and dtype of ``x``."""
        with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001
            gradient: Tensor = torch.ops.qdp.encode_backward(grad, x, weight, bias, **spec)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what second derivatives are computed from."""
        del output
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives."""
        grad, x, weight, bias = ctx.saved_tensors
        features = mapped(x, weight, bias, ctx.spec)
        gradient = gradient_of(grad.dtype, ctx.spec)
        cotangent = cotangent.to(features.dtype)
        by_grad, by_features = pulled_back(gradient, cotangent, grad, features)
        needed = ctx.needs_input_grad[1:]
        return by_grad, *affine.gradients(by_features, x, weight, bias, needed), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        """The tangent: the gradient of that of ``grad``, in which it is linear, and the second
        derivative, which is symmetric, in the direction of that of the samples.
        """
        with forward_ad._set_fwd_grad_enabled(True):  # noqa: SLF001
            grad, x, weight, bias = map(primal, ctx.saved_tensors)
            parts = []
            if tangents[0] is not None:
                parts.append(
                    torch.ops.qdp.encode_backward(tangents[0], x, weight, bias, **ctx.spec)
                )
            direction = affine.direction(x, weight, tangents[1:4])
            if direction is not None:
                features = mapped(x, weight, bias, ctx.spec)
                gradient = gradient_of(grad.dtype, ctx.spec)
                direction = direction.to(features.dtype)
                (part,) = pulled_back(lambda x: gradient(grad, x), direction, features)
                parts.append(part.to(x.dtype))
            return sum(parts[1:], parts[0]) if parts else None

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
        rows, weight, bias = as_mapped_rows(in_dims[1:], info.batch_size, x, weight, bias, spec)
        flat = grads.flatten(0, 1), rows.flatten(0, 1)
        gradient = torch.ops.qdp.encode_backward(*flat, weight, bias, **spec).to(x.dtype)
        single = x.dim() - (in_dims[1] is not None) == 1
        return gradient if single else gradient.unflatten(0, rows.shape[:2]), 0


def primal(x: Tensor | None) -> Any:
    """The tensor without its tangent, where there is one."""
    return None if x is None else forward_ad.unpack_dual(x, level=0).primal


def mapped(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: dict[str, Any]) -> Tensor:
    """The features of samples as the kernels see them."""
    if spec.get("encoding", "amplitude") == "amplitude":
        return x
    return affine.mapped(x, weight, bias, double=True)


def gradient_of(dtype: torch.dtype, spec: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """``qdp::encode_backward`` of states of a dtype and mapped features, through the encoding
    written out in torch's operations.
    """

    def gradient(grad: Tensor, features: Tensor) -> Tensor:
        (by_features,) = pulled_back(lambda x: formula.encode(x, dtype, **spec), grad, features)
        return by_features

    return gradient


def pulled_back(
    function: Callable[..., Tensor], cotangent: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The gradients by a function's tensors, given that by its result."""
    # Dynamo cannot trace that, and what it makes of this is run without such hooks.
    with nullcontext() if torch.compiler.is_dynamo_compiling() else hooks_aside():
        _, pullback, *_ = torch.func.vjp(function, *tensors)
        gradients: tuple[Tensor, ...] = pullback(cotangent)
    return gradients


@contextmanager
def hooks_aside() -> Iterator[None]:
    """Without this thread's hooks on saved tensors (``save_on_cpu``, ``checkpoint``), with which
    torch.func refuses to work. What is saved meanwhile stays as it is.
    """
    hooks: Any = torch._C._autograd  # noqa: SLF001
    aside = []
    try:
        while (pair := hooks._top_saved_tensors_default_hooks(True)) is not None:  # noqa: SLF001
            aside.append(pair)
            hooks._pop_saved_tensors_default_hooks()  # noqa: SLF001
        yield
    finally:
        for pair in reversed(aside):
            hooks._push_saved_tensors_default_hooks(*pair)  # noqa: SLF001


def detached(tensor: Tensor | None) -> Any:
    """The tensor without its history, where there is one."""
    return None if tensor is None else tensor.detach()


def as_mapped_rows(
    in_dims: tuple[int | None, ...],
    size: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Samples of every element of a vmap, and the map that all share: none where each has its own,
    which is then applied, in double as the kernels do.
    """
    rows = as_rows(x, in_dims[0], size)
    dims = in_dims[1:3]
    if dims[0] is None and dims[1] is None:
        return rows, weight, bias
    if (encoding := arguments.get("encoding", "amplitude")) in ("amplitude", "basis"):
        name = "bias" if dims[0] is None else "weight"
        raise InvalidArgumentError(f"{name}: expected None for {encoding}, got values")
    weight, bias = (
        values if values is None or dim is None else values.movedim(dim, 0)
        for values, dim in zip((weight, bias), dims, strict=True)
    )
    batched = [dim is not None for dim in dims]
    return affine.mapped_each(rows, weight, bias, batched), None, None


def as_rows(x: Tensor, batch_dim: int | None, size: int) -> Tensor:
    """Samples of every element of a vmap, shape ``(size, batch, values)``."""
    x = x.unsqueeze(0).expand(size, *x.shape) if batch_dim is None else x.movedim(batch_dim, 0)
    return x.unsqueeze(1) if x.dim() == 2 else x
