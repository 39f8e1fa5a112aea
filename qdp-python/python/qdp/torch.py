"""PyTorch in, PyTorch out."""

from qdp._qdp import check, encode

__all__ = ["check", "encode"]
