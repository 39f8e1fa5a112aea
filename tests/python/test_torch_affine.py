"""The scale and shift of features that the encode applies, against torch's own operations."""

# torch's dispatch modes have no types.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, Case

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE  # noqa: E402
from qdp._qdp import encode_backward  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

# torch's own code for compilation and forward mode warns of what torch itself has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SMOOTH = [case for case in CASES if case.encoding != "basis"]
FUSED = [case for case in SMOOTH if case.encoding != "amplitude"]
EACH = list({case.encoding: case for case in reversed(FUSED)}.values())
smooth = pytest.mark.parametrize("case", SMOOTH, ids=str)
fused = pytest.mark.parametrize("case", FUSED, ids=str)
each = pytest.mark.parametrize("case", EACH, ids=str)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
N = 3


def data(
    case: Case, n: int, batch: int, device: str, dtype: Any = torch.float64
) -> tuple[Any, Any, Any]:
    """Samples, weight and bias; two values of none are alike."""
    x = torch.from_numpy(case.samples(n, batch=batch))
    generator = torch.Generator().manual_seed(n)
    weight, bias = (
        torch.rand(x.shape[1], generator=generator, dtype=torch.float64) + shift
        for shift in (0.5, -0.5)
    )
    x = x.to(dtype.to_complex()) if x.is_complex() else x.to(dtype)
    return x.to(device), weight.to(device, dtype), bias.to(device, dtype)


def random_like(states: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(states.shape, generator=generator, dtype=torch.complex128)
    return values.to(states.device, states.dtype)


def loss(states: Any) -> Any:
    return (states * random_like(states)).abs().square().sum()


@smooth
@pytest.mark.parametrize("convention", reference.CONVENTIONS)
def test_is_the_map_and_the_encoding(case: Case, convention: Any, device: str) -> None:
    for n in (1, 2, 5, 11):
        options = {"convention": convention, **case.options(n)}
        x, weight, bias = data(case, n, 3, device)
        for w, b in ((weight, bias), (weight, None), (None, bias)):
            moved = x if w is None else x * w
            moved = moved if b is None else moved + b
            states = qdp.torch.encode(x, n, case.encoding, weight=w, bias=b, **options)
            expected = qdp.torch.encode(moved, n, case.encoding, **options)
            torch.testing.assert_close(states, expected, rtol=0, atol=1e-11)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gpu_equals_cpu(case: Case, dtype: Any) -> None:
    """Every form's kernels: whole states, tiles, and gradients of each."""
    for n in (3, 9, 13):
        options = case.options(n)
        x, weight, bias = data(case, n, 3, "cpu", dtype)
        states = qdp.torch.encode(x, n, case.encoding, weight=weight, bias=bias, **options)
        on_gpu = [tensor.to(DEVICE) for tensor in (x, weight, bias)]
        mine, w, b = on_gpu
        found = qdp.torch.encode(mine, n, case.encoding, weight=w, bias=b, **options)
        moved = (x * weight + bias).double().numpy()
        phase = 1 + reference.phase_bound(moved, n, case.encoding, **options)
        eps = float(torch.finfo(dtype).eps)
        assert float((found.cpu() - states).abs().max()) <= 8 * eps * phase
        g = random_like(states)
        want = encode_backward(g, x, n, case.encoding, weight=weight, bias=bias, **options)
        got = encode_backward(g.to(DEVICE), mine, n, case.encoding, weight=w, bias=b, **options)
        scale = float(g.abs().sum(1).max()) * float(states.abs().max())
        assert float((got.cpu() - want).abs().max()) <= 8 * eps * phase * scale * n


@smooth
def test_finite_differences(case: Case, device: str) -> None:
    for n in (1, 2, 3):
        options = case.options(n)

        def encode(x: Any, weight: Any, bias: Any, n: int = n, options: Any = options) -> Any:
            return qdp.torch.encode(x, n, case.encoding, weight=weight, bias=bias, **options)

        tensors = tuple(tensor.requires_grad_() for tensor in data(case, n, 2, device))
        assert torch.autograd.gradcheck(encode, tensors)
        for alone in range(3):
            given = [tensor.detach() for tensor in tensors]
            given[alone].requires_grad_()
            assert torch.autograd.gradcheck(encode, tuple(given))


@each
def test_second_derivatives(case: Case, device: str) -> None:
    def encode(x: Any, weight: Any, bias: Any) -> Any:
        return qdp.torch.encode(x, 2, case.encoding, weight=weight, bias=bias)

    tensors = tuple(tensor.requires_grad_() for tensor in data(case, 2, 2, device))
    assert torch.autograd.gradgradcheck(encode, tensors)


@each
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("of_map", FLOATS, ids=str)
def test_types(case: Case, dtype: Any, of_map: Any, device: str) -> None:
    """States as of the sum's type, each gradient of its tensor's."""
    x, weight, bias = data(case, N, 4, device)
    tensors = [x.to(dtype), weight.to(of_map), bias.to(torch.float32)]
    for tensor in tensors:
        tensor.requires_grad_()
    x, weight, bias = tensors
    states = qdp.torch.encode(x, N, case.encoding, weight=weight, bias=bias)
    assert states.dtype == qdp.torch.encode(x * weight + bias, N, case.encoding).dtype
    (exact_x, exact_weight, exact_bias) = (t.detach().double().requires_grad_() for t in tensors)
    exact = qdp.torch.encode(exact_x * exact_weight + exact_bias, N, case.encoding)
    double = states.dtype == torch.complex128
    bound = 1e-12 if double else 2e-4
    torch.testing.assert_close(states.to(exact), exact, rtol=0, atol=bound)
    given = torch.autograd.grad(loss(states), tensors)
    wanted = torch.autograd.grad(loss(exact), (exact_x, exact_weight, exact_bias))
    for gradient, expected, tensor in zip(given, wanted, tensors, strict=True):
        assert gradient.dtype == tensor.dtype
        # Rounded once, to the tensor's own type.
        rounding = float(torch.finfo(tensor.dtype).eps) * float(expected.abs().max())
        limit = rounding + 100 * bound * (1 + float(expected.abs().max()))
        assert float((gradient.double() - expected).abs().max()) <= limit


def test_integers_are_mapped(device: str) -> None:
    x = torch.arange(12, device=device).reshape(3, 4)
    weight = torch.full((4,), 0.1, device=device, requires_grad=True)
    states = qdp.torch.encode(x, 4, "angle", weight=weight)
    assert states.dtype == torch.complex64
    (given,) = torch.autograd.grad(loss(states), weight)
    (expected,) = torch.autograd.grad(loss(qdp.torch.encode(x * weight, 4, "angle")), weight)
    torch.testing.assert_close(given, expected)


def test_strides_one_sample_and_none(device: str) -> None:
    base = torch.rand(6, 8, device=device, dtype=torch.float64)
    rows = torch.rand(4, 8, device=device, dtype=torch.float64)
    for weight, bias in ((rows[0], rows[1]), (rows.T[:, 2], rows.T[:, 3])):
        one = torch.ones(1, device=device, dtype=torch.float64).expand(8)
        for view in (base[0], base[::2], base.flip(0), base[:0], base[1].expand(3, 8)):
            for b in (bias, one):
                tensors = tuple(t.detach().requires_grad_() for t in (view, weight, b))
                x, w, shift = tensors
                result = qdp.torch.encode(x, 8, "phase", weight=w, bias=shift)
                expected = qdp.torch.encode(x * w + shift, 8, "phase")
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
                given = torch.autograd.grad(loss(result), tensors)
                wanted = torch.autograd.grad(loss(expected), tensors)
                torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.sanitize
@each
def test_backward_is_by_mapped_features(case: Case, device: str) -> None:
    x, weight, bias = data(case, N, 4, device)
    encoding = case.encoding
    g = random_like(torch.empty(4, 2**N, dtype=torch.complex128, device=device))
    moved = x * weight + bias
    states = qdp.torch.encode(x, N, encoding, weight=weight, bias=bias)
    torch.testing.assert_close(states, qdp.torch.encode(moved, N, encoding), rtol=0, atol=1e-12)
    given = encode_backward(g, x, N, encoding, weight=weight, bias=bias)
    expected = encode_backward(g, moved, N, encoding)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-11)


def test_out_and_what_is_not_recorded(device: str) -> None:
    x, weight, bias = data(EACH[0], N, 4, device)
    encoding = EACH[0].encoding
    expected = qdp.torch.encode(x, N, encoding, weight=weight, bias=bias)
    out = torch.empty_like(expected)
    assert qdp.torch.encode(x, N, encoding, weight=weight, bias=bias, out=out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        qdp.torch.encode(x, N, encoding, weight=weight, out=out)
    with torch.no_grad():
        assert not qdp.torch.encode(x, N, encoding, weight=weight).requires_grad
    assert qdp.torch.encode(x, N, encoding, weight=weight).requires_grad
    narrow = qdp.torch.encode(x, N, encoding, weight=weight.detach(), precision="complex64")
    assert narrow.dtype == torch.complex64


def test_refusals(device: str) -> None:
    x = torch.rand(3, 4, device=device)
    weight = torch.ones(4, device=device)

    def encode(encoding: str = "angle", **options: Any) -> Any:
        return qdp.torch.encode(x, 4, encoding, **options)

    for name in ("weight", "bias"):
        with pytest.raises(qdp.ShapeError, match=name):
            encode(**{name: weight[:3]})
        with pytest.raises(qdp.ShapeError, match=name):
            encode(**{name: weight[None]})
        with pytest.raises(qdp.DTypeError, match=name):
            encode(**{name: weight.int()})
        with pytest.raises(qdp.DTypeError, match=name):
            encode(**{name: weight.to(torch.complex64)})
        values: Any = [1.0] * 4
        with pytest.raises(qdp.DTypeError, match=name):
            encode(**{name: values})
        with pytest.raises(qdp.InvalidArgumentError, match=name):
            encode("basis", **{name: weight})
        with pytest.raises(qdp.ShapeError, match=name):
            encode("amplitude", **{name: weight[:3]})
        with pytest.raises(qdp.InvalidArgumentError, match=name):
            encode_backward(
                torch.ones(3, 16, device=device, dtype=torch.complex64), x, 4, **{name: weight}
            )
    values = np.zeros((3, 4))
    with pytest.raises(qdp.DTypeError, match="weight"):
        qdp.torch.encode(values, 4, "angle", weight=weight)
    if device != "cpu":
        with pytest.raises(qdp.DeviceMismatchError, match="weight"):
            encode(weight=weight.cpu())


@pytest.mark.parametrize("given", [[1.0] * 4, np.ones(4), 1.0], ids=["list", "array", "number"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_maps_are_tensors(name: str, given: Any, device: str) -> None:
    """Whatever is torch's to know of."""
    x = torch.rand(3, 4, device=device)
    other = {"weight": "bias", "bias": "weight"}[name]

    def total(x: Any, values: Any = None) -> Any:
        return qdp.torch.encode(x, 4, "angle", **{name: given, other: values}).real.sum()

    calls: list[Callable[[], Any]] = [
        lambda: total(x),
        lambda: total(x.clone().requires_grad_()),
        lambda: total(x, torch.ones(4, device=device, requires_grad=True)),
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.vmap(total)(x),
    ]
    for call in calls:
        with pytest.raises(qdp.DTypeError, match=f"{name}: expected .*tensor") as raised:
            call()
        assert (raised.value.argument, raised.value.got) == (name, type(given).__name__)


def test_bad_values_are_told_of(device: str) -> None:
    x = torch.ones(3, 4, device=device)
    bias = torch.tensor([0, 0, float("inf"), 0], device=device)
    with pytest.raises(qdp.NonFiniteError) as raised:
        qdp.torch.encode(x, 4, "phase", bias=bias, validate="now")
    assert (raised.value.sample, raised.value.position) == (0, 2)
    g = torch.ones(3, 16, device=device, dtype=torch.complex64)
    assert encode_backward(g, x, 4, "phase", bias=bias).isnan().all()


@each
def test_opcheck(case: Case, device: str) -> None:
    tensors = data(case, N, 3, device)
    options = {"num_qubits": N, "encoding": case.encoding}
    states = torch.ops.qdp.encode(*tensors, **options)
    recorded = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    x, weight, bias = recorded
    for given in (tensors, recorded, (x, weight), (x, None, bias), (*tensors[:2], bias)):
        torch.library.opcheck(torch.ops.qdp.encode.default, given, options)
        if len(given) == 3:
            torch.library.opcheck(torch.ops.qdp.encode_backward.default, (states, *given), options)


@pytest.mark.parametrize("case", [*EACH, Case("amplitude")], ids=str)
def test_compiles_whole(case: Case, device: str) -> None:
    def model(x: Any, weight: Any, bias: Any) -> Any:
        states = qdp.torch.encode(x * 1.0, N, case.encoding, weight=weight, bias=bias)
        return (states * states.conj().flip(1)).real.sum() + states.imag.sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 3):
        tensors = tuple(t.requires_grad_() for t in data(case, N, batch, device))
        torch.testing.assert_close(compiled(*tensors), model(*tensors))
        actual = torch.autograd.grad(compiled(*tensors), tensors)
        expected = torch.autograd.grad(model(*tensors), tensors)
        torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("case", [*EACH, Case("amplitude")], ids=str)
def test_function_transforms(case: Case, device: str) -> None:
    x, weight, bias = data(case, N, 4, device)

    def encode(x: Any, weight: Any, bias: Any) -> Any:
        return qdp.torch.encode(x, N, case.encoding, weight=weight, bias=bias)

    def total(*tensors: Any) -> Any:
        states = encode(*tensors)
        return (states * states.conj().flip(1)).real.sum() + states.imag.sum()

    states = encode(x, weight, bias)
    shared = torch.func.vmap(encode, in_dims=(0, None, None))(x, weight, bias)
    torch.testing.assert_close(shared[:, 0], states)
    # Models of one architecture, as torch.func.stack_module_state makes them.
    weights = torch.stack([weight, -weight, 2 * weight], dim=1)
    own = torch.func.vmap(encode, in_dims=(None, 1, None))(x, weights, bias)
    for k in range(3):
        torch.testing.assert_close(own[k], encode(x, weights[:, k], bias))
    slopes = torch.func.vmap(torch.func.grad(total, argnums=(0, 1, 2)), in_dims=(None, 1, None))
    for k, given in enumerate(zip(*slopes(x, weights, bias), strict=True)):
        recorded = [t.detach().requires_grad_() for t in (x, weights[:, k], bias)]
        expected = torch.autograd.grad(total(*recorded), recorded)
        torch.testing.assert_close(given, expected)
    forward = torch.func.jacfwd(lambda w: encode(x, w, bias).real)(weight)
    reverse = torch.func.jacrev(lambda w: encode(x, w, bias).real)(weight)
    torch.testing.assert_close(forward, reverse)
    hessian = torch.func.hessian(lambda w: total(x, w, bias))(weight)
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.abs().sum() > 0


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow: Any, device: str) -> None:
    layer = torch.nn.Linear(N, N, device=device)
    encoding = qdp.torch.ZZFeatureMap(N, affine=True, device=device)
    with torch.autocast(torch.device(device).type, dtype=narrow):
        states = encoding(layer(torch.rand(3, N, device=device)))
    assert states.dtype == torch.complex64
    loss(states).backward()
    for parameter in (*layer.parameters(), *encoding.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_module_passes_its_parameters(device: str) -> None:
    """One operator, and no other that maps."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen: list[Any]

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(f)
            return f(*args, **(kwargs or {}))

    model = qdp.torch.AngleEncoding(N, affine=True, device=device)
    x = torch.rand(2, N, device=device)
    with torch.no_grad(), Watch() as watch:
        watch.seen = []
        model(x)
    assert watch.seen == [torch.ops.qdp.encode.default]


@pytest.mark.gpu
@each
def test_captured(case: Case) -> None:
    """In a graph of torch's, replayed on other samples and another map."""
    for n in (5, 13):
        x, weight, bias = (t.requires_grad_() for t in data(case, n, 4, DEVICE, torch.float32))

        def step(n: int = n, x: Any = x, weight: Any = weight, bias: Any = bias) -> Any:
            states = qdp.torch.encode(x, n, case.encoding, weight=weight, bias=bias)
            total = states.real.sum() + (states.imag[:, :2] ** 2).sum()
            return states, torch.autograd.grad(total, (x, weight, bias))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states, gradients = step()
        with torch.no_grad():
            x.copy_(x.flip(0))
            weight.mul_(0.7)
            bias.add_(0.1)
        graph.replay()
        expected, wanted = step()
        torch.testing.assert_close(states, expected, rtol=0, atol=0)
        torch.testing.assert_close(gradients, wanted)
