"""Gradients of qdp.torch.encode against finite differences, PennyLane and plain torch."""

from __future__ import annotations

from typing import Any

import live
import numpy as np
import pytest
import qdp
import reference
from cases import CASES, Case

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from qdp.torch import formula  # noqa: E402

# torch imports its own deprecated code for forward mode and to check operators.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]
DIFFERENTIABLE = [case for case in CASES if case.encoding != "basis"]
cases = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)


def samples(case: Case, n: int, batch: int = 3, device: str = "cpu") -> Any:
    return torch.from_numpy(case.samples(n, batch=batch)).to(device).requires_grad_()


def cotangent(like: Any, seed: int = 7) -> Any:
    """A random gradient by states: every amplitude's real and imaginary part counts."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(like.shape, generator=generator, dtype=torch.complex128)
    return values.to(like.device, like.dtype)


@cases
@pytest.mark.parametrize("convention", reference.CONVENTIONS)
def test_finite_differences(case: Case, convention: Any, device: str) -> None:
    for n in (1, 2, 3):
        options = {"convention": convention, **case.options(n)}

        def encode(x: Any, n: int = n, options: Any = options) -> Any:
            return qdp.torch.encode(x, n, case.encoding, **options)

        assert torch.autograd.gradcheck(encode, samples(case, n, 2, device))


@cases
def test_equals_pennylane(case: Case, device: str) -> None:
    """PennyLane's own backpropagation through its own circuit."""
    qml = pytest.importorskip("pennylane", exc_type=ImportError)
    for n in (1, 2, 4):
        options = case.options(n)
        x = samples(case, n)
        circuit = live.pennylane_circuit(n, case.encoding, **options)
        device_ = qml.device("default.qubit", wires=n)
        node = qml.QNode(circuit, device_, interface="torch", diff_method="backprop")
        states = node(x)
        weight = cotangent(states)
        (expected,) = torch.autograd.grad(states, x, weight)

        mine = x.detach().to(device).requires_grad_()
        result = qdp.torch.encode(mine, n, case.encoding, convention="pennylane", **options)
        result.backward(weight.to(device))
        assert mine.grad.dtype == x.dtype
        np.testing.assert_allclose(mine.grad.cpu(), expected, rtol=0, atol=1e-11)


@cases
@pytest.mark.parametrize("precision", ["complex64", "complex128"])
def test_equals_plain_torch(case: Case, precision: Any, device: str) -> None:
    """At sizes above a vector's length, and in single precision."""
    for n in (5, 8, 11):
        options = case.options(n)
        x = samples(case, n)
        states = live.torch_states(x, n, case.encoding, **options)
        weight = cotangent(states)
        (expected,) = torch.autograd.grad(states, x, weight)

        given = torch.from_numpy(case.cast(x.detach().numpy(), precision)).to(device)
        given.requires_grad_()
        result = qdp.torch.encode(given, n, case.encoding, convention="qiskit", **options)
        result.backward(weight.to(result))
        assert given.grad.dtype == given.dtype
        # A gradient sums 2**n terms, of which each has the states' error.
        scale = float(weight.abs().sum(1).max()) * float(states.detach().abs().max())
        phase = 1 + reference.phase_bound(x.detach().numpy(), n, case.encoding, **options)
        bound = float(np.finfo(precision).eps) * 8 * phase * scale * max(1, n)
        error = (given.grad.cpu() - expected).abs().max()
        assert float(error) <= bound


@cases
def test_second_derivatives(case: Case, device: str) -> None:
    n = 2
    options = case.options(n)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, n, case.encoding, **options)

    assert torch.autograd.gradgradcheck(encode, samples(case, n, 1, device))


# torch's check looks for the gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("encoding", sorted({case.encoding for case in DIFFERENTIABLE}))
def test_derivatives_of_no_samples(encoding: str, device: str) -> None:
    """To every order, and what torch checks of an operator."""
    x = torch.zeros(0, 3, device=device, dtype=torch.float64, requires_grad=True)
    grad = torch.zeros(0, 4 if encoding == "iqp" else 8, device=device, dtype=torch.complex128)
    options: dict[str, Any] = {"num_qubits": 2 if encoding == "iqp" else 3, "encoding": encoding}
    if encoding in ("zz", "iqp-embedding"):
        options["reps"] = 3
    torch.library.opcheck(torch.ops.qdp.encode_backward, (grad, x), options)
    leaves = (grad.clone().requires_grad_(), x)
    torch.library.opcheck(torch.ops.qdp.encode_backward, leaves, options)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, **options)

    (first,) = torch.autograd.grad(encode(x).real.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    assert second.shape == third.shape == x.shape
    samples = x.detach()
    assert torch.func.jvp(encode, (samples,), (samples,))[1].shape == grad.shape


def hooked(kind: str) -> Any:
    """A function, run with hooks on the tensors that it saves."""
    from torch.utils.checkpoint import checkpoint

    def saved(f: Any, x: Any) -> Any:
        with (
            torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved),
            torch.autograd.graph.save_on_cpu(),
        ):
            return f(x)

    return saved if kind == "hooks" else lambda f, x: checkpoint(f, x, use_reentrant=False)


@pytest.mark.parametrize("kind", ["hooks", "checkpoint"])
@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_hooks_on_saved_tensors(encoding: str, kind: str, device: str) -> None:
    """They change no derivative, of any order, and are there afterwards."""
    x = torch.rand(2, 3, device=device, dtype=torch.float64)

    def states(x: Any) -> Any:
        return qdp.torch.encode(x, 3, encoding)

    def third(x: Any) -> Any:
        """A number whose computation takes the encoding's third derivative."""
        f = states(x).real.pow(3).sum()
        for _ in range(3):
            (f,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        return f.square().sum()

    def forward(x: Any) -> Any:
        """The same of a tangent, with and without torch.func."""
        with torch.autograd.forward_ad.dual_level():
            slope = torch.autograd.forward_ad.unpack_dual(
                states(torch.autograd.forward_ad.make_dual(x, x.cos()))
            ).tangent
        other = torch.func.jvp(states, (x,), (x.cos(),))[1]
        return (slope * other).real.sum()

    for function in (third, forward):
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(function(leaf), leaf)
        assert want.abs().max() > 1e-3
        (found,) = torch.autograd.grad(hooked(kind)(function, leaf), leaf)
        torch.testing.assert_close(found, want)
    seen = []

    def packed(saved: Any) -> Any:
        seen.append(saved)
        return saved

    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda saved: saved):
        (first,) = torch.autograd.grad(states(leaf).real.sum(), leaf, create_graph=True)
        first.sum().backward()
        seen.clear()
        leaf.sin()
    assert len(seen) == 1


@cases
def test_forward_mode(case: Case, device: str) -> None:
    n = 3
    options = case.options(n)
    x = samples(case, n, 2, device).detach()
    tangent = torch.from_numpy(case.samples(n, batch=4)[2:]).to(x)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, n, case.encoding, **options)

    states, slope = torch.func.jvp(encode, (x,), (tangent,))
    step = 1e-6
    expected = (encode(x + step * tangent) - encode(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(states, encode(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-7)
    with torch.autograd.forward_ad.dual_level():
        dual = encode(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("convention", reference.CONVENTIONS)
def test_formula_is_the_encoding(case: Case, convention: Any) -> None:
    """What derivatives of higher order are taken through has the states of the native code."""
    if case.encoding == "basis":
        with pytest.raises(qdp.InvalidArgumentError, match="derivatives"):
            formula.encode(torch.zeros(1, 3), torch.complex64, num_qubits=3, encoding="basis")
        return
    for n in (1, 2, 5):
        options = case.options(n)
        x = samples(case, n).detach()
        entanglement = options.pop("entanglement", None)
        named = entanglement if isinstance(entanglement, str) else None
        pairs = [q for pair in entanglement for q in pair] if entanglement and not named else None
        if entanglement == []:
            named = "none"
        states = formula.encode(
            x,
            torch.complex128,
            num_qubits=n,
            encoding=case.encoding,
            convention=convention,
            entanglement=named,
            pairs=pairs,
            **options,
        )
        reference.assert_states(
            states.numpy(), x.numpy(), n, case.encoding, convention=convention, **case.options(n)
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gradient_has_the_samples_dtype(dtype: str, device: str) -> None:
    x = torch.rand(3, 4, device=device).to(getattr(torch, dtype)).requires_grad_()
    result = qdp.torch.encode(x, 4, "angle")
    assert result.dtype == (torch.complex128 if dtype == "float64" else torch.complex64)
    result.real.sum().backward()
    assert x.grad.dtype == x.dtype
    exact = x.detach().double().requires_grad_()
    qdp.torch.encode(exact, 4, "angle").real.sum().backward()
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=4 * eps, atol=16 * eps)


def test_strides_and_one_sample(device: str) -> None:
    base = torch.rand(6, 8, device=device, dtype=torch.float64)
    for view in (base[0], base[:, 3], base[::2], base[:, ::2], base.T, base[1].expand(3, 8)):
        n = view.shape[-1]
        x = view.detach().requires_grad_()
        result = qdp.torch.encode(x, n, "angle")
        weight = cotangent(result)
        (gradient,) = torch.autograd.grad(result, x, weight)
        dense = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        (expected,) = torch.autograd.grad(qdp.torch.encode(dense, n, "angle"), dense, weight)
        assert gradient.shape == x.shape
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
        # A gradient of another layout, as a reduction or a lazy conjugate gives.
        for other in (weight.conj(), weight.T.contiguous().T, weight[:1].expand_as(weight)):
            given = torch.autograd.grad(qdp.torch.encode(x, n, "angle"), x, other)
            same = torch.autograd.grad(
                qdp.torch.encode(dense, n, "angle"), dense, other.resolve_conj().contiguous()
            )
            torch.testing.assert_close(given, same, rtol=0, atol=1e-14)


def test_jacobian_in_one_pass(device: str) -> None:
    """Many gradients of one forward, mapped over together."""
    x = torch.rand(2, 3, device=device, dtype=torch.float64)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, 3, "zz", entanglement=[(0, 2)]).real

    together = torch.autograd.functional.jacobian(encode, x, vectorize=True)
    one_by_one = torch.autograd.functional.jacobian(encode, x)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-14)


def test_plan_has_gradients(device: str) -> None:
    plan = qdp.Engine(device, precision="complex128").plan(
        4, "zz", reps=1, entanglement=[(0, 2), (3, 1)], convention="pennylane"
    )
    x = torch.rand(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.torch, x)
    float_x = x.detach().float().requires_grad_()
    assert plan.torch(float_x).dtype == torch.complex128


def test_nothing_is_recorded_without_need(device: str) -> None:
    x = torch.rand(3, 4, device=device, requires_grad=True)
    with torch.no_grad():
        assert not qdp.torch.encode(x, 4, "angle").requires_grad
    assert not qdp.torch.encode(x.detach(), 4, "angle").requires_grad
    with torch.inference_mode():
        qdp.torch.encode(torch.rand(3, 4, device=device), 4, "angle")


def test_refusals(device: str) -> None:
    x = torch.rand(3, 4, device=device, requires_grad=True)
    out = torch.empty(3, 16, dtype=torch.complex64, device=device)
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        qdp.torch.encode(x, 4, "angle", out=out)
    with torch.no_grad():
        assert qdp.torch.encode(x, 4, "angle", out=out) is out
        torch.testing.assert_close(out, qdp.torch.encode(x, 4, "angle"))
        with pytest.raises(qdp.ShapeError, match="out"):
            qdp.torch.encode(x, 4, "angle", out=out[:2])
        with pytest.raises(qdp.DTypeError, match="out"):
            qdp.torch.encode(x, 4, "angle", out=out.to(torch.complex128))
    bits = torch.ones(1, 4, device=device, requires_grad=True)
    total = qdp.torch.encode(bits, 4, "basis").real.sum()
    with pytest.raises(qdp.InvalidArgumentError, match="basis"):
        total.backward()
    with pytest.raises(qdp.FeatureCountError):
        qdp.torch.encode(x, 5, "angle")
    with pytest.raises(qdp.InvalidArgumentError, match="encoding"):
        qdp.torch.encode(x, 4, "angles")


def test_bad_values_have_no_gradient(device: str) -> None:
    if device == "cpu":
        x = torch.tensor([[0.0, float("nan")]], requires_grad=True)
        with pytest.raises(qdp.NonFiniteError):
            qdp.torch.encode(x, 2, "angle")


@pytest.mark.sanitize
def test_training(device: str) -> None:
    """Angles are found that give a state: the gradient is good enough to descend by."""
    torch.manual_seed(0)
    target = qdp.torch.encode(torch.rand(1, 3, device=device, dtype=torch.float64), 3, "angle")
    model = qdp.torch.AngleEncoding(3, affine=True, device=device, dtype=torch.float64)
    x = torch.ones(1, 3, device=device, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = 1 - (model(x).conj() * target).sum().abs() ** 2
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
