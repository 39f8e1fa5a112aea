"""The pipeline for host input: its settings, what an engine counts, and what it foresees."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
from devices import DEVICE, on_device
from test_api import run_python

if TYPE_CHECKING:
    from collections.abc import Callable

RNG = np.random.default_rng()

SETTINGS = (
    "slots",
    "min_chunk_bytes",
    "max_chunk_bytes",
    "direct_bytes",
    "staging_threads",
    "max_batch_bytes",
    "max_batch_samples",
    "timing",
)
COUNTERS = {
    "calls",
    "direct_calls",
    "rounds",
    "chunks",
    "staged_bytes",
    "copied_bytes",
    "host_waits",
    "host_wait_ns",
    "occupied_slots",
    "max_occupied_slots",
    "copy_ns",
    "compute_ns",
    "overlap_ns",
}
TIMES = ("copy_ns", "compute_ns", "overlap_ns")

# All chunks of one size, so that their number follows from the shape.
SLOT = 65536
EVEN: dict[str, Any] = {
    "slots": 2,
    "min_chunk_bytes": SLOT,
    "max_chunk_bytes": SLOT,
    "direct_bytes": 0,
}


class TestConfig:
    def test_defaults_go_together(self) -> None:
        config = qdp.PipelineConfig()
        assert config.slots >= 2
        assert 4096 <= config.min_chunk_bytes <= config.max_chunk_bytes
        assert config.direct_bytes <= config.max_chunk_bytes
        assert config.staging_threads >= 1
        assert config == qdp.PipelineConfig()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("slots", 5),
            ("min_chunk_bytes", 8192),
            ("max_chunk_bytes", 1 << 24),
            ("direct_bytes", 0),
            ("staging_threads", 7),
            ("max_batch_bytes", 12345),
            ("max_batch_samples", 3),
            ("timing", True),
        ],
    )
    def test_one_setting_at_a_time(self, name: str, value: Any) -> None:
        usual, config = qdp.PipelineConfig(), qdp.PipelineConfig(**{name: value})
        assert getattr(config, name) == value
        assert config != usual
        for other in SETTINGS:
            assert other == name or getattr(config, other) == getattr(usual, other)

    @pytest.mark.parametrize(
        ("argument", "settings"),
        [
            ("slots", {"slots": 1}),
            ("slots", {"slots": 1025}),
            ("max_chunk_bytes", {"max_chunk_bytes": 65535, "min_chunk_bytes": 4096}),
            ("max_chunk_bytes", {"max_chunk_bytes": (1 << 30) + 1}),
            ("min_chunk_bytes", {"min_chunk_bytes": 4095}),
            ("min_chunk_bytes", {**EVEN, "min_chunk_bytes": SLOT + 1}),
            ("direct_bytes", {**EVEN, "direct_bytes": SLOT + 1}),
            ("staging_threads", {"staging_threads": 0}),
            ("max_batch_bytes", {"max_batch_bytes": 0}),
            ("max_batch_samples", {"max_batch_samples": 0}),
            ("slots", {"slots": -1}),
            ("max_batch_bytes", {"max_batch_bytes": 2**64}),
        ],
    )
    def test_refused_settings_are_named(self, argument: str, settings: dict[str, Any]) -> None:
        with pytest.raises(qdp.InvalidArgumentError) as caught:
            qdp.PipelineConfig(**settings)
        assert caught.value.argument == argument
        assert caught.value.got == str(settings[argument])

    @pytest.mark.parametrize("settings", [{"slots": 2.5}, {"slots": "2"}, {"timing": 1}, {"x": 1}])
    def test_other_types_and_names(self, settings: dict[str, Any]) -> None:
        with pytest.raises(TypeError):
            qdp.PipelineConfig(**settings)

    def test_only_by_name(self) -> None:
        with pytest.raises(TypeError):
            qdp.PipelineConfig(16)  # type: ignore[call-arg]

    def test_repr_makes_it_again(self) -> None:
        for config in (
            qdp.PipelineConfig(),
            qdp.PipelineConfig(slots=3, max_batch_bytes=1 << 20, max_batch_samples=7, timing=True),
        ):
            names = {"PipelineConfig": qdp.PipelineConfig}
            assert eval(repr(config), names) == config

    def test_frozen(self) -> None:
        config = qdp.PipelineConfig()
        for name in (*SETTINGS, "other"):
            with pytest.raises(AttributeError):
                setattr(config, name, 2)

    def test_equality_is_of_the_settings(self) -> None:
        assert qdp.PipelineConfig(slots=4) == qdp.PipelineConfig(slots=4)
        assert qdp.PipelineConfig(slots=4) != qdp.PipelineConfig(slots=5)
        other: Any = 16
        assert qdp.PipelineConfig() != other


class TestEnvironment:
    PRINT = "import qdp; print(repr(qdp.PipelineConfig({})))"

    def test_it_names_the_defaults(self) -> None:
        values: dict[str, Any] = {
            "slots": 5,
            "min_chunk_bytes": 8192,
            "max_chunk_bytes": 1 << 19,
            "direct_bytes": 0,
            "staging_threads": 3,
            "max_batch_bytes": 1 << 25,
            "max_batch_samples": 100,
            "timing": True,
        }
        assert set(values) == set(SETTINGS)
        environment = {f"QDP_PIPELINE_{k.upper()}": str(int(v)) for k, v in values.items()}
        expected = repr(qdp.PipelineConfig(**values))
        assert run_python(self.PRINT.format(""), **environment).strip() == expected
        # An argument comes before it.
        values["slots"] = 9
        expected = repr(qdp.PipelineConfig(**values))
        assert run_python(self.PRINT.format("slots=9"), **environment).strip() == expected

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("QDP_PIPELINE_SLOTS", "many"),
            ("QDP_PIPELINE_SLOTS", "0"),
            ("QDP_PIPELINE_TIMING", "2"),
            ("QDP_NUM_THREADS", "-1"),
        ],
    )
    @pytest.mark.parametrize("call", ["PipelineConfig()", "Engine()", "Engine('cpu')"])
    def test_what_is_not_valid_is_refused_by_name(self, name: str, value: str, call: str) -> None:
        code = (
            "import qdp\n"
            f"try: qdp.{call}\n"
            "except qdp.InvalidArgumentError as error: print(error.argument, error.got)\n"
        )
        assert run_python(code, **{name: value}).split() == [name, f'"{value}"']

    @pytest.mark.parametrize(("name", "value"), [("SLOTS", "1"), ("MAX_CHUNK_BYTES", "4096")])
    def test_what_does_not_go_together_is_refused(self, name: str, value: str) -> None:
        code = (
            "import qdp\ntry: qdp.Engine()\nexcept qdp.InvalidArgumentError as error: print(error)"
        )
        assert name.lower() in run_python(code, **{f"QDP_PIPELINE_{name}": value})

    def test_threads_follow_the_process(self) -> None:
        code = "import qdp; print(qdp.PipelineConfig().staging_threads)"
        threads = [int(run_python(code, QDP_NUM_THREADS=n)) for n in ("1", "16")]
        assert threads[0] == 1 < threads[1] < 16


class TestEngine:
    def test_takes_a_config(self, device: str) -> None:
        config = qdp.PipelineConfig(**EVEN)
        engine = qdp.Engine(device, pipeline=config)
        assert engine.encode(np.ones((100, 1024)), 10).shape == (100, 1024)
        assert qdp.Engine(device, pipeline=None).device == device
        with pytest.raises(TypeError):
            qdp.Engine(device, pipeline={"slots": 2})  # type: ignore[arg-type]

    def test_counters(self, device: str) -> None:
        engine = qdp.Engine(device)
        assert engine.stats() == dict.fromkeys(COUNTERS, 0)
        engine.encode(np.ones((4, 8)), 3)
        assert engine.stats()["calls"] == (device != "cpu")
        if device == "cpu":
            assert engine.stats() == dict.fromkeys(COUNTERS, 0)


def counted(engine: qdp.Engine, *calls: Callable[[], Any]) -> dict[str, int]:
    """What the engine counts while the calls are made."""
    before = engine.stats()
    for call in calls:
        call()
    return {name: value - before[name] for name, value in engine.stats().items()}


def gpu_engine(precision: Any = None, **settings: Any) -> qdp.Engine:
    config = qdp.PipelineConfig(**{**EVEN, **settings})
    return qdp.Engine(DEVICE, precision=precision, pipeline=config)


def chunks_of(batch: int, row_bytes: int) -> int:
    """Chunks of a round: whole samples, or slots that long samples are split over."""
    if row_bytes > SLOT:
        return batch * -(-row_bytes // SLOT)
    return -(-batch // (SLOT // row_bytes))


def pageable(x: Any) -> Any:
    return x


def torch_pinned(x: Any) -> Any:
    import torch

    return torch.from_numpy(x).pin_memory()


@pytest.mark.gpu
class TestCounters:
    def check(self, engine: qdp.Engine, data: Any, n: int, *options: Any, **expected: int) -> None:
        stats = counted(engine, partial(engine.encode, data, n, *options))
        usual = {"calls": 1, "direct_calls": 0, "rounds": 1, "staged_bytes": 0}
        expected = {**usual, **expected}
        assert {name: stats[name] for name in expected} == expected
        assert stats["chunks"] <= stats["occupied_slots"] <= 2 * stats["chunks"]
        assert 1 <= engine.stats()["max_occupied_slots"] <= 2
        assert stats["host_waits"] <= stats["chunks"]
        assert (stats["host_waits"] == 0) == (stats["host_wait_ns"] == 0)

    def test_a_batch(self) -> None:
        x = RNG.normal(size=(100, 1024))  # 8 samples in a slot
        self.check(gpu_engine(), x, 10, chunks=13, copied_bytes=x.nbytes, staged_bytes=x.nbytes)

    def test_a_pinned_batch(self) -> None:
        x = RNG.normal(size=(100, 1024))
        engine = gpu_engine()
        self.check(engine, torch_pinned(x), 10, chunks=13, copied_bytes=x.nbytes)
        with qdp.pin(x):
            self.check(engine, x, 10, chunks=13, copied_bytes=x.nbytes)
            # The elements of a copy have to follow each other.
            half = x[:, ::2]
            size = half.nbytes
            self.check(engine, half, 10, chunks=7, copied_bytes=size, staged_bytes=size)
        self.check(engine, x, 10, chunks=13, copied_bytes=x.nbytes, staged_bytes=x.nbytes)

    @pytest.mark.parametrize("pin", [pageable, torch_pinned])
    def test_the_direct_path(self, pin: Any) -> None:
        engine = gpu_engine(direct_bytes=32768)
        for batch, chunks in ((1, 1), (4, 1), (5, 1), (9, 2)):
            x = RNG.normal(size=(batch, 1024))
            staged = x.nbytes if pin is pageable else 0
            direct = int(x.nbytes <= 32768)
            sizes = {"copied_bytes": x.nbytes, "staged_bytes": staged}
            self.check(engine, pin(x), 10, direct_calls=direct, chunks=chunks, **sizes)

    @pytest.mark.parametrize("pin", [pageable, torch_pinned])
    def test_split_samples(self, pin: Any) -> None:
        x = RNG.normal(size=(3, 20_000))  # 8192 values in a slot
        staged = x.nbytes if pin is pageable else 0
        expected = {"chunks": 9, "copied_bytes": x.nbytes, "staged_bytes": staged}
        self.check(gpu_engine(), pin(x), 15, **expected)

    @pytest.mark.parametrize(
        ("encoding", "dtype", "precision", "size"),
        [
            ("amplitude", "float64", "complex64", 4),
            ("amplitude", "int64", "complex64", 4),
            ("amplitude", "complex128", "complex64", 8),
            ("amplitude", "float64", "complex128", 8),
            ("amplitude", "complex128", "complex128", 16),
            ("amplitude", "float32", "complex128", 4),
            ("amplitude", "float16", "complex64", 2),
            ("amplitude", "uint8", "complex128", 1),
            ("angle", "float64", "complex64", 8),
            ("iqp-z", "int64", "complex64", 8),
        ],
    )
    def test_bytes_that_travel(self, encoding: str, dtype: str, precision: Any, size: int) -> None:
        n, features, batch = (13, 8192, 8) if encoding == "amplitude" else (8, 8, 2000)
        x = RNG.integers(1, 100, size=(batch, features)).astype(dtype)
        travels = batch * features * size
        chunks = chunks_of(batch, features * size)
        expected = {"chunks": chunks, "copied_bytes": travels, "staged_bytes": travels}
        self.check(gpu_engine(precision), x, n, encoding, **expected)
        if x[0].nbytes > SLOT and size < x.itemsize:
            return  # test_long_pinned_samples_that_are_narrowed
        # Copied from where it lies, it travels as it is.
        expected = {"chunks": chunks_of(batch, x[0].nbytes), "copied_bytes": x.nbytes}
        self.check(gpu_engine(precision), torch_pinned(x), n, encoding, **expected)

    def test_long_pinned_samples_that_are_narrowed(self) -> None:
        x = RNG.normal(size=(2, 40_000))  # 16384 narrow values in a slot
        half = x.nbytes // 2
        expected = {"chunks": 6, "copied_bytes": half, "staged_bytes": half}
        self.check(gpu_engine("complex64"), torch_pinned(x), 16, **expected)

    @pytest.mark.parametrize("pin", [pageable, torch_pinned])
    def test_rounds(self, pin: Any) -> None:
        x = RNG.normal(size=(100, 1024))
        staged = x.nbytes if pin is pageable else 0
        for settings, rounds, chunks in (
            ({"max_batch_samples": 20}, 5, 15),
            ({"max_batch_bytes": 200_000}, 5, 13),
            ({"max_batch_bytes": 200_000, "max_batch_samples": 10}, 10, 20),
            ({"max_batch_bytes": 1}, 100, 100),
            ({"max_batch_samples": 8, "direct_bytes": SLOT}, 13, 13),
            ({"max_batch_samples": 100}, 1, 13),
        ):
            expected = {"copied_bytes": x.nbytes, "staged_bytes": staged, "chunks": chunks}
            self.check(gpu_engine(**settings), pin(x), 10, rounds=rounds, **expected)

    def test_a_sample_out_of_range_makes_its_round_again(self) -> None:
        x = RNG.normal(size=(100, 1024))
        x[70] *= 1e60
        # 16 narrow samples in a slot, 50 in a round: the second is made twice.
        expected = {"rounds": 3, "chunks": 12, "copied_bytes": 600 * 1024}
        engine = gpu_engine("complex64", max_batch_samples=50)
        self.check(engine, x, 10, staged_bytes=600 * 1024, **expected)

    def test_several_calls(self) -> None:
        engine = gpu_engine(direct_bytes=SLOT)
        x = RNG.normal(size=(100, 1024))
        out = on_device(np.empty((100, 1024), np.complex128))
        stats = counted(
            engine,
            lambda: engine.encode(x, 10),
            lambda: engine.encode(x[:3], 10),
            lambda: engine.encode_async(x, 10).result(),
            lambda: engine.encode(x, 10, out=out),
            lambda: engine.plan(10).encode(x[0]),
            lambda: engine.encode(on_device(x), 10),  # not host input
            lambda: engine.encode(x[:0], 10),  # nothing to do
        )
        assert (stats["calls"], stats["direct_calls"], stats["chunks"]) == (5, 2, 41)
        assert stats["copied_bytes"] == stats["staged_bytes"] == 304 * 8192

    def test_times_only_where_asked_for(self) -> None:
        x = RNG.normal(size=(512, 2**12))
        engine = gpu_engine()
        stats = counted(engine, partial(engine.encode, x, 12))
        assert [stats[name] for name in TIMES] == [0, 0, 0]
        for pin in (pageable, torch_pinned):
            engine = gpu_engine(timing=True)
            stats = counted(engine, partial(engine.encode, pin(x), 12))
            assert stats["copy_ns"] > 0
            assert stats["compute_ns"] > 0
            assert stats["overlap_ns"] <= min(stats["copy_ns"], stats["compute_ns"])
            again = counted(engine, partial(engine.encode, x[:1], 12))
            assert again["copy_ns"] > 0


class TestEstimate:
    @pytest.mark.parametrize(
        ("encoding", "n", "features", "batch", "dtype"),
        [
            ("amplitude", 10, 1024, 100, "float64"),
            ("amplitude", 10, 1000, 100, "float32"),
            ("amplitude", 10, 1024, 1, "int16"),
            ("amplitude", 15, 20_000, 3, "float64"),
            ("amplitude", 15, 20_000, 5, "complex64"),
            ("amplitude", 5, 1, 1000, "uint8"),
            ("angle", 8, 8, 5000, "float64"),
            ("basis", 8, 1, 5000, "int64"),
            ("iqp", 8, 36, 5000, "float32"),
            ("zz", 8, 8, 5000, "float16"),
        ],
    )
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            EVEN,
            {**EVEN, "max_batch_samples": 7, "direct_bytes": 4096},
            {**EVEN, "slots": 3, "min_chunk_bytes": 4096, "max_chunk_bytes": 1 << 18},
            {**EVEN, "max_batch_bytes": 100_000, "min_chunk_bytes": 4096},
        ],
    )
    def test_is_what_is_counted(
        self,
        encoding: str,
        n: int,
        features: int,
        batch: int,
        dtype: str,
        settings: dict[str, Any],
        device: str,
    ) -> None:
        config = qdp.PipelineConfig(**settings)
        for precision in (None, "complex64"):
            engine = qdp.Engine(device, precision=precision, pipeline=config)
            plan = engine.estimate(n, encoding, batch, dtype=dtype, num_features=features)
            x = np.ones((batch, features), dtype)
            stats = counted(engine, partial(engine.encode, x, n, encoding))
            state = engine.encode(x, n, encoding)
            assert plan["fits"] is True
            assert plan["input_bytes"] == x.nbytes
            assert plan["output_bytes"] == state.nbytes <= plan["free_bytes"]
            if device == "cpu":
                assert (plan["rounds"], plan["chunks"], plan["copied_bytes"]) == (1, 0, 0)
                continue
            for name in ("copied_bytes", "rounds", "chunks"):
                assert plan[name] == stats[name], name
            assert plan["copied_bytes"] == stats["staged_bytes"]
            assert plan["direct"] is bool(stats["direct_calls"])
            assert plan["slot_bytes"] == config.max_chunk_bytes
            assert 1 <= plan["slots"] <= min(config.slots, plan["chunks"])

    def test_defaults(self, device: str) -> None:
        engine = qdp.Engine(device)
        plan = engine.estimate(10)
        assert plan["input_bytes"] == 1024 * 8
        assert plan["output_bytes"] == 1024 * 16
        for encoding in ("angle", "basis", "iqp"):
            plan = engine.estimate(10, encoding, 6, dtype="float32")
            assert plan["input_bytes"] == 6 * 4 * engine.num_features(10, encoding)
            assert plan["output_bytes"] == 6 * 1024 * 8
        assert engine.estimate(10, batch_size=0)["output_bytes"] == 0
        options: dict[str, Any] = {"reps": 3, "entanglement": "linear", "convention": "qiskit"}
        assert engine.estimate(10, "zz", 6, **options)["fits"] is True

    def test_on_the_device(self, device: str) -> None:
        engine = qdp.Engine(device)
        plan = engine.estimate(12, "iqp", 100, on_device=True)
        names = ("copied_bytes", "chunks", "slots", "slot_bytes")
        assert [plan[name] for name in names] == [0, 0, 0, 0]
        assert plan["rounds"] == 1
        assert plan["output_bytes"] == 100 * 2**12 * 16

    def test_runs_nothing(self, device: str) -> None:
        engine = qdp.Engine(device)
        assert counted(engine, partial(engine.estimate, 20, "iqp", 10)) == dict.fromkeys(
            COUNTERS, 0
        )

    @pytest.mark.parametrize(
        ("n", "encoding", "batch"),
        [(40, "angle", 1), (50, "angle", 1), (20, "phase", 1_000_000), (12, "basis", 1 << 30)],
    )
    def test_what_cannot_fit_is_refused_before_any_work(
        self, n: int, encoding: str, batch: int, device: str
    ) -> None:
        engine = qdp.Engine(device)
        features = 1 if encoding == "basis" else n
        plan = engine.estimate(n, encoding, batch, num_features=features)
        assert plan["fits"] is False
        assert plan["output_bytes"] == batch * 2**n * 16 > plan["free_bytes"]
        names = ("slots", "rounds", "chunks", "workspace_bytes")
        assert [plan[name] for name in names] == [0, 0, 0, 0]
        x = np.broadcast_to(np.zeros(features), (batch, features))
        before = engine.stats()
        with pytest.raises(qdp.OutOfMemoryError) as caught:
            engine.encode(x, n, encoding)
        assert caught.value.needed == plan["output_bytes"]
        assert engine.stats() == before
        assert engine.encode(x[:1, :1], 1, encoding).shape == (1, 2)

    def test_beyond_64_bits(self, device: str) -> None:
        """Asking costs nothing, whatever it is asked about."""
        engine = qdp.Engine(device)
        for encoding in ("amplitude", "angle", "iqp"):
            plan = engine.estimate(50, encoding, 2**40)
            assert plan["fits"] is False
            assert plan["output_bytes"] == 2**64 - 1
        assert engine.estimate(50, batch_size=2**40)["input_bytes"] == 2**64 - 1
        assert engine.estimate(50)["input_bytes"] == 2**53

    def test_errors(self, device: str) -> None:
        engine = qdp.Engine(device)
        with pytest.raises(qdp.DTypeError, match="float8") as caught:
            engine.estimate(3, dtype="float8")
        assert caught.value.argument == "dtype"
        with pytest.raises(qdp.FeatureCountError):
            engine.estimate(3, num_features=9)
        with pytest.raises(qdp.DTypeError):
            engine.estimate(3, "angle", dtype="complex64")
        with pytest.raises(qdp.InvalidArgumentError):
            engine.estimate(3, "magic")
