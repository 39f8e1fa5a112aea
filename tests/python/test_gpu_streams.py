"""No host sync: work is ordered by streams, and captures replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import PLAIN_CASES, PRECISIONS

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE, on_device  # noqa: E402

pytestmark = pytest.mark.gpu

LONG = 500_000_000  # clock cycles of a sleeping kernel: a quarter of a second or so


def encoders(engine: qdp.Engine, n: int, encoding: str, out: Any) -> list[Any]:
    """Every way from a device tensor to a tensor."""
    return [
        lambda x: qdp.torch.encode(x, n, encoding),
        lambda x: qdp.torch.encode(x, n, encoding, out=out),
        lambda x: engine.encode(x, n, encoding).torch(),
        lambda x: torch.from_dlpack(engine.encode(x, n, encoding)),
        lambda x: engine.encode(x, n, encoding, out=out).torch(),
        lambda x: engine.plan(n, encoding).encode(x).torch(),
    ]


WAYS = range(6)


class TestStreams:
    @pytest.mark.parametrize("way", WAYS)
    def test_nothing_waits(self, way: int, gpu: qdp.Engine) -> None:
        """The stream is still busy when the call returns, so the call has not waited for it."""
        for case in PLAIN_CASES:
            n = 6
            x = on_device(case.samples(n))
            out = torch.empty(len(x), 2**n, dtype=torch.complex128, device=DEVICE)
            encode = encoders(gpu, n, case.encoding, out)[way]
            encode(x)  # the kernel is loaded, the pool has memory
            torch.cuda.synchronize()
            torch.cuda._sleep(LONG)
            result = encode(x)
            assert not torch.cuda.current_stream().query(), f"{case} waited"
            reference.assert_states(result.cpu().numpy(), case.samples(n), n, case.encoding)

    @pytest.mark.parametrize("way", WAYS)
    def test_order_on_torchs_current_stream(self, way: int, gpu: qdp.Engine) -> None:
        """On a side stream: input is written late before, output read right after."""
        for case in PLAIN_CASES:
            values = on_device(case.samples(8))
            out = torch.empty(len(values), 2**8, dtype=torch.complex128, device=DEVICE)
            encode = encoders(gpu, 8, case.encoding, out)[way]
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                x = torch.zeros_like(values)
                torch.cuda._sleep(LONG // 10)
                x.copy_(values)
                result = encode(x).clone()
                x.zero_()
            stream.synchronize()
            reference.assert_states(result.cpu().numpy(), case.samples(8), 8, case.encoding)

    def test_stream_argument(self, gpu: qdp.Engine) -> None:
        values = np.random.default_rng(13).uniform(-1, 1, size=(4, 8))
        stream = torch.cuda.Stream()
        for argument in (stream, stream.cuda_stream):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                x = torch.zeros(4, 8, dtype=torch.float64, device=DEVICE)
                torch.cuda._sleep(LONG // 10)
                x.copy_(torch.from_numpy(values))
            state = gpu.encode(x, 8, "angle", stream=argument)
            reference.assert_states(state.numpy(), values, 8, "angle")

    def test_consumer_on_another_stream(self, gpu: qdp.Engine) -> None:
        """An importer's stream waits for the encode, of host and of device input."""
        values = np.random.default_rng(14).uniform(-1, 1, size=(64, 14))
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        expected = reference.encode(values[:1], 14, "phase")
        for data in (values, on_device(values)):
            torch.cuda.synchronize()
            with torch.cuda.stream(producer):
                torch.cuda._sleep(LONG // 10)
                state = gpu.encode(data, 14, "phase")
            with torch.cuda.stream(consumer):
                read = torch.from_dlpack(state).clone()
            consumer.synchronize()
            np.testing.assert_allclose(read[:1].cpu().numpy(), expected, rtol=0, atol=1e-15)

    def test_memory_is_reused_after_its_last_reader(self, gpu: qdp.Engine) -> None:
        """A state dropped while a stream still reads it keeps its memory until that is done."""
        ones = torch.ones(64, 2**12, device=DEVICE)
        for _ in range(5):
            reader = torch.cuda.Stream()
            state = gpu.encode(ones, 12, "amplitude")
            with torch.cuda.stream(reader):
                tensor = torch.from_dlpack(state)
                torch.cuda._sleep(LONG // 10)
                total = tensor.real.sum()
                del tensor
            del state
            others = [gpu.encode(-ones, 12, "amplitude") for _ in range(20)]
            reader.synchronize()
            assert total.item() == pytest.approx(64 * 2**6)
            assert len(others) == 20

    def test_host_input_may_change_after_the_call(self, gpu: qdp.Engine) -> None:
        x = np.random.default_rng(15).normal(size=(256, 2**12))
        expected = reference.encode(x[:3], 12, "amplitude")
        states = []
        for _ in range(4):
            data = x.copy()
            states.append(gpu.encode(data, 12, "amplitude"))
            data[:] = np.nan
        for state in states:
            np.testing.assert_allclose(state[:3].numpy(), expected, rtol=0, atol=1e-15)

    def test_device_input_may_be_dropped_after_the_call(self, gpu: qdp.Engine) -> None:
        values = np.random.default_rng(16).normal(size=(64, 2**10))
        torch.cuda._sleep(LONG // 10)
        x = on_device(values)
        state = gpu.encode(x, 10, "amplitude")
        del x
        noise = [torch.full((64, 2**10), 7.0, device=DEVICE, dtype=torch.float64) for _ in range(8)]
        reference.assert_states(state.numpy(), values, 10, "amplitude")
        assert len(noise) == 8


class TestCapture:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_replays_follow_their_input(self, precision: Any, way: int) -> None:
        engine = qdp.Engine(DEVICE, precision=precision)
        for case in PLAIN_CASES:
            for n in (3, 11, 15):
                samples = [np.roll(case.samples(n), k, axis=0) for k in range(3)]
                static = on_device(case.cast(samples[0], precision))
                dtype = getattr(torch, precision)
                out = torch.empty(len(static), 2**n, dtype=dtype, device=DEVICE)
                encode = encoders(engine, n, case.encoding, out)[way]
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    encode(static)  # warm-up, as torch's own documentation asks for
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    result = encode(static)
                for x in samples:
                    static.copy_(on_device(case.cast(x, precision)))
                    graph.replay()
                    eager = engine.encode(static, n, case.encoding).torch()
                    assert torch.equal(result, eager), f"{case} n={n}"
                engine.check()

    def test_result_stays_in_the_graph(self) -> None:
        """Encodes outside never land in memory that a replay writes."""
        x = torch.ones(8, 2**10, device=DEVICE)
        qdp.torch.encode(x, 10)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = qdp.torch.encode(x, 10) * 2
        eager = [qdp.torch.encode(-x, 10) for _ in range(10)]
        graph.replay()
        torch.cuda.synchronize()
        assert (result.real > 0).all()
        assert all((e.real < 0).all() for e in eager)

    def test_what_would_wait_is_refused(self, gpu: qdp.Engine) -> None:
        x = torch.ones(4, 8, device=DEVICE)
        qdp.torch.encode(x, 3)
        gpu.encode(x, 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(qdp.CaptureError):
                gpu.encode(x, 3, validate="now")
            result = qdp.torch.encode(x, 3)
        graph.replay()
        reference.assert_states(result.cpu().numpy(), np.ones((4, 8)), 3, "amplitude")

    def test_a_bad_replay_is_reported(self, gpu: qdp.Engine) -> None:
        x = torch.ones(4, 8, device=DEVICE)
        gpu.encode(x, 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state = gpu.encode(x, 3)
            result = state.torch()
        graph.replay()
        torch.cuda.synchronize()
        gpu.check()
        x[2, 5] = float("nan")
        graph.replay()
        torch.cuda.synchronize()
        assert result[2].isnan().all()
        assert not result[[0, 1, 3]].isnan().any()
        with pytest.raises(qdp.NonFiniteError) as caught:
            gpu.check()
        assert (caught.value.sample, caught.value.position) == (2, 5)
