"""Forward mode, higher derivatives and torch.func, eagerly and compiled."""

# torch.autograd.forward_ad has no types.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qdp
from cases import CASES

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

# torch's own code for these warns of what torch itself has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
N = 3
EACH = tuple({case.encoding: case for case in reversed(CASES)}.values())
SMOOTH = [case for case in EACH if case.encoding != "basis"]
each = pytest.mark.parametrize("case", SMOOTH, ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


def total(states: Any) -> Any:
    """A number whose derivatives do not vanish."""
    return torch.view_as_real(states).pow(3).sum()


def along(f: Any, x: Any) -> Any:
    return torch.func.jvp(f, (x,), (torch.cos(x),))[1]


TRANSFORMS: dict[str, Any] = {
    "jvp": lambda f, x: torch.view_as_real(along(f, x)),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda x: f(x).real)(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).real)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: total(f(x)))(x),
    "each grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: total(f(x))))(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: total(f(x)))(x[0]),
    "reverse twice": lambda f, x: torch.func.jacrev(torch.func.grad(lambda x: total(f(x))))(x[0]),
    "forward twice": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(lambda x: total(f(x))))(x[0]),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def angle_by_hand(x: Any) -> Any:
    """The angle encoding in torch's operations."""
    x = x if x.dim() == 2 else x[None]
    states = torch.ones_like(x[:, :1])
    for k in range(x.shape[1]):
        qubit = torch.stack([x[:, k].cos(), x[:, k].sin()], 1)
        states = (qubit[:, :, None] * states[:, None, :]).flatten(1)
    return torch.complex(states, torch.zeros_like(states))


@transforms
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_transforms(transform: str, backend: Any, device: str) -> None:
    """Of the function and of its operator, as of torch's own operations."""
    x = torch.rand(2, N, device=device, dtype=torch.float64)
    expected = TRANSFORMS[transform](angle_by_hand, x)
    assert expected.abs().max() > 0.1

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, N, "angle")

    def operator(x: Any) -> Any:
        return torch.ops.qdp.encode(x, num_qubits=N, encoding="angle")

    for f in (encode, operator):

        def run(x: Any, f: Any = f) -> Any:
            return TRANSFORMS[transform](f, x)

        if backend is not None:
            run = torch.compile(run, fullgraph=True, backend=backend)
        torch.testing.assert_close(run(x), expected)


@each
def test_compiled_like_eager(case: Any, device: str) -> None:
    x = torch.from_numpy(case.samples(N, batch=2)).to(device)
    options = case.options(N)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, N, case.encoding, **options)

    for transform in ("jvp", "hessian"):

        def run(x: Any, transform: str = transform) -> Any:
            return TRANSFORMS[transform](encode, x)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert run(x).abs().max() > 1e-3
        torch.testing.assert_close(compiled(x), run(x))


@each
def test_forward_mode_twice(case: Any, device: str) -> None:
    x = torch.from_numpy(case.samples(2, batch=1)[0]).to(device)

    def f(x: Any) -> Any:
        return total(qdp.torch.encode(x, 2, case.encoding))

    expected = torch.autograd.functional.hessian(f, x)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(f))(x), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(f))(x), expected)
    # A level without torch.func, and the gradient taken within it.
    direction = torch.ones_like(x)
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(f(forward_ad.make_dual(leaf, direction)), leaf)
        slope = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(slope, expected @ direction)


def test_operator_in_a_dual_level(device: str) -> None:
    x = torch.rand(2, N, device=device, dtype=torch.float64)
    weight = torch.rand(N, device=device, dtype=torch.float64)
    with forward_ad.dual_level():
        for dual in ("x", "weight"):
            tensors = {"x": x, "weight": weight}
            tensors[dual] = forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
            states = torch.ops.qdp.encode(**tensors, num_qubits=N, encoding="angle")
            slope = forward_ad.unpack_dual(states).tangent
            moved = (x + 1e-6) * weight if dual == "x" else x * (weight + 1e-6)
            step = (qdp.torch.encode(moved, N, "angle") - states) / 1e-6
            torch.testing.assert_close(slope, step, rtol=0, atol=1e-4)


def test_compiled_code_takes_no_dual_tensors(device: str) -> None:
    """Where torch does not say so itself, the tangent is there."""
    x = torch.rand(2, N, device=device)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, N, "angle") * 1

    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        expected = forward_ad.unpack_dual(encode(dual)).tangent
        try:
            slope = forward_ad.unpack_dual(compiled(dual)).tangent
        except RuntimeError as error:
            assert "dual" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(slope, expected)


def test_another_threads_forward_mode(device: str) -> None:
    """What a call does depends on its own tensors."""
    x = torch.rand(2, N, device=device)
    expected = qdp.torch.encode(x, N, "angle")
    out = torch.empty_like(expected)

    def elsewhere() -> None:
        assert torch.equal(qdp.torch.encode(x, N, "angle"), expected)
        assert qdp.torch.encode(x, N, "angle", out=out) is out
        states = qdp.torch.encode(torch.tensor([[1], [6]], device=device), N, "basis")
        assert states.abs().argmax(1).tolist() == [1, 6]
        for wrong in (x[:, :2], torch.cat([x, x], 1)):
            with pytest.raises(qdp.FeatureCountError):
                qdp.torch.encode(wrong, N, "angle")
        with pytest.raises(qdp.NonFiniteError):
            qdp.torch.encode(x * float("nan"), N, "angle", validate="now")
        leaf = x.clone().requires_grad_()
        total(qdp.torch.encode(leaf, N, "angle")).backward()
        assert leaf.grad.abs().max() > 0

    with forward_ad.dual_level(), ThreadPoolExecutor(1) as pool:
        pool.submit(elsewhere).result()
        elsewhere()
    assert torch.equal(out, expected)


@each
def test_forward_mode_checks(case: Any, device: str) -> None:
    x = torch.from_numpy(case.samples(N, batch=2)).to(device)

    def along(x: Any, **options: Any) -> Any:
        def encode(x: Any) -> Any:
            return qdp.torch.encode(x, N, case.encoding, **options)

        return torch.func.jvp(encode, (x,), (torch.ones_like(x),))

    with pytest.raises(qdp.FeatureCountError):
        along(torch.cat([x] * 9, 1))
    with pytest.raises(qdp.NonFiniteError):
        along(x * float("nan"), validate="now")
    with pytest.raises(qdp.ShapeError):
        along(x[None])
    if case.encoding == "amplitude":
        with pytest.raises(qdp.ZeroNormError):
            along(x * 0, validate="now")


def test_what_nothing_depends_on(device: str) -> None:
    """Basis states have no derivative, and are none of a transform of something else."""
    x = torch.rand(2, N, device=device)
    index = torch.tensor([[1], [6]], device=device)

    def f(x: Any) -> Any:
        return (qdp.torch.encode(x, N, "angle") * qdp.torch.encode(index, N, "basis")).real.sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        assert transform(f)(x).abs().max() > 0
    assert torch.func.hessian(f)(x).abs().max() > 0
    with pytest.raises(qdp.InvalidArgumentError, match="basis"):
        torch.func.jvp(lambda x: qdp.torch.encode(x, N, "basis"), (x.round(),), (x,))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e25, 1e30])
def test_amplitudes_of_any_size(scale: float, device: str) -> None:
    """Derivatives of a state that does not depend on the scale, in what float32 can say."""
    x = torch.tensor([[1.0, 2.0, -3.0]], device=device)
    tangent = torch.tensor([[3.0, -1.0, 2.0]], device=device)

    def states(x: Any) -> Any:
        return qdp.torch.encode(x, 2)

    expected = torch.func.jvp(states, (x,), (tangent,))
    found = torch.func.jvp(states, (x * scale,), (tangent * scale,))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], states(x * scale))
    weight = torch.tensor([1.0, 3.0, 2.0, 1.0], device=device)

    def second(scale: float) -> Any:
        leaf = (x * scale).requires_grad_()
        loss = (states(leaf).real * weight).sum()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad((first * scale * tangent).sum(), leaf)[0] * scale

    torch.testing.assert_close(second(scale), second(1.0), rtol=1e-4, atol=1e-5)


FUSED = [case for case in SMOOTH if case.encoding != "amplitude"]


@pytest.mark.parametrize("case", FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_maps_in_double(case: Any, dtype: Any, device: str) -> None:
    """Every way that a map is applied gives what the kernels give."""
    x = torch.from_numpy(case.samples(N, batch=2)).to(device, dtype)
    generator = torch.Generator().manual_seed(3)
    weights = (torch.rand(2, x.shape[1], generator=generator) * 30).to(device, dtype)
    biases = torch.rand(2, x.shape[1], generator=generator).to(device, dtype)

    def encode(weight: Any, bias: Any) -> Any:
        return qdp.torch.encode(x, N, case.encoding, weight=weight, bias=bias)

    apart = torch.stack([encode(w, b) for w, b in zip(weights, biases, strict=True)])
    together = torch.func.vmap(encode)(weights, biases)
    assert together.dtype == torch.complex64
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    states, slope = torch.func.jvp(
        lambda weight: encode(weight, biases[0]), (weights[0],), (biases[1],)
    )
    assert torch.equal(states, apart[0])
    w, b, v = weights[0].double(), biases[0].double(), biases[1].double()
    _, expected = torch.func.jvp(
        lambda w: qdp.torch.encode(x.double(), N, case.encoding, weight=w, bias=b), (w,), (v,)
    )
    scale = float(expected.abs().max())
    torch.testing.assert_close(slope, expected.to(slope), rtol=0, atol=1e-6 * scale)


def test_maps_of_amplitudes_do_not_overflow(device: str) -> None:
    x = torch.tensor([[300.0, 2.0]], device=device).half()
    weight = torch.tensor([300.0, 1.0], device=device).half()
    expected = qdp.torch.encode(x.float() * weight.float(), 1)
    assert torch.equal(qdp.torch.encode(x, 1, weight=weight), expected)


def test_mapped_maps_are_checked(device: str) -> None:
    x = torch.rand(2, N, device=device)
    weights = torch.rand(4, N, device=device)

    def each(weights: Any, encoding: str = "angle") -> Any:
        return torch.func.vmap(lambda w: qdp.torch.encode(x, N, encoding, weight=w))(weights)

    assert each(weights).shape == (4, 2, 2**N)
    for wrong in (weights[:, :1], weights[:, None], weights[:, 0]):
        with pytest.raises(qdp.ShapeError, match="weight"):
            each(wrong)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(qdp.DTypeError, match="weight"):
            each(weights.to(dtype))
    with pytest.raises(qdp.InvalidArgumentError, match="weight"):
        each(weights, "basis")
    with pytest.raises(qdp.DTypeError, match="weight"):
        qdp.torch.encode(x, 2, weight=weights[0].int())


@each
def test_autocast_narrows_no_derivative(case: Any, device: str) -> None:
    x = torch.from_numpy(case.samples(N, batch=2)).to(device, torch.float32)

    def states(x: Any) -> Any:
        return qdp.torch.encode(x, N, case.encoding)

    def derivatives() -> Any:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(total(states(leaf)), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return *torch.func.jvp(states, (x,), (x,)), second

    expected = derivatives()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            found = derivatives()
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("recorded", [False, True])
def test_traced_by_jit(recorded: bool, device: str) -> None:
    """The operator, and no constant."""
    x = torch.rand(2, N, device=device, requires_grad=recorded)
    model = qdp.torch.ZZFeatureMap(N, affine=True, device=device)
    torch.nn.init.normal_(model.get_parameter("weight"))
    pairs = [(0, 1), (2, 0)]
    functions: tuple[Any, ...] = (
        lambda x: qdp.torch.encode(x, N, "angle").abs(),
        lambda x: qdp.torch.encode(x, N, "zz", entanglement=pairs).abs(),
        model,
    )
    for f in functions:
        traced = torch.jit.trace(f, x)
        assert "qdp::encode" in str(traced.graph)
        other = torch.rand(2, N, device=device)
        torch.testing.assert_close(traced(other), f(other))


@pytest.mark.parametrize("recorded", [False, True])
def test_entanglement_is_read_once(recorded: bool, device: str) -> None:
    x = torch.rand(2, N, device=device, requires_grad=recorded)

    def encode(entanglement: Any) -> Any:
        return qdp.torch.encode(x, N, "zz", entanglement=entanglement)

    expected = encode([(0, 1), (1, 2)])
    assert not torch.equal(expected, encode([]))
    for same in (((k, k + 1) for k in range(2)), np.array([[0, 1], [1, 2]]), "linear"):
        assert torch.equal(encode(same), expected)
    others: tuple[Any, ...] = (((k, k + 1) for k in range(2)), np.array([[0, 1], [1, 2]]))
    for same in others:
        model = qdp.torch.ZZFeatureMap(N, entanglement=same)
        assert repr(model) == "ZZFeatureMap(num_qubits=3, entanglement=[(0, 1), (1, 2)])"
        for _ in range(2):
            assert torch.equal(model(x), expected)


def test_entanglement_in_compiled_code(device: str) -> None:
    x = torch.rand(2, N, device=device)
    pairs = [(0, 1), (1, 2)]
    encode: Any = qdp.torch.encode
    expected = encode(x, N, "zz", entanglement=pairs)

    def as_array(x: Any) -> Any:
        return encode(x * 1, N, "zz", entanglement=np.array(pairs))

    def as_iterator(x: Any) -> Any:
        return encode(x * 1, N, "zz", entanglement=(pair for pair in pairs))

    for f in (as_array, as_iterator):
        found = torch.compile(f, backend="aot_eager")(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
