"""The batcher: many threads and tasks share batches, and nobody notices but by the speed."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

N = 3
DIM = 2**N
# Long enough that nothing starts by itself.
NEVER_US = 50e6

ENCODINGS: list[tuple[str, int, dict[str, Any]]] = [
    ("amplitude", DIM, {}),
    ("amplitude", DIM - 3, {}),
    ("angle", N, {}),
    ("angle", N, {"rotation": "x", "convention": "pennylane"}),
    ("phase", N, {}),
    ("iqp", N + N * (N - 1) // 2, {}),
    ("iqp-z", N, {}),
    ("zz", N, {"reps": 3, "entanglement": "linear"}),
    ("iqp-embedding", N, {"entanglement": [(0, 2)]}),
]
DTYPES = ["float64", "float32", "float16", "int8", "uint32", "int64"]


def samples(count: int, features: int = DIM, dtype: str = "float64") -> Any:
    values = np.random.default_rng(count).uniform(1, 100, size=(count, features))
    return values.astype(dtype)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(main)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Runs ``work`` in so many threads that all begin at once."""
    barrier = threading.Barrier(count)

    def start(thread: int) -> Any:
        barrier.wait()
        return work(thread)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def assert_same(state: qdp.StateBatch, alone: qdp.StateBatch) -> None:
    """The same bits, shape, dtype and device."""
    assert state.shape == alone.shape
    assert state.dtype == alone.dtype
    assert state.device == alone.device
    assert state.numpy().tobytes() == alone.numpy().tobytes()


class TestSame:
    def test_as_alone(self, engine: qdp.Engine) -> None:
        x = samples(1)[0]
        with engine.batcher(N) as batcher:
            state = batcher.encode(x)
            assert isinstance(state, qdp.StateBatch)
            assert_same(state, engine.encode(x, N))
            assert state.shape == (1, DIM)

    @pytest.mark.parametrize(("encoding", "features", "options"), ENCODINGS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_encoding_and_dtype(
        self, engine: qdp.Engine, encoding: str, features: int, options: Any, dtype: str
    ) -> None:
        data = samples(12, features, dtype)
        with engine.batcher(N, encoding, max_delay_us=NEVER_US, **options) as batcher:

            async def main() -> list[qdp.StateBatch]:
                tasks = [asyncio.create_task(batcher.encode_async(x)) for x in data]
                tasks.append(asyncio.create_task(batcher.encode_async(data[2:5])))
                await asyncio.sleep(0)
                batcher.close()
                return list(await asyncio.gather(*tasks))

            states = run(main())
            assert batcher.stats()["batches"] == 1
        for x, state in zip([*data, data[2:5]], states, strict=True):
            assert_same(state, engine.encode(x, N, encoding, **options))

    @pytest.mark.parametrize("dtype", ["complex64", "complex128"])
    def test_complex(self, engine: qdp.Engine, dtype: str) -> None:
        data = (samples(6) * (1 - 2j)).astype(dtype)
        with engine.batcher(N) as batcher:

            async def main() -> list[qdp.StateBatch]:
                return list(await asyncio.gather(*map(batcher.encode_async, data)))

            for x, state in zip(data, run(main()), strict=True):
                assert_same(state, engine.encode(x, N))

    @pytest.mark.parametrize("features", [1, N])
    def test_basis(self, engine: qdp.Engine, features: int) -> None:
        data = np.random.default_rng(1).integers(0, 2, size=(20, features))
        with engine.batcher(N, "basis") as batcher:
            for x, state in zip(
                data, in_threads(20, lambda i: batcher.encode(data[i])), strict=True
            ):
                assert_same(state, engine.encode(x, N, "basis"))

    @pytest.mark.parametrize("precision", ["complex64", "complex128"])
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_precision(
        self, engine_for: Callable[[Any], qdp.Engine], precision: str, dtype: str
    ) -> None:
        engine = engine_for(precision)
        data = samples(16, DIM, dtype) * 1e-30  # beyond what float32's square holds
        with engine.batcher(N) as batcher:
            for x, state in zip(
                data, in_threads(16, lambda i: batcher.encode(data[i])), strict=True
            ):
                assert_same(state, engine.encode(x, N))

    def test_threads(self, engine: qdp.Engine) -> None:
        data = samples(1600, 64)
        alone = engine.encode(data, 6).numpy()
        with engine.batcher(6) as batcher:

            def work(thread: int) -> bool:
                own = range(thread, len(data), 16)
                return all((batcher.encode(data[i]).numpy()[0] == alone[i]).all() for i in own)

            assert all(in_threads(16, work))
            stats = batcher.stats()
            assert stats["requests"] == len(data)
            assert stats["batches"] <= stats["requests"]
            assert stats["waiting"] == 0

    def test_tasks(self, engine: qdp.Engine) -> None:
        data = samples(1024, 64)
        alone = engine.encode(data, 6).numpy()
        with engine.batcher(6) as batcher:

            async def one(i: int) -> bool:
                state = await batcher.encode_async(data[i])
                return bool((state.numpy()[0] == alone[i]).all())

            async def main() -> list[bool]:
                return await asyncio.gather(*map(one, range(len(data))))

            assert all(run(main()))
            assert batcher.stats()["batches"] < len(data)

    def test_threads_and_loops_together(self, engine: qdp.Engine) -> None:
        data = samples(400, 16)
        alone = engine.encode(data, 4).numpy()
        with engine.batcher(4) as batcher:

            async def main() -> list[qdp.StateBatch]:
                return list(await asyncio.gather(*map(batcher.encode_async, data)))

            def work(thread: int) -> bool:
                states = run(main()) if thread % 2 else [batcher.encode(x) for x in data]
                return all(
                    (state.numpy()[0] == row).all()
                    for state, row in zip(states, alone, strict=True)
                )

            assert all(in_threads(6, work))

    def test_mixed(self, engine: qdp.Engine) -> None:
        requests = [
            (samples(1, features, dtype)[0], n, encoding, options)
            for n in (3, 4)
            for encoding, features, options in ENCODINGS
            if n == N or encoding == "amplitude"
            for dtype in DTYPES
        ]
        with engine.batcher(N, max_delay_us=2000) as batcher:

            async def main() -> list[qdp.StateBatch]:
                tasks = [batcher.encode_async(x, n, name, **o) for x, n, name, o in requests]
                return list(await asyncio.gather(*tasks))

            states = run(main())
        for (x, n, encoding, options), state in zip(requests, states, strict=True):
            assert_same(state, engine.encode(x, n, encoding, **options))

    def test_options_are_the_batchers_unless_named(self, engine: qdp.Engine) -> None:
        x = samples(1, N)[0]
        with engine.batcher(N, "zz", reps=3, convention="qiskit") as batcher:
            zz: dict[str, Any] = {"convention": "qiskit", "reps": 3}
            assert_same(batcher.encode(x), engine.encode(x, N, "zz", **zz))
            zz["entanglement"] = "linear"
            state = batcher.encode(x, entanglement="linear")
            assert_same(state, engine.encode(x, N, "zz", **zz))
            state = batcher.encode(x, encoding="angle")
            assert_same(state, engine.encode(x, N, "angle", convention="qiskit"))
            assert_same(
                batcher.encode(x[:2], 2), engine.encode(x[:2], 2, "zz", convention="qiskit", reps=3)
            )

    @pytest.mark.parametrize("form", ["list", "strided", "transposed", "torch", "big-endian"])
    def test_forms_of_data(self, engine: qdp.Engine, form: str, torch: Any) -> None:
        base = samples(2 * DIM, DIM)
        data: Any = {
            "list": base[0].tolist(),
            "strided": base[0, ::2],
            "transposed": base[:DIM].T,
            "torch": torch.from_numpy(base[0]),
            "big-endian": base[0].astype(">f8"),
        }[form]
        with engine.batcher(N, max_delay_us=2000) as batcher:
            for state in in_threads(3, lambda _: batcher.encode(data)):
                assert_same(state, engine.encode(data, N))

    def test_large_requests_and_none(self, engine: qdp.Engine) -> None:
        data = samples(20)
        with engine.batcher(N, max_batch_samples=4) as batcher:
            assert_same(batcher.encode(data), engine.encode(data, N))
            assert_same(run(batcher.encode_async(data)), engine.encode(data, N))
            assert batcher.encode(data[:0]).shape == (0, DIM)
            assert batcher.stats()["direct"] == 3

    @pytest.mark.gpu
    def test_data_on_the_device(self, gpu: qdp.Engine, torch: Any) -> None:
        x = torch.from_numpy(samples(1)[0]).to(gpu.device)
        with gpu.batcher(N) as batcher:
            assert_same(batcher.encode(x), gpu.encode(x, N))
            assert_same(run(batcher.encode_async(x)), gpu.encode(x, N))
            with pytest.raises(qdp.ZeroNormError):
                batcher.encode(torch.zeros_like(x))
            gpu.check()  # it was raised where it belongs


BAD: list[tuple[Any, type[Exception]]] = [
    (np.full(DIM, np.nan), qdp.NonFiniteError),
    (np.full(DIM, -np.inf), qdp.NonFiniteError),
    (np.zeros(DIM), qdp.ZeroNormError),
    (np.full(DIM, 1e200), qdp.NormOverflowError),
    (np.ones(DIM + 1), qdp.FeatureCountError),
    (np.ones((2, 2, 2)), qdp.ShapeError),
    (np.array(["a"] * DIM), qdp.DTypeError),
    ([1.0, [2.0]], qdp.ShapeError),
    (None, qdp.DTypeError),
]


class TestIsolation:
    @pytest.mark.parametrize(("bad", "error"), BAD)
    @pytest.mark.parametrize("place", [0, 3, 6])
    def test_a_bad_request_fails_alone(
        self, engine: qdp.Engine, bad: Any, error: type[Exception], place: int
    ) -> None:
        data: list[Any] = list(samples(6))
        data.insert(place, bad)
        with engine.batcher(N, max_delay_us=NEVER_US) as batcher:

            async def main() -> list[Any]:
                tasks = [asyncio.create_task(batcher.encode_async(x)) for x in data]
                await asyncio.sleep(0)
                batcher.close()
                return list(await asyncio.gather(*tasks, return_exceptions=True))

            results = run(main())
            assert batcher.stats()["batches"] == 1
        failed = results.pop(place)
        assert type(failed) is error
        with pytest.raises(error) as alone:
            engine.encode(bad, N)
        assert str(failed) == str(alone.value)
        assert vars(failed) == vars(alone.value)
        for x, state in zip(data[:place] + data[place + 1 :], results, strict=True):
            assert_same(state, engine.encode(x, N))

    @pytest.mark.parametrize(
        ("encoding", "bad"),
        [
            ("basis", [0, 2, 0]),
            ("basis", [8]),
            ("basis", [0.5]),
            ("angle", [0, np.inf, 0]),
            ("zz", [np.nan, 1, 2]),
            ("angle", [1j, 0, 0]),
        ],
    )
    def test_in_threads(self, engine: qdp.Engine, encoding: str, bad: Any) -> None:
        good = np.ones(len(bad))
        with pytest.raises(qdp.QdpError) as alone:
            engine.encode(np.array(bad), N, encoding)
        with engine.batcher(N, encoding, max_delay_us=5000) as batcher:

            def work(thread: int) -> Any:
                try:
                    return batcher.encode(np.array(bad) if thread % 4 == 0 else good)
                except qdp.QdpError as error:
                    return error

            for thread, result in enumerate(in_threads(12, work)):
                if thread % 4 == 0:
                    assert type(result) is type(alone.value)
                    assert str(result) == str(alone.value)
                else:
                    assert_same(result, engine.encode(good, N, encoding))

    def test_the_sample_is_counted_in_the_request(self, engine: qdp.Engine) -> None:
        data = samples(4)
        data[2, 5] = np.nan
        with engine.batcher(N, max_delay_us=1000) as batcher:
            with pytest.raises(qdp.NonFiniteError) as error:
                batcher.encode(data)
            assert (error.value.sample, error.value.position) == (2, 5)

    def test_arguments(self, engine: qdp.Engine) -> None:
        x = samples(1)[0]
        with engine.batcher(N) as batcher:
            with pytest.raises(qdp.InvalidArgumentError):
                batcher.encode(x, 0)
            with pytest.raises(qdp.InvalidArgumentError):
                batcher.encode(x, encoding="none")
            with pytest.raises(qdp.InvalidArgumentError, match="deadline"):
                batcher.encode(x, deadline=float("nan"))
            with pytest.raises(TypeError):
                batcher.encode(x, priority="high")  # type: ignore[arg-type]
            assert_same(batcher.encode(x), engine.encode(x, N))

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("max_delay_us", -1.0),
            ("max_delay_us", float("nan")),
            ("max_delay_us", 1e12),
            ("max_batch_bytes", 0),
            ("max_batch_samples", -1),
            ("max_batch_samples", True),
            ("queue", 0),
            ("queue", 1.5),
            ("when_full", "drop"),
        ],
    )
    def test_settings(self, engine: qdp.Engine, argument: str, value: Any) -> None:
        with pytest.raises(qdp.InvalidArgumentError, match=argument):
            engine.batcher(N, **{argument: value})


class TestOrder:
    def test_a_level_keeps_its_order_and_higher_ones_start_first(self, engine: qdp.Engine) -> None:
        order: list[tuple[int, int]] = []
        data = samples(30)
        with engine.batcher(N, max_delay_us=NEVER_US) as batcher:

            async def one(i: int) -> None:
                await batcher.encode_async(data[i], priority=i % 3)
                order.append((-(i % 3), i))

            async def main() -> None:
                tasks = [asyncio.create_task(one(i)) for i in range(len(data))]
                await asyncio.sleep(0)
                batcher.close()
                await asyncio.gather(*tasks)

            run(main())
            assert batcher.stats()["batches"] == 3
        assert order == sorted(order)

    def test_batches_of_one_start_in_order(self, engine: qdp.Engine) -> None:
        order = []
        data = samples(20)
        with engine.batcher(N, max_batch_samples=1) as batcher:

            async def one(i: int) -> None:
                await batcher.encode_async(data[i])
                order.append(i)

            async def main() -> None:
                await asyncio.gather(*map(one, range(len(data))))

            run(main())
        assert order == list(range(len(data)))
