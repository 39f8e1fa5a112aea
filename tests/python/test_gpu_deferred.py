"""Device input is validated on the device: late, but never in silence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import qdp
import reference

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE, on_device  # noqa: E402

pytestmark = pytest.mark.gpu


BAD_INPUT = [
    ("amplitude", 4, (3, 6), math.nan, qdp.NonFiniteError),
    ("amplitude", 4, (3, 6), math.inf, qdp.NonFiniteError),
    ("amplitude", 4, (3, slice(None)), 0.0, qdp.ZeroNormError),
    ("amplitude", 12, (3, slice(None)), 0.0, qdp.ZeroNormError),
    ("amplitude", 15, (3, 6), math.nan, qdp.NonFiniteError),
    ("amplitude", 18, (3, 6), math.nan, qdp.NonFiniteError),
    ("amplitude", 4, (3, slice(None)), 1e200, qdp.NormOverflowError),
    ("angle", 9, (3, 6), math.nan, qdp.NonFiniteError),
    ("phase", 9, (3, 6), -math.inf, qdp.NonFiniteError),
    ("iqp", 9, (3, 6), math.nan, qdp.NonFiniteError),
    ("iqp", 15, (3, 100), math.nan, qdp.NonFiniteError),
    ("iqp-z", 9, (3, 6), math.nan, qdp.NonFiniteError),
    ("zz", 9, (3, 6), math.nan, qdp.NonFiniteError),
    ("iqp-embedding", 9, (3, 6), math.nan, qdp.NonFiniteError),
    ("basis", 9, (3, 6), 2.0, qdp.BasisValueError),
    ("basis", 9, (3, 6), 0.5, qdp.BasisValueError),
]


class TestDeferredErrors:
    @staticmethod
    def bad_input(n: int, encoding: str, place: Any, value: float) -> tuple[Any, Any]:
        count = 2**n if encoding == "amplitude" else reference.num_features(n, encoding)
        good = np.ones((6, count))
        bad = good.copy()
        bad[place] = value
        return on_device(bad), good

    def check_position(self, error: Any, place: Any) -> None:
        assert error.sample == place[0]
        if isinstance(error, qdp.NonFiniteError | qdp.BasisValueError):
            assert error.position == place[1]

    @pytest.mark.parametrize(("encoding", "n", "place", "value", "kind"), BAD_INPUT)
    def test_the_bad_row_is_nan_and_the_state_says_so(
        self, encoding: str, n: int, place: Any, value: float, kind: Any, gpu: qdp.Engine
    ) -> None:
        bad, good = self.bad_input(n, encoding, place, value)
        state = gpu.encode(bad, n, encoding)
        rows = torch.from_dlpack(state)
        torch.cuda.synchronize()
        assert rows[3].isnan().all()
        others = [0, 1, 2, 4, 5]
        expected = gpu_states(good, n, encoding)
        assert torch.equal(rows[others], expected[others])
        for _ in range(3):
            with pytest.raises(kind) as caught:
                state.check()
            self.check_position(caught.value, place)
        with pytest.raises(kind):
            state.numpy()
        with pytest.raises(kind):
            np.asarray(state)

    @pytest.mark.parametrize(("encoding", "n", "place", "value", "kind"), BAD_INPUT)
    def test_validate_now(
        self, encoding: str, n: int, place: Any, value: float, kind: Any, gpu: qdp.Engine
    ) -> None:
        bad, good = self.bad_input(n, encoding, place, value)
        for encode in (gpu.encode, qdp.torch.encode):
            with pytest.raises(kind) as caught:
                encode(bad, n, encoding, validate="now")
            self.check_position(caught.value, place)
        gpu.check()  # raised at the call, so nothing is left to raise
        gpu.encode(on_device(good), n, encoding, validate="now")

    def test_engine_check_raises_once(self, gpu: qdp.Engine) -> None:
        bad, good = self.bad_input(4, "amplitude", (2, 3), math.nan)
        gpu.encode(on_device(good), 4)
        state = gpu.encode(bad, 4)
        torch.cuda.synchronize()
        with pytest.raises(qdp.NonFiniteError) as caught:
            gpu.check()
        assert (caught.value.sample, caught.value.position) == (2, 3)
        gpu.check()
        gpu.encode(on_device(good), 4).check()
        with pytest.raises(qdp.NonFiniteError):
            state.check()

    def test_the_next_call_raises_once(self, gpu: qdp.Engine) -> None:
        bad, good = self.bad_input(4, "amplitude", (2, 3), math.nan)
        gpu.encode(bad, 4)  # its state is dropped: the error must not be lost with it
        torch.cuda.synchronize()
        with pytest.raises(qdp.NonFiniteError) as caught:
            gpu.encode(on_device(good), 4)
        assert (caught.value.sample, caught.value.position) == (2, 3)
        state = gpu.encode(on_device(good), 4)
        reference.assert_states(state.numpy(), good, 4, "amplitude")
        gpu.check()

    def test_torch_encode_raises_at_a_later_call(self) -> None:
        bad, good = self.bad_input(4, "amplitude", (2, 3), math.nan)
        result = qdp.torch.encode(bad, 4)
        torch.cuda.synchronize()
        assert result[2].isnan().all()
        with pytest.raises(qdp.NonFiniteError) as caught:
            qdp.torch.encode(on_device(good), 4)
        assert (caught.value.sample, caught.value.position) == (2, 3)
        result = qdp.torch.encode(on_device(good), 4)
        reference.assert_states(result.cpu().numpy(), good, 4, "amplitude")

    def test_torch_check_raises_once(self) -> None:
        bad, good = self.bad_input(6, "amplitude", (3, 6), math.nan)
        qdp.torch.encode(bad, 6, "amplitude")
        with pytest.raises(qdp.NonFiniteError) as caught:
            qdp.torch.check()
        self.check_position(caught.value, (3, 6))
        qdp.torch.check()
        assert torch.isfinite(torch.view_as_real(qdp.torch.encode(on_device(good), 6))).all()

    def test_a_view_of_the_bad_row(self, gpu: qdp.Engine) -> None:
        bad, _ = self.bad_input(4, "amplitude", (2, 3), math.nan)
        state = gpu.encode(bad, 4)
        with pytest.raises(qdp.NonFiniteError) as caught:
            state[2].numpy()
        assert caught.value.sample == 2

    def test_the_first_bad_sample_is_named(self, gpu: qdp.Engine) -> None:
        x = np.ones((5000, 8))
        x[[4000, 1234, 2345], [1, 2, 3]] = np.nan
        x[1234, 7] = np.inf
        with pytest.raises(qdp.NonFiniteError) as caught:
            gpu.encode(on_device(x), 3).check()
        assert (caught.value.sample, caught.value.position) == (1234, 2)

    def test_many_bad_calls_lose_nothing(self, gpu: qdp.Engine) -> None:
        """More pending states than any table of flags is likely to hold."""
        bad, _ = self.bad_input(3, "amplitude", (2, 3), math.nan)
        states, raised = [], 0
        for _ in range(3000):
            try:
                states.append(gpu.encode(bad, 3))
            except qdp.NonFiniteError:
                raised += 1
        assert raised
        for state in (states[0], states[len(states) // 2], states[-1]):
            with pytest.raises(qdp.NonFiniteError):
                state.check()


def gpu_states(x: Any, n: int, encoding: str) -> Any:
    return qdp.Engine(DEVICE).encode(on_device(x), n, encoding).torch()
