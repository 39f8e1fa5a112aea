"""GPU and CPU backend agree, and the GPU's memory comes back."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PLAIN_CASES, PRECISIONS, REAL, Case

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE, on_device  # noqa: E402

pytestmark = pytest.mark.gpu


class TestSmall:
    """Every kernel at small sizes: also what runs under compute-sanitizer."""

    @pytest.mark.sanitize
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", PLAIN_CASES, ids=str)
    def test_every_kernel(self, case: Any, precision: Any) -> None:
        engine = qdp.Engine(DEVICE, precision=precision)
        for n in (1, 2, 3, 6, 11):
            for batch in (1, 3):
                x = case.samples(n, batch=batch)
                data = case.cast(x, precision)
                wide = np.zeros((2 * batch, 2 * x.shape[1]), data.dtype)
                wide[::2, ::2] = data
                for source in (data, on_device(data), on_device(wide)[::2, ::2]):
                    states = engine.encode(source, n, case.encoding).numpy()
                    reference.assert_states(states, x, n, case.encoding)
        engine.check()

    @pytest.mark.sanitize
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_every_option(self, precision: Any) -> None:
        engine = qdp.Engine(DEVICE, precision=precision)
        for case in CASES:
            for convention in reference.CONVENTIONS:
                x, options = case.samples(5, batch=2), case.options(5)
                data = on_device(case.cast(x, precision))
                states = engine.encode(data, 5, case.encoding, convention=convention, **options)
                reference.assert_states(
                    states.numpy(), x, 5, case.encoding, convention=convention, **options
                )

    @pytest.mark.sanitize
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("n", [13, 15, 18, 20])
    def test_kernels_of_large_states(self, n: int, precision: Any) -> None:
        """The kernels that take over where a state outgrows a block, and a cluster."""
        engine = qdp.Engine(DEVICE, precision=precision)
        host = qdp.Engine("cpu", precision="complex128")
        for case in PLAIN_CASES:
            x = case.samples(n, batch=2)
            states = engine.encode(on_device(case.cast(x, precision)), n, case.encoding).numpy()
            expected = host.encode(x, n, case.encoding).numpy()
            reference.assert_close(states, expected, x, n, case.encoding, slack=2)

    @pytest.mark.sanitize
    def test_every_input_dtype(self) -> None:
        engine = qdp.Engine(DEVICE)
        for dtype in (
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
            *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
        ):
            t = torch.arange(1, 8, device=DEVICE).to(dtype)
            for precision in PRECISIONS:
                for encoding, n in (("amplitude", 3), ("angle", 7)):
                    states = qdp.torch.encode(t, n, encoding, precision=precision)
                    reference.assert_states(states.cpu().numpy(), t.cpu().double(), n, encoding)
        index = torch.tensor([[3], [1]], device=DEVICE)
        assert engine.encode(index, 2, "basis").numpy()[[0, 1], [3, 1]].all()

    @pytest.mark.sanitize
    def test_validation_kernels(self) -> None:
        for encoding, row, error in (
            ("amplitude", [0.0, 0, 0, 0], qdp.ZeroNormError),
            ("amplitude", [1.0, np.nan, 0, 0], qdp.NonFiniteError),
            ("angle", [1.0, np.inf, 0, 0], qdp.NonFiniteError),
            ("basis", [0.0, 2, 0, 0], qdp.BasisValueError),
        ):
            x = np.ones((3, 4))
            x[1] = row
            with pytest.raises(error) as caught:
                qdp.Engine(DEVICE).encode(on_device(x), 4, encoding, validate="now")
            assert caught.value.sample == 1


class TestEqualsCpuBackend:
    """Both backends give the same states to rounding, at sizes around every threshold."""

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_every_size(self, case: Any, precision: Any, gpu: qdp.Engine, cpu: qdp.Engine) -> None:
        for n in range(1, 19):
            batches = (1, 2, 33) if n <= 12 else (1, 3)
            for batch in batches:
                x, options = case.samples(n, batch=batch), case.options(n)
                data = case.cast(x, precision)
                expected = cpu.encode(data, n, case.encoding, **options).numpy()
                for source in (data, on_device(data)):
                    states = gpu.encode(source, n, case.encoding, **options).numpy()
                    reference.assert_close(
                        states, expected, x, n, case.encoding, slack=2, **options
                    )

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize(
        "encoding", ["angle", "phase", "iqp-z", "basis", "iqp", "zz", "iqp-embedding"]
    )
    def test_many_short_rows(
        self, encoding: str, precision: Any, gpu: qdp.Engine, cpu: qdp.Engine
    ) -> None:
        """Several rows to a block, the last block not full; a bad row spoils no other."""
        case = Case(encoding)
        for n, batch in ((1, 20_001), (2, 64), (3, 63), (5, 4099), (8, 700), (9, 131), (11, 95)):
            x = case.samples(n, batch=batch)
            data = case.cast(x, precision)
            expected = cpu.encode(data, n, encoding).numpy()
            states = gpu.encode(on_device(data), n, encoding).numpy()
            reference.assert_close(states, expected, x, n, encoding, slack=2)
            bad = batch - 2
            data[bad, -1] = np.nan
            out = on_device(np.zeros_like(states))
            with pytest.raises(qdp.NonFiniteError) as caught:
                gpu.encode(on_device(data), n, encoding, validate="now", out=out)
            assert (caught.value.sample, caught.value.position) == (bad, data.shape[1] - 1)
            assert out[bad].isnan().all()
            others = np.arange(batch) != bad
            np.testing.assert_array_equal(out.cpu().numpy()[others], states[others])

    @pytest.mark.sanitize
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("case", [*PLAIN_CASES, Case("angle")], ids=str)
    def test_rows_at_any_address(self, case: Any, precision: Any, gpu: qdp.Engine) -> None:
        """Rows of an ``out=`` aligned to one amplitude only; between them nothing is written."""
        dtype = getattr(torch, precision)
        for n in (1, 2, 3, 6, 11, 13):
            batch, dim = 3, 2**n
            data = on_device(case.cast(case.samples(n, batch=batch), precision))
            expected = gpu.encode(data, n, case.encoding).torch()
            for first in (0, 1):
                memory = torch.full((1 + batch * (dim + 1),), 7 - 7j, dtype=dtype, device=DEVICE)
                rows = memory[first : first + batch * (dim + 1)].view(batch, dim + 1)
                gpu.encode(data, n, case.encoding, out=rows[:, :dim])
                assert torch.equal(rows[:, :dim], expected), f"n={n} first={first}"
                rows[:, :dim] = 7 - 7j
                assert (memory == 7 - 7j).all(), f"n={n} first={first}"

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("kind", ["real", "complex"])
    def test_amplitude_lengths(
        self, kind: str, precision: Any, gpu: qdp.Engine, cpu: qdp.Engine
    ) -> None:
        rng = np.random.default_rng(11)
        for k in range(19):
            for length in {max(1, 2**k - 1), 2**k, 2**k + 1}:
                n = max(1, (length - 1).bit_length())
                for qubits in (n, n + 2):
                    x = rng.normal(size=(3, length)).astype(REAL[precision])
                    data = (x + 1j * x[::-1]).astype(precision) if kind == "complex" else x
                    expected = cpu.encode(data, qubits).numpy()
                    for source in (data, on_device(data), on_device(np.tile(data, 2))[:, :length]):
                        states = gpu.encode(source, qubits).numpy()
                        reference.assert_close(states, expected, x, qubits, "amplitude", slack=2)
                        assert not states[:, length:].any()

    @pytest.mark.parametrize(
        "dtype", ["uint8", "float16", "float32", "float64", "complex64", "complex128"]
    )
    @pytest.mark.parametrize("n", [1, 5, 10, 12, 14])
    def test_transposed(self, n: int, dtype: str) -> None:
        """Samples that lie side by side, few and many, whole tiles of them and not."""
        generator = torch.Generator().manual_seed(n)
        kind = getattr(torch, dtype)
        exact = torch.complex128 if kind.is_complex else torch.float64
        for batch in (2, 3, 8, 33, 64, 200, 1000):
            for length in {2**n, max(1, 2**n - 3)}:
                values = torch.randn(length, batch, generator=generator, dtype=exact)
                inexact = kind.is_floating_point or kind.is_complex
                x = (values if inexact else 9 * values.abs() + 1).to(kind).T
                states = qdp.Engine(DEVICE).encode(x.to(DEVICE), n).numpy()
                rows = qdp.Engine(DEVICE).encode(x.to(DEVICE).contiguous(), n).numpy()
                assert (states == rows).all(), f"batch {batch}: not as dense rows"
                expected = qdp.Engine("cpu").encode(x, n).numpy()
                reference.assert_close(states, expected, x.to(exact), n, "amplitude", slack=2)

    def test_transposed_without_memory_to_spare(self) -> None:
        """There is no room to make rows of the samples: they are read as they lie."""
        n, batch = 27, 8
        x = torch.rand(2**n, batch, device=DEVICE).T
        out = torch.empty(batch, 2**n, dtype=torch.complex64, device=DEVICE)
        engine = qdp.Engine(DEVICE)
        torch.cuda.empty_cache()
        room = engine.memory_info()
        taken = torch.empty(room["free"] - 2**30, dtype=torch.uint8, device=DEVICE)
        engine.encode(x, n, out=out).check()
        del taken
        norms = torch.linalg.vector_norm(out, dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        scale = x[3].norm()
        torch.testing.assert_close(out[3, ::4097].real, x[3, ::4097] / scale)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
    @pytest.mark.parametrize("n", [3, 9, 12, 13, 14, 17])
    def test_amplitude_layouts(self, n: int, dtype: str) -> None:
        """Input and output that cannot be read and written in whole memory words, and that can."""
        generator = torch.Generator().manual_seed(n)
        kind = getattr(torch, dtype)
        exact = torch.complex128 if kind.is_complex else torch.float64
        memory = torch.randn(9 * 2**n + 9, generator=generator, dtype=exact).to(kind)
        on_gpu = memory.to(DEVICE)
        dim = 2**n
        for precision in PRECISIONS:
            gpu = qdp.Engine(DEVICE, precision=precision)
            cpu = qdp.Engine("cpu", precision=precision)
            out = torch.zeros(3, dim + 1, dtype=getattr(torch, precision), device=DEVICE)
            for offset, row, column in (
                *((0, dim, 1), (1, dim, 1), (0, dim + 1, 1), (3, 2 * dim, 1)),
                *((0, 0, 1), (1, 2 * dim, 2), (0, 1, 3)),
            ):
                for length in (dim, dim - 1):
                    layout = ((3, length), (row, column), offset)
                    x = memory.as_strided(*layout)
                    expected = cpu.encode(x, n).numpy()
                    source = on_gpu.as_strided(*layout)
                    for target, gap in (
                        (None, None),
                        (out[:, :dim], out[:, dim]),
                        (out[:, 1:], out[:, 0]),
                    ):
                        out.fill_(7)
                        state = gpu.encode(source, n, out=target)
                        reference.assert_close(
                            state.numpy(), expected, x.to(exact), n, "amplitude", slack=2
                        )
                        if gap is not None:
                            assert (gap == 7).all(), "written between the rows"

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8", "int32", "int64"])
    def test_other_dtypes(self, dtype: str, gpu: qdp.Engine, cpu: qdp.Engine) -> None:
        generator = torch.Generator().manual_seed(12)
        for n in (1, 5, 9, 10, 11, 12, 13, 14, 16, 17):
            for length in (2**n - 1, 2**n):
                x = torch.randint(1, 100, (3, length), generator=generator)
                x = x.to(getattr(torch, dtype))
                expected = cpu.encode(x, n).numpy()
                for source in (x, x.to(DEVICE)):
                    states = gpu.encode(source, n)
                    assert states.dtype == expected.dtype
                    reference.assert_close(
                        states.numpy(), expected, x.double(), n, "amplitude", slack=2
                    )

    def test_bit_identical_run_to_run(self, gpu: qdp.Engine) -> None:
        for case in CASES:
            for n in (1, 6, 10, 13, 15, 17):
                x, options = on_device(case.samples(n, batch=5)), case.options(n)
                first = gpu.encode(x, n, case.encoding, **options).torch()
                for _ in range(4):
                    again = gpu.encode(x, n, case.encoding, **options).torch()
                    assert torch.equal(first, again), f"{case} n={n}"


class TestMemory:
    def test_ten_thousand_encodes_leave_nothing(self, gpu: qdp.Engine) -> None:
        rng = np.random.default_rng(17)
        host = rng.normal(size=(40, 2**12))
        device = on_device(host)

        def encode(k: int) -> None:
            n, batch = 1 + k % 12, 1 + k % 37
            case = k % 4
            if case == 0:
                gpu.encode(device[:batch, : 2**n], n)
            elif case == 1:
                torch.from_dlpack(gpu.encode(host[:batch, : 2**n - k % 2], n))
            elif case == 2:
                qdp.torch.encode(device[:batch, :n], n, "zz").sum()
            else:
                gpu.encode(device[:batch, :n], n, "angle")[0].__dlpack__()

        def free() -> int:
            gpu.synchronize()
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            available: int = torch.cuda.mem_get_info()[0]
            return available

        for k in range(37 * 12 * 4):  # every shape once: plans, kernels and pools are there
            encode(k)
        before = free()
        for k in range(10_000):
            encode(k)
        assert abs(before - free()) <= 32 * 2**20

    def test_failures_leave_nothing(self, gpu: qdp.Engine) -> None:
        x = torch.ones(4, 2**20, device=DEVICE)

        def fail() -> None:
            with pytest.raises(qdp.FeatureCountError):
                gpu.encode(x, 19)
            with pytest.raises(qdp.OutOfMemoryError):
                gpu.encode(x, 42)
            with pytest.raises(qdp.ShapeError):
                gpu.encode(x, 20, out=torch.empty(4, 2, dtype=torch.complex64, device=DEVICE))

        fail()
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        for _ in range(300):
            fail()
        torch.cuda.synchronize()
        assert before - torch.cuda.mem_get_info()[0] <= 32 * 2**20

    def test_a_batch_that_does_not_fit(self, gpu: qdp.Engine) -> None:
        total = torch.cuda.mem_get_info()[1]
        batch = total // (2**20 * 16) + 1
        x = torch.ones(1, 1, dtype=torch.float64, device=DEVICE).expand(batch, 1)
        with pytest.raises(qdp.OutOfMemoryError) as caught:
            gpu.encode(x, 20)
        error = caught.value
        assert error.needed >= batch * 2**20 * 16 > error.total >= error.free > 0
        assert gpu.encode(x[:2], 20).shape == (2, 2**20)

    def test_threads(self, gpu: qdp.Engine) -> None:
        """Threads on streams of their own share one engine."""

        def work(seed: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for case in PLAIN_CASES:
                    for n in (3, 8, 12):
                        x = np.roll(case.samples(n, batch=16), seed, axis=0)
                        for data in (x, on_device(x)):
                            states = gpu.encode(data, n, case.encoding).numpy()
                            reference.assert_states(states, x, n, case.encoding)
                        states = qdp.torch.encode(on_device(x), n, case.encoding).cpu().numpy()
                        reference.assert_states(states, x, n, case.encoding)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
