"""The scale and shift of features as far as they are torch's to compute: the gradients by them, and
the map itself where no kernel applies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qdp._errors import refusal
from qdp.exceptions import DeviceMismatchError, DTypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "check_kind",
    "direction",
    "gradients",
    "in_double",
    "mapped",
    "mapped_dtype",
    "mapped_each",
    "widened",
]


def mapped(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, double: bool = False
) -> Tensor:
    """``weight * x + bias``, with one value of each per feature: in a type of at least 32 bits, or
    in double, in which the kernels map.
    """
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            check(name, values, x)
    return _map(in_double(x) if double else widened(x, weight, bias), weight, bias)


def mapped_each(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batched: Sequence[bool],
) -> Tensor:
    """The same in double of rows, shape ``(maps, batch, features)``, by as many maps: ``batched``
    says of ``weight`` and ``bias`` whether their first dimension is that of the maps.
    """
    for name, values, each in zip(("weight", "bias"), (weight, bias), batched, strict=True):
        if values is not None:
            check(name, values[0] if each else values, x)
    weight, bias = (None if v is None else v.unsqueeze(-2) for v in (weight, bias))
    return _map(in_double(x), weight, bias)


def check_kind(argument: str, values: object) -> None:
    """Raise what the kernels raise about what is no tensor."""
    if not isinstance(values, torch.Tensor):
        raise refusal(DTypeError, argument, "a tensor", type(values).__name__)


def check(name: str, values: Tensor, x: Tensor) -> None:
    """Raise what the kernels raise about the values of one map."""
    check_kind(name, values)
    if not values.is_floating_point():
        raise refusal(DTypeError, name, "a real floating dtype", str(values.dtype))
    if values.shape != x.shape[-1:]:
        raise refusal(ShapeError, name, str(tuple(x.shape[-1:])), str(tuple(values.shape)))
    if values.device != x.device:
        place = f"a tensor on {x.device}"
        raise refusal(DeviceMismatchError, name, place, f"one on {values.device}")


def _map(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def in_double(x: Tensor) -> Tensor:
    """Values in double."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def mapped_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of mapped features."""
    dtype = x.dtype
    for values in (weight, bias):
        if values is not None:
            dtype = torch.promote_types(dtype, values.dtype)
    return dtype


def widened(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Samples as a type of at least 32 bits whose gradients those of the map are summed from."""
    if weight is None and bias is None:
        return x
    return x.to(torch.promote_types(mapped_dtype(x, weight, bias), torch.float32))


def direction(x: Tensor, weight: Tensor | None, tangents: Sequence[Tensor | None]) -> Tensor | None:
    """The tangent of mapped features, in double, given those of ``x``, ``weight`` and ``bias``."""
    by_x, by_weight, by_bias = (None if v is None else in_double(v) for v in tangents)
    if by_x is not None and weight is not None:
        by_x = by_x * weight
    if by_weight is not None:
        by_weight = in_double(x) * by_weight
    parts = [part for part in (by_x, by_weight, by_bias) if part is not None]
    if not parts:
        return None
    return sum(parts[1:], parts[0]).expand(x.shape)


def gradients(
    by_mapped: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those by ``x``, ``weight`` and ``bias``, as far as needed, from that by mapped features."""
    by_x = by_weight = by_bias = None
    if needed[0]:
        by_x = by_mapped if weight is None else by_mapped * weight
        by_x = by_x.to(x.dtype)
    if needed[1] and weight is not None:
        by_weight = _over_rows(by_mapped * x).to(weight.dtype)
    if needed[2] and bias is not None:
        by_bias = _over_rows(by_mapped).to(bias.dtype)
    return by_x, by_weight, by_bias


def _over_rows(gradient: Tensor) -> Tensor:
    return gradient.sum(0) if gradient.dim() == 2 else gradient
