"""Encodings as modules, with an optional trainable map of the features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, Unpack

import numpy as np
import torch
from torch import nn

from qdp import _qdp

if TYPE_CHECKING:
    from torch import Tensor

    from qdp._types import Convention, Entanglement, Precision

__all__ = [
    "AmplitudeEncoding",
    "AngleEncoding",
    "BasisEncoding",
    "Encoding",
    "IQPEmbedding",
    "IQPEncoding",
    "IQPZEncoding",
    "PhaseEncoding",
    "ZZFeatureMap",
]


class Common(TypedDict, total=False):
    """Arguments that the encodings' modules have in common."""

    convention: Convention
    precision: Precision | None
    affine: bool
    device: torch.device | str | int | None
    dtype: torch.dtype | None


class Encoding(nn.Module):
    """Samples in, states out: what the encodings' modules have in common.

    Samples have shape ``(features,)`` or ``(batch, features)``, states ``(batch, 2**num_qubits)``
    on the same device: :func:`qdp.torch.encode` says more of both, of ``convention`` and of
    ``precision``. With ``affine=True`` the features ``weight * x + bias`` are encoded, mapped by
    the encode itself: trainable, one value per feature, made with ``device`` and ``dtype`` as
    torch's own modules make theirs. They begin as ones and zeros, which change nothing.

    Raises :class:`qdp.InvalidArgumentError` for an option that is not what it may be, and
    :class:`qdp.FeatureCountError` for a number of features that the encoding does not take.
    """

    encoding: ClassVar[str]
    num_qubits: int
    num_features: int
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_qubits: int,
        options: dict[str, Any],
        *,
        num_features: int | None = None,
        convention: Convention = "qdp",
        precision: Precision | None = None,
        affine: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(self, "encoding"):
            raise TypeError(
                f"{type(self).__name__} names no encoding: take one of its classes that do"
            )
        options = {**options, "entanglement": listed(options.get("entanglement"))}
        # What is wrong with an option is said here, and not when the first sample comes.
        engine = _qdp.Engine("cpu", precision=precision)
        plan = engine.plan(num_qubits, self.encoding, convention=convention, **options)
        self.num_qubits = plan.num_qubits
        if num_features is None:
            num_features = engine.num_features(num_qubits, self.encoding)
        plan.encode(np.empty((0, num_features)))
        self.num_features = num_features
        self.options = {name: value for name, value in options.items() if value is not None}
        if convention != "qdp":
            self.options["convention"] = convention
        if precision is not None:
            self.options["precision"] = precision
        if affine:
            self.weight = nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Make the affine map the identity."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The states of samples."""
        options, weight, bias = self.options, self.weight, self.bias
        if weight is not None or bias is not None:
            options = {**options, "weight": weight, "bias": bias}
        states: Tensor = _qdp.encode(x, self.num_qubits, self.encoding, **options)
        return states

    def extra_repr(self) -> str:
        """The options that are not the defaults."""
        options = {"num_qubits": self.num_qubits, **self.options}
        if self.weight is not None or self.bias is not None:
            options["affine"] = True
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def listed(entanglement: Any) -> Any:
    """An entanglement of one's own: pairs, which may come from an iterator, as a list."""
    if entanglement is None or isinstance(entanglement, str):
        return entanglement
    try:
        pairs = [tuple(pair) for pair in entanglement]
    except TypeError:
        return entanglement  # The plan says what it is not.
    return [tuple(int(q) if isinstance(q, np.integer) else q for q in pair) for pair in pairs]


class AmplitudeEncoding(Encoding):
    """``x / norm(x)``, filled up with zeros: :func:`qdp.torch.encode` with ``"amplitude"``.

    ``num_features``, by default ``2**num_qubits``, is the number of values per sample that the
    affine map is for; without one, samples may have any number up to ``2**num_qubits``. The map is
    as large as the state, and computed by torch's operations before the encode.
    """

    encoding = "amplitude"

    def __init__(
        self, num_qubits: int, *, num_features: int | None = None, **common: Unpack[Common]
    ) -> None:
        super().__init__(num_qubits, {}, num_features=num_features, **common)

    def extra_repr(self) -> str:
        """The options that are not the defaults."""
        shown = super().extra_repr()
        if self.num_features == 2**self.num_qubits:
            return shown
        return f"{shown}, num_features={self.num_features}"


class AngleEncoding(Encoding):
    """One rotation per qubit: :func:`qdp.torch.encode` with ``"angle"``."""

    encoding = "angle"

    def __init__(
        self,
        num_qubits: int,
        *,
        rotation: Literal["x", "y", "z"] | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(num_qubits, {"rotation": rotation}, **common)


class PhaseEncoding(Encoding):
    """One phase per qubit: :func:`qdp.torch.encode` with ``"phase"``."""

    encoding = "phase"

    def __init__(self, num_qubits: int, **common: Unpack[Common]) -> None:
        super().__init__(num_qubits, {}, **common)


class BasisEncoding(Encoding):
    """One basis state per sample, by its index or its bits: :func:`qdp.torch.encode` with
    ``"basis"``. It has no gradient, and so no affine map.
    """

    encoding = "basis"

    def __init__(
        self,
        num_qubits: int,
        *,
        convention: Convention = "qdp",
        precision: Precision | None = None,
    ) -> None:
        super().__init__(num_qubits, {}, convention=convention, precision=precision)


class IQPEncoding(Encoding):
    """Phases between Hadamards, a feature for each qubit and then for each pair of qubits:
    :func:`qdp.torch.encode` with ``"iqp"``.
    """

    encoding = "iqp"

    def __init__(self, num_qubits: int, **common: Unpack[Common]) -> None:
        super().__init__(num_qubits, {}, **common)


class IQPZEncoding(Encoding):
    """Phases between Hadamards, a feature for each qubit: :func:`qdp.torch.encode` with
    ``"iqp-z"``.
    """

    encoding = "iqp-z"

    def __init__(self, num_qubits: int, **common: Unpack[Common]) -> None:
        super().__init__(num_qubits, {}, **common)


class ZZFeatureMap(Encoding):
    """Qiskit's ``zz_feature_map``: :func:`qdp.torch.encode` with ``"zz"``."""

    encoding = "zz"

    def __init__(
        self,
        num_qubits: int,
        *,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {"reps": reps, "entanglement": entanglement}
        super().__init__(num_qubits, options, **common)


class IQPEmbedding(Encoding):
    """PennyLane's ``IQPEmbedding``: :func:`qdp.torch.encode` with ``"iqp-embedding"``."""

    encoding = "iqp-embedding"

    def __init__(
        self,
        num_qubits: int,
        *,
        reps: int | None = None,
        entanglement: Entanglement | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {"reps": reps, "entanglement": entanglement}
        super().__init__(num_qubits, options, **common)
