"""Engine.stream: a source of any length, batch by batch, in constant memory."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES
from devices import on_device
from test_api import run_python
from test_async import busy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N = 3


def samples(count: int = 25) -> Any:
    return np.random.default_rng(count).normal(size=(count, 2**N))


class Source:
    """An iterator that knows how many items were taken, and whether it was closed."""

    def __init__(self, items: Any, error: BaseException | None = None) -> None:
        self.items = iter(items)
        self.error = error
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            item = next(self.items)
        except StopIteration:
            if self.error is not None:
                raise self.error from None
            raise
        self.taken += 1
        return item

    def close(self) -> None:
        self.closed = True


class Exporter:
    """An array that only DLPack can describe."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def check(stream: qdp.StateStream, x: Any, sizes: list[int]) -> None:
    states = [state.numpy() for state in stream]
    assert [len(state) for state in states] == sizes
    reference.assert_states(np.concatenate(states), x, N, "amplitude")


class TestSources:
    SIZES = (10, 10, 5)

    def kinds(self, x: Any, tmp_path: Path) -> list[Any]:
        torch = pytest.importorskip("torch")
        np.save(tmp_path / "samples.npy", x)
        mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
        tensor = torch.from_numpy(x)
        batches = [x[:10], x[10:20], x[20:]]
        arrays = [x, mapped, tensor, Exporter(x), np.asfortranarray(x), x.astype(">f8")]
        return [
            *arrays,
            x.tolist(),
            iter(x),
            (row.tolist() for row in x),
            iter(tensor),
            batches,
            map(torch.from_numpy, batches),
            (batch.tolist() for batch in batches),
        ]

    def test_of_any_kind(self, engine: qdp.Engine, tmp_path: Path) -> None:
        x = samples()
        for source in self.kinds(x, tmp_path):
            check(engine.stream(source, N, batch_size=10), x, [*self.SIZES])

    @pytest.mark.parametrize("prefetch", [0, 1, 2, 100])
    def test_whatever_the_prefetch(self, prefetch: int, engine: qdp.Engine) -> None:
        x = samples()
        check(engine.stream(x, N, batch_size=4, prefetch=prefetch), x, [4] * 6 + [1])

    @pytest.mark.gpu
    def test_on_the_device(self, gpu: qdp.Engine) -> None:
        x = samples()
        for source in (on_device(x), Exporter(on_device(x)), iter(on_device(x))):
            check(gpu.stream(source, N, batch_size=10), x, [*self.SIZES])

    def test_options(self, engine: qdp.Engine) -> None:
        for case in CASES:
            x, options = case.samples(4, batch=7), case.options(4)
            stream = engine.stream(x, 4, case.encoding, batch_size=3, **options)
            states = np.concatenate([state.numpy() for state in stream])
            expected = engine.encode(x, 4, case.encoding, **options).numpy()
            np.testing.assert_array_equal(states, expected)

    def test_empty(self, engine: qdp.Engine) -> None:
        sources: list[Any] = [np.empty((0, 8)), [], iter(())]
        for source in sources:
            assert list(engine.stream(source, N)) == []

    def test_slices_are_views(self, engine: qdp.Engine) -> None:
        """Of an array nothing is read before its batch is due."""
        x = samples(40)
        stream = engine.stream(x, N, batch_size=10, prefetch=0)
        for k, state in enumerate(stream):
            reference.assert_states(state.numpy(), x[10 * k : 10 * k + 10], N, "amplitude")
            x[10 * k + 10 :] *= -2

    def test_default_batch_size(self, engine: qdp.Engine, monkeypatch: Any) -> None:
        from qdp import _stream

        x = samples(100)
        check(engine.stream(x, N), x, [100])
        monkeypatch.setattr(_stream, "MAX_RESULT_BYTES", 40 * 16 * 2**N)
        check(engine.stream(x, N), x, [40, 40, 20])
        check(engine.stream(iter(x), N), x, [40, 40, 20])
        check(engine.stream(iter([x]), N), x, [100])
        single = [len(state) for state in engine.stream(x.astype(np.float32), N)]
        assert single == [80, 20]

    def test_default_batch_size_leaves_memory(self) -> None:
        from qdp._stream import default_batch_size

        class Small:
            precision = None

            def memory_info(self) -> dict[str, int]:
                return {"free": 1 << 20, "total": 1 << 30, "reserved": 1 << 20, "used": 0}

        engine: Any = Small()
        for prefetch in (0, 2, 6):
            size = default_batch_size(engine, 2**10, prefetch, np.empty(1))
            assert size * 2**10 * 16 * (prefetch + 2) == (2 << 20) // 4
        assert default_batch_size(engine, 2**40, 2, np.empty(1)) == 1

    def test_rows_of_tables_are_samples(self, engine: qdp.Engine) -> None:
        pa = pytest.importorskip("pyarrow")
        x = samples(10)
        table = pa.table({str(k): column for k, column in enumerate(x.T)})
        rows = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 2**N)
        batches = table.to_batches(max_chunksize=4)
        for source in (table, batches[0], table.to_reader(), batches, rows):
            got = [states.numpy() for states in engine.stream(source, N, batch_size=3)]
            count = sum(map(len, got))
            assert (np.concatenate(got) == engine.encode(x[:count], N).numpy()).all()
            assert count == (4 if source is batches[0] else 10)

    def test_samples_that_share_a_buffer(self, engine: qdp.Engine) -> None:
        def source() -> Iterator[Any]:
            buffer = np.empty(2**N)
            for sample in x:
                buffer[:] = sample
                yield buffer

        x = samples(10)
        (states,) = engine.stream(source(), N, batch_size=10)
        assert (states.numpy() == engine.encode(x, N).numpy()).all()

    def test_items_that_only_export(self, engine: qdp.Engine) -> None:
        x = samples(7)
        (first, last) = engine.stream([Exporter(x[:3]), Exporter(x[3:])], N)
        whole = np.concatenate([first.numpy(), last.numpy()])
        assert (whole == engine.encode(x, N).numpy()).all()
        (states,) = engine.stream([Exporter(sample) for sample in x], N, batch_size=9)
        assert (states.numpy() == whole).all()


class TestLaziness:
    @pytest.mark.parametrize("prefetch", [0, 1, 3])
    def test_takes_no_more_than_it_says(self, prefetch: int, engine: qdp.Engine) -> None:
        source = Source([samples(2)] * 10)
        stream = engine.stream(source, N, prefetch=prefetch)
        assert source.taken == 0
        for k, _ in enumerate(stream):
            assert source.taken == min(k + 1 + prefetch, 10)

    def test_endless(self, engine: qdp.Engine) -> None:
        def rows() -> Iterator[Any]:
            while True:
                yield np.ones(8)

        with engine.stream(rows(), N, batch_size=5) as stream:
            for _ in range(20):
                assert next(stream).shape == (5, 8)

    def test_memory_is_constant(self, device: str) -> None:
        """Results that are dropped are used again; their number does not matter."""
        engine = qdp.Engine(device)
        x = np.ones((8, 2**14))
        used = set()
        for state in engine.stream((x for _ in range(60)), 14, prefetch=2):
            state.synchronize()
            used.add(state.torch().data_ptr())
        # Four are alive at a time; the device frees in its own order, somewhat later.
        assert len(used) <= 12

    def test_what_is_kept_stays(self, engine: qdp.Engine) -> None:
        x = np.random.default_rng(1).normal(size=(200, 2**10))
        states = list(engine.stream(x, 10, batch_size=10))
        for k, state in enumerate(states):
            reference.assert_states(state.numpy(), x[10 * k :][:10], 10, "amplitude")


class TestErrors:
    @pytest.mark.parametrize("prefetch", [0, 2, 5])
    def test_of_the_source_come_in_their_place(self, prefetch: int, engine: qdp.Engine) -> None:
        source = Source([samples(2)] * 3, OSError("unreadable"))
        stream = engine.stream(source, N, prefetch=prefetch)
        for _ in range(3):
            next(stream)
        with pytest.raises(OSError, match="unreadable"):
            next(stream)
        assert list(stream) == []

    @pytest.mark.parametrize("prefetch", [0, 2, 5])
    def test_of_an_encode_come_in_their_place(self, prefetch: int, engine: qdp.Engine) -> None:
        x = samples(30)
        x[17] = 0
        stream = engine.stream(x, N, batch_size=5, prefetch=prefetch)
        for _ in range(3):
            next(stream)
        with pytest.raises(qdp.ZeroNormError) as caught:
            next(stream)
        assert caught.value.sample == 2
        assert caught.value.__notes__ == ["it is sample 17 of the stream"]
        assert list(stream) == []

    @pytest.mark.parametrize(
        ("items", "good"),
        [
            ([np.ones((2, 8)), np.ones((2, 9))], 1),
            ([np.ones((2, 8)), np.ones((2, 2, 2))], 1),
            ([np.ones(8), np.ones(8), np.ones(7)], 1),
            ([np.ones(8), np.ones((2, 8))], 0),
            ([1.0, 2.0], 0),
            ([None], 0),
        ],
    )
    def test_of_shapes(self, items: Any, good: int, engine: qdp.Engine) -> None:
        stream = engine.stream(items, N, batch_size=2)
        for _ in range(good):
            next(stream)
        with pytest.raises(qdp.QdpError):
            next(stream)
        assert list(stream) == []

    @pytest.mark.parametrize(
        ("source", "options"),
        [
            (np.ones(8), {}),
            (np.ones((2, 2, 2)), {}),
            (8, {}),
            (np.ones((2, 8)), {"batch_size": 0}),
            (np.ones((2, 8)), {"batch_size": True}),
            (np.ones((2, 8)), {"prefetch": -1}),
            (np.ones((2, 8)), {"convention": "none"}),
            (np.ones((2, 8)), {"validate": "never"}),
        ],
    )
    def test_of_arguments_come_at_the_call(
        self, source: Any, options: Any, engine: qdp.Engine
    ) -> None:
        with pytest.raises(qdp.QdpError):
            engine.stream(source, N, **options)


class TestEnd:
    def test_close_waits_for_the_encode_that_was_asked_for(self) -> None:
        code = (
            "import signal, numpy as np, qdp\n"
            "class Alarm(Exception): pass\n"
            "def ring(*_): raise Alarm\n"
            "signal.signal(signal.SIGALRM, ring)\n"
            "engine = qdp.Engine('cpu', precision='complex64')\n"
            "x = np.random.default_rng(7).uniform(-1, 1, size=(2**8, 14))\n"
            "futures = []\n"
            "submit = qdp._stream.StateStream._submit\n"
            "def noted(self, batch):\n"
            "    submit(self, batch)\n"
            "    futures.append(self._pending[-1][1])\n"
            "qdp._stream.StateStream._submit = noted\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
            "try: next(engine.stream([x, x], 14, 'zz', reps=300))\n"
            "except Alarm: print([future.done() for future in futures])\n"
        )
        assert run_python(code).strip() == "[True, True]"

    def test_close(self, engine: qdp.Engine) -> None:
        source = Source([samples(2)] * 10)
        stream = engine.stream(source, N)
        next(stream)
        stream.close()
        assert source.closed
        assert list(stream) == []
        stream.close()

    def test_pending_encodes_are_cancelled(self, engine: qdp.Engine) -> None:
        kept = []

        def batches() -> Iterator[Any]:
            for _ in range(5):
                batch = samples(2)
                kept.append(weakref.ref(batch))
                yield batch
                del batch

        with busy(engine):
            stream = engine.stream(batches(), N, prefetch=2)
            _, first = stream._next()
            assert len(kept) == 3
            stream.close()
            assert [batch() is None for batch in kept] == [True, True, True]
            assert first.cancelled()

    def test_dropping_it_ends_it(self, engine: qdp.Engine) -> None:
        gc.collect()
        gc.disable()
        try:
            source = Source([samples(2)] * 10)
            stream = engine.stream(source, N)
            for _ in stream:
                break
            gone = weakref.ref(stream)
            del stream
            assert gone() is None
            engine.encode_async(samples(2), N).result()  # behind what was being encoded
            assert source.closed
        finally:
            gc.enable()

    def test_the_engines_thread_may_collect_it(self, engine: qdp.Engine) -> None:
        """A stream in a cycle, found by a collection at the end of its own encode."""

        class Collecting(np.ndarray[Any, Any]):
            def __del__(self) -> None:
                if self.base is None:
                    gc.collect()

        def batches() -> Iterator[Any]:
            yield samples(2)
            batch = Collecting((2, 2**N))
            batch[:] = samples(2)
            yield batch
            del batch
            yield samples(2)

        gc.collect()
        gc.disable()
        try:
            with busy(engine):
                stream = engine.stream(batches(), N, prefetch=2)
                first = stream._next()[1]
                stream.cycle = stream  # type: ignore[attr-defined]
                gone = weakref.ref(stream)
                del stream
            first.result(timeout=60)
            engine.encode_async(samples(2), N).result(timeout=60)
            assert gone() is None
        finally:
            gc.enable()

    def test_at_exit(self, device: str) -> None:
        run_python(
            "import numpy as np, qdp\n"
            f"stream = qdp.Engine({device!r}).stream((np.ones((8, 2**16)) for _ in range(9)), 16)\n"
            "next(stream)\n"
        )


class TestAsync:
    def test_all(self, engine: qdp.Engine) -> None:
        x = samples()

        async def every() -> list[Any]:
            return [state.numpy() async for state in engine.stream(x, N, batch_size=10)]

        states = asyncio.run(every())
        assert [len(state) for state in states] == [10, 10, 5]
        reference.assert_states(np.concatenate(states), x, N, "amplitude")

    def test_errors(self, engine: qdp.Engine) -> None:
        x = samples()
        x[12] = np.inf

        async def every(states: list[Any]) -> None:
            async for state in engine.stream(x, N, batch_size=10):
                states.append(state)  # noqa: PERF401 - what came before the error is wanted

        states: list[Any] = []
        with pytest.raises(qdp.NonFiniteError) as caught:
            asyncio.run(every(states))
        assert caught.value.__notes__ == ["it is sample 12 of the stream"]
        assert len(states) == 1
