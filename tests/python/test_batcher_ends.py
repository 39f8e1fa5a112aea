"""The batcher: bounds, deadlines, cancellation, and the ends of batchers and processes."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qdp
from test_batcher import DIM, NEVER_US, N, assert_same, in_threads, run, samples, wait_for


class TestLimits:
    def test_deadline(self, engine: qdp.Engine) -> None:
        x = samples(1)[0]
        with engine.batcher(N, max_delay_us=NEVER_US) as batcher:
            with pytest.raises(qdp.DeadlineExceededError) as error:
                batcher.encode(x, deadline=0.01)
            assert isinstance(error.value, TimeoutError)
            with pytest.raises(qdp.DeadlineExceededError):
                batcher.encode(x, deadline=-1)
            with pytest.raises(qdp.DeadlineExceededError):
                run(batcher.encode_async(x, deadline=0))
            assert batcher.stats()["expired"] == 3
        with engine.batcher(N) as batcher:
            assert_same(batcher.encode(x, deadline=60), engine.encode(x, N))
            assert_same(batcher.encode(x, deadline=float("inf")), engine.encode(x, N))

    def test_a_deadline_that_passed_when_the_batch_starts(self, engine: qdp.Engine) -> None:
        x = samples(1)[0]
        with engine.batcher(N, max_delay_us=20_000) as batcher:

            async def main() -> list[Any]:
                late = batcher.encode_async(x, deadline=0.001)
                return list(
                    await asyncio.gather(late, batcher.encode_async(x), return_exceptions=True)
                )

            late, fine = run(main())
        assert type(late) is qdp.DeadlineExceededError
        assert_same(fine, engine.encode(x, N))

    def test_queue_full_raises(self, engine: qdp.Engine) -> None:
        data = samples(5)
        with engine.batcher(N, max_delay_us=NEVER_US, queue=2, when_full="raise") as batcher:

            async def main() -> list[Any]:
                tasks = [asyncio.create_task(batcher.encode_async(x)) for x in data]
                await asyncio.sleep(0)
                batcher.close()
                return list(await asyncio.gather(*tasks, return_exceptions=True))

            results = run(main())
            assert batcher.stats()["refused"] == 3
        for x, state in zip(data[:2], results[:2], strict=True):
            assert_same(state, engine.encode(x, N))
        for error in results[2:]:
            assert type(error) is qdp.QueueFullError
            assert error.queue == 2

    def test_queue_full_waits(self, engine: qdp.Engine) -> None:
        data = samples(40)
        with engine.batcher(N, queue=2) as batcher:

            async def main() -> list[Any]:
                return list(await asyncio.gather(*map(batcher.encode_async, data)))

            for x, state in zip(data, run(main()), strict=True):
                assert_same(state, engine.encode(x, N))
            for x, state in zip(
                data, in_threads(40, lambda i: batcher.encode(data[i])), strict=True
            ):
                assert_same(state, engine.encode(x, N))

    def test_delay_counts_from_the_oldest(self, engine: qdp.Engine) -> None:
        data = samples(8)
        with engine.batcher(N, max_delay_us=30_000) as batcher:
            for x, state in zip(
                data, in_threads(8, lambda i: batcher.encode(data[i])), strict=True
            ):
                assert_same(state, engine.encode(x, N))
            stats = batcher.stats()
            assert stats["started_delay"] >= 1
            assert stats["max_queue_wait_ns"] >= 30_000_000
            assert stats["queue_wait_ns"] >= stats["max_queue_wait_ns"]

    def test_a_full_batch_does_not_wait(self, engine: qdp.Engine) -> None:
        data = samples(4)
        with engine.batcher(N, max_delay_us=NEVER_US, max_batch_samples=4) as batcher:
            for x, state in zip(
                data, in_threads(4, lambda i: batcher.encode(data[i])), strict=True
            ):
                assert_same(state, engine.encode(x, N))
            stats = batcher.stats()
            assert stats["started_full"] == 1
            assert stats["batch_sizes"] == {4: 1}


class TestCancel:
    def test_a_cancelled_task_takes_its_request_along(self, engine: qdp.Engine) -> None:
        data = samples(3)
        with engine.batcher(N, max_delay_us=NEVER_US) as batcher:

            async def main() -> list[Any]:
                tasks = [asyncio.create_task(batcher.encode_async(x)) for x in data]
                await asyncio.sleep(0)
                assert batcher.stats()["waiting"] == 3
                tasks[1].cancel()
                await asyncio.sleep(0)
                assert batcher.stats()["waiting"] == 2
                assert batcher.stats()["cancelled"] == 1
                batcher.close()
                return list(await asyncio.gather(*tasks, return_exceptions=True))

            first, cancelled, last = run(main())
        assert type(cancelled) is asyncio.CancelledError
        assert_same(first, engine.encode(data[0], N))
        assert_same(last, engine.encode(data[2], N))

    def test_timeout(self, engine: qdp.Engine) -> None:
        with engine.batcher(N, max_delay_us=NEVER_US) as batcher:

            async def main() -> None:
                async with asyncio.timeout(0.01):
                    await batcher.encode_async(samples(1)[0])

            with pytest.raises(TimeoutError):
                run(main())
            assert batcher.stats()["waiting"] == 0

    def test_cancelled_while_parked(self, engine: qdp.Engine) -> None:
        data = samples(3)
        with engine.batcher(N, max_delay_us=NEVER_US, queue=1) as batcher:

            async def main() -> list[Any]:
                tasks = [asyncio.create_task(batcher.encode_async(x)) for x in data]
                await asyncio.sleep(0)
                tasks[1].cancel()
                await asyncio.sleep(0)
                batcher.close()
                return list(await asyncio.gather(*tasks, return_exceptions=True))

            first, cancelled, last = run(main())
        assert type(cancelled) is asyncio.CancelledError
        assert_same(first, engine.encode(data[0], N))
        assert_same(last, engine.encode(data[2], N))


class TestClose:
    def test_it_drains(self, engine: qdp.Engine) -> None:
        data = samples(4)
        batcher = engine.batcher(N, max_delay_us=NEVER_US)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(batcher.encode, x) for x in data]
            wait_for(lambda: batcher.stats()["waiting"] == 4)
            batcher.close()
            for x, future in zip(data, futures, strict=True):
                assert_same(future.result(), engine.encode(x, N))
        assert batcher.stats()["started_close"] == 1

    def test_no_more_requests(self, engine: qdp.Engine) -> None:
        x = samples(1)[0]
        with engine.batcher(N) as batcher:
            assert "closed" not in repr(batcher)
            batcher.encode(x)
        assert batcher.closed
        batcher.close()
        with pytest.raises(qdp.BatcherClosedError):
            batcher.encode(x)
        with pytest.raises(qdp.BatcherClosedError):
            run(batcher.encode_async(x))
        assert "closed" in repr(batcher)

    def test_repr(self, engine: qdp.Engine) -> None:
        with engine.batcher(5, "angle") as batcher:
            expected = f"Batcher(num_qubits=5, encoding='angle', device='{engine.device}')"
            assert repr(batcher) == expected
            assert type(batcher) is qdp.Batcher

    def test_an_exception_in_the_body_closes_it(self, engine: qdp.Engine) -> None:
        with pytest.raises(KeyError), engine.batcher(N) as batcher:
            raise KeyError
        assert batcher.closed

    def test_a_loop_that_is_gone(self, engine: qdp.Engine) -> None:
        x = samples(1)[0]
        batcher = engine.batcher(N, max_delay_us=NEVER_US)
        loop = asyncio.new_event_loop()

        async def start() -> Any:
            future, _ = batcher.submit(asyncio.get_running_loop(), x)
            return future

        future = loop.run_until_complete(start())
        loop.close()
        batcher.close()
        assert not future.done()
        assert batcher.stats()["waiting"] == 0

    def test_nothing_is_kept(self, engine: qdp.Engine) -> None:
        class Array(np.ndarray[Any, Any]):
            pass

        async def main(batcher: qdp.Batcher, data: list[Array]) -> None:
            tasks = map(batcher.encode_async, data)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert len(results) == len(data)

        def use() -> list[weakref.ref[Any]]:
            data = [x.copy().view(Array) for x in samples(50)]
            batcher = engine.batcher(N, queue=5)
            run(main(batcher, data))
            batcher.encode(data[0])
            batcher.close()
            return [weakref.ref(batcher), *map(weakref.ref, data)]

        kept = use()
        gc.collect()
        assert [ref() for ref in kept] == [None] * len(kept)

    def test_a_loop_that_knows_the_batcher_is_no_reason_to_keep_it(
        self, engine: qdp.Engine
    ) -> None:
        def use() -> weakref.ref[Any]:
            batcher = engine.batcher(N)
            event_loop = asyncio.new_event_loop()
            event_loop.set_exception_handler(lambda *_, own=batcher: own.close())
            event_loop.run_until_complete(batcher.encode_async(samples(1)[0]))
            event_loop.close()
            return weakref.ref(batcher)

        kept = use()
        gc.collect()
        assert kept() is None

    def test_a_full_queue_does_not_wait_for_the_loop_that_is_in_the_way(
        self, engine: qdp.Engine
    ) -> None:
        data = samples(20)

        async def main(batcher: qdp.Batcher) -> None:
            tasks = [asyncio.create_task(batcher.encode_async(x)) for x in data]
            await asyncio.sleep(0)  # they are queued, and the loop is to encode them
            assert batcher.encode(data[0]).shape == (1, DIM)
            await asyncio.gather(*tasks)

        with engine.batcher(N, queue=4) as batcher:
            run(main(batcher))

    @pytest.mark.parametrize("signals", [1, 3])
    def test_a_signal_on_the_way_to_a_future_loses_no_other(
        self, engine: qdp.Engine, signals: int
    ) -> None:
        def told(_: Any) -> None:
            pass

        class Loop(asyncio.SelectorEventLoop):
            interrupts = signals

            def call_soon(  # type: ignore[override]
                self, callback: Any, *args: Any, context: Any = None
            ) -> Any:
                if callback is told and self.interrupts:
                    self.interrupts -= 1
                    raise KeyboardInterrupt(self.interrupts)
                return super().call_soon(callback, *args, context=context)

        event_loop = Loop()
        batcher = engine.batcher(N)
        try:
            futures = [batcher.submit(event_loop, x)[0] for x in samples(8)]
            for future in futures:
                future.add_done_callback(told)
            with pytest.raises(KeyboardInterrupt) as raised:
                event_loop.run_until_complete(asyncio.sleep(1))
            chain: list[BaseException] = [raised.value]
            while chain[-1].__context__ is not None:
                chain.append(chain[-1].__context__)
            assert [error.args for error in chain] == [(left,) for left in range(signals)]
            event_loop.run_until_complete(asyncio.wait_for(asyncio.gather(*futures), 20))
            assert all(future.done() for future in futures)
        finally:
            batcher.close()
            event_loop.close()

    def test_dropped_with_requests_waiting(self, engine: qdp.Engine) -> None:
        async def main() -> Any:
            batcher = engine.batcher(N, max_delay_us=NEVER_US)
            future, _ = batcher.submit(asyncio.get_running_loop(), samples(1)[0])
            del batcher
            gc.collect()
            return await future

        assert run(main()).shape == (1, DIM)


#: Runs after what is registered later: after the batchers' own end.
AT_EXIT = (
    "import atexit\natexit.register(lambda: print(batcher.closed, batcher.stats()['waiting']))\n"
)


def script(text: str) -> str:
    """What a fresh interpreter prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", text],
        check=False,
        timeout=60,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestProcess:
    @pytest.mark.parametrize("call", ["close()", "encode(x[0])", "stats()"])
    def test_a_signals_handler_may_use_it(self, call: str) -> None:
        code = (
            "import faulthandler, signal, numpy as np, qdp\n"
            "faulthandler.dump_traceback_later(60, exit=True)\n"
            "engine = qdp.Engine('cpu', precision='complex64')\n"
            "x = np.random.default_rng(7).uniform(-1, 1, size=(2**9, 14))\n"
            "heard = []\n"
            f"def ring(*_): heard.append(batcher.{call})\n"
            "signal.signal(signal.SIGALRM, ring)\n"
            "batcher = engine.batcher(14, 'zz', reps=30, max_batch_bytes=2**32)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
            "print(len(batcher.encode(x)), len(heard))\n"
        )
        assert script(code).split() == [str(2**9), "1"]

    def test_a_signals_handler_calls_a_waiting_caller_away(self) -> None:
        code = (
            "import faulthandler, signal, qdp\n"
            "faulthandler.dump_traceback_later(60, exit=True)\n"
            "batcher = qdp.Engine('cpu').batcher(2, max_delay_us=60e6)\n"
            "def ring(*_):\n"
            "    assert len(batcher.encode([1.0])) == 1\n"
            "    raise TimeoutError('away')\n"
            "signal.signal(signal.SIGALRM, ring)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
            "try:\n"
            "    batcher.encode([1.0])\n"
            "except TimeoutError as error:\n"
            "    print(error, batcher.stats()['cancelled'], batcher.stats()['waiting'])\n"
        )
        assert script(code) == "away 1 0\n"

    def test_what_a_signals_handler_raises_on_the_way_to_a_loop_is_the_calls(self) -> None:
        code = (
            "import asyncio, signal, sys, threading, time, qdp\n"
            "batcher = qdp.Engine('cpu').batcher(2)\n"
            "class Away(Exception): pass\n"  # which nobody else handles
            "lost, heard, caught = [], 0, 0\n"
            "sys.unraisablehook = lambda error: lost.append(repr(error.exc_value))\n"
            "async def main():\n"
            "    async def task():\n"
            "        while heard < 1000:\n"
            "            await batcher.encode_async([1.0])\n"
            "    await asyncio.gather(*(task() for _ in range(8)))\n"
            "def ring(*_):\n"
            "    global heard\n"
            "    heard += 1\n"
            "    raise Away\n"
            "signal.signal(signal.SIGALRM, ring)\n"
            "thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)\n"
            "thread.start()\n"
            "while heard < 1000:\n"
            "    before = heard\n"
            "    try:\n"
            "        signal.setitimer(signal.ITIMER_REAL, 0.0003)\n"
            "        while heard == before:\n"
            "            batcher.encode([1.0])\n"
            "    except Away:\n"
            "        caught += 1\n"
            "thread.join()\n"
            "print(caught, lost)\n"
        )
        assert script(code) == "1000 []\n"

    @pytest.mark.parametrize("delay", ["0", "50e6"])
    def test_exit_with_requests_waiting(self, device: str, delay: str) -> None:
        printed = script(
            f"{AT_EXIT}"
            "import asyncio, qdp\n"
            f"batcher = qdp.Engine({device!r}).batcher(2, max_delay_us={delay})\n"
            "async def main():\n"
            "    loop = asyncio.get_running_loop()\n"
            "    return [batcher.submit(loop, [1.0, i])[0] for i in range(100)]\n"
            "kept = asyncio.run(main())\n"
        )
        assert printed.split() == ["True", "0"]

    def test_exit_with_daemons_waiting(self, device: str) -> None:
        printed = script(
            f"{AT_EXIT}"
            "import threading, time, qdp\n"
            f"batcher = qdp.Engine({device!r}).batcher(2, max_delay_us=50e6)\n"
            "for _ in range(4):\n"
            "    threading.Thread(target=lambda: batcher.encode([1.0]), daemon=True).start()\n"
            "while batcher.stats()['waiting'] < 4:\n"
            "    time.sleep(0.001)\n"
        )
        assert printed.split() == ["True", "0"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_fork(self) -> None:
        printed = script(
            "import asyncio, os, qdp\n"
            "batcher = qdp.Engine('cpu').batcher(2)\n"
            "asyncio.run(batcher.encode_async([1.0]))\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    for encode in (batcher.encode, lambda x: asyncio.run(batcher.encode_async(x))):\n"
            "        try:\n"
            "            encode([1.0])\n"
            "        except qdp.BatcherClosedError:\n"
            "            continue\n"
            "        os._exit(1)\n"
            "    assert batcher.closed and batcher.stats()['waiting'] == 0\n"
            "    batcher.close()\n"
            "    del batcher\n"
            "    raise SystemExit(0)\n"
            "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
            "print(status, len(batcher.encode([1.0])))\n"
        )
        assert printed.split() == ["0", "1"]
