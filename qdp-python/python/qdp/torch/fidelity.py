"""``qdp.gram`` of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qdp import _gram, _qdp
from qdp._errors import refusal
from qdp.exceptions import DeviceMismatchError, DTypeError, InvalidArgumentError
from qdp.torch.function import has_values, is_dual, states_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qdp._gram import Kernel
    from qdp._types import Precision

__all__ = ["Torch", "blocks", "gram"]


@dataclass(frozen=True)
class Torch:
    """Samples that are tensors."""

    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None, *, precision: Precision | None) -> Torch:
        """Torch in the precision that samples have together, on their one device."""
        tensors = [x] if y is None else [x, y]
        for name, other, data in zip("xy", "yx", tensors, strict=False):
            if not isinstance(data, torch.Tensor):
                raise refusal(DTypeError, name, f"a tensor, as {other} is", type(data).__name__)
            if data.layout is not torch.strided or data.is_nested:
                got = "a nested one" if data.is_nested else f"one of layout {data.layout}"
                raise refusal(InvalidArgumentError, name, "a dense tensor", got)
            if data.device != tensors[0].device:
                place = f"a tensor on {tensors[0].device}, as x is"
                raise refusal(DeviceMismatchError, name, place, f"one on {data.device}")
            refuse_transforms(data)
        states = {states_dtype(data.dtype, precision) for data in tensors}
        double = torch.complex128 in states
        return cls(torch.float64 if double else torch.float32, x.device)

    @property
    def edge(self) -> int:
        """Rows and columns of a block: on the host, one that caches hold."""
        return 2048 if self.device.type == "cpu" else 8192

    @property
    def tile(self) -> int:
        """Bytes for states and blocks."""
        return (256 << 20) if self.device.type == "cpu" else (2 << 30)

    @property
    def itemsize(self) -> int:
        """Bytes of a real number."""
        return self.dtype.itemsize

    def samples(self, data: Tensor, *, double: bool) -> Tensor:
        """Samples in this precision."""
        real = torch.float64 if double else self.dtype
        return data.to(real.to_complex() if data.is_complex() else real)

    def encode(self, x: Tensor, num_qubits: int, encoding: str, options: dict[str, Any]) -> Tensor:
        """Their states."""
        states: Tensor = _qdp.encode(x, num_qubits, encoding, **options)
        return states

    def dense(self, states: Tensor) -> Tensor:
        """The tensor without gaps."""
        return states.contiguous()

    def indices(self, x: Tensor, num_qubits: int) -> Tensor:
        """Basis indices. On a GPU nothing waits to ask whether they are some."""
        wrong = ~((x >= 0) & (x < 2**num_qubits) & (x == x.floor()))
        if x.device.type == "cpu" and wrong.any():
            raise _gram.index_error(int(wrong.flatten().nonzero()[0]), num_qubits)
        return x.masked_fill(wrong, torch.nan)[:, 0]

    def equal(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether indices are equal."""
        equal = (a[:, None] == b).to(self.dtype)
        wrong = torch.isnan(a)[:, None] | torch.isnan(b)
        return equal.masked_fill_(wrong, torch.nan)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product with an adjoint."""
        result: Tensor = Product.apply(a, b)
        return result

    def multiply(self, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        """Products of elements."""
        return torch.mul(a, b, out=out)

    def empty(self, rows: int, columns: int) -> Tensor:
        """An uninitialised matrix."""
        return torch.empty(rows, columns, dtype=self.dtype, device=self.device)

    def overlap(self, out: Tensor, data: Tensor) -> bool:
        """Whether a result and samples may have bytes in common."""
        if out.device != data.device or not (has_values(out) and has_values(data)):
            return False
        return _gram.may_overlap(np.asarray(Addresses(out)), np.asarray(Addresses(data)))


class Addresses:
    """Where a tensor's elements lie, as an array whose values nobody may read."""

    def __init__(self, x: Tensor) -> None:
        self.__array_interface__ = {
            "data": (x.data_ptr(), True),
            "shape": tuple(x.shape),
            "strides": tuple(stride * x.itemsize for stride in x.stride()),
            "typestr": f"|V{x.itemsize}",
            "version": 3,
        }


def refuse_transforms(data: Tensor) -> None:
    """Refuse a tensor that stands for others, in a transform of torch.func, or has a tangent."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(data)  # noqa: SLF001
    if wrapped or (not is_mapped(data) and is_dual(data)):
        raise RuntimeError(
            "qdp.gram has gradients by torch.autograd, and no rule for the transforms of "
            "torch.func (grad, jvp, vmap) or forward-mode differentiation"
        )


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor is several that ``torch.autograd`` maps over (``is_grads_batched``)."""
    mapped: bool = torch._C._functorch.is_legacy_batchedtensor(x)  # noqa: SLF001
    return mapped


#: Of how many numbers of a type a float32 is the sum, and how many of its bits that type lacks.
PARTS = {"tf32": (2, 13), "bf16": (3, 16)}


def parts_of(a: Tensor) -> tuple[int, int] | None:
    """How a factor has to be split to be multiplied in full, or None where it does not."""
    if a.dtype not in (torch.float32, torch.complex64):
        return None
    if a.device.type == "cuda":
        return PARTS.get(torch.backends.cuda.matmul.fp32_precision)
    # No library multiplies complex numbers in less precision on the host.
    host = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return None if a.is_complex() else PARTS.get(host.fp32_precision)


def split(x: Tensor, count: int, lacking: int) -> list[Tensor]:
    """Tensors whose sum is ``x``, and of whose bits the last ones are 0; of the last about."""
    rest = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    rest = rest.resolve_neg().contiguous()
    parts = []
    for _ in range(count - 1):
        rounded = rest.view(torch.int32) + (1 << (lacking - 1))
        parts.append((rounded & -(1 << lacking)).view(torch.float32))
        rest = rest - parts[-1]
    parts.append(rest)
    return [torch.view_as_complex(part) for part in parts] if x.is_complex() else parts


class Product(torch.autograd.Function):
    """``a @ b.mH`` in the precision of its factors, under autocast and where the process lets
    float32 be multiplied as TF32 or bfloat16.

    That switch is read and not touched, as other threads multiply meanwhile. Where it is on, the
    factors are split into numbers that the shorter type holds: their products are exact, and sums
    are in float32. Gradients, of any order, are such products too, whenever they are asked for;
    where torch maps over them, which it cannot with a number's bits, they are products in double.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(a, b)
        with without_autocast(a):
            if (parts := parts_of(a)) is None:
                return a @ b.mH
            left, right = split(a, *parts), split(b, *parts)
            # Small products first, which rounds least; what is left out is smaller than a rounding.
            pairs = [(i, n - i) for n in reversed(range(len(left))) for i in range(n + 1)]
            a = torch.cat([left[i] for i, _ in pairs], dim=1)
            b = torch.cat([right[j] for _, j in pairs], dim=1)
            return a @ b.mH

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients by the factors."""
        refuse_transforms(grad)
        a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # Of a function of ours that it maps over, torch would lose the gradients.
        product = mapped_product if is_mapped(grad) else Product.apply
        by_a = product(grad, b.mH) if wanted[0] else None
        return by_a, product(grad.mH, a.mH) if wanted[1] else None


def without_autocast(x: Tensor) -> torch.autocast:
    """Where products are what their factors are. Tensors without values are on no device that
    autocast knows.
    """
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def mapped_product(a: Tensor, b: Tensor) -> Tensor:
    """:class:`Product` of tensors that torch maps over, in operators of its own."""
    with without_autocast(a):
        if parts_of(a) is None:
            return a @ b.mH
        double = torch.promote_types(a.dtype, torch.float64)
        return (a.to(double) @ b.to(double).mH).to(a.dtype)


def gram(kernel: Kernel, x: Tensor, y: Tensor | None, tile: int, out: Tensor | None) -> Tensor:
    """The matrix of fidelities."""
    differentiable = any(data is not None and data.requires_grad for data in (x, y))
    if differentiable and torch.is_grad_enabled():
        if out is not None:
            raise RuntimeError("out= has no gradient: leave it out, or detach() the samples")
        if not kernel.groups or kernel.groups[0].encoding == "basis":
            raise refusal(InvalidArgumentError, "encoding", "one that has a gradient", "'basis'")
        result: Tensor = Gram.apply(x, y, kernel, tile)
        return result
    with torch.no_grad():
        if out is None or out.device == x.device:
            return _gram.fill(kernel, x, y, tile, out)  # type: ignore[no-any-return]
        found = _gram.fidelities(kernel, x, y, tile)
        for row, column, block in _gram.mirrored(found, symmetric=y is None):
            out[row, column] = block
        return out


def blocks(
    kernel: Kernel, x: Tensor, y: Tensor | None, tile: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The blocks of the matrix of fidelities."""
    found = _gram.fidelities(kernel, x, y, tile)
    while True:
        # What the caller does with a block is none of this.
        with torch.no_grad():
            if (block := next(found, None)) is None:
                return
        yield block


class Gram(torch.autograd.Function):
    """The matrix of fidelities; its gradient computes every block once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, kernel: Kernel, tile: int) -> Tensor:
        """The matrix."""
        ctx.save_for_backward(x, y)
        ctx.kernel, ctx.tile = kernel, tile
        return _gram.fill(kernel, x, y, tile, None)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients by the samples, a block at a time. ``grad`` may be many that torch maps
        over (``is_grads_batched``), of which new tensors are made that may be so, too.
        """
        refuse_transforms(grad)
        x, y = ctx.saved_tensors
        kernel, tile = ctx.kernel, ctx.tile
        if torch.is_grad_enabled():
            return *recorded_gradients(kernel, x, y, grad), None, None
        symmetric = y is None
        others = x if symmetric else y
        by_x = grad.new_zeros(x.shape, dtype=x.dtype)
        by_y = by_x if symmetric else grad.new_zeros(y.shape, dtype=y.dtype)
        with torch.enable_grad():
            columns = _gram.slices(kernel, len(others), tile)
            for row in _gram.slices(kernel, len(x), tile):
                left = Lifted(kernel, x, "x", row)
                for column in columns:
                    if symmetric and column.start < row.start:
                        continue
                    if symmetric and column == row:
                        block = kernel.block(left.states, left.states)
                        left.add(torch.autograd.grad(block, left.states, part(grad, row, column)))
                        continue
                    right = Lifted(kernel, others, "x" if symmetric else "y", column)
                    block = kernel.block(left.states, right.states)
                    weight = part(grad, row, column)
                    if symmetric:
                        weight = weight + part(grad, column, row).T
                    both = torch.autograd.grad(block, left.states + right.states, weight)
                    left.add(both[: len(left.states)])
                    right.add(both[len(left.states) :])
                    part(by_y, column).add_(right.gradient())
                part(by_x, row).add_(left.gradient())
        return by_x, None if symmetric else by_y, None, None


def part(x: Tensor, *slices: slice) -> Tensor:
    """``x[slices]``, of tensors that torch maps over too."""
    for dim, rows in enumerate(slices):
        x = x.narrow(dim, rows.start, rows.stop - rows.start)
    return x


def recorded_gradients(
    kernel: Kernel, x: Tensor, y: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by the samples, to be differentiated in turn: all blocks are kept."""
    left = kernel.lift(x, "x", 0)
    right = left if y is None else kernel.lift(y, "y", 0)
    matrix = kernel.block(left, right)
    wanted = [data for data in (x, y) if data is not None and data.requires_grad]
    found = list(torch.autograd.grad(matrix, wanted, grad, create_graph=True))
    by_x = found.pop(0) if x.requires_grad else None
    return by_x, found.pop() if found else None


class Lifted:
    """Lifted samples, and the gradient by them so far."""

    def __init__(self, kernel: Kernel, x: Tensor, argument: str, rows: slice) -> None:
        self.samples = x[rows].detach().requires_grad_()
        self.lifted = kernel.lift(self.samples, argument, rows.start)
        self.states = [states.detach().requires_grad_() for states in self.lifted]
        self.gradients = [torch.zeros_like(states) for states in self.lifted]

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        """Add the gradient by a block."""
        self.gradients = [a + b for a, b in zip(self.gradients, gradients, strict=True)]

    def gradient(self) -> Tensor:
        """The gradient by the samples."""
        return torch.autograd.grad(self.lifted, self.samples, self.gradients)[0]
