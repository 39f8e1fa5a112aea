"""Every way to be wrong has an exception of its own, and the engine works afterwards."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

if TYPE_CHECKING:
    from collections.abc import Iterator

ENCODINGS = ("amplitude", "angle", "basis", "phase", "iqp", "iqp-z", "zz", "iqp-embedding")
GOOD = np.array([[1.0, 2.0, 3.0, 4.0]])


@pytest.fixture(autouse=True)
def engine_works_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did wrong, its engine then encodes as ever."""
    if "engine" not in request.fixturenames:
        yield
    else:
        engine = request.getfixturevalue("engine")
        yield
        engine.check()
        reference.assert_states(engine.encode(GOOD, 2).numpy(), GOOD, 2, "amplitude")


class TestArguments:
    @pytest.mark.parametrize("num_qubits", [0, -1, -(2**70), 2**31, 2**32 + 2, 2**64, 2**70])
    def test_num_qubits(self, num_qubits: int, engine: qdp.Engine) -> None:
        for encoding in ENCODINGS:
            with pytest.raises(qdp.InvalidArgumentError, match="num_qubits") as caught:
                engine.encode(GOOD, num_qubits, encoding)
            assert caught.value.argument == "num_qubits"
            assert str(num_qubits) in caught.value.got
            assert caught.value.expected in str(caught.value)
        with pytest.raises(qdp.InvalidArgumentError, match="num_qubits"):
            engine.plan(num_qubits, "angle")

    @pytest.mark.parametrize("num_qubits", [2.0, "2", None, [2], True, 2 + 0j, b"2", np.float64(2)])
    def test_num_qubits_of_another_type(self, num_qubits: Any, engine: qdp.Engine) -> None:
        with pytest.raises((TypeError, qdp.InvalidArgumentError), match=r"num_qubits"):
            engine.encode(GOOD, num_qubits, "amplitude")

    def test_num_qubits_is_any_integer(self, engine: qdp.Engine) -> None:
        for n in (np.int64(2), np.uint8(2), np.int32(2)):
            states = engine.encode(GOOD, n, "amplitude").numpy()  # type: ignore[arg-type]
            reference.assert_states(states, GOOD, 2, "amplitude")

    @pytest.mark.parametrize("encoding", ["", "amplitudes", "ANGLE", "a" * 10_000, "iqp\0", "zz "])
    def test_encoding(self, encoding: str, engine: qdp.Engine) -> None:
        with pytest.raises(qdp.InvalidArgumentError, match="encoding") as caught:
            engine.encode(GOOD, 2, encoding)
        assert caught.value.argument == "encoding"
        for name in ENCODINGS:
            assert name in caught.value.expected

    @pytest.mark.parametrize(
        ("option", "value", "encoding"),
        [
            ("rotation", "w", "angle"),
            ("rotation", "", "angle"),
            ("convention", "cirq", "angle"),
            ("convention", "", "amplitude"),
            ("validate", "later", "amplitude"),
            ("entanglement", "fully", "zz"),
            ("entanglement", [(0, 4)], "zz"),
            ("entanglement", [(-1, 0)], "zz"),
            ("entanglement", [(2, 2)], "zz"),
            ("entanglement", [(0, 1, 2)], "zz"),
            ("entanglement", [(0,)], "iqp-embedding"),
            ("entanglement", [(0, 4)], "iqp-embedding"),
            ("reps", 0, "zz"),
            ("reps", -1, "zz"),
            ("reps", 0, "iqp-embedding"),
            ("reps", 2**70, "zz"),
        ],
    )
    def test_option(self, option: str, value: Any, encoding: str, engine: qdp.Engine) -> None:
        x = np.ones((1, 4))
        with pytest.raises(qdp.InvalidArgumentError, match=option) as caught:
            engine.encode(x, 4, encoding, **{option: value})
        assert caught.value.argument == option
        assert caught.value.expected in str(caught.value)
        assert caught.value.got in str(caught.value)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("rotation", 1),
            ("convention", None),
            ("validate", True),
            ("entanglement", 3),
            ("entanglement", [0, 1]),
            ("entanglement", [("a", "b")]),
            ("entanglement", {0: 1}),
            ("reps", 1.5),
            ("reps", "2"),
            ("stream", "fast"),
            ("stream", object()),
        ],
    )
    def test_option_of_another_type(self, option: str, value: Any, engine: qdp.Engine) -> None:
        encoding = "angle" if option == "rotation" else "zz"
        with pytest.raises((TypeError, qdp.InvalidArgumentError), match=option):
            engine.encode(np.ones((1, 4)), 4, encoding, **{option: value})

    @pytest.mark.parametrize(
        ("encoding", "options"),
        [
            ("amplitude", {"rotation": "x"}),
            ("phase", {"rotation": "y"}),
            ("angle", {"reps": 2}),
            ("iqp", {"entanglement": "linear"}),
            ("basis", {"reps": 1}),
        ],
    )
    def test_options_of_other_encodings(
        self, encoding: str, options: dict[str, Any], engine: qdp.Engine
    ) -> None:
        """An option that would be ignored is a mistake of the caller's."""
        (name,) = options
        with pytest.raises(qdp.InvalidArgumentError, match=name):
            engine.encode([[1.0]], 1, encoding, **options)
        with pytest.raises(qdp.InvalidArgumentError, match=name):
            engine.plan(1, encoding, **options)

    def test_unknown_keyword(self, engine: qdp.Engine) -> None:
        with pytest.raises(TypeError, match="qubits"):
            engine.encode(GOOD, 2, qubits=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            engine.encode(GOOD)  # type: ignore[call-arg]


class TestEngine:
    @pytest.mark.parametrize(
        "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1", "CPU ", "cpu:1", "cuda:1.0"]
    )
    def test_device_name(self, name: str) -> None:
        with pytest.raises(qdp.InvalidArgumentError, match="device") as caught:
            qdp.Engine(name)
        assert caught.value.argument == "device"
        assert "cuda" in caught.value.expected

    def test_device_of_another_type(self) -> None:
        for device in (0, 1.5, b"cpu", ["cpu"]):
            with pytest.raises((TypeError, qdp.QdpError)):
                qdp.Engine(device)  # type: ignore[arg-type]

    def test_precision(self) -> None:
        for precision in ("complex32", "float64", "", "c64"):
            with pytest.raises(qdp.InvalidArgumentError, match="precision") as caught:
                qdp.Engine("cpu", precision=precision)  # type: ignore[arg-type]
            assert caught.value.argument == "precision"

    def test_no_driver(self) -> None:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            pass
        else:
            pytest.skip("this machine has a driver")
        for device in ("cuda", "cuda:0", "cuda:7"):
            with pytest.raises(qdp.DeviceUnavailableError, match="driver") as caught:
                qdp.Engine(device)
            assert caught.value.reason == "no-driver"
            assert caught.value.device.startswith("cuda")
        assert qdp.Engine().device == "cpu"
        assert "driver" in qdp.device_info()["cuda_unavailable"]

    @pytest.mark.gpu
    def test_no_such_device(self) -> None:
        with pytest.raises(qdp.DeviceUnavailableError, match="no such device") as caught:
            qdp.Engine("cuda:1000")
        assert caught.value.reason == "no-such-device"
        assert caught.value.device == "cuda:1000"


class TestFeatures:
    @pytest.mark.parametrize("encoding", ["angle", "phase", "iqp", "iqp-z", "zz", "iqp-embedding"])
    def test_count(self, encoding: str, engine: qdp.Engine) -> None:
        right = engine.num_features(3, encoding)
        for count in (1, right - 1, right + 1, 2 * right, 100):
            for x in (np.ones(count), np.ones((2, count))):
                with pytest.raises(qdp.FeatureCountError, match=encoding) as caught:
                    engine.encode(x, 3, encoding)
                assert caught.value.encoding == encoding
                assert caught.value.num_qubits == 3
                assert caught.value.got == count
                assert str(right) in caught.value.expected
                assert str(count) in str(caught.value)

    def test_amplitude_count(self, engine: qdp.Engine) -> None:
        for count in (9, 16, 1000):
            with pytest.raises(qdp.FeatureCountError, match="amplitude") as caught:
                engine.encode(np.ones((2, count)), 3, "amplitude")
            assert caught.value.got == count
            assert "8" in caught.value.expected

    def test_basis_count(self, engine: qdp.Engine) -> None:
        for count in (2, 4, 8):
            with pytest.raises(qdp.FeatureCountError, match="basis") as caught:
                engine.encode(np.zeros((2, count)), 3, "basis")
            assert caught.value.got == count


class TestValues:
    @pytest.mark.parametrize("validate", ["deferred", "now"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_non_finite(self, bad: float, validate: Any, engine: qdp.Engine) -> None:
        for dtype in (np.float64, np.float32, np.float16):
            for encoding in ("amplitude", "angle", "phase", "iqp-z", "zz", "iqp-embedding"):
                x = np.ones((7, 4), dtype)
                x[5, 2] = bad
                with pytest.raises(qdp.NonFiniteError, match=r"5.*2") as caught:
                    engine.encode(x, 4, encoding, validate=validate)
                assert (caught.value.sample, caught.value.position) == (5, 2)
                assert ("NaN" if np.isnan(bad) else "inf") in str(caught.value)

    def test_non_finite_iqp_pair(self, engine: qdp.Engine) -> None:
        x = np.ones((3, 10))
        x[1, 9] = np.nan
        with pytest.raises(qdp.NonFiniteError) as caught:
            engine.encode(x, 4, "iqp")
        assert (caught.value.sample, caught.value.position) == (1, 9)

    def test_non_finite_complex(self, engine: qdp.Engine) -> None:
        for bad in (complex(np.nan, 1), complex(1, np.inf)):
            x = np.ones((4, 4), np.complex128)
            x[3, 1] = bad
            with pytest.raises(qdp.NonFiniteError) as caught:
                engine.encode(x, 2, "amplitude")
            assert (caught.value.sample, caught.value.position) == (3, 1)

    def test_non_finite_strided(self, engine: qdp.Engine) -> None:
        """The position is the caller's, not the memory's."""
        x = np.ones((6, 8))
        x[1, 3] = np.nan
        for view, place in ((x[::-1, ::-2], (4, 2)), (x.T, (3, 1)), (x[1], (0, 3))):
            with pytest.raises(qdp.NonFiniteError) as caught:
                engine.encode(view, 3, "amplitude")
            assert (caught.value.sample, caught.value.position) == place

    def test_the_first_bad_sample_is_named(self, engine: qdp.Engine) -> None:
        x = np.ones((1000, 4))
        x[[900, 400, 700], [1, 2, 3]] = np.nan
        with pytest.raises(qdp.NonFiniteError) as caught:
            engine.encode(x, 2, "amplitude")
        assert (caught.value.sample, caught.value.position) == (400, 2)

    def test_zero_norm(self, engine: qdp.Engine) -> None:
        for dtype in (np.float64, np.float32, np.int32, np.complex64, np.bool_):
            x = np.ones((5, 4), dtype)
            x[3] = 0
            with pytest.raises(qdp.ZeroNormError, match="3") as caught:
                engine.encode(x, 2, "amplitude")
            assert caught.value.sample == 3
            assert isinstance(caught.value, qdp.InvalidDataError)

    def test_norm_overflow(self, engine: qdp.Engine) -> None:
        x = np.ones((3, 4))
        x[2] = 1e200
        with pytest.raises(qdp.NormOverflowError, match="2") as caught:
            engine.encode(x, 2, "amplitude")
        assert caught.value.sample == 2

    def test_basis_index(self, engine: qdp.Engine) -> None:
        for bad in (8, -1, 0.5, 1e30, 2**40):
            x = np.array([[0.0], [7.0], [bad]])
            with pytest.raises(qdp.BasisValueError) as caught:
                engine.encode(x, 3, "basis")
            assert (caught.value.sample, caught.value.position) == (2, 0)
            assert caught.value.num_qubits == 3
        for bad in (np.nan, np.inf):
            with pytest.raises(qdp.InvalidDataError) as finite:
                engine.encode(np.array([[0.0], [bad]]), 3, "basis")
            assert finite.value.sample == 1
        with pytest.raises(qdp.BasisValueError):
            engine.encode(np.array([2**64 - 1], np.uint64), 3, "basis")

    def test_basis_bit(self, engine: qdp.Engine) -> None:
        for bad in (2, -1, 0.5):
            x = np.zeros((4, 3))
            x[1, 2] = bad
            with pytest.raises(qdp.BasisValueError) as caught:
                engine.encode(x, 3, "basis")
            assert (caught.value.sample, caught.value.position) == (1, 2)

    def test_masked_values(self, engine: qdp.Engine) -> None:
        masked = np.ma.array([3.0, 4.0], mask=[False, True])
        for data in (masked, [masked], ([1.0, 2.0], masked)):
            with pytest.raises(qdp.InvalidArgumentError, match="masked"):
                engine.encode(data, 1)
        assert engine.encode([np.ma.array([3.0, 4.0])], 1).shape == (1, 2)


class TestMemory:
    @pytest.mark.parametrize("n", [40, 45, 50])
    def test_too_many_qubits_are_refused_before_allocation(
        self, n: int, device: str, engine: qdp.Engine
    ) -> None:
        for encoding, x in (("amplitude", [1.0, 2.0]), ("angle", [0.5] * n), ("basis", [3])):
            with pytest.raises(qdp.OutOfMemoryError) as caught:
                engine.encode(np.array(x, np.float64), n, encoding)
            error = caught.value
            assert error.device == device
            assert error.needed >= 2**n * 16
            assert 0 <= error.free <= error.total < error.needed
            for number in (error.needed, error.free, error.total):
                assert str(number) in str(error)
            assert isinstance(error, MemoryError)

    def test_too_large_a_batch(self, engine: qdp.Engine) -> None:
        x = np.broadcast_to(np.float32(1), (2**40, 4))  # 4 bytes here, 32 TiB there
        with pytest.raises(qdp.OutOfMemoryError) as caught:
            engine.encode(x, 2)
        assert caught.value.needed >= 2**40 * 4 * 8

    def test_sizes_beyond_any_integer(self, engine: qdp.Engine) -> None:
        x = np.broadcast_to(np.float32(1), (2**40, 2))
        for n in (30, 60, 62, 63):
            with pytest.raises((qdp.OutOfMemoryError, qdp.InvalidArgumentError)):
                engine.encode(x, n, "amplitude")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=3),
    st.binary(max_size=3),
)
objects = st.one_of(
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12),
    st.dictionaries(st.text(max_size=2), scalars, max_size=2),
    st.sets(st.integers(), max_size=3),
    st.builds(object),
    st.just(NotImplemented),
    st.just(np),
    st.builds(range, st.integers(0, 20)),
    st.builds(bytearray, st.integers(0, 20)),
)
arrays = hnp.arrays(
    dtype=st.one_of(
        hnp.floating_dtypes(endianness="?"),
        hnp.integer_dtypes(endianness="?"),
        hnp.unsigned_integer_dtypes(endianness="?"),
        hnp.complex_number_dtypes(endianness="?"),
        hnp.boolean_dtypes(),
        hnp.datetime64_dtypes(),
        hnp.byte_string_dtypes(max_len=3),
    ),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
)
names = st.sampled_from([*ENCODINGS, "", "Amplitude", 3, None])
options = st.fixed_dictionaries(
    {},
    optional={
        "rotation": st.sampled_from(["x", "y", "z", "q", 1, None]),
        "reps": st.one_of(st.integers(-2, 4), st.none(), st.floats()),
        "entanglement": st.one_of(
            st.sampled_from(["full", "linear", "sca", "none", "?", None]),
            st.lists(st.lists(st.integers(-1, 8), max_size=3), max_size=4),
        ),
        "convention": st.sampled_from([*reference.CONVENTIONS, "?", None]),
        "validate": st.sampled_from(["now", "deferred", "?"]),
        "out": st.one_of(st.none(), arrays),
        "stream": st.sampled_from([None, None, "s", -7, 2**70]),
    },
)


class TestAnything:
    """Malformed input of any kind ends in a state or a typed exception, never in an abort."""

    SETTINGS = settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )

    @SETTINGS
    @given(
        data=st.one_of(objects, arrays),
        num_qubits=st.one_of(st.integers(1, 8), st.integers(), scalars),
        encoding=names,
        options=options,
    )
    def test_arguments(
        self, data: Any, num_qubits: Any, encoding: Any, options: dict[str, Any], cpu: qdp.Engine
    ) -> None:
        try:
            state = cpu.encode(data, num_qubits, encoding, **options)
        except (qdp.QdpError, TypeError):
            return
        assert state.shape[1] == 2**num_qubits
        assert np.isfinite(state.numpy()).all()

    @SETTINGS
    @given(
        x=arrays, n=st.integers(1, 6), encoding=st.sampled_from(ENCODINGS), reverse=st.booleans()
    )
    def test_arrays(self, x: Any, n: int, encoding: str, reverse: bool, engine: qdp.Engine) -> None:
        """An array that is accepted gives the reference's states."""
        view = x[..., ::-1] if reverse and x.ndim else x
        try:
            states = engine.encode(view, n, encoding).numpy()
        except qdp.QdpError:
            return
        assert view.ndim in (1, 2)
        assert np.isfinite(view).all()
        np.testing.assert_allclose(np.linalg.norm(states, axis=1), 1, rtol=0, atol=1e-4)
        if np.abs(view).max(initial=0) < 100:
            reference.assert_states(states, np.atleast_2d(view), n, encoding)

    @SETTINGS
    @given(data=st.one_of(objects, arrays), name=scalars, precision=scalars)
    def test_engine(self, data: Any, name: Any, precision: Any) -> None:
        try:
            engine = qdp.Engine(name, precision=precision)
        except (qdp.QdpError, TypeError):
            return
        assert engine.device in ("cpu", "cuda:0")
        with suppress(qdp.QdpError, TypeError):
            assert engine.encode(data, 2).shape[1] == 4
