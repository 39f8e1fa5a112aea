"""Scopes that collect requests, and encode_list: the states of one encode after another."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PRECISIONS
from test_api import run_python
from test_input import COMPLEX, FLOATS, INTEGERS

RNG = np.random.default_rng()
DTYPES = (*FLOATS, *INTEGERS, *COMPLEX)

#: Thresholds that flush now and then, at every request, or never.
THRESHOLDS: list[dict[str, Any]] = [{}, {"max_samples": 3}, {"max_samples": 1}, {"max_bytes": 4096}]


def content(state: Any) -> tuple[tuple[int, ...], np.dtype[Any], bytes]:
    """What makes states the same to the last bit."""
    amplitudes = state.numpy()
    return amplitudes.shape, amplitudes.dtype, amplitudes.tobytes()


class TestStates:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_each_request_is_as_if_alone(self, engine_for: Any, case: Any, precision: Any) -> None:
        engine, options = engine_for(precision), case.options(5)
        x = case.samples(5, batch=7)
        with engine.coalesce(5, case.encoding, **options) as batch:
            handles = [batch.submit(row) for row in x]
        for handle, row in zip(handles, x, strict=True):
            alone = engine.encode(row, 5, case.encoding, **options)
            assert content(handle.result()) == content(alone)
        together = content(engine.encode(x, 5, case.encoding, **options))
        assert content(batch.states) == together
        assert content(engine.encode_list(list(x), 5, case.encoding, **options)) == together

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype_and_stride(self, engine: qdp.Engine, dtype: str) -> None:
        x = RNG.integers(1, 100, size=(6, 40)).astype(dtype)
        views = [x[0], x[1, ::2], x[2, ::-1], x[3:5], x[5:6, 3:9], x[:, 1]]
        with engine.coalesce(6) as batch:
            handles = [batch.submit(view) for view in views]
        for handle, view in zip(handles, views, strict=True):
            assert content(handle.result()) == content(engine.encode(view, 6))

    @pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
    def test_thresholds_lose_and_reorder_nothing(
        self, engine: qdp.Engine, thresholds: dict[str, Any]
    ) -> None:
        sizes = RNG.integers(0, 4, size=50)
        x = [RNG.normal(size=(k, 128)) if k else RNG.normal(size=128) for k in sizes]
        with engine.coalesce(7, **thresholds) as batch:
            handles = [batch.submit(samples) for samples in x]
        for handle, samples in zip(handles, x, strict=True):
            assert content(handle.result()) == content(engine.encode(samples, 7))
        whole = np.concatenate([samples.reshape(-1, 128) for samples in x])
        for _ in range(2):
            assert content(batch.states) == content(engine.encode(whole, 7))
        for handle, samples in zip(handles, x, strict=True):  # now views of what was put together
            assert content(handle.result()) == content(engine.encode(samples, 7))
        stats = batch.stats()
        assert stats["samples"] == len(whole)
        assert sum(stats["flushed_samples"].values()) == sum(stats["flushes"].values())
        if "max_samples" in thresholds:
            assert stats["flushes"]["max_samples"] > 0
        if "max_bytes" in thresholds:
            assert stats["flushes"]["max_bytes"] > 0
            assert stats["passed_through"] == sum(samples.nbytes > 4096 for samples in x)

    def test_views_of_one_batch(self, engine: qdp.Engine) -> None:
        with engine.coalesce(3) as batch:
            handles = [batch.submit(RNG.normal(size=8)) for _ in range(5)]
        whole = batch.states.__dlpack__()
        del whole
        if engine.device == "cpu":
            base = batch.states.numpy()
            for k, handle in enumerate(handles):
                assert np.shares_memory(handle.result().numpy(), base[k])

    def test_amplitudes_of_any_length(self, engine: qdp.Engine) -> None:
        x = [RNG.normal(size=int(k)) for k in RNG.integers(1, 4097, size=300)]
        states = engine.encode_list(x, 12)
        for k, sample in enumerate(x):
            assert content(states[k]) == content(engine.encode(sample, 12)[0])

    def test_long_samples(self, engine: qdp.Engine) -> None:
        x = [RNG.normal(size=k) for k in (2**20, 5, 2**21 - 3, 2**21)]
        states = engine.encode_list(x, 21)
        for k, sample in enumerate(x):
            reference.assert_states(states[k : k + 1].numpy(), sample[None], 21, "amplitude")

    def test_samples_that_need_scaling_on_their_way(self, engine_for: Any) -> None:
        engine = engine_for("complex64")
        x = [RNG.normal(size=64) * 10.0**power for power in (0, -60, 70, 1, -140, 150)]
        states = engine.encode_list(x, 6)
        for k, sample in enumerate(x):
            assert content(states[k]) == content(engine.encode(sample, 6)[0])

    def test_several_dtypes_have_the_widest_precision(self, engine: qdp.Engine) -> None:
        values = RNG.integers(1, 50, size=16)
        kinds = ["uint8", "float16", "float32", "int32", "complex64", "int64", "float64"]
        with engine.coalesce(4) as batch:
            handles = [batch.submit(values.astype(kind)) for kind in kinds]
        assert batch.states.dtype == np.complex128
        expected = engine.encode(values.astype("float64"), 4).numpy()
        for handle in handles:
            np.testing.assert_allclose(handle.result().numpy(), expected, rtol=0, atol=1e-15)
        narrow = engine.encode_list([values.astype(kind) for kind in kinds[:3]], 4)
        assert narrow.dtype == np.complex64
        large = engine.encode_list([np.array([2**29 + 1]).astype("int32"), [1.0]], 30 - 10)
        assert large.shape == (2, 2**20)

    def test_where_values_lie_changes_no_bit(self, engine: qdp.Engine) -> None:
        x = RNG.random((9, 64), dtype=np.float32)
        want = engine.encode(x, 6)
        whole = np.zeros((9, 128), dtype=np.float32)
        whole[:, ::2] = x
        for other in (np.asfortranarray(x), whole[:, ::2], x[:, ::-1].copy()[:, ::-1]):
            assert content(engine.encode(other, 6)) == content(want)
            assert content(engine.encode_list([other], 6)) == content(want)
            assert content(engine.encode_list(list(other), 6)) == content(want)

    def test_bits_and_indices(self, engine: qdp.Engine) -> None:
        x = [[1, 0, 1], [6], [[0, 1, 1], [1, 1, 1]], [2]]
        with engine.coalesce(3, "basis") as batch:
            handles = [batch.submit(bits) for bits in x]
        for handle, bits in zip(handles, x, strict=True):
            assert content(handle.result()) == content(engine.encode(bits, 3, "basis"))
        assert np.argmax(np.abs(batch.states.numpy()), axis=1).tolist() == [5, 6, 6, 7, 2]

    def test_everything_that_encode_takes(self, engine: qdp.Engine, torch: Any) -> None:
        x = RNG.normal(size=8)
        kinds = [x, x.tolist(), tuple(x), torch.tensor(x), x.astype(">f8"), x[None]]
        for handle in self.submitted(engine, kinds):
            assert content(handle.result()) == content(engine.encode(x, 3))

    def submitted(self, engine: qdp.Engine, data: list[Any]) -> list[qdp.CoalesceHandle]:
        with engine.coalesce(3) as batch:
            return [batch.submit(item) for item in data]

    def test_nothing(self, engine: qdp.Engine) -> None:
        with engine.coalesce(3) as batch:
            pass
        assert batch.states.shape == (0, 8)
        assert len(batch) == 0
        assert engine.encode_list([], 3).shape == (0, 8)
        with engine.coalesce(3) as batch:
            handle = batch.submit(np.empty((0, 8)))
        assert handle.result().shape == (0, 8)

    @pytest.mark.gpu
    def test_data_on_the_device(self, gpu: qdp.Engine, torch: Any) -> None:
        x = torch.randn(6, 256, device="cuda", dtype=torch.float64)
        kinds = [x[0], x[1].cpu().numpy(), x[2:4], x[4].cpu(), x[5]]
        with gpu.coalesce(8) as batch:
            handles = [batch.submit(item) for item in kinds]
        assert content(batch.states) == content(gpu.encode(x.cpu(), 8))
        rows = [handle.result().numpy() for handle in handles]
        assert (np.concatenate(rows) == batch.states.numpy()).all()
        assert content(gpu.encode_list(list(x), 8)) == content(gpu.encode(x, 8))

    @pytest.mark.gpu
    def test_a_stream_of_the_callers(self, gpu: qdp.Engine, torch: Any) -> None:
        stream = torch.cuda.Stream()
        x = [RNG.normal(size=2**12) for _ in range(50)]
        with gpu.coalesce(12, stream=stream) as batch:
            for sample in x:
                batch.submit(sample)
        with torch.cuda.stream(stream):
            norms = torch.linalg.vector_norm(torch.from_dlpack(batch.states), dim=1).cpu()
        assert torch.allclose(norms, torch.ones(50, dtype=torch.float64))


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "nan": ([1.0, np.nan, 0, 0], qdp.NonFiniteError),
    "zero": (np.zeros(4), qdp.ZeroNormError),
    "overflow": (np.full(4, 1e200), qdp.NormOverflowError),
    "too long": (np.ones(5), qdp.FeatureCountError),
    "empty": (np.ones(0), qdp.FeatureCountError),
    "dimensions": (np.ones((1, 1, 4)), qdp.ShapeError),
    "text": (np.array(["a", "b"]), qdp.DTypeError),
    "no array": (object(), qdp.QdpError),
    "ragged": ([[1.0], [1.0, 2.0]], qdp.ShapeError),
}


class TestIsolation:
    @pytest.mark.parametrize("kind", BAD)
    @pytest.mark.parametrize("place", [0, 3, 6])
    def test_a_bad_request_fails_alone(self, engine: qdp.Engine, kind: str, place: int) -> None:
        bad, error = BAD[kind]
        good = [RNG.normal(size=4) for _ in range(6)]
        data = [*good[:place], bad, *good[place:]]
        with engine.coalesce(2) as batch:
            handles = [batch.submit(item) for item in data]
        for k, (handle, item) in enumerate(zip(handles, data, strict=True)):
            if k != place:
                assert content(handle.result()) == content(engine.encode(item, 2))
                assert handle.exception() is None
                continue
            for _ in range(2):
                with pytest.raises(error) as caught:
                    handle.result()
            assert type(handle.exception()) is type(caught.value)
            with pytest.raises(error) as alone:
                engine.encode(item, 2)
            assert str(caught.value) == str(alone.value)
            assert handle.done()
            assert not handle.cancelled()
        with pytest.raises(error) as caught:
            _ = batch.states
        assert caught.value.__notes__ == [f"in element {place}"]
        assert getattr(caught.value, "sample", place) == place
        assert batch.stats()["failed"] == 1
        with pytest.raises(error) as caught:
            engine.encode_list(data, 2)
        assert caught.value.__notes__ == [f"in element {place}"]
        states = engine.encode_list(good, 2)  # goes on
        assert content(states) == content(engine.encode(np.stack(good), 2))

    def test_many_bad_requests(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(500, 256))
        bad = RNG.choice(500, size=100, replace=False)
        x[bad, RNG.integers(0, 256, size=100)] = np.nan
        with engine.coalesce(8) as batch:
            handles = [batch.submit(row) for row in x]
        for k, handle in enumerate(handles):
            if k in bad:
                error: Any = handle.exception()
                assert isinstance(error, qdp.NonFiniteError)
                assert (error.sample, np.isnan(x[k, error.position])) == (0, True)
            else:
                assert content(handle.result()) == content(engine.encode(x[k], 8))
        assert batch.stats()["failed"] == 100

    def test_a_bad_sample_of_several(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(4, 8))
        x[2] = 0
        with engine.coalesce(3) as batch:
            first, bad, last = batch.submit(x[:2]), batch.submit(x[1:]), batch.submit(x[3])
        assert content(first.result()) == content(engine.encode(x[:2], 3))
        assert content(last.result()) == content(engine.encode(x[3], 3))
        with pytest.raises(qdp.ZeroNormError) as caught:
            bad.result()
        assert caught.value.sample == 1
        with pytest.raises(qdp.ZeroNormError) as caught:
            _ = batch.states
        assert caught.value.sample == 3

    def test_all_bad(self, engine: qdp.Engine) -> None:
        with engine.coalesce(3, "angle") as batch:
            handles = [batch.submit([np.inf, 0, 0]) for _ in range(3)]
        assert all(isinstance(h.exception(), qdp.NonFiniteError) for h in handles)

    def test_a_result_that_does_not_fit_is_everybodys_error(self, engine: qdp.Engine) -> None:
        batch = engine.coalesce(45)
        handles = [batch.submit([1.0, 2.0]) for _ in range(3)]
        with pytest.raises(qdp.OutOfMemoryError):
            batch.flush()
        assert all(isinstance(h.exception(), qdp.OutOfMemoryError) for h in handles)
        with pytest.raises(qdp.OutOfMemoryError), engine.coalesce(45) as batch:
            batch.submit([1.0])
        with pytest.raises(qdp.OutOfMemoryError):
            engine.encode_list([[1.0]], 45)

    @pytest.mark.gpu
    def test_bad_data_on_the_device(self, gpu: qdp.Engine, torch: Any) -> None:
        x = torch.randn(3, 8, device="cuda")
        x[1, 2] = torch.nan
        handles = []
        with gpu.coalesce(3) as batch:
            for row in (*x, x[0].cpu(), x[2]):
                handles.append(batch.submit(row))
                torch.cuda.synchronize()  # what is wrong is known by the next request
        with pytest.raises(qdp.NonFiniteError):
            handles[1].result().numpy()
        for good in (0, 2, 3, 4):
            assert abs(np.linalg.norm(handles[good].result().numpy()) - 1) < 1e-6

    @pytest.mark.gpu
    def test_bad_data_of_other_calls(self, gpu: qdp.Engine, torch: Any) -> None:
        """It is raised where no request is to blame, and not lost."""
        bad, good = torch.full((8,), torch.nan, device="cuda"), torch.ones(8, device="cuda")

        def known() -> None:
            gpu.encode(bad, 3)
            torch.cuda.synchronize()

        known()
        with pytest.raises(qdp.NonFiniteError):
            gpu.coalesce(3)
        with gpu.coalesce(3) as batch:
            known()
            handles = [batch.submit(good), batch.submit(np.ones(8))]
        with gpu.batcher(3) as batcher:
            results = [batcher.encode(good), batcher.encode(np.ones(8))]
            results.append(asyncio.run(batcher.encode_async(np.ones(8))))
        results += [handle.result() for handle in handles]
        for result in results:
            assert abs(np.linalg.norm(result.numpy()) - 1) < 1e-6
        with pytest.raises(qdp.NonFiniteError):
            gpu.check()
        gpu.check()


class TestScope:
    def test_a_body_that_raises(self, engine: qdp.Engine) -> None:
        handles = []
        with pytest.raises(KeyError), engine.coalesce(2) as batch:  # noqa: PT012 - a body's end
            handles = [batch.submit(RNG.normal(size=4)) for _ in range(3)]
            raise KeyError
        assert batch.stats()["cancelled"] == 3
        assert batch.stats()["flushes"]["demand"] == 0
        for handle in handles:
            assert handle.cancelled()
            assert handle.done()
            with pytest.raises(CancelledError):
                handle.result()
        with pytest.raises(CancelledError):
            _ = batch.states

    def test_what_was_encoded_before_stays(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(3, 4))
        with pytest.raises(KeyError), engine.coalesce(2) as batch:  # noqa: PT012 - a body's end
            done = batch.submit(x[0])
            batch.flush()
            waiting = batch.submit(x[1])
            raise KeyError
        assert content(done.result()) == content(engine.encode(x[0], 2))
        assert waiting.cancelled()
        assert not done.cancelled()

    def test_a_result_within_the_scope(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(3, 4))
        with engine.coalesce(2) as batch:
            first = batch.submit(x[0])
            assert not first.done()
            assert repr(first).endswith("waiting>")
            assert content(first.result()) == content(engine.encode(x[0], 2))
            assert first.done()
            assert repr(first).endswith("done>")
            second = batch.submit(x[1:])
            assert len(batch) == 2
            assert "1 of them waiting" in repr(batch)
        assert content(second.result()) == content(engine.encode(x[1:], 2))
        assert content(batch.states) == content(engine.encode(x, 2))

    def test_after_its_end(self, engine: qdp.Engine) -> None:
        with engine.coalesce(2) as batch:
            batch.submit(np.ones(4))
        with pytest.raises(qdp.InvalidArgumentError, match="scope"):
            batch.submit(np.ones(4))
        with pytest.raises(qdp.InvalidArgumentError, match="scope"):
            batch.submit([1.0])
        batch.flush()
        assert len(batch.states) == 1

    @pytest.mark.parametrize("name", ["max_samples", "max_bytes"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
    def test_bad_thresholds(self, engine: qdp.Engine, name: str, value: Any) -> None:
        with pytest.raises(qdp.InvalidArgumentError, match=name):
            engine.coalesce(2, **{name: value})

    def test_bad_options(self, engine: qdp.Engine) -> None:
        with pytest.raises(qdp.InvalidArgumentError, match="encoding"):
            engine.coalesce(2, "nothing")
        with pytest.raises(qdp.InvalidArgumentError, match="data"):
            engine.encode_list(3, 2)  # type: ignore[arg-type]

    def test_data_is_kept_and_let_go(self, engine: qdp.Engine) -> None:
        class Array(np.ndarray[Any, Any]):
            """An array that weak references can be made to."""

        def array() -> Any:
            return RNG.normal(size=4).view(Array)

        plain = RNG.normal(size=4)
        before = sys.getrefcount(plain)
        batch = engine.coalesce(2)
        x = array()
        alive = weakref.ref(x)
        batch.submit(x)
        batch.submit(plain)
        del x
        gc.collect()
        assert alive() is not None
        assert sys.getrefcount(plain) == before + 1
        batch.flush()
        gc.collect()
        assert alive() is None
        assert sys.getrefcount(plain) == before
        x = array()
        alive = weakref.ref(x)
        batch.submit(x)
        del x, batch
        gc.collect()
        assert alive() is None  # nobody encoded it, and nobody will

    def test_states_outlive_everything(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(20, 64))
        batch = engine.coalesce(6)
        handles = [batch.submit(row) for row in x]
        states = [handle.result() for handle in handles]
        want = engine.encode(x, 6).numpy()
        del batch, handles
        gc.collect()
        assert (np.concatenate([state.numpy() for state in states]) == want).all()

    def test_threads(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(8, 100, 64))
        start = threading.Barrier(8)
        with engine.coalesce(6, max_samples=37) as batch:

            def work(rows: Any) -> list[Any]:
                start.wait()
                handles = []
                for k, row in enumerate(rows):
                    handles.append(batch.submit(row))
                    if k % 31 == 5:
                        handles[-1].result()
                return handles

            with ThreadPoolExecutor(8) as pool:
                handles = list(pool.map(work, x))
        assert len(batch) == len(batch.states) == 800
        for mine, rows in zip(handles, x, strict=True):
            for handle, row in zip(mine, rows, strict=True):
                assert content(handle.result()) == content(engine.encode(row, 6))

    def test_the_callers_array_may_change_behind_the_flush(self, engine: qdp.Engine) -> None:
        x = RNG.normal(size=(100, 1024))
        want = engine.encode(x, 10).numpy()
        with engine.coalesce(10) as batch:
            for row in x:
                batch.submit(row)
        x[:] = np.nan
        assert (batch.states.numpy() == want).all()

    def test_a_signals_handler_cannot_use_it_while_it_encodes(self) -> None:
        """It would wait for the thread that it interrupts."""
        code = (
            "import faulthandler, signal, numpy as np, qdp\n"
            "faulthandler.dump_traceback_later(60, exit=True)\n"
            "engine = qdp.Engine('cpu', precision='complex64')\n"
            "x = np.random.default_rng(7).uniform(-1, 1, size=14)\n"
            "def ring(*_): len(batch)\n"
            "signal.signal(signal.SIGALRM, ring)\n"
            "batch = engine.coalesce(14, 'zz', reps=300)\n"
            "handles = [batch.submit(x) for _ in range(2**11)]\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
            "try: batch.flush()\n"
            "except RuntimeError as error: print(error)\n"
            "print(handles[0].cancelled(), len(batch))\n"
        )
        lines = run_python(code).splitlines()
        assert "signal" in lines[0]
        assert lines[1:] == ["True 2048"]

    def test_an_interrupt_is_no_error_of_a_request(self) -> None:
        code = (
            "import signal, numpy as np, qdp\n"
            "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
            "engine = qdp.Engine('cpu', precision='complex64')\n"
            "x = np.random.default_rng(7).uniform(-1, 1, size=(2**11, 14))\n"
            "for ask in ('result', 'exception'):\n"
            "    handle = engine.coalesce(14, 'zz', reps=300).submit(x)\n"
            "    signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
            "    try: print(getattr(handle, ask)())\n"
            "    except BaseException as error: print(type(error).__name__)\n"
        )
        assert run_python(code).split() == ["KeyboardInterrupt"] * 2

    def test_an_exception_may_ask_the_batch(self, engine: qdp.Engine) -> None:
        class AskingError(Exception):
            def __str__(self) -> str:
                return f"behind {len(batch)} requests"

        class Data:
            @property
            def __dlpack__(self) -> Any:
                raise AskingError

        batch = engine.coalesce(2)
        handle = batch.submit(Data())
        with pytest.raises(AskingError):
            handle.result()

    def test_what_its_exceptions_hold_is_found_by_the_collector(self, engine: qdp.Engine) -> None:
        class Marker:
            """Something that weak references can be made to."""

        class Data:
            @property
            def __dlpack__(self) -> Any:
                raise ValueError

        def use() -> Any:
            marker = Marker()
            batch = engine.coalesce(2)
            handle = batch.submit(Data())
            try:
                handle.result()
            except Exception:  # noqa: BLE001 - whose traceback refers to this frame
                return weakref.ref(marker)

        alive = use()
        gc.collect()
        assert alive() is None
