"""The GPU that the gpu tests use."""

from __future__ import annotations

from typing import Any

import numpy as np

DEVICE = "cuda:0"


def on_device(x: Any) -> Any:
    """The array as a tensor on the GPU."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)
