"""Single samples of 22 to 30 qubits, at chosen indices by the definition."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import PRECISIONS, REAL

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE, on_device  # noqa: E402

pytestmark = pytest.mark.gpu


def needs(n: int, precision: str, copies: float = 1.1) -> None:
    """Skip a state that this GPU cannot hold now."""
    torch.cuda.empty_cache()
    needed = int(copies * 2**n * np.dtype(precision).itemsize)
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def some_indices(n: int) -> Any:
    """Both ends, both sides of every power of two and of 2**31 bytes, and random ones."""
    rng = np.random.default_rng(n)
    edges = [2**k + d for k in range(n) for d in (-1, 0, 1)]
    chosen = np.unique([0, 2**n - 1, *edges, *rng.integers(0, 2**n, size=200)])
    return chosen[(chosen >= 0) & (chosen < 2**n)]


def bits_of(index: Any, n: int) -> Any:
    return (np.asarray(index)[:, None] >> np.arange(n)) & 1


def iqp_amplitude(x: Any, n: int, index: int) -> complex:
    """One amplitude of ``iqp`` by its sum over all 2**n phases, on the GPU, in float64."""
    # An index z is a high and a low half; the phases within each and between them add up.
    low, high = n // 2, n - n // 2
    weights = np.zeros((n, n))
    for value, (j, k) in zip(x[n:], combinations(range(n), 2), strict=True):
        weights[j, k] = value
    bits = bits_of(np.arange(2**high), high).astype(np.float64)
    below = bits_of(np.arange(2**low), low).astype(np.float64)
    inner = below @ x[:low] + np.einsum("zj,jk,zk->z", below, weights[:low, :low], below)
    outer = bits @ x[low:n] + np.einsum("zj,jk,zk->z", bits, weights[low:, low:], bits)
    sign = bits_of([index], n)[0]
    inner += np.pi * (below @ sign[:low])
    outer += np.pi * (bits @ sign[low:])
    cross = on_device(below @ weights[:low, low:])
    total = 0j
    for rows in torch.split(on_device(np.column_stack([outer, bits])), 1024):
        angle = rows[:, :1] + on_device(inner) + rows[:, 1:] @ cross.T
        total += complex(torch.cos(angle).sum().item(), torch.sin(angle).sum().item())
    amplitude: complex = total / 2**n
    return amplitude


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", range(22, 31))
class TestLargeSamples:
    """Single samples up to what the memory holds, at chosen indices by the definition."""

    def selected(self, state: qdp.StateBatch, n: int) -> tuple[Any, Any]:
        assert state.shape == (1, 2**n)
        index = some_indices(n)
        return index, torch.from_dlpack(state)[0][on_device(index)].cpu().numpy()

    def test_amplitude(self, n: int, precision: Any) -> None:
        needs(n, precision, copies=2.5)
        rng = np.random.default_rng(n)
        x = rng.standard_normal(2**n, dtype=REAL[precision])
        norm = math.sqrt(
            sum(float(np.square(c, dtype=np.float64).sum()) for c in x.reshape(64, -1))
        )
        engine = qdp.Engine(DEVICE, precision=precision)
        for data in (x, on_device(x)):
            index, actual = self.selected(engine.encode(data, n), n)
            tolerance = 8 * np.finfo(precision).eps * 6 / 2 ** (n / 2)
            np.testing.assert_allclose(actual, x[index] / norm, rtol=0, atol=tolerance)

    def test_odd_length(self, n: int, precision: Any) -> None:
        needs(n, precision, copies=2.5)
        length = 2 ** (n - 1) + 12345
        x = torch.ones(length, dtype=getattr(torch, REAL[precision].__name__), device=DEVICE)
        index, actual = self.selected(qdp.Engine(DEVICE).encode(x, n), n)
        expected = np.where(index < length, 1 / math.sqrt(length), 0)
        np.testing.assert_allclose(actual, expected, rtol=8 * np.finfo(precision).eps, atol=0)

    @pytest.mark.parametrize("encoding", ["angle", "phase", "iqp-embedding"])
    def test_product_and_diagonal(self, encoding: str, n: int, precision: Any) -> None:
        needs(n, precision, copies=2.1)
        rng = np.random.default_rng(n)
        # Angles near pi/4 keep the products of cosines and sines from vanishing.
        x = rng.uniform(0.6, 1.0, size=n).astype(np.float32).astype(np.float64)
        state = qdp.Engine(DEVICE, precision=precision).encode(on_device(x), n, encoding)
        index, actual = self.selected(state, n)
        b = bits_of(index, n)
        y = x.astype(np.longdouble)  # hundreds of terms would round as much as the engine does
        if encoding == "angle":
            expected = np.prod(np.where(b, np.sin(y), np.cos(y)), axis=1)
        elif encoding == "phase":
            expected = np.exp(1j * (b @ y)) / 2 ** (n / 2)
        else:
            z = 1 - 2 * b
            theta = -0.5 * (z @ y)
            for j, k in combinations(range(n), 2):
                theta -= 0.5 * y[j] * y[k] * z[:, j] * z[:, k]
            expected = np.exp(1j * theta) / 2 ** (n / 2)
        bound = 8 + 2 * reference.phase_bound(x, n, encoding)
        tolerance = bound * np.finfo(precision).eps * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)

    def test_basis(self, n: int, precision: Any) -> None:
        needs(n, precision)
        for hot in (0, 2**n - 1, 2 ** (n - 1) + 1):
            x = torch.tensor([hot], device=DEVICE)
            state = qdp.Engine(DEVICE, precision=precision).encode(x, n, "basis")
            tensor = torch.from_dlpack(state)
            assert torch.count_nonzero(torch.view_as_real(tensor)).item() == 1
            assert tensor[0, hot].item() == 1

    def test_iqp(self, n: int, precision: Any) -> None:
        needs(n, precision, copies=2.1)
        rng = np.random.default_rng(n)
        x = rng.uniform(-np.pi, np.pi, size=n * (n + 1) // 2).astype(np.float32).astype(np.float64)
        state = qdp.Engine(DEVICE, precision=precision).encode(on_device(x), n, "iqp")
        tensor = torch.from_dlpack(state)[0]
        # Amplitudes are about 2**(-n/2); the sum of 2**n phases has a rounding of its own.
        eps, eps_of_sum = float(np.finfo(precision).eps), float(np.finfo(np.float64).eps)
        tolerance = eps * (8 + 2 * np.abs(x).sum()) * 2 ** (-n / 2) + 8 * eps_of_sum
        for index in (0, 1, 2 ** (n - 1), 2**n - 1, *rng.integers(0, 2**n, size=4).tolist()):
            assert abs(tensor[index].item() - iqp_amplitude(x, n, index)) <= tolerance

    def test_norm(self, n: int, precision: Any) -> None:
        """A fault anywhere in a large state shows in its norm."""
        needs(n, precision, copies=1.6)
        x = torch.linspace(-1, 1, n, dtype=torch.float64, device=DEVICE)
        for encoding in ("angle", "phase", "iqp-z", "zz", "iqp-embedding"):
            state = qdp.Engine(DEVICE, precision=precision).encode(x, n, encoding)
            parts = torch.view_as_real(torch.from_dlpack(state)[0]).split(2**22)
            total = sum(part.double().square().sum().item() for part in parts)
            assert total == pytest.approx(1, abs=64 * float(np.finfo(precision).eps))
            del state, parts
