"""qdp.gram: fidelity matrices."""

from __future__ import annotations

import operator
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, Case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BY_ENCODING = {case.encoding: case for case in reversed(CASES)}
cases = pytest.mark.parametrize("case", CASES, ids=str)
# Sizes that leave blocks of every shape behind: many small ones, some, and one.
TILES = (200, 5000, None)


def expected(case: Case, n: int, x: Any, y: Any, **options: Any) -> Any:
    a = reference.encode(x, n, case.encoding, **options)
    b = reference.encode(y, n, case.encoding, **options)
    return np.abs(a @ b.conj().T) ** 2


def keywords(case: Case, n: int) -> dict[str, Any]:
    """Arguments for n qubits; where features do not say n, it is named."""
    named = {"num_qubits": n} if case.encoding in ("amplitude", "basis") else {}
    return {"encoding": case.encoding, **named, **case.options(n)}


def pair(case: Case, n: int) -> tuple[Any, Any]:
    """Samples and others, of which one is the same."""
    both = case.samples(n, batch=12)
    return both[:5], np.concatenate([both[5:], both[:1]])


@cases
@pytest.mark.parametrize("convention", reference.CONVENTIONS)
@pytest.mark.parametrize("tile", TILES)
def test_equals_the_states(case: Case, convention: Any, tile: Any) -> None:
    for n in (1, 2, 3, 6):
        x, y = pair(case, n)
        options = {**keywords(case, n), "convention": convention}
        want = {"convention": convention, **case.options(n)}
        result = qdp.gram(x, y, tile=tile, **options)
        assert type(result) is np.ndarray
        assert (result.dtype, result.shape) == (np.float64, (5, 8))
        np.testing.assert_allclose(result, expected(case, n, x, y, **want), rtol=0, atol=1e-12)
        alone = qdp.gram(y, tile=tile, **options)
        np.testing.assert_allclose(alone, expected(case, n, y, y, **want), rtol=0, atol=1e-12)
        np.testing.assert_allclose(alone, alone.T, rtol=0, atol=1e-14)
        np.testing.assert_allclose(np.diag(alone), 1, rtol=0, atol=1e-12)


@cases
@pytest.mark.parametrize("tile", TILES)
def test_tensors(case: Case, tile: Any, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    for n in (1, 3, 7):
        x, y = pair(case, n)
        options = keywords(case, n)
        for precision in ("complex64", "complex128"):
            a, b = (torch.from_numpy(case.cast(data, precision)).to(device) for data in (x, y))
            want = expected(case, n, x, y, **case.options(n))
            result = qdp.gram(a, b, tile=tile, **options)
            assert result.device == a.device
            assert result.dtype == (torch.float32 if precision == "complex64" else torch.float64)
            eps = float(np.finfo(precision).eps)
            phase = reference.phase_bound(
                np.concatenate([x, y]), n, case.encoding, **case.options(n)
            )
            bound = eps * 16 * (1 + phase)
            np.testing.assert_allclose(result.cpu(), want, rtol=0, atol=bound)
            alone = qdp.gram(b, tile=tile, **options)
            want = expected(case, n, y, y, **case.options(n))
            np.testing.assert_allclose(alone.cpu(), want, rtol=0, atol=bound)
            torch.testing.assert_close(alone, alone.T, rtol=0, atol=4 * eps)


@cases
@pytest.mark.parametrize("tile", [300, None])
def test_gradients(case: Case, tile: Any, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    import qdp.torch

    for n in (1, 2, 4):
        x, y = (torch.from_numpy(data[:4]).to(device).requires_grad_() for data in pair(case, n))
        options = keywords(case, n)
        if case.encoding == "basis":
            with pytest.raises(qdp.InvalidArgumentError, match="basis"):
                qdp.gram(x, y, tile=tile, **options)
            continue
        weight = torch.rand(4, 4, device=device, dtype=torch.float64)
        actual = torch.autograd.grad(qdp.gram(x, y, tile=tile, **options), (x, y), weight)
        alone = torch.autograd.grad(qdp.gram(x, tile=tile, **options), x, weight)

        def states(data: Any, n: int = n) -> Any:
            return qdp.torch.encode(data, n, case.encoding, **case.options(n))

        whole = (states(x) @ states(y).mH).abs() ** 2
        same = (states(x) @ states(x).mH).abs() ** 2
        want = torch.autograd.grad(whole, (x, y), weight)
        torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            alone, torch.autograd.grad(same, (x,), weight), rtol=1e-9, atol=1e-11
        )
        if n == 2:
            assert torch.autograd.gradcheck(
                lambda a, b, o=options: qdp.gram(a, b, tile=tile, **o), (x, y)
            )
        # By one of the two alone.
        (only,) = torch.autograd.grad(qdp.gram(x, y.detach(), tile=tile, **options), x, weight)
        torch.testing.assert_close(only, want[0], rtol=1e-9, atol=1e-11)
        (only,) = torch.autograd.grad(qdp.gram(x.detach(), y, tile=tile, **options), y, weight)
        torch.testing.assert_close(only, want[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile", [300, None])
@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_batched_gradients(encoding: str, tile: Any, device: str) -> None:
    """Many of one matrix, mapped over together, and of its gradient."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(5, 3, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.rand(4, 3, device=device, dtype=torch.float64, requires_grad=True)

    def gram(*samples: Any) -> Any:
        return qdp.gram(*samples, encoding=encoding, tile=tile)

    def one_by_one(result: Any, of: Any, weights: Any) -> Any:
        every = (torch.autograd.grad(result, of, w, retain_graph=True) for w in weights)
        return tuple(map(torch.stack, zip(*every, strict=True)))

    for samples in ((x,), (x, y)):
        matrix = gram(*samples)
        weights = torch.rand(2, *matrix.shape, device=device, dtype=torch.float64)
        want = one_by_one(matrix, samples, weights)
        for again in (False, True):
            found = torch.autograd.grad(
                matrix,
                samples,
                weights,
                is_grads_batched=True,
                retain_graph=True,
                create_graph=again,
            )
            torch.testing.assert_close(found, want)
        weights = torch.rand(2, *found[0].shape, device=device, dtype=torch.float64)
        want = one_by_one(found[0], x, weights)
        second = torch.autograd.grad(found[0], x, weights, is_grads_batched=True)
        torch.testing.assert_close(second, want)
    samples = (x[:2].detach(), y[:2].detach())
    for derivative, f in (
        (torch.autograd.functional.jacobian, gram),
        (torch.autograd.functional.hessian, lambda *samples: gram(*samples).square().sum()),
    ):
        found = derivative(f, samples, vectorize=True)
        torch.testing.assert_close(found, derivative(f, samples))
    assert torch.autograd.gradcheck(gram, (x,), check_batched_grad=True)


def test_hooks_on_saved_tensors(device: str) -> None:
    """They change no second derivative."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 2, device=device, dtype=torch.float64, requires_grad=True)

    def second() -> Any:
        matrix = qdp.gram(x, encoding="zz")
        (first,) = torch.autograd.grad(matrix.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    want = second()
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(second(), want)


@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_second_derivatives(encoding: str, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 2, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.rand(2, 2, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a: qdp.gram(a, encoding=encoding), (x,))
    assert torch.autograd.gradgradcheck(lambda a, b: qdp.gram(a, b, encoding=encoding), (x, y))
    assert torch.autograd.gradgradcheck(lambda b: qdp.gram(x.detach(), b, encoding=encoding), (y,))


@pytest.mark.parametrize(
    ("given", "precision", "result"),
    [
        (np.float32, None, np.float32),
        (np.float16, None, np.float32),
        (np.int8, None, np.float32),
        (np.int32, None, np.float32),
        (np.int64, None, np.float64),
        (np.float64, None, np.float64),
        (np.complex64, None, np.float32),
        (np.complex128, None, np.float64),
        (np.float64, "complex64", np.float32),
        (np.float32, "complex128", np.float64),
    ],
)
def test_precision(given: Any, precision: Any, result: Any) -> None:
    x = np.arange(1, 13).reshape(3, 4).astype(given)
    found = qdp.gram(x, encoding="amplitude", precision=precision)
    assert found.dtype == result
    want = expected(Case("amplitude"), 2, x, x)
    np.testing.assert_allclose(found, want, rtol=0, atol=20 * np.finfo(result).eps)


@pytest.mark.parametrize(
    ("one", "other", "result"),
    [
        ("float32", "int32", "float32"),
        ("float16", "int32", "float32"),
        ("complex64", "int32", "float32"),
        ("float32", "int64", "float64"),
        ("int32", "float64", "float64"),
    ],
)
def test_precision_of_two(one: str, other: str, result: str) -> None:
    """Double where the states of either are, of arrays and of tensors."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = np.arange(1, 13).reshape(3, 4)
    a, b = x.astype(one), x.astype(other)
    for first, second in ((a, b), (b, a)):
        assert qdp.gram(first, second).dtype == result
        tensors = torch.from_numpy(first), torch.from_numpy(second)
        assert qdp.gram(*tensors).dtype == getattr(torch, result)


def test_whatever_numpy_takes() -> None:
    x = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    want = qdp.gram(np.array(x), encoding="phase")
    np.testing.assert_array_equal(qdp.gram(x, encoding="phase"), want)
    row = qdp.gram(x[0], x, encoding="phase")
    np.testing.assert_allclose(row, want[:1], rtol=1e-14)
    wide = np.zeros((6, 4))
    wide[::2, ::2] = x
    strided = qdp.gram(wide[::2, ::2], encoding="phase")
    np.testing.assert_array_equal(strided, want)


def test_empty(device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = np.ones((3, 2))
    assert qdp.gram(x[:0], x, encoding="angle").shape == (0, 3)
    assert qdp.gram(x, x[:0], encoding="zz").shape == (3, 0)
    assert qdp.gram(x[:0], encoding="amplitude").shape == (0, 0)
    t = torch.ones(3, 2, device=device, requires_grad=True)
    result = qdp.gram(t, t[:0], encoding="angle")
    assert result.shape == (3, 0)
    result.sum().backward()
    assert not t.grad.any()


def test_large_basis_indices() -> None:
    """Those that single precision does not tell apart."""
    x = np.array([[2**40], [2**40 + 1], [7]])
    np.testing.assert_array_equal(qdp.gram(x, encoding="basis"), np.eye(3))
    assert qdp.gram(x.astype(np.int32), encoding="basis", num_qubits=30).dtype == np.float32
    bits = np.array([[0, 1, 1] * 12, [0, 1, 0] * 12])
    np.testing.assert_array_equal(qdp.gram(bits, encoding="basis"), np.eye(2))


def test_many_qubits() -> None:
    """Far more than any state has room for."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(0, 0.2, size=(2, 6, 45))
    want = np.prod(np.cos(x[:, None] - y[None]) ** 2, axis=2)
    np.testing.assert_allclose(qdp.gram(x, y, encoding="angle"), want, rtol=1e-12)


@pytest.mark.parametrize("tile", TILES)
def test_out(tile: Any, tmp_path: Any, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(7, 5))
    for encoding in ("angle", "zz"):
        want = qdp.gram(x, y, encoding=encoding)
        mapped = np.memmap(tmp_path / encoding, np.float64, "w+", shape=(9, 7))
        assert qdp.gram(x, y, encoding=encoding, tile=tile, out=mapped) is mapped
        np.testing.assert_allclose(mapped, want, rtol=0, atol=1e-14)
        a, b = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        for place in (device, "cpu"):
            out = torch.full((9, 14), torch.nan, dtype=torch.float64, device=place)[:, ::2]
            assert qdp.gram(a, b, encoding=encoding, tile=tile, out=out) is out
            np.testing.assert_allclose(out.cpu(), want, rtol=0, atol=1e-13)
        alone = torch.full((9, 9), torch.nan, dtype=torch.float64)
        qdp.gram(a, encoding=encoding, tile=tile, out=alone)
        np.testing.assert_allclose(alone, qdp.gram(x, encoding=encoding), rtol=0, atol=1e-13)


def test_out_without_values() -> None:
    """As where torch traces a program."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = torch.empty(5, 5)
        assert qdp.gram(torch.empty(5, 3), encoding="zz", out=out) is out


@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_gradients_of_batched_gradients(encoding: str, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    many = torch.rand(4, 3, 3, dtype=torch.float64, device=device)

    def derivatives(*, batched: bool) -> list[Any]:
        result = qdp.gram(x, encoding=encoding)

        def gradient(weights: Any) -> Any:
            options = {"create_graph": True, "is_grads_batched": batched}
            return torch.autograd.grad(result, x, weights, **options)[0]

        first = gradient(many) if batched else torch.stack([gradient(w) for w in many])
        return [first, *torch.autograd.grad(first.square().sum(), x)]

    torch.testing.assert_close(derivatives(batched=True), derivatives(batched=False))


def test_out_is_apart_from_the_samples(device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    memory = np.random.default_rng(7).normal(size=100)
    for whole in (memory, torch.from_numpy(memory).to(device)):
        x, y = whole[:20].reshape(5, 4), whole[20:40].reshape(5, 4)
        for out, name in ((whole[19:44].reshape(5, 5), "x"), (whole[39:64].reshape(5, 5), "y")):
            with pytest.raises(qdp.InvalidArgumentError, match=f"apart from {name}'s") as raised:
                qdp.gram(x, y, encoding="angle", out=out)
            error = raised.value
            assert (error.argument, error.got) == ("out", "an overlap")
        square = whole[:25].reshape(5, 5)
        with pytest.raises(qdp.InvalidArgumentError, match="apart from x's"):
            qdp.gram(square, out=square)
        with pytest.raises(qdp.InvalidArgumentError, match="apart from x's"):
            qdp.gram(square.T, encoding="angle", out=square)
        # Columns of one matrix have no byte in common.
        columns = whole.reshape(10, 10)[5:]
        again = qdp.gram(columns[:, :4], encoding="angle")
        beside = qdp.gram(columns[:, :4], encoding="angle", out=columns[:, 5:])
        assert beside.tolist() == again.tolist()
        with pytest.raises(qdp.InvalidArgumentError, match="apart from x's"):
            qdp.gram(columns[:, :4], encoding="angle", out=columns[:, 3:8])
        want = qdp.gram(x, y, encoding="angle")
        beside = qdp.gram(x, y, encoding="angle", out=whole[40:65].reshape(5, 5))
        assert beside.tolist() == want.tolist()
        # No samples are nowhere.
        assert qdp.gram(x[:0], encoding="angle", out=whole[:0].reshape(0, 0)).shape == (0, 0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_blocks(symmetric: bool, tile: Any, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(11, 4)), None if symmetric else rng.normal(size=(6, 4))
    tensors = [None if data is None else torch.from_numpy(data).to(device) for data in (x, y)]
    for encoding in ("phase", "iqp-embedding"):
        want = qdp.gram(x, y, encoding=encoding)
        for samples in ((x, y), tensors):
            found = np.full_like(want, np.nan)
            for rows, columns, block in qdp.gram_blocks(*samples, encoding=encoding, tile=tile):
                assert np.isnan(found[rows, columns]).all()
                found[rows, columns] = block if samples[0] is x else block.cpu()
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("encoding", ["angle", "zz"])
def test_memory_is_bounded(encoding: str) -> None:
    """Beside the result: neither all states, nor anything that grows with the pairs."""
    rng = np.random.default_rng(2)
    samples, n, tile = 700, 8, 1 << 20
    x = rng.normal(size=(samples, n))
    out = np.empty((samples, samples))
    qdp.gram(x[:2], encoding=encoding)
    tracemalloc.start()
    try:
        qdp.gram(x, encoding=encoding, tile=tile, out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out.nbytes > 3 * tile
    assert peak < 2 * tile


@pytest.fixture
def precisions() -> Iterator[Callable[[str], None]]:
    """Sets how torch may multiply float32, and puts it back."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    places = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]

    def choose(name: str) -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "bf16" else name
        torch.backends.mkldnn.matmul.fp32_precision = name

    yield choose
    for place, name in zip(places, before, strict=True):
        place.fp32_precision = name


def shortened(x: Any, bits: int) -> Any:
    """What a type that lacks the last bits of a float32 has in its place."""
    import torch

    rounded = (x.contiguous().view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)
    return rounded.view(torch.float32)


def short_products(name: str) -> Any:
    """A mode of torch's in which the host multiplies float32 as another type, where it may, as some
    hosts and all GPUs do. It records the settings that it finds.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.found: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            on_host = func is torch.ops.aten.mm.default and args[0].device.type == "cpu"
            if on_host and args[0].dtype == torch.float32:
                place = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
                self.found.append(place.fp32_precision)
                if place.fp32_precision == name:
                    args = [shortened(x, {"tf32": 13, "bf16": 16}[name]) for x in args]
            return func(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize("name", ["tf32", "bf16"])
@pytest.mark.parametrize("encoding", ["angle", "amplitude", "zz"])
def test_matrix_products_are_in_full_precision(
    encoding: str, name: str, device: str, precisions: Any
) -> None:
    """Neither autocast nor a lower precision of products that the process asked for reaches them,
    in gradients of any order; and the setting is the same throughout, as other threads see it.
    """
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(3)
    x, weight = rng.uniform(0.1, 1, size=(40, 6)), rng.normal(size=(40, 40))
    kind = torch.device(device).type

    def derivatives(dtype: Any) -> list[Any]:
        a = torch.from_numpy(x).to(device, dtype).requires_grad_()
        w = torch.from_numpy(weight).to(device, dtype)
        matrix = qdp.gram(a, encoding=encoding)
        (first,) = torch.autograd.grad(matrix, a, w)
        recorded = torch.autograd.grad(qdp.gram(a, encoding=encoding), a, w, create_graph=True)
        again = qdp.gram(a, encoding=encoding)
        batched = torch.autograd.grad(again, a, w[None], is_grads_batched=True)
        plain = qdp.gram(a.detach(), encoding=encoding)
        return [result.detach() for result in (plain, matrix, first, *recorded, *batched)]

    wanted = derivatives(torch.float64)
    mode = short_products(name)
    precisions(name)
    with torch.autocast(kind, dtype=torch.bfloat16), mode:
        found = derivatives(torch.float32)
    for result, want in zip(found, wanted, strict=True):
        scale = float(want.abs().max())
        assert float((result - want).abs().max()) < 5e-6 * scale
    assert set(mode.found) <= {name}
    assert mode.found or encoding == "zz" or kind == "cuda"


def test_second_derivatives_are_in_full_precision(device: str, precisions: Any) -> None:
    """Though they are computed long after the call."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(4)
    x = rng.uniform(0.1, 1, size=(20, 6))

    def second(dtype: Any) -> Any:
        a = torch.from_numpy(x).to(device, dtype).requires_grad_()
        matrix = qdp.gram(a)
        (first,) = torch.autograd.grad(matrix.pow(2).sum(), a, create_graph=True)
        with mode:
            return torch.autograd.grad(first.pow(2).sum(), a)[0]

    mode = short_products("tf32")
    want = second(torch.float64)
    precisions("tf32")
    found = second(torch.float32)
    assert float((found - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert set(mode.found) <= {"tf32"}


@pytest.mark.parametrize("place", ["cuda.matmul", "mkldnn.matmul", "all"])
def test_either_way_to_ask_for_less_precision(place: str, device: str, precisions: Any) -> None:
    """torch refuses to say its precision in the old way once it was set in the new one."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(5, 4, device=device)
    want = qdp.gram(x, encoding="angle")
    precisions("none")
    everywhere = torch.backends.fp32_precision
    try:
        if place == "all":
            torch.backends.fp32_precision = "tf32"
        else:
            operator.attrgetter(place)(torch.backends).fp32_precision = "tf32"
        torch.testing.assert_close(qdp.gram(x, encoding="angle"), want, rtol=0, atol=2e-6)
    finally:
        torch.backends.fp32_precision = everywhere


def test_factors_are_split_without_loss() -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    from qdp.torch.fidelity import PARTS, split

    for dtype in (torch.float32, torch.complex64):
        x = torch.randn(7, 5, dtype=dtype)
        for count, bits in PARTS.values():
            for data in (x, x.mH.contiguous().mH, x.T[1::2]):
                parts = split(data, count, bits)
                assert len(parts) == count
                assert torch.equal(
                    sum(part.to(torch.complex128) for part in parts), data.to(torch.complex128)
                )
                for part in parts[:-1]:
                    real = torch.view_as_real(part) if part.is_complex() else part
                    assert torch.equal(shortened(real, bits), real)


def test_positive_semidefinite() -> None:
    """What makes it a kernel."""
    for case in BY_ENCODING.values():
        x = case.samples(3, batch=30)
        matrix = qdp.gram(x, **keywords(case, 3))
        assert np.linalg.eigvalsh(matrix).min() > -1e-12


def test_errors() -> None:
    x = np.ones((3, 4))
    with pytest.raises(qdp.InvalidArgumentError, match="encoding"):
        qdp.gram(x, encoding="angles")
    with pytest.raises(qdp.InvalidArgumentError, match="reps"):
        qdp.gram(x, encoding="angle", reps=2)
    with pytest.raises(qdp.FeatureCountError):
        qdp.gram(x, encoding="iqp")
    with pytest.raises(qdp.FeatureCountError):
        qdp.gram(x, encoding="angle", num_qubits=3)
    with pytest.raises(qdp.FeatureCountError):
        qdp.gram(x, encoding="amplitude", num_qubits=1)
    with pytest.raises(qdp.InvalidArgumentError, match="num_qubits"):
        qdp.gram(x, encoding="angle", num_qubits=0)
    with pytest.raises(qdp.InvalidArgumentError, match="y: expected 4"):
        qdp.gram(x, x[:, :3], encoding="angle")
    with pytest.raises(qdp.ShapeError, match="y"):
        qdp.gram(x, x[None], encoding="angle")
    with pytest.raises(qdp.DTypeError):
        qdp.gram(np.array([["a"]]), encoding="angle")
    tile: Any
    for tile in (0, -1, "a", 2.5):
        with pytest.raises(qdp.InvalidArgumentError, match="tile"):
            qdp.gram(x, encoding="angle", tile=tile)
    precision: Any
    for precision in ("float64", "nonsense", "complex256"):
        with pytest.raises(qdp.InvalidArgumentError, match=r'precision: expected "complex64"'):
            qdp.gram(x, precision=precision)
    entanglement: Any
    for entanglement in (3, [0, 1], [(0, 1, 2)], ["ab"]):
        with pytest.raises(qdp.InvalidArgumentError, match="entanglement"):
            qdp.gram(x, encoding="zz", entanglement=entanglement)
    with pytest.raises(qdp.InvalidArgumentError, match="out: expected a ndarray"):
        qdp.gram(x, encoding="angle", out=np.empty((3, 3)).tolist())
    fixed = np.empty((3, 3))
    fixed.setflags(write=False)
    with pytest.raises(qdp.InvalidArgumentError, match="read-only"):
        qdp.gram(x, encoding="angle", out=fixed)
    with pytest.raises(qdp.ShapeError, match="out"):
        qdp.gram(x, encoding="angle", out=np.empty((3, 4)))
    with pytest.raises(qdp.DTypeError, match="out"):
        qdp.gram(x, encoding="angle", out=np.empty((3, 3), np.float32))
    with pytest.raises(qdp.BasisValueError):
        qdp.gram([[3.0], [0.5]], encoding="basis")
    with pytest.raises(qdp.BasisValueError):
        qdp.gram([[0.0, 2.0, 1.0]], encoding="basis")


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tensors", [False, True])
def test_bad_values_are_named(tensors: bool, tile: Any) -> None:
    """By their argument and their place among all its samples, whatever block they are in."""
    torch = pytest.importorskip("torch", exc_type=ImportError) if tensors else None
    good, bad = np.ones((9, 40)), np.ones((9, 40))
    bad[7, 33] = np.nan
    bits = np.zeros((9, 40))
    bits[7, 33] = 2
    for encoding, values, message in (
        ("angle", bad, "sample 7 holds NaN at position 33;"),
        ("zz", bad[:, 31:35], "sample 7 holds NaN at position 2;"),
        ("basis", bits, "sample 7 holds 2 at position 33;"),
        ("basis", good[:, :1] / 2, "sample 0 holds a value that is no index at position 0;"),
        (
            "basis",
            np.where(np.arange(9) == 5, -1.0, 1)[:, None],
            "sample 5 holds a value that is no index at position 0;",
        ),
        ("amplitude", good[:, :4] * (np.arange(9) != 6)[:, None], "sample 6 has zero norm"),
    ):
        others = np.ones_like(values)
        for name, arguments in (("x", [values]), ("x", [values, others]), ("y", [others, values])):
            given = arguments if torch is None else [torch.from_numpy(x) for x in arguments]
            with pytest.raises(qdp.InvalidDataError, match=f"^{name}: {message}") as caught:
                qdp.gram(*given, encoding=encoding, tile=tile)
            assert caught.value.sample == int(message.split()[1])
            if isinstance(caught.value, qdp.NonFiniteError | qdp.BasisValueError):
                assert f"at position {caught.value.position};" in str(caught.value)


@pytest.mark.parametrize("kind", ["iterator", "iterators", "array", "list", "tuple"])
def test_entanglement_is_read_once(kind: str, device: str) -> None:
    """It may be an iterator, and is looked at for every block."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    pairs = [(0, 1), (2, 1)]
    x = np.random.default_rng(5).uniform(size=(5, 3))
    a, b = (reference.encode(x, 3, encoding="zz", entanglement=e) for e in (pairs, "none"))
    want = np.abs(a @ a.conj().T) ** 2
    assert not np.allclose(want, np.abs(b @ b.conj().T) ** 2)
    for data in (x, torch.from_numpy(x).to(device)):
        given: Any = {
            "iterator": iter(pairs),
            "iterators": (iter(pair) for pair in pairs),
            "array": np.array(pairs),
            "list": [list(pair) for pair in pairs],
            "tuple": tuple(pairs),
        }[kind]
        found = qdp.gram(data, encoding="zz", entanglement=given, tile=300)
        np.testing.assert_allclose(found if data is x else found.cpu(), want, rtol=0, atol=1e-12)


def test_amplitudes_are_in_the_samples_dimensions(device: str) -> None:
    """However many zeros their states have behind: those of 40 qubits fit no memory."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = np.random.default_rng(6).normal(size=(6, 5))
    want = qdp.gram(x)
    for data in (x, torch.from_numpy(x).to(device)):
        found, short = (qdp.gram(data, num_qubits=n) for n in (40, None))
        np.testing.assert_array_equal(*(a if data is x else a.cpu() for a in (found, short)))
    np.testing.assert_allclose(want, expected(Case("amplitude"), 3, x, x), rtol=0, atol=1e-12)


# torch imports its own deprecated code for this.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_transforms_are_refused(device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(4, 3, device=device)

    def total(x: Any, y: Any = None) -> Any:
        return qdp.gram(x, y, encoding="angle").sum()

    transforms: list[Callable[[], Any]] = [
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.grad(lambda y: total(x, y))(x),
        lambda: torch.func.vmap(total)(x[None]),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.hessian(total)(x),
    ]
    for transformed in transforms:
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            transformed()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            total(dual)
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            next(qdp.gram_blocks(dual, encoding="angle"))
        # What is not differentiated is nobody else's matter.
        torch.testing.assert_close(total(x), total(x.clone()))
    # Nor do they go through its gradient.
    leaf = x.clone().requires_grad_()
    matrix = qdp.gram(leaf, encoding="angle")
    ones = torch.ones_like(matrix)
    (first,) = torch.autograd.grad(matrix, leaf, ones, create_graph=True)
    for result in (matrix, first):

        def pulled(cotangent: Any, result: Any = result) -> Any:
            return torch.autograd.grad(result, leaf, cotangent, retain_graph=True)[0]

        weight = torch.ones_like(result)
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            torch.func.vmap(pulled)(weight[None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(weight, weight)
            with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
                pulled(dual)
            batched = torch.autograd.grad(
                result, leaf, weight[None], is_grads_batched=True, retain_graph=True
            )
            torch.testing.assert_close(batched[0][0], pulled(weight))


def test_tensors_without_values() -> None:
    """They give the result's description, and that of its gradient."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 4, device="meta", requires_grad=True)
    y = torch.rand(2, 4, device="meta", dtype=torch.float64)
    for encoding in ("amplitude", "angle", "zz"):
        result = qdp.gram(x, y, encoding=encoding)
        assert (result.shape, result.dtype) == ((3, 2), torch.float64)
        assert result.is_meta
        (gradient,) = torch.autograd.grad(result.sum(), x)
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        assert gradient.is_meta
        out = torch.empty(3, 3, device="meta")
        assert qdp.gram(x.detach(), encoding=encoding, out=out) is out
    assert qdp.gram(x.detach()[:, :1], encoding="basis").shape == (3, 3)
    with pytest.raises(qdp.FeatureCountError):
        qdp.gram(x, encoding="angle", num_qubits=3)


def test_errors_of_tensors(device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.ones(3, 4, device=device)
    with pytest.raises(qdp.DTypeError, match="y: expected a tensor, as x is, got ndarray") as wrong:
        qdp.gram(x, np.ones((3, 4)), encoding="angle")
    assert (wrong.value.argument, wrong.value.got) == ("y", "ndarray")
    with pytest.raises(qdp.DTypeError, match="x: expected a tensor, as y is, got ndarray"):
        qdp.gram(np.ones((3, 4)), x, encoding="angle")
    with pytest.raises(qdp.DeviceMismatchError, match="y") as elsewhere:
        qdp.gram(x, torch.ones(3, 4, device="meta"), encoding="angle")
    assert (elsewhere.value.argument, elsewhere.value.got) == ("y", "one on meta")
    for sparse in (x.to_sparse(), x.to_sparse_coo().requires_grad_()):
        with pytest.raises(qdp.InvalidArgumentError, match="x: expected a dense tensor") as layout:
            qdp.gram(sparse, x)
        assert (layout.value.argument, layout.value.got) == ("x", "one of layout torch.sparse_coo")
        with pytest.raises(qdp.InvalidArgumentError, match="y: expected a dense tensor"):
            qdp.gram(x, sparse)
    with pytest.raises(qdp.InvalidArgumentError, match="out"):
        qdp.gram(x, encoding="angle", out=np.empty((3, 3), np.float32))
    out = torch.empty(3, 3, device=device)
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        qdp.gram(x.clone().requires_grad_(), encoding="angle", out=out)


@pytest.mark.gpu
def test_bad_values_on_a_gpu() -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    import qdp.torch
    from devices import DEVICE

    x = torch.ones(3, 4, device=DEVICE)
    x[1, 2] = torch.nan
    result = qdp.gram(x, encoding="angle")
    assert result[1].isnan().all()
    assert result[0, 0] == 1
    with pytest.raises(qdp.NonFiniteError):
        qdp.torch.check()
    index = torch.tensor([[3.0], [0.5], [3.0]], device=DEVICE)
    result = qdp.gram(index, encoding="basis", num_qubits=2)
    assert result[1].isnan().all()
    assert result[0, 2] == 1
