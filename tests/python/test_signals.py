"""Signals' handlers that raise in the middle of a call: it is raised there, and nothing is lost."""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
from test_batcher import N, run, samples, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class AlarmError(Exception):
    """What the handler raises."""


class Handler:
    """Raises its own exceptions in order, and counts how often it ran."""

    def __init__(self) -> None:
        self.to_raise: list[BaseException] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        self.ran = 0

    def __call__(self, *_: Any) -> None:
        self.ran += 1
        self.meanwhile()
        if self.to_raise:
            raise self.to_raise.pop(0)


def once(handler: Handler) -> Any:
    """A handler that is gone when it raises."""

    def run(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        handler(number, frame)

    return run


#: What a handler may be.
KINDS: dict[str, Callable[[Handler], Any]] = {
    "object": lambda handler: handler,
    "method": lambda handler: handler.__call__,
    "partial": functools.partial,
    "lambda": lambda handler: lambda *_: handler(),
    "once": once,
}


def ring() -> None:
    signal.raise_signal(signal.SIGUSR1)


@pytest.fixture
def handler() -> Iterator[Handler]:
    handler = Handler()
    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    signal.signal(signal.SIGUSR1, before)


class Values:
    """Data that a signal interrupts where it is read."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        ring()
        return np.ones(N)


def by_scope(engine: qdp.Engine) -> None:
    with engine.coalesce(N, "angle") as batch:
        batch.submit(np.ones(N))
        batch.submit(Values())


def by_task(engine: qdp.Engine) -> None:
    with engine.batcher(N, "angle") as batcher:
        run(batcher.encode_async(Values()))


WAYS: dict[str, Callable[[qdp.Engine], Any]] = {
    "encode": lambda engine: engine.encode(Values(), N, "angle"),
    "list": lambda engine: engine.encode_list([np.ones(N), Values()], N, "angle"),
    "scope": by_scope,
    "batcher": lambda engine: engine.batcher(N, "angle").encode(Values()),
    "task": by_task,
}


class TestData:
    @pytest.mark.parametrize("kind", [AlarmError, RuntimeError, TimeoutError, KeyboardInterrupt])
    @pytest.mark.parametrize("way", WAYS)
    def test_it_is_no_error_of_the_data(
        self, way: str, kind: type[BaseException], handler: Handler, cpu: qdp.Engine
    ) -> None:
        for make in KINDS.values():
            signal.signal(signal.SIGUSR1, make(handler))
            handler.to_raise = [kind("away")]
            with pytest.raises(kind, match="away") as raised:
                WAYS[way](cpu)
            assert type(raised.value) is kind
        signal.signal(signal.SIGUSR1, handler)
        WAYS[way](cpu)
        assert handler.ran == len(KINDS) + 1

    def test_what_the_data_raises_is(self, handler: Handler, cpu: qdp.Engine) -> None:
        class Wrong:
            def __array__(self, *_: Any, **__: Any) -> Any:
                raise AlarmError("of the data's own")

        assert signal.getsignal(signal.SIGUSR1) is handler
        with pytest.raises(qdp.InvalidArgumentError, match="of the data's own") as raised:
            cpu.encode(Wrong(), N, "angle")
        assert type(raised.value.__cause__) is AlarmError

    def test_arguments(self, handler: Handler, cpu: qdp.Engine) -> None:
        class Index:
            def __index__(self) -> int:
                ring()
                return 2

        class Items:
            def __iter__(self) -> Any:
                ring()
                return iter([(0, 1)])

        engine: Any = cpu
        calls: list[Callable[[], Any]] = [
            lambda: engine.encode(np.ones(2), Index(), "angle"),
            lambda: engine.encode(np.ones(2), 2, "zz", reps=Index()),
            lambda: engine.encode(np.ones(2), 2, "zz", entanglement=Items()),
            lambda: engine.encode_list(Items(), 2, "angle"),
        ]
        for call in calls:
            handler.to_raise = [AlarmError()]
            with pytest.raises(AlarmError):
                call()
            call()

    def test_memory_that_runs_out_is_not(self, cpu: qdp.Engine) -> None:
        class Large:
            def __array__(self, *_: Any, **__: Any) -> Any:
                raise MemoryError("too large")

        with pytest.raises(MemoryError, match="too large") as raised:
            cpu.encode(Large(), N, "angle")
        assert type(raised.value) is MemoryError


class Loop(asyncio.SelectorEventLoop):
    """Rings whenever a batcher's results are to be told, as often as it is asked to."""

    rings = 0

    def call_soon(self, callback: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.ring(callback)
        return super().call_soon(callback, *args, **kwargs)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.ring(callback)
        return super().call_soon_threadsafe(callback, *args, **kwargs)

    def ring(self, callback: Any) -> None:
        if self.rings and type(callback).__name__ == "Inbox":
            self.rings -= 1
            ring()


@pytest.fixture
def event_loop() -> Iterator[Loop]:
    event_loop = Loop()
    yield event_loop
    event_loop.close()


class TestLoop:
    def test_every_exception_is_kept(
        self, handler: Handler, event_loop: Loop, cpu: qdp.Engine
    ) -> None:
        """As if each was raised while the one before it was handled."""

        second = AlarmError("second")
        second.__context__ = KeyError("of the handler's own")
        handler.to_raise = [AlarmError("first"), second]
        event_loop.rings = 2
        with cpu.batcher(N) as batcher, pytest.raises(AlarmError, match="second") as raised:
            event_loop.run_until_complete(batcher.encode_async(samples(1)[0]))
        chain: list[Any] = []
        error: BaseException | None = raised.value
        while error is not None:
            chain.append(error.args[0])
            error = error.__context__
        assert chain == ["second", "of the handler's own", "first"]

    @pytest.mark.parametrize("nested", ["engine", "batcher"])
    def test_a_handlers_own_calls_raise_what_is_theirs(
        self, nested: str, handler: Handler, event_loop: Loop, cpu: qdp.Engine
    ) -> None:
        own: list[Any] = []

        def second() -> None:
            handler.to_raise = [AlarmError("of its own call")]
            handler.meanwhile = lambda: None
            try:
                WAYS["encode" if nested == "engine" else "batcher"](cpu)
            except AlarmError as error:
                own.append(error)

        def first() -> None:
            handler.meanwhile = second

        handler.meanwhile = first
        handler.to_raise = [AlarmError("first")]
        event_loop.rings = 2
        with cpu.batcher(N) as batcher, pytest.raises(AlarmError, match="first"):
            event_loop.run_until_complete(batcher.encode_async(samples(1)[0]))
        assert [str(error) for error in own] == ["of its own call"]
        assert own[0].__context__ is None

    def test_a_request_whose_submission_raised_is_withdrawn(
        self, handler: Handler, event_loop: Loop, cpu: qdp.Engine
    ) -> None:
        unheard: list[Any] = []
        event_loop.set_exception_handler(lambda _, context: unheard.append(context))
        handler.to_raise = [AlarmError()]
        event_loop.rings = 1
        with cpu.batcher(N) as batcher:
            with pytest.raises(AlarmError):
                event_loop.run_until_complete(batcher.encode_async(samples(1)[0]))
            stats = batcher.stats()
            assert (stats["cancelled"], stats["waiting"]) == (1, 0)
            states = event_loop.run_until_complete(batcher.encode_async(samples(1)[0]))
            assert states.shape == (1, 2**N)
        assert not unheard

    def test_what_comes_while_a_request_is_cancelled(
        self,
        handler: Handler,
        event_loop: Loop,
        cpu: qdp.Engine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Cancelling lets another request in, and that one's loop is told that it is too late."""
        lost: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", lost.append)

        async def main(batcher: qdp.Batcher) -> None:
            first, _ = batcher.submit(event_loop, samples(1)[0])
            kept, request = batcher.submit(event_loop, samples(1)[0])
            late = asyncio.ensure_future(batcher.encode_async(samples(1)[0], deadline=0.05))
            await asyncio.sleep(0.2)
            event_loop.rings = 1
            handler.to_raise = [AlarmError()]
            assert request is not None
            with pytest.raises(AlarmError):
                request.cancel()
            with pytest.raises(qdp.DeadlineExceededError):
                await late
            batcher.close()
            assert (await first).shape == (1, 2**N)
            assert not kept.done()

        batcher = cpu.batcher(N, queue=2, max_delay_us=60e6)
        event_loop.run_until_complete(main(batcher))
        assert not lost
        assert handler.ran == 1


class TestOthers:
    def test_a_broken_loop_is_not_the_callers(
        self, cpu: qdp.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lost: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda error: lost.append(error.exc_value))

        class Broken(Loop):
            def call_soon_threadsafe(  # type: ignore[override]
                self, callback: Any, *args: Any, **kwargs: Any
            ) -> Any:
                if type(callback).__name__ == "Inbox":
                    raise ValueError("the loop's own")
                return super().call_soon_threadsafe(callback, *args, **kwargs)

        event_loop = Broken()
        # A batch that a caller leads, as its loop does not run.
        with cpu.batcher(N) as batcher:
            future, _ = batcher.submit(event_loop, samples(1)[0])
            assert batcher.encode(samples(1)[0]).shape == (1, 2**N)
            threads = [threading.Thread(target=batcher.encode, args=(x,)) for x in samples(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        event_loop.close()
        wait_for(lambda: len(lost) == 2)  # by the caller, and by a thread that tried again
        assert {str(error) for error in lost} == {"the loop's own"}
        assert not future.done()

    def test_a_closed_loop_hides_no_signal(
        self, handler: Handler, event_loop: Loop, cpu: qdp.Engine
    ) -> None:
        """A closed loop raises a RuntimeError, and so may a handler."""
        with cpu.batcher(N) as batcher:
            batcher.submit(event_loop, samples(1)[0])
            event_loop.close()
            event_loop.rings = 1
            handler.to_raise = [RuntimeError("the handler's")]
            with pytest.raises(RuntimeError, match="the handler's"):
                batcher.encode(samples(1)[0])

    def test_a_deep_stack_is_not_the_loops(
        self, cpu: qdp.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A caller that has no stack left for another's loop leaves it to somebody who has."""
        lost: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", lost.append)
        main = threading.get_ident()

        class Deep(Loop):
            def call_soon_threadsafe(  # type: ignore[override]
                self, callback: Any, *args: Any, **kwargs: Any
            ) -> Any:
                if type(callback).__name__ == "Inbox" and threading.get_ident() == main:
                    raise RecursionError
                return super().call_soon_threadsafe(callback, *args, **kwargs)

        event_loop = Deep()
        with cpu.batcher(N) as batcher:
            future, _ = batcher.submit(event_loop, samples(1)[0])
            batcher.encode(samples(1)[0])
            states = event_loop.run_until_complete(asyncio.wait_for(future, 20))
        event_loop.close()
        assert states.shape == (1, 2**N)
        assert [error.exc_type for error in lost] == [RecursionError]

    def test_a_loop_that_is_gone_is_in_nobodys_way(self, cpu: qdp.Engine) -> None:
        class Gone(Loop):
            gone = False

            def is_closed(self) -> bool:
                if self.gone:
                    raise RuntimeError("deleted")
                return super().is_closed()

        event_loop = Gone()
        with cpu.batcher(N) as batcher:
            event_loop.run_until_complete(batcher.encode_async(samples(1)[0]))
            event_loop.close()
            event_loop.gone = True
            for _ in range(2):
                assert run(batcher.encode_async(samples(1)[0])).shape == (1, 2**N)
            event_loop.gone = False
