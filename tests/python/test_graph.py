"""Graphs: what a replay returns is what encode returns, and it never changes."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PRECISIONS, Case

if TYPE_CHECKING:
    from collections.abc import Callable


def samples(batch: int, features: int = 8, seed: int = 0) -> Any:
    return np.random.default_rng([seed, batch]).uniform(-3, 3, size=(batch, features))


class TestReplay:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_encode(
        self, case: Case, precision: Any, engine_for: Callable[[Any], qdp.Engine]
    ) -> None:
        engine = engine_for(precision)
        for n in (1, 3, 8, 11):
            x, options = case.cast(case.samples(n, batch=5), precision), case.options(n)
            graph = engine.capture(
                n, case.encoding, 5, input=x.dtype, features=x.shape[1], **options
            )
            for k in range(4):
                data = np.roll(x, k, axis=0)
                state = graph.replay(data)
                assert state.shape == (5, 2**n)
                expected = engine.encode(data, n, case.encoding, **options).numpy()
                reference.assert_close(
                    state.numpy(), expected, data, n, case.encoding, slack=2, **options
                )

    def test_sizes(self, engine: qdp.Engine) -> None:
        """A smaller batch is padded to the next size, and what pads it is never seen."""
        graph = engine.capture(4, "amplitude", [16, 4, 64], features=16)
        assert graph.sizes == (4, 16, 64)
        for batch in (64, 1, 3, 4, 5, 16, 17, 63, 2, 64, 0):
            x = samples(batch, 16)
            state = graph.replay(x)
            assert state.shape == (batch, 16)
            np.testing.assert_allclose(
                state.numpy(), engine.encode(x, 4).numpy(), rtol=0, atol=1e-15
            )
        engine.check()

    def test_too_large_a_batch_names_the_sizes(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", [16, 4])
        with pytest.raises(qdp.ShapeError, match=r"at most 16 \(captured for 4, 16\)") as caught:
            graph.replay(samples(17))
        assert caught.value.argument == "data"
        assert caught.value.got == "(17, 8)"

    def test_one_sample(self, engine: qdp.Engine) -> None:
        state = engine.capture(8, "angle", 4).replay(samples(1)[0])
        assert state.shape == (1, 256)

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(lambda x: x[:, ::-1], id="reversed columns"),
            pytest.param(np.asfortranarray, id="columns"),
            pytest.param(lambda x: np.repeat(x, 2, axis=0)[::2], id="rows apart"),
            pytest.param(lambda x: x.tolist(), id="lists"),
            pytest.param(lambda x: x.astype(">f8"), id="bytes swapped"),
        ],
    )
    def test_host_data_of_every_kind(self, data: Any, engine: qdp.Engine) -> None:
        given = data(samples(6))
        state = engine.capture(8, "angle", 8).replay(given)
        np.testing.assert_allclose(
            state.numpy(), engine.encode(given, 8, "angle").numpy(), rtol=0, atol=1e-15
        )

    def test_cpu_tensors(self, engine: qdp.Engine, torch: Any) -> None:
        graph = engine.capture(8, "angle", 8, input=torch.float64)
        x = torch.from_numpy(samples(6))
        for given in (x, x.T.contiguous().T):
            expected = engine.encode(x, 8, "angle").numpy()
            np.testing.assert_allclose(graph.replay(given).numpy(), expected, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("name", [np.float32, np.dtype("float32"), "float32"])
    def test_element_types(self, name: Any, engine: qdp.Engine) -> None:
        graph = engine.capture(3, "angle", 2, input=name)
        assert graph.dtype == "float32"
        assert graph.replay(np.zeros((2, 3), np.float32)).dtype == np.complex64
        with pytest.raises(qdp.DTypeError, match="float32, as the graph was captured for"):
            graph.replay(np.zeros((2, 3)))

    def test_host_input_may_change_after_the_call(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 64)
        for k in range(8):
            x = samples(64, seed=k)
            expected = engine.encode(x, 8, "angle").numpy()
            state = graph.replay(x)
            x[:] = np.nan
            np.testing.assert_allclose(state.numpy(), expected, rtol=0, atol=1e-15)

    def test_attributes(self, engine: qdp.Engine) -> None:
        graph = engine.capture(3, "angle", 2)
        assert (graph.num_features, graph.dtype, graph.device) == (3, "float64", engine.device)
        assert 'encodings=["angle"], sizes=[2], dtype=float64, num_features=3' in repr(graph)
        assert graph.slots == (0 if engine.device == "cpu" else 4)
        graph.trim()
        assert graph.replay(np.zeros((2, 3))).shape == (2, 8)


class TestWhatItReturnsNeverChanges:
    def test_states_that_are_held(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 16)
        batches = [samples(16, seed=k) for k in range(7)]
        states = [graph.replay(x) for x in batches]
        views = [state.numpy() for state in states[:3]]
        for x, state in zip(batches, states, strict=True):
            expected = engine.encode(x, 8, "angle").numpy()
            np.testing.assert_allclose(state.numpy(), expected, rtol=0, atol=1e-15)
        np.testing.assert_array_equal(views[0], states[0].numpy())
        assert graph.slots == (0 if engine.device == "cpu" else 7)
        del states[2:], state
        graph.trim()
        assert graph.slots == (0 if engine.device == "cpu" else 4)
        np.testing.assert_array_equal(views[1], states[1].numpy())

    def test_slices_hold_their_batch(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 16)
        x = samples(16)
        row = graph.replay(x)[3]
        for k in range(1, 6):
            graph.replay(samples(16, seed=k))
        np.testing.assert_allclose(
            row.numpy(), engine.encode(x[3], 8, "angle")[0].numpy(), rtol=0, atol=1e-15
        )

    def test_states_outlive_graph_and_engine(self, device: str) -> None:
        engine = qdp.Engine(device)
        x = samples(4)
        expected = engine.encode(x, 8, "angle").numpy()
        state = engine.capture(8, "angle", 4).replay(x)
        del engine
        gc.collect()
        np.testing.assert_allclose(state.numpy(), expected, rtol=0, atol=1e-15)


class TestValidation:
    @pytest.mark.parametrize("batch", [3, 4, 5000])
    def test_bad_values_raise_at_the_call(self, batch: int, engine: qdp.Engine) -> None:
        for encoding, value, error in (
            ("amplitude", 0.0, qdp.ZeroNormError),
            ("amplitude", np.nan, qdp.NonFiniteError),
            ("angle", np.inf, qdp.NonFiniteError),
            ("basis", 2.0, qdp.BasisValueError),
        ):
            graph = engine.capture(8, encoding, batch + 1, features=8)
            good = np.ones((batch, 8))
            graph.replay(good)
            bad = good.copy()
            bad[1] = value
            for _ in range(3):
                with pytest.raises(error) as caught:
                    graph.replay(bad)
                assert caught.value.sample == 1
            # What was refused pads no batch.
            for _ in range(3):
                assert graph.replay(good[:1]).numpy().shape == (1, 256)
            engine.check()

    def test_every_encoding_is_asked(self, engine: qdp.Engine) -> None:
        for first, second in (("angle", "amplitude"), ("amplitude", "angle")):
            graph = engine.capture(8, [first, second], 4, features=8)
            x = np.ones((4, 8))
            x[2] = 0
            with pytest.raises(qdp.ZeroNormError):
                graph.replay(x)

    def test_wrong_shapes(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 4)
        for shape in ((4, 7), (4, 9), (7,)):
            with pytest.raises(qdp.ShapeError):
                graph.replay(np.zeros(shape))

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "argument"),
        [
            ((8, "angle", 0), {}, qdp.InvalidArgumentError, "batch_size"),
            ((8, "angle", []), {}, qdp.InvalidArgumentError, "batch_size"),
            ((8, "angle", [4, -1]), {}, qdp.InvalidArgumentError, "batch_size"),
            ((8, "angle", 1.5), {}, qdp.InvalidArgumentError, "batch_size"),
            ((8, "angle", 2**62), {}, qdp.InvalidArgumentError, "batch_size"),
            ((8, [], 4), {}, qdp.InvalidArgumentError, "encoding"),
            ((8, [3], 4), {}, qdp.InvalidArgumentError, "encoding"),
            ((8, [("zz", {"rep": 2})], 4), {}, qdp.InvalidArgumentError, "encoding"),
            ((8, "angle", 4), {"input": "float33"}, qdp.InvalidArgumentError, "input"),
            ((8, "angle", 4), {"validate": "never"}, qdp.InvalidArgumentError, "validate"),
            ((8, "angle", 4), {"inputs": {"a": 3}}, qdp.InvalidArgumentError, "inputs"),
            (
                (8, "angle", 4),
                {"inputs": {"a": ((2, None), "int8")}},
                qdp.InvalidArgumentError,
                "inputs",
            ),
            (
                (8, "angle", 4),
                {"inputs": {"a": ((2,), "int8")}, "constants": {"a": np.ones(2)}},
                qdp.InvalidArgumentError,
                "inputs",
            ),
            ((8, "angle", 4), {"input": "complex64"}, qdp.DTypeError, "data"),
        ],
    )
    def test_what_cannot_be_captured(
        self, arguments: Any, options: Any, error: Any, argument: str, engine: qdp.Engine
    ) -> None:
        with pytest.raises(error) as caught:
            engine.capture(*arguments, **options)
        assert caught.value.argument == argument

    def test_features_that_an_encoding_does_not_take(self, engine: qdp.Engine) -> None:
        with pytest.raises(qdp.FeatureCountError):
            engine.capture(8, "angle", 4, features=7)
        with pytest.raises(qdp.FeatureCountError):
            engine.capture(8, ["angle", "iqp"], 4)


class TestSeveralEncodings:
    def test_equal_each_alone(self, engine: qdp.Engine) -> None:
        encodings: list[str | tuple[str, dict[str, Any]]]
        encodings = ["angle", ("angle", {"rotation": "x"}), "phase", ("zz", {"reps": 1}), "iqp-z"]
        graph = engine.capture(8, encodings, [8, 64], convention="qiskit")
        for batch in (64, 5, 64, 8):
            x = samples(batch)
            replay = graph.replay(x)
            assert len(replay.states) == len(encodings)
            assert replay.inputs == {}
            for encoding, state in zip(encodings, replay.states, strict=True):
                name, options = encoding if isinstance(encoding, tuple) else (encoding, {})
                expected = engine.encode(x, 8, name, convention="qiskit", **options)
                np.testing.assert_allclose(state.numpy(), expected.numpy(), rtol=0, atol=1e-13)
            np.testing.assert_array_equal(replay.state.numpy(), replay.states[0].numpy())

    def test_one_that_is_held_keeps_its_memory(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, ["angle", "phase"], 16)
        x = samples(16)
        phase = graph.replay(x).states[1]
        for k in range(1, 6):
            graph.replay(samples(16, seed=k))
        expected = engine.encode(x, 8, "phase").numpy()
        np.testing.assert_allclose(phase.numpy(), expected, rtol=0, atol=1e-15)


def others(batch: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng([seed, batch])
    return {
        "labels": rng.integers(-9, 9, size=batch),
        "index": rng.integers(0, 99, size=(batch, 3)).astype(np.int32),
        "mask": rng.integers(0, 2, size=batch).astype(np.uint8),
        "weights": rng.normal(size=5).astype(np.float32),
        "matrix": rng.normal(size=(3, 4)),
    }


INPUTS: dict[str, Any] = {
    "labels": ((None,), "int64"),
    "index": ((None, 3), "int32"),
    "mask": ((None,), np.uint8),
    "weights": ((5,), "float32"),
    "matrix": ((3, 4), "float64"),
}


class TestInputs:
    def test_come_with_their_batch(self, engine: qdp.Engine) -> None:
        scale = np.arange(6.0)
        graph = engine.capture(8, "angle", [8, 64], inputs=INPUTS, constants={"scale": scale})
        scale[:] = -1  # copied at the capture
        held = []
        for batch in (64, 5, 8, 64, 9, 1):
            x, given = samples(batch), others(batch)
            replay = graph.replay(x, **given)
            held.append((given, replay))
            expected = engine.encode(x, 8, "angle").numpy()
            np.testing.assert_allclose(replay.state.numpy(), expected, rtol=0, atol=1e-15)
        for given, replay in held:
            assert set(replay.inputs) == {*INPUTS, "scale"}
            np.testing.assert_array_equal(replay.inputs["scale"].numpy(), np.arange(6.0))
            for name, value in given.items():
                array = replay.inputs[name]
                assert (array.shape, array.dtype) == (value.shape, value.dtype.name)
                assert array.device == engine.device
                np.testing.assert_array_equal(array.numpy(), value)

    def test_hold_their_batch(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 16, inputs=INPUTS)
        given = others(16)
        labels = graph.replay(samples(16), **given).inputs["labels"]
        for k in range(1, 6):
            graph.replay(samples(16), **others(16, seed=k))
        np.testing.assert_array_equal(labels.numpy(), given["labels"])

    def test_tensors(self, engine: qdp.Engine, torch: Any) -> None:
        graph = engine.capture(8, "angle", 16, inputs=INPUTS)
        given = others(16)
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        tensors["matrix"] = tensors["matrix"].T.contiguous().T
        replay = graph.replay(samples(16), **tensors)
        for name, value in given.items():
            for tensor in (replay.inputs[name].torch(), torch.from_dlpack(replay.inputs[name])):
                assert str(tensor.device) == engine.device
                assert tensor.dtype == tensors[name].dtype
                np.testing.assert_array_equal(tensor.cpu().numpy(), value)

    @pytest.mark.parametrize("name", ["bool", np.bool_, np.dtype(bool), bool])
    def test_truth_values_stay_truth_values(
        self, name: Any, engine: qdp.Engine, torch: Any
    ) -> None:
        x, mask = samples(4), np.array([True, False, False, True])
        marks = np.eye(2, dtype=bool)
        graph = engine.capture(
            8, "angle", 8, inputs={"mask": ((None,), name)}, constants={"marks": marks}
        )
        for given in (mask, torch.from_numpy(mask), mask.tolist(), np.repeat(mask, 2)[::2]):
            replay = graph.replay(x, mask=given)
            for key, want in (("mask", mask), ("marks", marks)):
                array = replay.inputs[key]
                assert array.dtype == "bool"
                assert "dtype=bool" in repr(array)
                assert array.numpy().dtype == np.bool_
                np.testing.assert_array_equal(~array.numpy(), ~want)
                for tensor in (array.torch(), torch.from_dlpack(array)):
                    assert tensor.dtype == torch.bool
                    np.testing.assert_array_equal((~tensor).cpu().numpy(), ~want)
        for wrong in (np.array([7, 9, 0, 1], np.uint8), torch.tensor([7, 9, 0, 1]), [0, 1, 0, 1]):
            with pytest.raises(qdp.DTypeError, match='inputs: expected dtype bool for "mask"'):
                graph.replay(x, mask=wrong)
        with pytest.raises(qdp.ShapeError, match=r"^inputs: "):
            graph.replay(x, mask=mask[:2])

    def test_bytes_stay_bytes(self, engine: qdp.Engine, torch: Any) -> None:
        constant = np.array([1, 9], np.uint8)
        graph = engine.capture(
            8, "angle", 8, inputs={"level": ((None,), "uint8")}, constants={"c": constant}
        )
        level = np.array([7, 9], np.uint8)
        replay = graph.replay(samples(2), level=level)
        for key, want in (("level", level), ("c", constant)):
            array = replay.inputs[key]
            assert array.dtype == array.numpy().dtype.name == "uint8"
            assert array.torch().dtype == torch.uint8
            np.testing.assert_array_equal(array.numpy(), want)

    def test_constants_are_nobodys_to_write(self, engine: qdp.Engine, torch: Any) -> None:
        """All replays share them, so whoever may write gets a copy."""
        graph = engine.capture(8, "angle", 8, constants={"c": np.arange(2), "empty": np.zeros(0)})

        def constant() -> Any:
            return graph.replay(samples(2)).inputs["c"]

        array = constant().numpy()
        if engine.device == "cpu":
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 99
            with pytest.raises(ValueError, match="flag to True"):
                array.setflags(write=True)
            torch.from_dlpack(constant())[0] = 99
            constant().__dlpack__(copy=True)
            with pytest.raises(BufferError, match="exported as a copy"):
                constant().__dlpack__(copy=False)
        else:
            array[0] = 99
        tensor = constant().torch()
        assert str(tensor.device) == engine.device
        tensor[0] = 99
        np.testing.assert_array_equal(constant().numpy(), [0, 1])
        np.testing.assert_array_equal(constant().torch().cpu(), [0, 1])
        assert graph.replay(samples(2)).inputs["empty"].torch().shape == (0,)

    @pytest.mark.usefixtures("torch")
    def test_inputs_are_their_replays_to_write(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 8, inputs={"labels": ((None,), "int64")})
        labels = np.arange(3)
        first, second = (graph.replay(samples(3), labels=labels).inputs["labels"] for _ in range(2))
        first.torch()[0] = 99
        np.testing.assert_array_equal(first.numpy(), [99, 1, 2])
        np.testing.assert_array_equal(second.numpy(), [0, 1, 2])
        np.testing.assert_array_equal(labels, [0, 1, 2])

    def test_have_to_be_those_of_the_capture(self, engine: qdp.Engine) -> None:
        graph = engine.capture(8, "angle", 16, inputs=INPUTS)
        x, given = samples(16), others(16)
        for wrong, error in (
            ({}, qdp.InvalidArgumentError),
            ({**given, "more": np.ones(2)}, qdp.InvalidArgumentError),
            (
                {**{k: v for k, v in given.items() if k != "mask"}, "musk": given["mask"]},
                qdp.InvalidArgumentError,
            ),
            ({**given, "labels": given["labels"][:5]}, qdp.ShapeError),
            ({**given, "matrix": given["matrix"].T}, qdp.ShapeError),
            ({**given, "weights": given["matrix"][0]}, qdp.DTypeError),
        ):
            with pytest.raises(error, match=r"^inputs: "):
                graph.replay(x, **wrong)
        assert graph.replay(x, **given).state.shape == (16, 256)
        with pytest.raises(qdp.InvalidArgumentError):
            engine.capture(8, "angle", 16).replay(x, **given)


class TestThreads:
    def test_share_a_graph(self, engine: qdp.Engine) -> None:
        graph = engine.capture(6, "angle", [4, 32], inputs={"number": ((1,), "int64")})
        start = threading.Barrier(6)

        def work(seed: int) -> None:
            start.wait()
            held: list[Any] = []
            for k in range(60):
                batch = 1 + (7 * k + seed) % 32
                x = samples(batch, 6, seed=seed * 1000 + k)
                replay = graph.replay(x, number=np.array([seed * 1000 + k]))
                held = [*held[-(k % 3) :], (x, replay, seed * 1000 + k)]
                for x, replay, number in held:
                    reference.assert_states(replay.state.numpy(), x, 6, "angle")
                    assert replay.inputs["number"].numpy() == number

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        graph.trim()
        assert graph.slots <= 4
