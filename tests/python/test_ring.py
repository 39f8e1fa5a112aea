"""States of host input that passes through the ring: slots far smaller than the data."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PRECISIONS
from devices import DEVICE
from test_api import run_python
from test_input import COMPLEX, FLOATS, INTEGERS

RNG = np.random.default_rng()

DTYPES = (*FLOATS, *INTEGERS, *COMPLEX, "bool", "bfloat16")
CASE_OF = {case.encoding: case for case in reversed(CASES)}
# One that is only slots, one that grows its chunks, one with a direct path and a single thread.
RINGS: dict[str, dict[str, int]] = {
    "even": {"slots": 2, "min_chunk_bytes": 65536, "max_chunk_bytes": 65536, "direct_bytes": 0},
    "growing": {"slots": 3, "min_chunk_bytes": 4096, "max_chunk_bytes": 131072, "direct_bytes": 0},
    "direct": {
        "slots": 2,
        "min_chunk_bytes": 4096,
        "max_chunk_bytes": 262144,
        "direct_bytes": 16384,
        "staging_threads": 1,
    },
}


@cache
def ring_engine(device: str, precision: Any = None, **settings: Any) -> qdp.Engine:
    config = qdp.PipelineConfig(**settings)
    return qdp.Engine(device, precision=precision, pipeline=config)


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> dict[str, int]:
    return RINGS[request.param]


@pytest.fixture
def engine(device: str, ring: dict[str, int]) -> qdp.Engine:
    """An engine with a small ring, in place of the usual one."""
    return ring_engine(device, **ring)


@pytest.fixture(params=["pageable", pytest.param("pinned", marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest) -> Any:
    """What puts an array into memory of a kind, and an array over the same memory."""
    if request.param == "pageable":
        return lambda x: (x, x)

    def pinned(x: Any) -> Any:
        if len(x) == 0:
            return x, x
        if not isinstance(x, np.ndarray):
            return x.pin_memory(), None
        tensor = pytest.importorskip("torch").from_numpy(x).pin_memory()
        return tensor, tensor.numpy()

    return pinned


def qubits(features: int) -> int:
    return max((features - 1).bit_length(), 1)


def samples(dtype: str, *shape: int) -> tuple[Any, Any]:
    """Data of an element type, and its values."""
    if dtype.startswith(("float", "complex")):
        x = RNG.normal(size=shape)
        if dtype.startswith("complex"):
            x = x + 1j * RNG.normal(size=shape)
        x = x.astype(dtype)
        return x, x
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(RNG.normal(size=shape)).bfloat16()
        return tensor, tensor.double().numpy()
    x = RNG.integers(0, 2 if dtype == "bool" else 100, size=shape).astype(dtype)
    x[..., 0] = 1
    return x, x.astype(np.float64)


def check(engine: qdp.Engine, data: Any, x: Any) -> Any:
    """The states of ``data``, which holds ``x``, are right; the host's copy of them."""
    x = np.atleast_2d(x).astype(np.complex128)
    n = qubits(x.shape[1])
    states = engine.encode(data, n).numpy()
    expected = np.zeros((len(x), 2**n), np.complex128)
    squares = x.real**2 + x.imag**2
    expected[:, : x.shape[1]] = x / np.sqrt(squares.sum(axis=1, keepdims=True))
    reference.assert_close(states, expected, x, n, "amplitude")
    return states


class TestStates:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("precision", [None, *PRECISIONS])
    def test_every_dtype(
        self, dtype: str, precision: Any, device: str, ring: dict[str, int], memory: Any
    ) -> None:
        engine = ring_engine(device, precision, **ring)
        for shape in ((1, 1), (1, 5), (1, 20_000), (7, 1000), (300, 257), (3, 20_000), (2, 70_001)):
            data, x = samples(dtype, *shape)
            check(engine, memory(data)[0], x)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_every_encoding(
        self, case: Any, cpu: qdp.Engine, device: str, ring: dict[str, int]
    ) -> None:
        for n, batch in ((1, 9000), (3, 3000), (8, 600)):
            x, options = case.samples(n, batch=batch), case.options(n)
            expected = cpu.encode(x, n, case.encoding, **options).numpy()
            for precision in PRECISIONS:
                engine = ring_engine(device, precision, **ring)
                states = engine.encode(x, n, case.encoding, **options).numpy()
                reference.assert_close(states, expected, x, n, case.encoding, slack=2, **options)

    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "complex128"])
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_strides(self, dtype: str, precision: Any, device: str, ring: dict[str, int]) -> None:
        engine = ring_engine(device, precision, **ring)
        x, _ = samples(dtype, 300, 400)
        x[:, 0] = 1  # no part of it is all zeros
        x[0] = 1
        for view in (
            x.T,
            x[::-1],
            x[:, ::-1],
            x[::-3, ::-7],
            x[5:250, :7],
            x[::299],
            x[:, :1],
            x[7],
            x[7, ::-2],
            x[:, 0],
            np.broadcast_to(x[3], (500, 400)),
            np.broadcast_to(x[:, :1], (300, 500)),
            np.asfortranarray(x),
            x.reshape(1, -1)[:, ::-1],  # split
            x.reshape(2, -1)[::-1, 3::2],
            x.T.reshape(1, -1, order="A"),
        ):
            check(engine, view, view)

    @pytest.mark.parametrize("features", [1, 2, 511, 512, 513, 1024, 4095, 4096, 4097])
    def test_around_the_sizes_of_chunks(
        self, features: int, engine: qdp.Engine, memory: Any
    ) -> None:
        """Batches one sample below, at and above the direct path, each slot and the whole ring."""
        row = 8 * features
        sizes = {0, 1, 2, 3}
        for size in (4096, 16384, 65536, 131072, 262144, 3 * 131072, 8 * 65536):
            sizes |= {size // row + d for d in (-1, 0, 1)}
        for batch in sorted(size for size in sizes if size >= 0 and size * features <= 200_000):
            x = RNG.normal(size=(batch, features))
            data, _ = memory(x)
            check(engine, data, x)

    @pytest.mark.parametrize("dtype", ["float64", "complex128", "float16", "int8"])
    @pytest.mark.parametrize("parts", [1, 2, 3, 8, 16, 17])
    def test_around_the_parts_of_split_samples(
        self, dtype: str, parts: int, engine: qdp.Engine, memory: Any
    ) -> None:
        for features in (4096 * parts - 1, 4096 * parts, 4096 * parts + 1):
            for batch in (1, 3):
                data, x = samples(dtype, batch, features)
                check(engine, memory(data)[0], x)

    def test_out_with_padded_rows(self, device: str, ring: dict[str, int]) -> None:
        """Every chunk is written to its own rows, and nothing between them."""
        torch = pytest.importorskip("torch")
        engine = ring_engine(device, **ring)
        for features in (1000, 20_000):
            x = RNG.normal(size=(40, features))
            n = qubits(features)
            whole = torch.full((40, 2**n + 8), 7, dtype=torch.complex128, device=device)
            state = engine.encode(x, n, out=whole[:, : 2**n])
            reference.assert_states(state.numpy(), x, n, "amplitude")
            assert (whole[:, 2**n :] == 7).all()

    @pytest.mark.parametrize("settings", [{"max_batch_samples": 7}, {"max_batch_bytes": 200_000}])
    def test_rounds(self, settings: Any, device: str, ring: dict[str, int], memory: Any) -> None:
        for precision in PRECISIONS:
            engine = ring_engine(device, precision, **{**ring, **settings})
            for shape in ((100, 1000), (3, 30_000)):
                x = RNG.normal(size=shape)
                check(engine, memory(x)[0], x)


class TestNarrowing:
    """float64 travels as float32 to complex64 states, whatever range its values are in."""

    @pytest.mark.parametrize("features", [3, 500, 40_000])
    @pytest.mark.parametrize("dtype", ["float64", "complex128"])
    def test_wild_samples_change_no_other(
        self, features: int, dtype: str, device: str, ring: dict[str, int], memory: Any
    ) -> None:
        engine = ring_engine(device, "complex64", **ring)
        batch = 6 if features > 1000 else 200
        x, _ = samples(dtype, batch, features)
        wild = {1: 1e60, 2: 1e-60, batch - 1: 1e-140, batch - 3: 1e150}
        tame = check(engine, memory(x)[0], x)
        for row, scale in wild.items():
            x[row] *= scale
        states = check(engine, memory(x)[0], x)
        others = np.delete(np.arange(batch), list(wild))
        np.testing.assert_array_equal(states[others], tame[others])
        np.testing.assert_array_equal(check(engine, memory(x[others])[0], x[others]), tame[others])

    @pytest.mark.parametrize("features", [500, 40_000])
    def test_values_of_all_sizes_in_a_sample(
        self, features: int, device: str, ring: dict[str, int], memory: Any
    ) -> None:
        engine = ring_engine(device, "complex64", **ring)
        x = RNG.normal(size=(5, features)) * 10.0 ** RNG.uniform(-100, 30, size=(5, features))
        check(engine, memory(x)[0], x)
        check(engine, memory(x * 1e90)[0], x * 1e90)

    def test_in_rounds(self, device: str, ring: dict[str, int]) -> None:
        engine = ring_engine(device, "complex64", **ring, max_batch_samples=9)
        x = RNG.normal(size=(100, 1000))
        x[::7] *= 1e70
        x[50] *= 1e-70
        check(engine, x, x)


class TestBadValues:
    """Named exactly, at the call; the engine encodes correctly next."""

    LONG = ((300, 1024), (2, 100_000))

    def refused(self, engine: qdp.Engine, data: Any, n: int, encoding: str = "amplitude") -> Any:
        with pytest.raises(qdp.InvalidDataError) as caught:
            engine.encode(data, n, encoding)
        good = RNG.normal(size=(100, 1024))
        check(engine, good, good)
        engine.check()
        return caught.value

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("shape", LONG)
    def test_non_finite(self, shape: Any, value: float, engine: qdp.Engine, memory: Any) -> None:
        batch, features = shape
        n = qubits(features)
        for sample in (0, batch - 1):
            for position in (0, features - 1, features // 2):
                x = RNG.normal(size=shape)
                x[sample, position] = value
                error = self.refused(engine, memory(x)[0], n)
                assert isinstance(error, qdp.NonFiniteError)
                assert (error.sample, error.position) == (sample, position)

    def test_the_first_of_several(self, engine: qdp.Engine, memory: Any) -> None:
        x = RNG.normal(size=(300, 1024))
        x[299, 3] = x[120, 1000] = x[120, 1001] = np.inf
        x[290] = 0
        x[200, 0] = np.nan
        error = self.refused(engine, memory(x)[0], 10)
        assert (type(error), error.sample, error.position) == (qdp.NonFiniteError, 120, 1000)

    @pytest.mark.parametrize("shape", LONG)
    def test_norms(self, shape: Any, device: str, ring: dict[str, int], memory: Any) -> None:
        for precision in PRECISIONS:
            engine = ring_engine(device, precision, **ring)
            for scale, expected in ((0, qdp.ZeroNormError), (1e160, qdp.NormOverflowError)):
                for sample in (0, shape[0] - 1):
                    x = RNG.normal(size=shape)
                    x[sample] *= scale
                    error = self.refused(engine, memory(x)[0], qubits(shape[1]))
                    assert (type(error), error.sample) == (expected, sample)

    def test_other_encodings(self, engine: qdp.Engine, memory: Any) -> None:
        for encoding, features in (("angle", 8), ("phase", 8), ("iqp", 36), ("zz", 8)):
            x = RNG.normal(size=(20_000, features))
            x[19_999, features - 1] = np.nan
            error = self.refused(engine, memory(x)[0], 8, encoding)
            assert (error.sample, error.position) == (19_999, features - 1)
        for features, value in ((1, 256), (1, -1), (1, 0.5), (8, 2), (8, np.nan)):
            x = np.ones((20_000, features))
            x[19_998, features - 1] = value
            error = self.refused(engine, memory(x)[0], 8, "basis")
            expected = qdp.NonFiniteError if np.isnan(value) else qdp.BasisValueError
            assert type(error) is expected
            assert (error.sample, error.position) == (19_998, features - 1)

    def test_in_a_later_round(self, device: str, ring: dict[str, int], memory: Any) -> None:
        engine = ring_engine(device, "complex64", **ring, max_batch_samples=9)
        x = RNG.normal(size=(100, 1024))
        x[3] *= 1e60
        x[98, 1023] = np.nan
        error = self.refused(engine, memory(x)[0], 10)
        assert (error.sample, error.position) == (98, 1023)


class TestOrder:
    def test_the_array_may_be_overwritten_at_once(self, engine: qdp.Engine, memory: Any) -> None:
        for shape in ((1, 1000), (2000, 1024), (1, 2**20 - 3)):
            values = RNG.normal(size=shape)
            data, array = memory(values.copy())
            state = engine.encode(data, qubits(shape[1]))
            array[:] = np.nan
            reference.assert_states(state.numpy(), values, qubits(shape[1]), "amplitude")

    def test_states_of_many_calls_at_once(self, engine: qdp.Engine, memory: Any) -> None:
        """Slots that an earlier call left in flight are not touched too soon."""
        data, array = memory(np.empty((64, 1024)))
        values = RNG.normal(size=(20, 64, 1024))
        states = []
        for batch in values:
            array[:] = batch
            states.append(engine.encode(data, 10))
        for state, batch in zip(states, values, strict=True):
            reference.assert_states(state.numpy(), batch, 10, "amplitude")

    @pytest.mark.sanitize
    def test_eight_threads(self, engine: qdp.Engine, memory: Any) -> None:
        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for case in CASE_OF.values():
                x = case.samples(8, batch=int(rng.integers(1, 300)))
                x = np.roll(x, seed, axis=0)
                data, array = memory(x.copy())
                state = engine.encode(data, 8, case.encoding, **case.fixed)
                array[:] = -1
                reference.assert_states(state.numpy(), x, 8, case.encoding, **case.fixed)
            x = rng.normal(size=(2, int(rng.integers(8000, 40_000))))
            check(engine, memory(x)[0], x)
            x[1, -1] = np.nan
            with pytest.raises(qdp.NonFiniteError) as caught:
                engine.encode(memory(x)[0], 16)
            assert (caught.value.sample, caught.value.position) == (1, x.shape[1] - 1)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


class TestReproducible:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_from_run_to_run(self, precision: Any, device: str, memory: Any) -> None:
        engine = ring_engine(device, precision, **RINGS["growing"])
        for case in CASE_OF.values():
            x = case.samples(8, batch=500)
            first, *others = (
                engine.encode(memory(x)[0], 8, case.encoding).numpy() for _ in range(4)
            )
            for states in others:
                np.testing.assert_array_equal(states, first)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_across_chunk_sizes(self, precision: Any, device: str, memory: Any) -> None:
        """No bit depends on the cut. (A sample that fits a slot is summed in another order than
        one that is split; and Hadamards are applied in an order that depends on the batch.)"""
        direct = {"min_chunk_bytes": 4096, "max_chunk_bytes": 1 << 20, "direct_bytes": 1 << 20}
        whole = [direct, *RINGS.values(), {**RINGS["even"], "slots": 7, "staging_threads": 3}]
        split = [
            {"min_chunk_bytes": least, "max_chunk_bytes": most, "direct_bytes": 0, "slots": slots}
            for least, most, slots in (
                (4096, 65536, 2),
                (65536, 65536, 5),
                (8192, 131072, 3),
                (262144, 262144, 2),
            )
        ]
        long = RNG.normal(size=(3, 100_000))  # more than a slot also as float32
        calls = [("amplitude", 10, RNG.normal(size=(300, 1000)), whole)]
        calls += [("amplitude", 17, long, split)]
        for encoding in ("angle", "phase", "basis"):
            calls.append((encoding, 8, CASE_OF[encoding].samples(8, batch=5000), whole))
        for encoding, n, x, settings in calls:
            data, _ = memory(x)
            first, *others = (
                ring_engine(device, precision, **ring).encode(data, n, encoding).numpy()
                for ring in settings
            )
            for states in others:
                np.testing.assert_array_equal(states, first)


@pytest.mark.gpu
class TestInterrupt:
    """A signal in the middle of a call that would take many seconds ends it; the next one works."""

    CODE = (
        "import signal, numpy as np, qdp\n"
        "class Alarm(Exception): pass\n"
        "def ring(*_): raise {exception}\n"
        "signal.signal(signal.SIGALRM, ring)\n"
        "config = qdp.PipelineConfig(slots=2, min_chunk_bytes=4096, max_chunk_bytes=65536,\n"
        "                            direct_bytes=0, staging_threads=1)\n"
        "engine = qdp.Engine('{device}', precision='complex64', pipeline=config)\n"
        "{data}\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "try: engine.encode({call})\n"
        "except {exception} as error: print(type(error).__name__, error.__context__)\n"
        "rows = np.arange(1.0, 301.0)[:, None] + np.arange(1000.0)\n"
        "norms = np.linalg.norm(rows, axis=1, keepdims=True)\n"
        "states = engine.encode(rows, 10).numpy()[:, :1000]\n"
        "assert np.allclose(states, rows / norms, rtol=1e-5, atol=0)\n"
        "engine.check()\n"
    )
    # Gathered backwards, value by value, by one thread; and kernels that take long.
    STAGING = "x = np.broadcast_to(np.arange(1.0, 2**14 + 1)[::-1], (2**16, 2**14))"
    KERNELS = "x = np.random.default_rng(7).uniform(-1, 1, size=(2**16, 14))"
    PINNED = f"{KERNELS}\npinned = qdp.pin(x); assert pinned.pinned"

    @pytest.mark.parametrize("exception", ["KeyboardInterrupt", "Alarm"])
    @pytest.mark.parametrize(
        ("data", "call"),
        [
            (STAGING, "x, 14"),
            (KERNELS, "x, 14, 'zz', reps=1000"),
            (PINNED, "x, 14, 'zz', reps=1000"),
        ],
        ids=["staging", "kernels", "pinned"],
    )
    def test_ends_the_call(self, data: str, call: str, exception: str) -> None:
        code = self.CODE.format(data=data, call=call, exception=exception, device=DEVICE)
        assert run_python(code).split() == [exception, "None"]

    @pytest.mark.parametrize("pin", ["None", "qdp.pin(x)"], ids=["staged", "pinned"])
    def test_the_handler_may_use_the_engine(self, pin: str) -> None:
        """On its own thread and on another, while the call that it interrupts is not done."""
        code = (
            "import signal, numpy as np, qdp\n"
            "config = qdp.PipelineConfig(slots=2, min_chunk_bytes=4096, max_chunk_bytes=65536,\n"
            "                            direct_bytes=0, staging_threads=1)\n"
            f"engine = qdp.Engine({DEVICE!r}, pipeline=config)\n"
            "small = np.random.default_rng(8).uniform(-1, 1, size=(2000, 8))\n"
            "want = engine.encode(small, 8, 'angle').numpy()\n"
            "heard = []\n"
            "def ring(*_):\n"
            "    got = engine.encode(small, 8, 'angle').numpy()\n"
            "    other = engine.encode_async(small, 8, 'angle').result(timeout=60).numpy()\n"
            "    assert (got == want).all() and (other == want).all()\n"
            "    heard.append(engine.stats()['calls'])\n"
            "signal.signal(signal.SIGALRM, ring)\n"
            "x = np.random.default_rng(7).uniform(-1, 1, size=(2**13, 14))\n"
            f"pinned = {pin}\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
            "states = engine.encode(x, 14, 'zz', reps=500)\n"
            "assert heard == [4]\n"
            "last = engine.encode(x[-300:], 14, 'zz', reps=500).numpy()\n"
            "assert np.allclose(states.numpy()[-300:], last, rtol=0, atol=1e-10)\n"
        )
        run_python(code)
