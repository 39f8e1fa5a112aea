"""qdp.gram: fidelity matrices."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, Case

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
