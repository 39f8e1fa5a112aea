"""encode_async: the states of encode, in order, through futures; and signals in long calls."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PLAIN_CASES
from devices import DEVICE, on_device
from test_api import run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 500_000_000  # clock cycles of a sleeping kernel: a quarter of a second or so


class Held(np.ndarray[Any, Any]):
    """Data that an engine's thread, where it lets go of it last, has to wait for."""

    opened: threading.Event | None = None
    owner = 0
    missed: list[Any]

    def __del__(self) -> None:
        if self.opened is None:
            return
        if threading.get_ident() == self.owner:
            self.missed.append(self.shape)
        else:
            self.opened.wait()


@contextmanager
def busy(engine: qdp.Engine) -> Iterator[qdp.EncodeFuture]:
    """The engine's thread is held up, letting go of its data, until the block is left."""
    opened = threading.Event()
    while True:
        missed: list[Any] = []
        data = np.ones((1, 2)).view(Held)
        data.opened, data.owner, data.missed = opened, threading.get_ident(), missed
        future = engine.encode_async(data, 1)
        del data
        if not missed:
            break
    try:
        yield future
    finally:
        opened.set()
        future.result()


class TestResults:
    def test_are_those_of_encode(self, engine: qdp.Engine) -> None:
        for case in CASES:
            for n in (2, 7):
                x, options = case.samples(n), case.options(n)
                future = engine.encode_async(x, n, case.encoding, **options)
                expected = engine.encode(x, n, case.encoding, **options)
                assert isinstance(future, qdp.EncodeFuture)
                np.testing.assert_array_equal(future.result().numpy(), expected.numpy())

    def test_precision_is_the_engines(self, engine_for: Callable[[Any], qdp.Engine]) -> None:
        for precision in ("complex64", "complex128"):
            state = engine_for(precision).encode_async([[1.0, 2.0]], 1).result()
            assert state.dtype == precision

    def test_any_kind_of_data(self, engine: qdp.Engine) -> None:
        torch = pytest.importorskip("torch")
        arrow = pytest.importorskip("pyarrow")
        x = np.random.default_rng(1).normal(size=(6, 4))
        table = arrow.table({str(k): x[:, k] for k in range(4)})
        kinds = [(data, x) for data in (x, x.tolist(), torch.from_numpy(x), table, x.astype(">f8"))]
        for data, rows in (*kinds, (x[::-1, ::2], x[::-1, ::2]), (x[0], x[:1])):
            states = engine.encode_async(data, 2).result().numpy()
            reference.assert_states(states, rows, 2, "amplitude")

    def test_out(self, engine: qdp.Engine, device: str) -> None:
        x = np.random.default_rng(2).normal(size=(6, 4))
        out: Any = np.empty((6, 4), np.complex128)
        if device != "cpu":
            out = on_device(out)
        for data in (x[::-1].copy(), x):
            future = engine.encode_async(data, 2, out=out)
        reference.assert_states(future.result().numpy(), x, 2, "amplitude")
        written = out if device == "cpu" else out.cpu().numpy()
        np.testing.assert_array_equal(future.result().numpy(), written)

    def test_in_the_order_of_the_calls(self, engine: qdp.Engine) -> None:
        order: list[int] = []

        def note(k: int, _: Any) -> None:
            order.append(k)

        with busy(engine):
            futures = [engine.encode_async(np.eye(4)[k % 4], 2) for k in range(20)]
            for k, future in enumerate(futures):
                future.add_done_callback(partial(note, k))
            assert not any(future.done() for future in futures)
        wait(futures)
        assert order == list(range(20))
        for k, future in enumerate(futures):
            assert future.result().numpy()[0, k % 4] == 1

    def test_as_completed(self, engine: qdp.Engine) -> None:
        futures: dict[Any, int] = {engine.encode_async(np.eye(8)[k], 3): k for k in range(8)}
        for future in as_completed(futures):
            assert future.result().numpy()[0, futures[future]] == 1

    def test_threads_share_an_engine(self, engine: qdp.Engine) -> None:
        def work(seed: int) -> None:
            for case in PLAIN_CASES:
                x = np.roll(case.samples(8, batch=8), seed, axis=0)
                futures = [engine.encode_async(x[k:], 8, case.encoding) for k in range(8)]
                for k, future in enumerate(futures):
                    reference.assert_states(future.result().numpy(), x[k:], 8, case.encoding)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


class TestErrors:
    def test_of_values_come_through_the_future(self, engine: qdp.Engine) -> None:
        x = np.ones((4, 4))
        x[2, 3] = np.nan
        bad = engine.encode_async(x, 2)
        good = engine.encode_async(np.ones((4, 4)), 2)
        with pytest.raises(qdp.NonFiniteError) as caught:
            bad.result()
        assert (caught.value.sample, caught.value.position) == (2, 3)
        assert isinstance(bad.exception(), qdp.NonFiniteError)
        assert good.result().shape == (4, 4)

    @pytest.mark.parametrize(
        ("arguments", "options", "error"),
        [
            ((np.ones((2, 3)), 1), {}, qdp.FeatureCountError),
            ((np.ones((2, 3, 4)), 2), {}, qdp.ShapeError),
            ((["a"], 2), {}, qdp.QdpError),
            ((np.ones(4), 2, "magic"), {}, qdp.InvalidArgumentError),
            ((np.ones(4), 2), {"validate": "later"}, qdp.InvalidArgumentError),
            ((np.ones(4), 2), {"stream": "s"}, qdp.InvalidArgumentError),
            ((np.ones(4), 2), {"out": [1]}, qdp.DTypeError),
        ],
    )
    def test_of_arguments_come_at_the_call(
        self, arguments: Any, options: Any, error: Any, engine: qdp.Engine
    ) -> None:
        with pytest.raises(error):
            engine.encode_async(*arguments, **options)

    def test_of_out_come_at_the_call(self, cpu: qdp.Engine) -> None:
        x = np.ones((2, 4), np.complex128)
        for out in (np.empty((3, 4), np.complex128), np.empty((2, 4)), x):
            with pytest.raises(qdp.QdpError):
                cpu.encode_async(x, 2, out=out)


class TestCancel:
    def test_before_it_starts(self, engine: qdp.Engine) -> None:
        called: list[Any] = []
        with busy(engine) as first:
            futures = [engine.encode_async([1.0, k], 1) for k in range(3)]
            futures[1].add_done_callback(called.append)
            assert futures[1].cancel()
            assert futures[1].cancel()
            assert futures[1].cancelled()
            assert futures[1].done()
            assert not futures[1].running()
            assert called == [futures[1]]
            while not first.running():
                time.sleep(1e-3)
            assert not first.cancel()
        with pytest.raises(CancelledError):
            futures[1].result()
        for k in (0, 2):
            states = futures[k].result().numpy()
            reference.assert_states(states, np.array([[1.0, k]]), 1, "amplitude")
            assert not futures[k].cancel()
            assert not futures[k].running()

    def test_by_many_at_once(self, engine: qdp.Engine) -> None:
        def cancel(future: qdp.EncodeFuture) -> None:
            future.cancel()
            assert future.cancelled() or not future.cancel()

        with ThreadPoolExecutor(4) as pool:
            for _ in range(50):
                future = engine.encode_async([1.0, 2.0], 1)
                list(pool.map(cancel, [future] * 4))
                wait([future])
                assert future.done()


class TestAwait:
    def test_many(self, engine: qdp.Engine) -> None:
        x = np.random.default_rng(3).normal(size=(8, 4, 16))

        async def encode(data: Any) -> Any:
            return (await engine.encode_async(data, 4)).numpy()

        async def every() -> Any:
            return await asyncio.gather(*map(encode, x))

        for data, states in zip(x, asyncio.run(every()), strict=True):
            reference.assert_states(states, data, 4, "amplitude")

    def test_errors(self, engine: qdp.Engine) -> None:
        async def bad() -> None:
            await engine.encode_async(np.zeros(4), 2)

        with pytest.raises(qdp.ZeroNormError):
            asyncio.run(bad())

    def test_cancelling_the_task_cancels_the_encode(self, engine: qdp.Engine) -> None:
        async def cancel(future: qdp.EncodeFuture) -> None:
            task = asyncio.ensure_future(future)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        with busy(engine):
            future = engine.encode_async([1.0, 2.0], 1)
            asyncio.run(cancel(future))
            assert future.cancelled()


class TestLifetimes:
    def test_data_is_kept_until_the_future_is_done(self, engine: qdp.Engine) -> None:
        x = np.random.default_rng(4).normal(size=(4, 2**10))
        for cancel in (False, True):
            with busy(engine):
                data = x.copy()
                gone = weakref.ref(data)
                future = engine.encode_async(data, 10)
                del data
                noise = [np.full_like(x, np.nan) for _ in range(4)]
                assert gone() is not None
                assert not cancel or future.cancel()
            wait([future])
            assert gone() is None
            assert len(noise) == 4
            if not cancel:
                reference.assert_states(future.result().numpy(), x, 10, "amplitude")

    def test_no_reference_cycles(self, engine: qdp.Engine) -> None:
        gc.collect()
        gc.disable()
        try:
            for cancel in (False, True):
                with busy(engine):
                    future = engine.encode_async(np.ones((2, 4)), 2)
                    assert not cancel or future.cancel()
                wait([future])
                # The thread is done with the future once it is done with the next one.
                engine.encode_async([1.0], 1).result()
                gone = weakref.ref(future)
                del future
                assert gone() is None
        finally:
            gc.enable()

    def test_the_engine_may_go_first(self, device: str) -> None:
        x = np.random.default_rng(5).normal(size=(8, 2**12))
        futures = []
        for k in range(8):
            engine = qdp.Engine(device)
            futures += [engine.encode_async(x[k:], 12), engine.encode_async(x, 12)]
        del engine
        for k in range(8):
            reference.assert_states(futures[2 * k].result().numpy(), x[k:], 12, "amplitude")

    def test_futures_may_go_first(self, cpu: qdp.Engine) -> None:
        out = np.empty((4, 2**10), np.complex128)
        x = np.random.default_rng(6).normal(size=(4, 2**10))
        cpu.encode_async(x, 10, out=out)
        cpu.encode_async([1.0], 1).result()
        reference.assert_states(out, x, 10, "amplitude")


class TestProcess:
    def test_exit_with_futures_pending(self, device: str) -> None:
        printed = run_python(
            "import atexit\n"
            "def at_exit():\n"  # runs after what was registered later
            "    print(all(future.done() for future in futures))\n"
            "    try: engine.encode_async([1.0], 1)\n"
            "    except RuntimeError: print('closed')\n"
            "atexit.register(at_exit)\n"
            "import numpy as np, qdp\n"
            f"engine = qdp.Engine({device!r})\n"
            "x = np.ones((16, 2**16))\n"
            "futures = [engine.encode_async(x, 16) for _ in range(100)]\n"
        )
        assert printed.split() == ["True", "closed"]

    def test_exit_while_daemons_encode(self, device: str) -> None:
        printed = run_python(
            "import threading, numpy as np, qdp\n"
            f"engine = qdp.Engine({device!r})\n"
            "started = threading.Event()\n"
            "def work():\n"
            "    while True:\n"
            "        future = engine.encode_async(np.ones((4, 2**12)), 12)\n"
            "        started.set()\n"
            "        future.result()\n"
            "for _ in range(4):\n"
            "    threading.Thread(target=work, daemon=True).start()\n"
            "threading.excepthook = lambda _: None\n"
            "started.wait()\n"
            "print(sum(thread.daemon for thread in threading.enumerate()))\n"
        )
        assert printed.split() == ["4"]

    def test_a_forked_child_encodes(self) -> None:
        script = (
            "import concurrent.futures, os, signal, numpy as np, qdp\n"
            "x = np.ones((64, 2**12))\n"
            "engine = qdp.Engine('cpu')\n"
            "want = engine.encode_async(x, 12).result().numpy()\n"
            "pending = [engine.encode_async(x, 12) for _ in range(20)]\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    signal.alarm(60)  # a hang ends the child\n"
            "    concurrent.futures.wait(pending)\n"
            "    for future in pending:\n"
            "        try: assert (future.result().numpy() == want).all()\n"
            "        except concurrent.futures.CancelledError: assert future.cancelled()\n"
            "    for own in (engine, qdp.Engine('cpu')):\n"
            "        assert (own.encode_async(x, 12).result(30).numpy() == want).all()\n"
            "    raise SystemExit(0)  # with its exit functions\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
            "assert all((future.result().numpy() == want).all() for future in pending)\n"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


class TestInterrupt:
    """A signal's handler raises in the middle of a call that would take many seconds."""

    CODE = (
        "import signal, threading, numpy as np, qdp\n"
        "class Alarm(Exception): pass\n"
        "def ring(*_): raise {exception}\n"
        "signal.signal(signal.SIGALRM, ring)\n"
        "engine = qdp.Engine('cpu', precision='complex64')\n"
        "x = np.random.default_rng(7).uniform(-1, 1, size=(2**11, 14))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "try: engine.encode(x, 14, 'zz', reps=300{out})\n"
        "except {exception} as error: print(type(error).__name__, error.__context__)\n"
        "assert abs(np.linalg.norm(engine.encode(x[0], 14, 'zz').numpy()) - 1) < 1e-5\n"
    )

    @pytest.mark.parametrize("exception", ["KeyboardInterrupt", "Alarm"])
    @pytest.mark.parametrize("out", ["", ", out=np.empty((2**11, 2**14), np.complex64)"])
    def test_ends_the_call(self, exception: str, out: str) -> None:
        printed = run_python(self.CODE.format(exception=exception, out=out))
        assert printed.split() == [exception, "None"]


@pytest.mark.gpu
class TestStreams:
    def test_device_data_is_encoded_at_the_call(self, gpu: qdp.Engine, torch: Any) -> None:
        values = np.random.default_rng(8).normal(size=(8, 2**10))
        source = on_device(values)
        gpu.encode(source, 10)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            x = torch.zeros_like(source)
            torch.cuda._sleep(LONG)
            x.copy_(source)
            future = gpu.encode_async(x, 10)
            assert future.done()
            assert not stream.query(), "waited"
            result = future.result().torch().clone()
            x.zero_()
        stream.synchronize()
        reference.assert_states(result.cpu().numpy(), values, 10, "amplitude")

    def test_device_errors_come_through_the_future(self, gpu: qdp.Engine) -> None:
        future = gpu.encode_async(on_device(np.zeros((2, 4))), 2, validate="now")
        assert isinstance(future.exception(), qdp.ZeroNormError)

    def test_results_are_imported_before_they_are_ready(self, gpu: qdp.Engine, torch: Any) -> None:
        values = np.random.default_rng(9).uniform(-1, 1, size=(64, 14))
        expected = reference.encode(values[:1], 14, "phase")
        producer = torch.cuda.Stream()
        consumers = [torch.cuda.Stream() for _ in range(4)]
        for _ in range(5):
            with torch.cuda.stream(producer):
                torch.cuda._sleep(LONG // 10)
            futures = [gpu.encode_async(values, 14, "phase", stream=producer) for _ in consumers]
            read = []
            for future, consumer in zip(futures, consumers, strict=True):
                with torch.cuda.stream(consumer):
                    read.append(torch.from_dlpack(future.result())[:1].clone())
            torch.cuda.synchronize()
            for states in read:
                np.testing.assert_allclose(states.cpu().numpy(), expected, rtol=0, atol=1e-15)

    def test_eight_threads_with_streams_of_their_own(self, gpu: qdp.Engine, torch: Any) -> None:
        def work(seed: int) -> None:
            rng = np.random.default_rng([10, seed])
            stream = torch.cuda.Stream(DEVICE)
            with torch.cuda.stream(stream):
                for _ in range(20):
                    values = rng.normal(size=(int(rng.integers(1, 200)), 2**10))
                    data = values.copy()
                    future = gpu.encode_async(data, 10)
                    total = torch.from_dlpack(future.result()).real.sum(1)
                    data[:] = np.nan
                    expected = values.sum(1) / np.linalg.norm(values, axis=1)
                    np.testing.assert_allclose(total.cpu().numpy(), expected, atol=1e-12)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
