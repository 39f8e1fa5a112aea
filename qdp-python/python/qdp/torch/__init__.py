"""PyTorch in, PyTorch out: tensors, gradients, compilation and modules."""

from qdp._qdp import check, encode
from qdp.torch import ops
from qdp.torch.modules import (
    AmplitudeEncoding,
    AngleEncoding,
    BasisEncoding,
    Encoding,
    IQPEmbedding,
    IQPEncoding,
    IQPZEncoding,
    PhaseEncoding,
    ZZFeatureMap,
)

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
    "check",
    "encode",
]

ops.substitute_when_compiling()
