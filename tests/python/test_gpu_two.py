"""Two GPUs: everything happens on the one that is named, and the current one stays current."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

X = np.random.default_rng(7).uniform(0.1, 1.0, (64, 256))
EXPECTED = X / np.linalg.norm(X, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def current_device_stays() -> Iterator[None]:
    """Nothing leaves another device current than it found."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def check(states: Any) -> None:
    np.testing.assert_allclose(np.asarray(states), EXPECTED, rtol=0, atol=1e-15)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
class TestEachDevice:
    def test_host_input(self, device: str) -> None:
        state = qdp.Engine(device).encode(X, 8)
        assert state.device == device
        check(state)
        assert str(torch.from_dlpack(state).device) == str(state.torch().device) == device

    def test_tensors(self, device: str) -> None:
        x = torch.tensor(X, device=device)
        result = qdp.torch.encode(x, 8)
        out = torch.empty_like(result)
        qdp.Engine(device).encode(x, 8, out=out)
        assert str(result.device) == device
        assert torch.cuda.current_device() == 0
        check(result.cpu())
        check(out.cpu())

    def test_side_stream(self, device: str) -> None:
        with torch.cuda.stream(torch.cuda.Stream(device=device)):
            state = qdp.Engine(device).encode(torch.tensor(X, device=device), 8)
        check(state)

    def test_capture(self, device: str) -> None:
        with torch.cuda.device(device):
            x = torch.tensor(X[::-1].copy(), device=device)
            qdp.torch.encode(x, 8)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # torch's own capture stream stays on the device of the first capture.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device=device)):
                result = qdp.torch.encode(x, 8)
            x.copy_(torch.tensor(X, device=device))
            graph.replay()
            check(result.cpu())

    def test_deferred_validation(self, device: str) -> None:
        x = torch.tensor(X, device=device)
        x[5, 7] = float("nan")
        state = qdp.Engine(device).encode(x, 8)
        with pytest.raises(qdp.NonFiniteError) as caught:
            state.check()
        assert (caught.value.sample, caught.value.position) == (5, 7)

    def test_the_other_device_is_refused(self, device: str) -> None:
        other = "cuda:0" if device == "cuda:1" else "cuda:1"
        engine = qdp.Engine(device)
        with pytest.raises(qdp.DeviceMismatchError) as caught:
            engine.encode(torch.tensor(X, device=other), 8)
        assert (caught.value.argument, caught.value.got) == ("data", other)
        out = torch.empty(64, 256, dtype=torch.complex128, device=other)
        with pytest.raises(qdp.DeviceMismatchError) as caught:
            engine.encode(X, 8, out=out)
        assert (caught.value.argument, caught.value.got) == ("out", other)

    def test_a_graph(self, device: str) -> None:
        graph = qdp.Engine(device).capture(8, "amplitude", [16, 64])
        for source in (X, torch.tensor(X, device=device), torch.tensor(X).pin_memory()):
            state = graph.replay(source)
            assert state.device == device
            check(state)

    def test_coalesced(self, device: str) -> None:
        engine = qdp.Engine(device)
        with engine.coalesce(8) as batch:
            handles = [batch.submit(x) for x in X]
        assert all(handle.result().device == device for handle in handles)
        check(batch.states)
        with engine.batcher(8) as batcher:
            check(batcher.encode(X))

    def test_streamed(self, device: str) -> None:
        states = list(qdp.Engine(device).stream(X, 8, batch_size=16))
        assert {state.device for state in states} == {device}
        check(np.concatenate([state.numpy() for state in states]))

    @pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
    def test_gradient_and_fidelities(self, encoding: str, device: str) -> None:
        features = 16 if encoding == "amplitude" else 4

        def found(at: str) -> list[Any]:
            x = torch.tensor(X[:9, :features].copy(), device=at, requires_grad=True)
            weight = torch.linspace(0.5, 1.5, features, device=at, dtype=x.dtype)
            states = qdp.torch.encode(x, 4, encoding, weight=weight)
            loss = (states.abs() ** 2 * torch.arange(16, device=at)).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            fidelities = qdp.gram(x.detach(), encoding=encoding, num_qubits=4)
            assert str(gradient.device) == str(fidelities.device) == at
            return [gradient.cpu(), fidelities.cpu()]

        for one, other in zip(found(device), found("cpu"), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)

    def test_the_other_devices_map_is_refused(self, device: str) -> None:
        other = "cuda:0" if device == "cuda:1" else "cuda:1"
        x = torch.tensor(X, device=device)
        with pytest.raises(qdp.DeviceMismatchError):
            qdp.torch.encode(x, 8, weight=torch.ones(256, device=other))


def test_data_parallel() -> None:
    """Replicas on both devices, in torch's threads, and their gradients in one place."""

    model = qdp.torch.ZZFeatureMap(4, affine=True, device="cuda:0", dtype=torch.float64)
    x = torch.tensor(X[:, :4].copy(), device="cuda:0")
    both = torch.nn.DataParallel(model, device_ids=[0, 1])
    weights = torch.arange(16, device="cuda:0")
    found = []
    for module in (model, both):
        states = module(x)
        loss = (states.abs() ** 2 * weights).sum()
        found.append([states.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        assert one.device == other.device == torch.device("cuda:0")
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
