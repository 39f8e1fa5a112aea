"""Graphs on a GPU: what a replay returns is right whatever streams do, and memory comes back."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import PLAIN_CASES, PRECISIONS

torch = pytest.importorskip("torch", exc_type=ImportError)
from devices import DEVICE, on_device  # noqa: E402

pytestmark = pytest.mark.gpu

LONG = 500_000_000  # clock cycles of a sleeping kernel: a quarter of a second or so

INPUTS: dict[str, Any] = {
    "labels": ((None,), "int64"),
    "index": ((None, 3), "int32"),
    "weights": ((5,), "float32"),
}


def samples(batch: int, features: int = 8, seed: int = 0) -> Any:
    return np.random.default_rng([seed, batch]).uniform(-3, 3, size=(batch, features))


def others(batch: int) -> dict[str, Any]:
    return {
        "labels": np.arange(batch),
        "index": np.arange(3 * batch, dtype=np.int32).reshape(batch, 3),
        "weights": np.ones(5, np.float32),
    }


class TestGraph:
    @pytest.mark.sanitize
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_every_encoding_and_source(self, precision: Any) -> None:
        engine = qdp.Engine(DEVICE, precision=precision)
        for case in PLAIN_CASES:
            for n in (1, 5, 11, 14):
                x = case.samples(n, batch=6)
                data = case.cast(x, precision)
                graph = engine.capture(
                    n, case.encoding, [2, 8], input=data.dtype, features=x.shape[1]
                )
                on_gpu = on_device(data)
                pinned = torch.from_numpy(data).pin_memory()
                wide = torch.zeros(6, 2 * x.shape[1], dtype=on_gpu.dtype, device=DEVICE)
                wide[:, ::2] = on_gpu
                for source in (data, on_gpu, pinned, wide[:, ::2], on_gpu, data):
                    for rows in (6, 1):
                        states = graph.replay(source[:rows]).numpy()
                        reference.assert_states(states, x[:rows], n, case.encoding)
                engine.check()

    def test_equals_encode_bit_by_bit(self, gpu: qdp.Engine) -> None:
        for case in PLAIN_CASES:
            for n in (3, 10, 13, 16):
                x = case.samples(n, batch=7)
                graph = gpu.capture(n, case.encoding, 7, features=x.shape[1])
                expected = gpu.encode(on_device(x), n, case.encoding).torch()
                for source in (x, on_device(x)) * 2:
                    assert bool((graph.replay(source).torch() == expected).all()), f"{case} n={n}"

    def test_nothing_waits(self, gpu: qdp.Engine) -> None:
        """A replay returns while torch's stream is still busy with what was enqueued before."""
        graph = gpu.capture(8, "angle", 64, inputs={"labels": ((None,), "int64")})
        x = samples(64)
        given = on_device(x)
        labels = np.arange(64)
        for source in (x, x, given, given):  # memory and graphs are there
            graph.replay(source, labels=labels)
        torch.cuda.synchronize()
        for source in (x, given):
            torch.cuda._sleep(LONG)
            replay = graph.replay(source, labels=labels)
            assert not torch.cuda.current_stream().query(), "waited"
            state, brought = replay.state.torch(), replay.inputs["labels"].torch()
            assert not torch.cuda.current_stream().query(), "waited"
            reference.assert_states(state.cpu().numpy(), x, 8, "angle")
            assert brought.cpu().tolist() == labels.tolist()
            del replay, state, brought

    def test_a_consumer_waits_for_the_replay(self, gpu: qdp.Engine) -> None:
        """Large enough that the encode is still running when its consumer is enqueued."""
        graph = gpu.capture(16, "angle", 256)
        for k in range(6):
            x = samples(256, 16, seed=k)
            expected = gpu.encode(on_device(x), 16, "angle").torch()
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                read = torch.from_dlpack(graph.replay(x)).clone()
                torch.cuda.current_stream().synchronize()
            assert torch.equal(read, expected), f"replay {k}"

    def test_a_third_replay_waits_for_the_consumer_of_the_first(self, gpu: qdp.Engine) -> None:
        """States are let go while a slow stream still reads them."""
        for on_gpu in (False, True):
            graph = gpu.capture(10, "angle", 64)
            consumer = torch.cuda.Stream()
            batches = [samples(64, 10, seed=k) for k in range(6)]
            expected = [gpu.encode(x, 10, "angle").numpy() for x in batches]
            given = [on_device(x) if on_gpu else x for x in batches]
            torch.cuda.synchronize()
            read = []
            for x in given:
                state = graph.replay(x)
                with torch.cuda.stream(consumer):
                    tensor = torch.from_dlpack(state)
                    torch.cuda._sleep(LONG // 10)
                    read.append(tensor.clone())
                del tensor, state
            consumer.synchronize()
            assert graph.slots == 4
            for k, (got, want) in enumerate(zip(read, expected, strict=True)):
                np.testing.assert_allclose(
                    got.cpu().numpy(), want, rtol=0, atol=1e-15, err_msg=f"{on_gpu=} replay {k}"
                )

    def test_device_input_is_read_on_its_stream(self, gpu: qdp.Engine) -> None:
        """Written late before the replay, overwritten right after, and dropped."""
        graph = gpu.capture(8, "angle", 64)
        for k in range(5):
            values = on_device(samples(64, seed=k))
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                x = torch.zeros_like(values)
                torch.cuda._sleep(LONG // 10)
                x.copy_(values)
                state = graph.replay(x[: 64 - k])
                x.fill_(7)
                del x
                result = state.torch().clone()
            stream.synchronize()
            expected = samples(64, seed=k)[: 64 - k]
            reference.assert_states(result.cpu().numpy(), expected, 8, "angle")

    def test_bad_device_values_are_reported_once_for_their_replay(self, gpu: qdp.Engine) -> None:
        graph = gpu.capture(4, "angle", [8, 2])
        good, bad = on_device(np.ones((8, 4))), on_device(np.ones((8, 4)))
        bad[5, 2] = float("nan")
        for _ in range(3):
            state = graph.replay(bad)
            with pytest.raises(qdp.NonFiniteError) as caught:
                state.check()
            assert (caught.value.sample, caught.value.position) == (5, 2)
            with pytest.raises(qdp.NonFiniteError):
                state.check()
            assert state.torch()[5].isnan().all()
            later = graph.replay(good)
            later.check()
            # A bad row that is still in the memory pads no batch.
            for batch in (good[:3], np.ones((3, 4)), good[:1]):
                graph.replay(batch).check()
            gpu.check()
        graph.replay(bad)
        with pytest.raises(qdp.NonFiniteError):
            gpu.check()
        gpu.check()

    def test_validated_now(self, gpu: qdp.Engine) -> None:
        graph = gpu.capture(4, ["angle", "phase"], 8, validate="now")
        bad = on_device(np.ones((8, 4)))
        bad[5, 2] = float("inf")
        with pytest.raises(qdp.NonFiniteError) as caught:
            graph.replay(bad)
        assert caught.value.sample == 5

    def test_not_in_anybodys_capture(self, gpu: qdp.Engine) -> None:
        """A device tensor is refused there; the user's capture stays valid."""
        graph = gpu.capture(3, "amplitude", 4)
        x = on_device(np.ones((4, 8)))
        graph.replay(x)
        torch.cuda.synchronize()
        out = torch.zeros(4, 8, dtype=torch.complex128, device=DEVICE)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            with pytest.raises(qdp.CaptureError):
                graph.replay(x)
            gpu.encode(x, 3, out=out)
        captured.replay()
        reference.assert_states(out.cpu().numpy(), np.ones((4, 8)), 3, "amplitude")

    def test_replays_of_host_data_beside_somebody_elses_capture(self, gpu: qdp.Engine) -> None:
        graph = gpu.capture(8, "angle", 16)
        x = torch.ones(4, device=DEVICE)
        captured = torch.cuda.CUDAGraph()
        batches = [samples(16, seed=k) for k in range(5)]
        held = []
        with torch.cuda.graph(captured):
            y = x * 2
            held = [graph.replay(data) for data in batches[:4]]  # a slot each: no allocation
        captured.replay()
        assert y.tolist() == [2.0] * 4
        for data, state in zip(batches, held, strict=False):
            reference.assert_states(state.numpy(), data, 8, "angle")

    def test_inputs_on_the_device_are_refused(self, gpu: qdp.Engine) -> None:
        graph = gpu.capture(8, "angle", 4, inputs={"labels": ((None,), "int64")})
        with pytest.raises(qdp.DeviceMismatchError):
            graph.replay(samples(4), labels=on_device(np.arange(4)))

    def test_trim_gives_memory_back(self, gpu: qdp.Engine) -> None:
        graph = gpu.capture(16, "angle", 64)
        state_bytes = 64 * 16 * 2**16
        x = samples(64, 16)
        graph.replay(x).synchronize()
        before = gpu.memory_info()
        assert before["used"] >= 2 * state_bytes
        held = graph.replay(x)
        graph.trim()
        after = gpu.memory_info()
        assert after["used"] <= before["used"] - state_bytes  # one of two is held
        expected = gpu.encode(x, 16, "angle").numpy()
        for source in (x, on_device(x)) * 2:
            again = graph.replay(source)
            np.testing.assert_allclose(again.numpy(), expected, rtol=0, atol=1e-15)
        np.testing.assert_allclose(held.numpy(), expected, rtol=0, atol=1e-15)
        del held, again
        graph.trim()
        assert gpu.memory_info()["used"] < state_bytes
        np.testing.assert_allclose(graph.replay(x).numpy(), expected, rtol=0, atol=1e-15)

    def test_graphs_leave_nothing(self, gpu: qdp.Engine) -> None:
        x = samples(8)

        def use(k: int) -> None:
            graph = gpu.capture(
                8, ["angle", "zz"], [1 + k % 3, 8], inputs=INPUTS, constants={"c": np.ones(4)}
            )
            held = [graph.replay(x[: 1 + k % 8], **others(1 + k % 8)) for _ in range(3)]
            held[k % 3].states[k % 2].torch()
            graph.replay(on_device(x), **others(8))

        def free() -> int:
            gpu.synchronize()
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            available: int = torch.cuda.mem_get_info()[0]
            return available

        for k in range(30):
            use(k)
        before, used = free(), gpu.memory_info()["used"]
        for k in range(200):
            use(k)
        assert gpu.memory_info()["used"] == used
        assert before - free() <= 32 * 2**20

    @pytest.mark.parametrize("source", ["host", "device", "both"])
    def test_stress_from_several_streams(self, source: str, gpu: qdp.Engine) -> None:
        """Threads on streams of their own share a graph, whose buffers go round.

        Each reads its states on its own stream behind other work, and lets them go before they
        are read: one that is overwritten too early, or read before it is written, differs.
        """
        n, sizes = 10, [8, 64]
        graph = gpu.capture(n, ["angle", "phase"], sizes, inputs={"number": ((None,), "int64")})
        failures: list[str] = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            stream = torch.cuda.Stream()
            checks = []
            with torch.cuda.stream(stream):
                for k in range(150):
                    batch = int(rng.integers(1, 65))
                    x = rng.uniform(-3, 3, size=(batch, n))
                    number = np.full(batch, 1000 * seed + k)
                    on_gpu = source == "device" or (source == "both" and k % 2 == 0)
                    given = on_device(x) if on_gpu else x
                    replay = graph.replay(given, number=number)
                    angle, phase = (state.torch() for state in replay.states)
                    brought = torch.from_dlpack(replay.inputs["number"])
                    if k % 5 == 0:
                        torch.cuda._sleep(200_000)
                    wanted = on_device(x)
                    reference_states = [
                        gpu.encode(wanted, n, encoding).torch() for encoding in ("angle", "phase")
                    ]
                    same = (
                        torch.equal(angle, reference_states[0])
                        if k % 7 == 0
                        else (angle == reference_states[0]).all()
                    )
                    checks.append((k, batch, same, (phase == reference_states[1]).all()))
                    checks.append((k, batch, (brought == 1000 * seed + k).all(), True))
                    del replay, angle, phase, brought
            stream.synchronize()
            failures.extend(
                f"thread {seed} replay {k} batch {batch}: {bool(first)} {bool(second)}"
                for k, batch, first, second in checks
                if not (bool(first) and bool(second))
            )

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        gpu.check()
        assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:20])
