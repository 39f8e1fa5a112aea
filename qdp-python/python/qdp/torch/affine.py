"""The scale and shift of features as far as they are torch's to compute: the gradients by them, and
the map itself where no kernel applies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qdp.exceptions import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["gradients", "mapped", "mapped_dtype", "mapped_each", "widened"]


def mapped(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``weight * x + bias``, with one value of each per feature."""
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and values.shape != x.shape[-1:]:
            raise ShapeError(
                f"{name}: expected shape {tuple(x.shape[-1:])}, got {tuple(values.shape)}"
            )
    return _map(x, weight, bias)


def mapped_each(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same of rows, shape ``(maps, batch, features)``, by as many maps, or one."""
    weight, bias = (None if v is None else v.unsqueeze(-2) for v in (weight, bias))
    return _map(x, weight, bias)


def _map(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


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
