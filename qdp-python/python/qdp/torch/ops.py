"""The operators ``torch.ops.qdp.encode`` and ``torch.ops.qdp.encode_backward``.

:func:`qdp.torch.encode` is native, and comes here only where torch has to know of the call. Where
something traces, compiles or watches it is the operator, which runs the native function in the end;
a gradient alone, and what ``torch.func`` transforms, takes the shorter way of
:mod:`qdp.torch.function`.
"""

# torch.library has no types.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from qdp import _qdp
from qdp.exceptions import DTypeError, ShapeError
from qdp.torch import affine, formula
from qdp.torch.function import (
    Encode,
    TransformedEncode,
    as_mapped_rows,
    as_rows,
    detached,
    has_values,
    native,
    schema,
    second_gradients,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from torch import Tensor

    from qdp._types import Entanglement

__all__ = ["encode", "is_traced", "substitute_when_compiling"]

SPEC = (
    'int num_qubits, str encoding="amplitude", str? rotation=None, int? reps=None, '
    'str? entanglement=None, int[]? pairs=None, str convention="qdp"'
)
MAP = "Tensor? weight=None, Tensor? bias=None"
# Everything but tensors by keyword: autograd and vmap then see tensors alone.
SCHEMAS = (
    f'encode(Tensor x, {MAP}, *, {SPEC}, str? precision=None, str validate="deferred") -> Tensor',
    f"encode_backward(Tensor grad, Tensor x, {MAP}, *, {SPEC}) -> Tensor",
)
DOUBLE = {torch.float64, torch.complex128, torch.int64, torch.uint64}

library = torch.library.Library("qdp", "DEF")
for definition in SCHEMAS:
    library.define(definition)


def is_traced(x: Tensor) -> bool:
    """Whether a tensor's encoding is torch's to know of, or the tensor has no values of its own."""
    return x.requires_grad or not has_values(x)


def encode(
    x: Tensor,
    num_qubits: int,
    encoding: str = "amplitude",
    *,
    rotation: str | None = None,
    reps: int | None = None,
    entanglement: Entanglement | None = None,
    convention: str = "qdp",
    precision: str | None = None,
    validate: str = "deferred",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`qdp.torch.encode` where torch has to know of it."""
    spec: dict[str, Any] = {
        "num_qubits": num_qubits,
        "encoding": encoding,
        "convention": convention,
    }
    if rotation is not None:
        spec["rotation"] = rotation
    if reps is not None:
        spec["reps"] = reps
    if entanglement is not None:
        spec["entanglement"] = entanglement
    if encoding == "amplitude":
        x, weight, bias = affine.mapped(x, weight, bias), None, None
    options = {"precision": precision, "validate": validate}
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if torch.compiler.is_compiling():
        states = torch.ops.qdp.encode(x, weight, bias, **schema(**spec), **options)
    elif forward_ad._current_level >= 0:  # noqa: SLF001
        features = affine.mapped(x, weight, bias)
        dtype = states_dtype(features.dtype, precision)
        states = formula.encode(features, dtype, **schema(**spec))
    elif any(map(is_transformed, tensors)):
        states = TransformedEncode.apply(x, weight, bias, schema(**spec), options)
    elif any(tensor.requires_grad for tensor in tensors) and all(map(has_values, tensors)):
        states = Encode.apply(x, weight, bias, spec, options)
    else:
        states = torch.ops.qdp.encode(x, weight, bias, **schema(**spec), **options)
    return states if out is None else write(out, states)


def is_transformed(x: Tensor) -> bool:
    """Whether ``torch.func`` maps over a tensor or differentiates by it."""
    functorch = torch._C._functorch  # noqa: SLF001
    return functorch.is_batchedtensor(x) or functorch.is_gradtrackingtensor(x)


def write(out: Tensor, states: Tensor) -> Tensor:
    """Write the states to a tensor of their own shape and dtype."""
    if torch.is_grad_enabled() and (states.requires_grad or out.requires_grad):
        raise RuntimeError("out= has no gradient: leave it out, or detach() the samples")
    if out.shape != states.shape:
        raise ShapeError(f"out: expected shape {tuple(states.shape)}, got {tuple(out.shape)}")
    if out.dtype != states.dtype:
        raise DTypeError(f"out: expected {states.dtype}, got {out.dtype}")
    return out.copy_(states)


def states_dtype(dtype: torch.dtype, precision: str | None) -> torch.dtype:
    """The dtype of the states of samples of a dtype."""
    if precision is None:
        return torch.complex128 if dtype in DOUBLE else torch.complex64
    return torch.complex128 if precision == "complex128" else torch.complex64


def run_encode(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **arguments: Any
) -> Tensor:
    """The kernel of ``qdp::encode``."""
    # Below autograd a tensor still says that it requires a gradient.
    states: Tensor = _qdp.encode_values(
        x.detach(), weight=detached(weight), bias=detached(bias), **native(**arguments)
    )
    return states


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **spec: Any,
) -> Tensor:
    """The kernel of ``qdp::encode_backward``."""
    gradient: Tensor = _qdp.encode_backward(
        grad.detach(), x.detach(), weight=detached(weight), bias=detached(bias), **native(**spec)
    )
    return gradient


def fake_encode(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_qubits: int,
    precision: str | None = None,
    **_options: Any,
) -> Tensor:
    """The result's description. What is wrong with an argument is said when it runs."""
    batch = x.shape[0] if x.dim() == 2 else 1
    dtype = states_dtype(affine.mapped_dtype(x, weight, bias), precision)
    return x.new_empty((batch, 1 << num_qubits), dtype=dtype)


def fake_backward(_grad: Tensor, x: Tensor, *_affine: Tensor | None, **_spec: Any) -> Tensor:
    """The gradient's description."""
    return x.new_empty(x.shape)


def save_encode(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    """Keep the samples, as :class:`qdp.torch.function.Encode` does."""
    del output
    ctx.save_for_backward(*inputs)
    ctx.spec = {
        name: value
        for name, value in keyword_only_inputs.items()
        if name not in ("precision", "validate")
    }


def encode_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the samples and the map."""
    x, weight, bias = ctx.saved_tensors
    wide = affine.widened(x, weight, bias)
    by_mapped = torch.ops.qdp.encode_backward(grad, wide, weight, bias, **ctx.spec)
    return affine.gradients(by_mapped, x, weight, bias, needed_by(ctx))


def needed_by(ctx: Any) -> tuple[bool, ...]:
    """Which positional arguments want a gradient: those that were left out do not."""
    return (*ctx.needs_input_grad, False, False)


def save_backward(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    """Keep what second derivatives are computed from."""
    del output
    ctx.save_for_backward(*inputs)
    ctx.spec = keyword_only_inputs


def backward_gradient(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives."""
    return second_gradients(ctx.saved_tensors, cotangent, ctx.spec, needed_by(ctx))


def map_encode(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, int]:
    """What is mapped over is more samples."""
    rows, weight, bias = as_mapped_rows(in_dims, info.batch_size, x, weight, bias)
    states = torch.ops.qdp.encode(rows.flatten(0, 1), weight, bias, **arguments)
    return states.unflatten(0, rows.shape[:2]), 0


def map_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **spec: Any,
) -> tuple[Tensor, int]:
    """What is mapped over is more samples."""
    grads = as_rows(grad, in_dims[0], info.batch_size)
    rows, weight, bias = as_mapped_rows(in_dims[1:], info.batch_size, x, weight, bias)
    flat = grads.flatten(0, 1), rows.flatten(0, 1)
    gradient = torch.ops.qdp.encode_backward(*flat, weight, bias, **spec)
    single = x.dim() - (in_dims[1] is not None) == 1
    return gradient if single else gradient.unflatten(0, rows.shape[:2]), 0


for key in ("CPU", "CUDA"):
    library.impl("encode", run_encode, key)
    library.impl("encode_backward", run_backward, key)
torch.library.register_fake("qdp::encode", fake_encode, lib=library)
torch.library.register_fake("qdp::encode_backward", fake_backward, lib=library)
torch.library.register_autograd(
    "qdp::encode", encode_gradient, setup_context=save_encode, lib=library
)
torch.library.register_autograd(
    "qdp::encode_backward", backward_gradient, setup_context=save_backward, lib=library
)
torch.library.register_vmap("qdp::encode", map_encode, lib=library)
torch.library.register_vmap("qdp::encode_backward", map_backward, lib=library)


def substitute_when_compiling() -> None:
    """Have ``torch.compile`` see the operator in place of the native function.

    The compiler is told when it is imported: importing it takes longer than torch itself.
    """
    if "torch._dynamo" in sys.modules:
        substitute()
    else:
        sys.meta_path.insert(0, AfterDynamo())


def substitute() -> None:
    """Tell the compiler."""
    torch.compiler.substitute_in_graph(_qdp.encode, skip_signature_check=True)(encode)


class AfterDynamo(importlib.abc.MetaPathFinder):
    """Tells the compiler once it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the compiler as others do, and come after its execution."""
        del path, target
        if fullname != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], None] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                substitute()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
