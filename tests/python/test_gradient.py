"""Gradients by the features: against torch's autograd, finite differences, and each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PRECISIONS, Case

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE  # noqa: E402
from qdp._qdp import encode_backward  # noqa: E402

DIFFERENTIABLE = [case for case in CASES if case.encoding != "basis"]
ONE_EACH = [
    Case("amplitude"),
    Case("amplitude", features="complex"),
    Case("angle", {"rotation": "x"}),
    Case("phase"),
    Case("iqp-z"),
    Case("iqp"),
    Case("zz", {"reps": 1}),
    Case("zz"),
    Case("iqp-embedding", {"reps": 3, "entanglement": "linear"}),
]


def hadamards(states: Any, n: int) -> Any:
    """H on every qubit."""
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=states.dtype) / math.sqrt(2)
    for k in range(n):
        parts = states.reshape(len(states), -1, 2, 2**k)
        states = torch.einsum("rapc,pq->raqc", parts, h).reshape(len(states), -1)
    return states


def phases(x: Any, n: int, case: Case, convention: Any) -> Any:
    """The phase of every index in one layer."""
    b = torch.from_numpy(reference.bits(n, convention)).to(x.dtype)
    z = 1 - 2 * b
    options = case.options(n)
    pairs = reference.entangled_pairs(n, options.get("entanglement", "full"))
    if case.encoding == "zz":
        theta = 2 * x @ b.T
        for j, k in pairs:
            u = 2 * (math.pi - x[:, j]) * (math.pi - x[:, k])
            theta = theta + u[:, None] * (b[:, j] - b[:, k]).abs()
        return theta
    if case.encoding == "iqp-embedding":
        theta = -x @ z.T / 2
        for j, k in pairs:
            theta = theta - (x[:, j] * x[:, k])[:, None] * z[:, j] * z[:, k] / 2
        return theta
    theta = x[:, :n] @ b.T
    if case.encoding == "iqp":
        for i, (j, k) in enumerate(pairs):
            theta = theta + x[:, n + i, None] * b[:, j] * b[:, k]
    return theta


def states_in_torch(x: Any, n: int, case: Case, convention: Any) -> Any:
    """States that torch can differentiate, from the definitions."""
    if case.encoding == "amplitude":
        unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return torch.nn.functional.pad(unit, (0, 2**n - x.shape[1])) + 0j
    if case.encoding == "angle":
        a = x if convention == "qdp" else x / 2
        match case.fixed["rotation"]:
            case "x":
                factors = torch.stack([torch.cos(a) + 0j, -1j * torch.sin(a)])
            case "y":
                factors = torch.stack([torch.cos(a), torch.sin(a)]) + 0j
            case _:
                factors = torch.stack([torch.exp(-1j * a), 0j * a])
        b = torch.from_numpy(reference.bits(n, convention))
        return torch.stack([factors[b[:, k], :, k] for k in range(n)]).prod(0).T
    reps = case.fixed.get("reps", 2 if case.encoding == "zz" else 1)
    layer = torch.exp(1j * phases(x, n, case, convention))
    states = torch.zeros(len(x), 2**n, dtype=torch.complex128)
    states[:, 0] = 1
    for _ in range(reps):
        states = hadamards(states, n) * layer
    return hadamards(states, n) if case.encoding in ("iqp", "iqp-z") else states


def steepness(case: Case, x: Any, n: int) -> float:
    """A bound on how fast a state moves with a feature."""
    if case.encoding == "amplitude":
        return float(1 / torch.linalg.vector_norm(x.to(torch.complex128), dim=1).min())
    reps = case.fixed.get("reps", 2)
    return float(reps * (2 + 4 * math.pi * n if case.encoding == "zz" else 1 + math.pi * n))


def assert_gradient(got: Any, want: Any, x: Any, g: Any, n: int, case: Case) -> None:
    """Equal to the rounding of the narrower of the two types."""
    real = torch.float32 if g.dtype == torch.complex64 else torch.float64
    eps = max(torch.finfo(real).eps, torch.finfo(x.dtype).eps)
    size = float(torch.linalg.vector_norm(g.to(torch.complex128), dim=-1).max())
    bound = 16 * eps * size * steepness(case, x, n)
    got, want = got.cpu().to(torch.complex128), want.cpu().to(torch.complex128)
    assert got.shape == want.shape
    error = float((got - want).abs().sub(2 * eps * want.abs()).max())
    assert error <= bound, f"{case} n={n}: off by {error}, {bound} allowed"


def sample(case: Case, n: int, batch: int, precision: str, seed: int = 0) -> tuple[Any, Any]:
    """Samples and a cotangent."""
    x = torch.from_numpy(case.cast(case.samples(n, batch=batch), precision))
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(batch, 2**n, dtype=torch.complex128, generator=generator)
    return x, g.to(getattr(torch, precision))


class TestCpu:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_equals_autograd(self, case: Case, precision: str) -> None:
        for n in (1, 2, 3, 5, 8):
            for convention in reference.CONVENTIONS:
                x, g = sample(case, n, 3, precision)
                exact = x.to(torch.complex128 if x.is_complex() else torch.float64).clone()
                exact.requires_grad_()
                states_in_torch(exact, n, case, convention).backward(g.to(torch.complex128))
                options: Any = {"convention": convention, **case.options(n)}
                got = encode_backward(g, x, n, case.encoding, **options)
                assert (got.dtype, got.shape) == (x.dtype, x.shape)
                assert_gradient(got, exact.grad, x, g, n, case)

    @pytest.mark.parametrize("case", ONE_EACH, ids=str)
    def test_equals_finite_differences(self, case: Case) -> None:
        for n in (3, 11):
            x, g = sample(case, n, 2, "complex128")
            generator = torch.Generator().manual_seed(n)
            direction = torch.randn(x.shape, dtype=x.dtype, generator=generator)
            step = 1e-5
            ahead, behind = (
                qdp.torch.encode(x + by * direction, n, case.encoding, **case.options(n))
                for by in (step, -step)
            )
            want = (g.conj() * (ahead - behind)).real.sum(1) / (2 * step)
            gradient = encode_backward(g, x, n, case.encoding, **case.options(n))
            got = (gradient.conj() * direction).real.sum(1)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_the_result_has_the_type_of_the_samples(self, dtype: str) -> None:
        for case in ONE_EACH:
            if case.features == "complex":
                continue
            x, g = sample(case, 4, 3, "complex64")
            x = x.to(getattr(torch, dtype))
            for cotangent in (g, g.to(torch.complex128)):
                got = encode_backward(cotangent, x, 4, case.encoding, **case.options(4))
                options = case.options(4)
                want = encode_backward(
                    g.to(torch.complex128), x.double(), 4, case.encoding, **options
                )
                assert got.dtype == x.dtype
                assert_gradient(got, want, x, cotangent, 4, case)

    def test_layouts(self) -> None:
        check_layouts("cpu")

    def test_one_sample_and_none(self) -> None:
        x, g = sample(ONE_EACH[3], 4, 3, "complex128")
        whole = encode_backward(g, x, 4, "phase")
        assert torch.equal(encode_backward(g[1:2], x[1], 4, "phase"), whole[1])
        assert torch.equal(encode_backward(g[1], x[1], 4, "phase"), whole[1])
        assert encode_backward(g[:0], x[:0], 4, "phase").shape == (0, 4)

    def test_lazily_conjugated(self) -> None:
        x, g = sample(ONE_EACH[1], 3, 2, "complex128")
        want = encode_backward(g.conj().resolve_conj(), x, 3)
        assert torch.equal(encode_backward(g.conj(), x, 3), want)

    def test_samples_without_a_state(self) -> None:
        check_bad_samples("cpu")

    def test_refusals(self) -> None:
        x, g = sample(ONE_EACH[3], 3, 2, "complex128")
        refusals: list[tuple[Any, str, Any]] = [
            (qdp.InvalidArgumentError, "encoding", lambda: encode_backward(g, x, 3, "basis")),
            (qdp.DTypeError, "data", lambda: encode_backward(g, x.long(), 3, "phase")),
            (qdp.DTypeError, "grad", lambda: encode_backward(g.real, x, 3, "phase")),
            (qdp.DTypeError, "grad", lambda: encode_backward(g.numpy(), x, 3, "phase")),
            (qdp.ShapeError, "grad", lambda: encode_backward(g[:1], x, 3, "phase")),
            (qdp.ShapeError, "grad", lambda: encode_backward(g[:, :4], x, 3, "phase")),
            (qdp.FeatureCountError, "phase", lambda: encode_backward(g, x[:, :2], 3, "phase")),
            (qdp.ShapeError, "out", lambda: encode_backward(g, x, 3, "phase", out=x[0].clone())),
            (qdp.DTypeError, "out", lambda: encode_backward(g, x, 3, "phase", out=x.float())),
            (qdp.InvalidArgumentError, "out", lambda: encode_backward(g, x, 3, "phase", out=x)),
            (
                qdp.InvalidArgumentError,
                "out",
                lambda: encode_backward(g, x, 3, "phase", out=torch.empty(3, 2).double().T),
            ),
            (
                qdp.InvalidArgumentError,
                "gradient",
                lambda: encode_backward(g, x.clone().requires_grad_(), 3, "phase"),
            ),
            (
                qdp.InvalidArgumentError,
                "rotation",
                lambda: encode_backward(g, x, 3, "phase", rotation="x"),
            ),
        ]
        for error, match, call in refusals:
            with pytest.raises(error, match=match):
                call()


def check_layouts(device: str) -> None:
    """Strides of the samples, the cotangent and the result change no value."""
    for case in ONE_EACH:
        for n in (3, 9, 13):
            x, g = (tensor.to(device) for tensor in sample(case, n, 5, "complex64"))
            options = case.options(n)
            want = encode_backward(g, x, n, case.encoding, **options)
            wide_x = x.new_zeros(10, 2 * x.shape[1] + 1)
            wide_x[::2, 1::2] = x
            wide_g = g.new_zeros(5, 2**n + 1)
            wide_g[:, 1:] = g
            for samples in (x, x.T.contiguous().T, wide_x[::2, 1::2]):
                for cotangent in (g, g.T.contiguous().T, wide_g[:, 1:], g.flip(0).flip(0)):
                    got = encode_backward(cotangent, samples, n, case.encoding, **options)
                    assert_gradient(got, want, x.cpu(), g.cpu(), n, case)
            row = g[:1].expand(5, -1)
            expanded = encode_backward(row, x, n, case.encoding, **options)
            copied = encode_backward(row.contiguous(), x, n, case.encoding, **options)
            assert_gradient(expanded, copied, x.cpu(), g.cpu(), n, case)
            out = x.new_full((5, x.shape[1] + 3), 7)
            part = out[:, 1:-2]
            assert encode_backward(g, x, n, case.encoding, out=part, **options) is part
            assert_gradient(part, want, x.cpu(), g.cpu(), n, case)
            assert (out[:, 0] == 7).all()
            assert (out[:, -2:] == 7).all()


def check_bad_samples(device: str) -> None:
    """A sample that has no state has a gradient of NaN, and the others have theirs."""
    for encoding, row in (
        ("amplitude", [0.0, 0, 0]),
        ("amplitude", [1.0, math.inf, 0]),
        ("angle", [1.0, math.nan, 0]),
        ("phase", [math.inf, 0.0, 0]),
        ("zz", [0.0, -math.inf, 0]),
    ):
        x = torch.ones(4, 3, dtype=torch.float64, device=device)
        x[2] = torch.tensor(row)
        g = torch.ones(4, 8, dtype=torch.complex128, device=device)
        gradient = encode_backward(g, x, 3, encoding)
        assert gradient.isnan().any(1).tolist() == [False, False, True, False], encoding
        assert gradient[2].isnan().all(), encoding


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.sanitize
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_every_kernel(self, precision: str) -> None:
        for case in ONE_EACH:
            for n in (1, 2, 5, 8, 11, 14):
                self.check(case, n, 3, precision)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_equals_cpu_backend(self, case: Case, precision: str) -> None:
        for n in range(1, 19):
            for batch in (1, 2, 33) if n <= 12 else (1, 3):
                self.check(case, n, batch, precision)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_long_rows(self, precision: str) -> None:
        for case in ONE_EACH:
            for n in (20, 22):
                self.check(case, n, 1, precision)

    def test_conventions(self) -> None:
        for case in ONE_EACH:
            for convention in reference.CONVENTIONS:
                self.check(case, 6, 4, "complex128", convention=convention)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_types(self, dtype: str, precision: str) -> None:
        for case in ONE_EACH:
            if case.features == "complex":
                continue
            for n in (4, 10, 14):
                self.check(case, n, 3, precision, dtype=getattr(torch, dtype))

    @pytest.mark.parametrize("n", [3, 12, 13, 14])
    def test_short_amplitudes(self, n: int) -> None:
        """Every cut of a row, whole units of memory or not."""
        generator = torch.Generator().manual_seed(n)
        for length in {1, 2, 2**n // 3, 2**n // 2, 2**n // 2 + 1, 2**n - 1, 2**n}:
            for dtype in (torch.float16, torch.float32, torch.complex64, torch.complex128):
                exact = torch.complex128 if dtype.is_complex else torch.float64
                x = torch.randn(4, length, dtype=exact, generator=generator).to(dtype)
                g = torch.randn(4, 2**n, dtype=torch.complex64, generator=generator)
                want = encode_backward(g, x, n)
                got = encode_backward(g.to(DEVICE), x.to(DEVICE), n)
                assert_gradient(got, want, x, g, n, ONE_EACH[0])

    def test_layouts(self) -> None:
        check_layouts(DEVICE)

    def test_samples_without_a_state(self) -> None:
        check_bad_samples(DEVICE)

    @pytest.mark.parametrize("case", ONE_EACH, ids=str)
    def test_batches(self, case: Case) -> None:
        for batch in (0, 1, 65_537):
            self.check(case, 3, batch, "complex64")

    def test_bit_identical_run_to_run(self) -> None:
        for case in ONE_EACH:
            for n in (3, 8, 12, 14, 17):
                x, g = (tensor.to(DEVICE) for tensor in sample(case, n, 5, "complex64"))
                first = encode_backward(g, x, n, case.encoding, **case.options(n))
                for _ in range(4):
                    again = encode_backward(g, x, n, case.encoding, **case.options(n))
                    assert torch.equal(first, again), f"{case} n={n}"

    @pytest.mark.parametrize("n", [5, 13, 15])
    def test_captured(self, n: int) -> None:
        """In a graph of torch's, together with the encode, replayed on other values."""
        for case in ONE_EACH:
            options = case.options(n)
            first, second = (
                [tensor.to(DEVICE) for tensor in sample(case, n, 4, "complex64", seed)]
                for seed in (0, 1)
            )
            second[0] = second[0].flip(0).contiguous()
            x, g = first[0].clone(), first[1].clone()
            encode_backward(g, x, n, case.encoding, **options)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                states = qdp.torch.encode(x, n, case.encoding, **options)
                gradient = encode_backward(states + g, x, n, case.encoding, **options)
            for samples, cotangent in (second, first):
                x.copy_(samples)
                g.copy_(cotangent)
                graph.replay()
                total = qdp.torch.encode(x, n, case.encoding, **options) + g
                want = encode_backward(total, x, n, case.encoding, **options)
                assert torch.equal(gradient, want), f"{case} n={n}"

    def test_other_streams(self) -> None:
        """Behind what its stream does before, and before what it does after."""
        x, g = (tensor.to(DEVICE) for tensor in sample(ONE_EACH[2], 10, 64, "complex64"))
        want = encode_backward(g, x, 10, "angle", rotation="x")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            late = g.clone()
            got = encode_backward(late, x, 10, "angle", rotation="x").clone()
            late.zero_()
        torch.cuda.synchronize()
        assert torch.equal(got, want)

    def test_devices_do_not_mix(self) -> None:
        x, g = sample(ONE_EACH[3], 3, 2, "complex64")
        with pytest.raises(qdp.DeviceMismatchError, match="grad"):
            encode_backward(g, x.to(DEVICE), 3, "phase")
        with pytest.raises(qdp.DeviceMismatchError, match="out"):
            encode_backward(g.to(DEVICE), x.to(DEVICE), 3, "phase", out=x.clone())

    @staticmethod
    def check(
        case: Case, n: int, batch: int, precision: str, *, dtype: Any = None, **options: Any
    ) -> None:
        x, g = sample(case, n, batch, precision)
        x = x.to(dtype or x.dtype)
        options = {**case.options(n), **options}
        want = encode_backward(g, x, n, case.encoding, **options)
        out = torch.full_like(x, 7).to(DEVICE)
        got = encode_backward(g.to(DEVICE), x.to(DEVICE), n, case.encoding, out=out, **options)
        if batch:
            assert_gradient(got, want, x, g, n, case)


def test_fixed_values(device: str) -> None:
    """One qubit by hand: d cos(x) / dx and d sin(x) / dx, for a loss that is one amplitude."""
    x = torch.tensor([[0.3]], dtype=torch.float64, device=device)
    for index, want in ((0, -np.sin(0.3)), (1, np.cos(0.3))):
        g = torch.zeros(1, 2, dtype=torch.complex128, device=device)
        g[0, index] = 1
        assert abs(encode_backward(g, x, 1, "angle").item() - want) < 1e-15
