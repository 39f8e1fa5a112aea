"""The operators ``torch.ops.qdp.encode`` and ``torch.ops.qdp.encode_backward``.

:func:`qdp.torch.encode` is native, and comes here only where torch has to know of the call. Where
something traces, compiles or watches it is the operator, which runs the native function in the end;
a gradient alone takes the shorter way of :class:`qdp.torch.function.Encode`.
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
from qdp._errors import refusal
from qdp.exceptions import DTypeError, ShapeError
from qdp.torch import affine
from qdp.torch.function import (
    BackwardOperator,
    Encode,
    EncodeOperator,
    detached,
    is_dual,
    is_plain,
    is_recorded,
    native,
    schema,
    states_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from torch import Tensor

    from qdp._types import Entanglement

__all__ = ["encode", "is_traced", "states_dtype", "substitute_when_compiling"]

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

library = torch.library.Library("qdp", "DEF")
for definition in SCHEMAS:
    library.define(definition)


def is_traced(x: Tensor) -> bool:
    """Whether a tensor's encoding is torch's to know of, or the tensor has no values of its own."""
    return x.requires_grad or not is_plain(x)


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
    affine.check_kind("x", x)
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            affine.check_kind(name, values)
    if encoding == "amplitude":
        x, weight, bias = affine.mapped(x, weight, bias), None, None
    options: dict[str, Any] = {"precision": precision, "validate": validate}
    tensors = (x, weight, bias)
    if (
        torch.compiler.is_compiling()
        or not is_plain(*tensors)
        or (forward_ad._current_level >= 0 and any(map(is_dual, tensors)))  # noqa: SLF001
    ):
        states = torch.ops.qdp.encode(*tensors, **schema(**spec), **options)
    elif any(tensor is not None and tensor.requires_grad for tensor in tensors):
        states = Encode.apply(x, weight, bias, spec, options)
    else:
        # Another thread's forward mode brought the call here, or a map that was torch's to compute.
        plain: Tensor = _qdp.encode_values(x, weight=weight, bias=bias, out=out, **spec, **options)
        return plain
    return states if out is None else write(out, states)


def write(out: Tensor, states: Tensor) -> Tensor:
    """Write the states to a tensor of their own shape and dtype."""
    if torch.is_grad_enabled() and (states.requires_grad or out.requires_grad):
        raise RuntimeError("out= has no gradient: leave it out, or detach() the samples")
    if out.shape != states.shape:
        wanted, got = str(tuple(states.shape)), str(tuple(out.shape))
        raise refusal(ShapeError, "out", wanted, got)
    if out.dtype != states.dtype:
        raise refusal(DTypeError, "out", str(states.dtype), str(out.dtype))
    return out.copy_(states)


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


def derive_encode(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **arguments: Any
) -> Tensor:
    """``qdp::encode`` where a derivative of it may be asked for."""
    if is_recorded(x, weight, bias):
        states: Tensor = EncodeOperator.apply(x, weight, bias, arguments)
        return states
    return EncodeOperator.forward(x, weight, bias, arguments)


def derive_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **spec: Any,
) -> Tensor:
    """``qdp::encode_backward`` where a derivative of it may be asked for."""
    if is_recorded(grad, x, weight, bias):
        gradient: Tensor = BackwardOperator.apply(grad, x, weight, bias, spec)
        return gradient
    return BackwardOperator.forward(grad, x, weight, bias, spec)


def transformed(
    derive: Callable[..., Tensor], operator: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """An operator under ``torch.func``, whose transforms know what to do with a function of
    ``torch.autograd``, but for one.
    """

    def run(*tensors: Tensor | None, **arguments: Any) -> Tensor:
        from torch._functorch.pyfunctorch import (
            FunctionalizeInterpreter,
            retrieve_current_functorch_interpreter,
        )
        from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

        interpreter = retrieve_current_functorch_interpreter()
        if not isinstance(interpreter, FunctionalizeInterpreter):
            return derive(*tensors, **arguments)
        functional: Any = FunctorchFunctionalizeAPI(interpreter)
        plain = functional.unwrap_tensors(tensors)
        with functional.redispatch_to_next():
            result = operator(*plain, **arguments)
        wrapped: Tensor = functional.wrap_tensors(result)
        return wrapped

    return run


for key in ("CPU", "CUDA"):
    library.impl("encode", run_encode, key)
    library.impl("encode_backward", run_backward, key)
torch.library.register_fake("qdp::encode", fake_encode, lib=library)
torch.library.register_fake("qdp::encode_backward", fake_backward, lib=library)
for key, function in (("encode", derive_encode), ("encode_backward", derive_backward)):
    library.impl(key, function, "Autograd")
    operator = getattr(torch.ops.qdp, key)
    library.impl(key, transformed(function, operator), "FuncTorchDynamicLayerFrontMode")


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
