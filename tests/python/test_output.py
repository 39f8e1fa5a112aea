"""What an engine gives: states, their views, and the ways out of them."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdp
import reference

CPU, CUDA = 1, 2  # DLPack device types
DTYPES = ("complex64", "complex128")
X = np.random.default_rng(7).normal(size=(5, 8))
EXPECTED = reference.encode(X, 3, "amplitude")


def to_host(array: Any) -> Any:
    return array.cpu().numpy() if hasattr(array, "cpu") else np.asarray(array)


def capsule_name(capsule: Any) -> str:
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    name: bytes = get_name(capsule)
    return name.decode()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class TestProperties:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_whole_batch(self, dtype: Any, device: str, engine_for: Any) -> None:
        state = engine_for(dtype).encode(X, 3, "amplitude")
        assert state.shape == (5, 8)
        assert state.ndim == 2
        assert isinstance(state.dtype, np.dtype)
        assert state.dtype == dtype
        assert state.device == device
        assert state.num_qubits == 3
        assert state.nbytes == 5 * 8 * np.dtype(dtype).itemsize
        assert len(state) == 5
        assert state.__dlpack_device__() == ((CPU, 0) if device == "cpu" else (CUDA, 0))
        for word in ("StateBatch", "5", "8", dtype, device):
            assert word in repr(state)

    def test_single_sample(self, engine: qdp.Engine) -> None:
        assert engine.encode(X[0], 3, "amplitude").shape == (1, 8)

    def test_engine(self, device: str, engine_for: Any) -> None:
        assert engine_for(None).device == device
        assert engine_for(None).precision is None
        assert engine_for("complex64").precision == "complex64"
        assert qdp.Engine(device.partition(":")[0]).device == device
        assert device in repr(engine_for(None))

    def test_states_are_not_hidden_by_numpy(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        state.synchronize()
        state.check()
        engine.synchronize()
        engine.check()
        np.testing.assert_allclose(state.numpy(), EXPECTED, rtol=0, atol=1e-15)

    def test_memory_info(self, engine: qdp.Engine) -> None:
        info = engine.memory_info()
        assert 0 < info["free"] <= info["total"]


class TestIndexing:
    @pytest.mark.parametrize(
        "index",
        [
            slice(None),
            slice(1, 3),
            slice(-2, None),
            slice(None, -1),
            slice(3, 100),
            slice(4, 2),
            slice(5, None),
            slice(-100, 2),
            0,
            4,
            -1,
            -5,
            np.int64(2),
        ],
        ids=repr,
    )
    def test_like_numpy(self, index: Any, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        view, expected = state[index], EXPECTED[index]
        assert isinstance(view, qdp.StateBatch)
        assert view.shape == expected.shape
        assert view.ndim == expected.ndim
        assert view.nbytes == expected.nbytes
        assert view.num_qubits == 3
        assert view.dtype == state.dtype
        np.testing.assert_allclose(view.numpy(), expected, rtol=0, atol=1e-15)

    def test_steps_work_like_numpy_or_are_refused(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        for index in (slice(None, None, 2), slice(None, None, -1), slice(3, 0, -2)):
            try:
                view = state[index]
            except (qdp.QdpError, IndexError):
                continue
            np.testing.assert_allclose(view.numpy(), EXPECTED[index], rtol=0, atol=1e-15)

    def test_out_of_range(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        for index in (5, -6, 2**40, 2**70):
            with pytest.raises(IndexError):
                state[index]
        for wrong in ("0", 1.0, None, (0, 1)):
            with pytest.raises((TypeError, IndexError)):
                state[wrong]  # type: ignore[index]

    def test_iteration(self, engine: qdp.Engine) -> None:
        rows = list(engine.encode(X, 3, "amplitude"))  # type: ignore[call-overload]
        assert [row.shape for row in rows] == [(8,)] * 5
        np.testing.assert_allclose(
            np.stack([row.numpy() for row in rows]), EXPECTED, rtol=0, atol=1e-15
        )

    def test_views_of_views_share_memory(self, engine: qdp.Engine, torch: Any) -> None:
        state = engine.encode(X, 3, "amplitude")
        whole = torch.from_dlpack(state)
        view = torch.from_dlpack(state[1:4][1:])
        row = torch.from_dlpack(state[1:4][1:][0])
        assert view.data_ptr() == row.data_ptr() == whole[2].data_ptr()
        whole[2, 3] = 42
        assert view[0, 3].item() == row[3].item() == 42

    def test_a_row_has_no_length_of_batches(self, engine: qdp.Engine) -> None:
        row = engine.encode(X, 3, "amplitude")[2]
        assert row.shape == (8,)
        with pytest.raises((TypeError, IndexError, qdp.QdpError)):
            row[0][0][0]


class TestDLPack:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_torch_many_times(self, dtype: Any, engine_for: Any, torch: Any) -> None:
        state = engine_for(dtype).encode(X, 3, "amplitude")
        tensors = [torch.from_dlpack(state) for _ in range(50)] + [state.torch()]
        assert len({t.data_ptr() for t in tensors}) == 1
        assert {str(t.device) for t in tensors} == {state.device}
        assert all(t.shape == (5, 8) and t.is_contiguous() for t in tensors)
        assert all(str(t.dtype) == f"torch.{dtype}" for t in tensors)
        tensors[0][1, 2] = 42
        assert all(t[1, 2].item() == 42 for t in tensors)
        assert state.numpy()[1, 2] == 42

    def test_numpy_from_dlpack(self, cpu: qdp.Engine) -> None:
        state = cpu.encode(X, 3, "amplitude")
        first, second = np.from_dlpack(state), np.from_dlpack(state)
        assert np.shares_memory(first, second)
        np.testing.assert_allclose(first, EXPECTED, rtol=0, atol=1e-15)

    @pytest.mark.parametrize(
        ("max_version", "name"),
        [
            (None, "dltensor"),
            ((0, 8), "dltensor"),
            ((1, 0), "dltensor_versioned"),
            ((1, 3), "dltensor_versioned"),
            ((2, 0), "dltensor_versioned"),
        ],
    )
    def test_versions(self, max_version: Any, name: str, engine: qdp.Engine, torch: Any) -> None:
        state = engine.encode(X, 3, "amplitude")
        capsule = state.__dlpack__(max_version=max_version)
        assert capsule_name(capsule) == name
        tensor = torch.utils.dlpack.from_dlpack(capsule)
        assert capsule_name(capsule) == f"used_{name}"
        np.testing.assert_allclose(to_host(tensor), EXPECTED, rtol=0, atol=1e-15)

    def test_copy(self, engine: qdp.Engine, torch: Any) -> None:
        state = engine.encode(X, 3, "amplitude")
        original = torch.from_dlpack(state)
        copied = torch.utils.dlpack.from_dlpack(state.__dlpack__(copy=True, max_version=(1, 0)))
        shared = torch.utils.dlpack.from_dlpack(state.__dlpack__(copy=False, max_version=(1, 0)))
        assert copied.data_ptr() != original.data_ptr() == shared.data_ptr()
        assert copied.device == original.device
        original.zero_()
        np.testing.assert_allclose(to_host(copied), EXPECTED, rtol=0, atol=1e-15)
        assert not to_host(shared).any()

    def test_copy_of_a_view(self, engine: qdp.Engine, torch: Any) -> None:
        capsule = engine.encode(X, 3, "amplitude")[1:3].__dlpack__(copy=True)
        copied = to_host(torch.utils.dlpack.from_dlpack(capsule))
        np.testing.assert_allclose(copied, EXPECTED[1:3], rtol=0, atol=1e-15)

    def test_own_device_by_name(self, engine: qdp.Engine, torch: Any) -> None:
        state = engine.encode(X, 3, "amplitude")
        capsule = state.__dlpack__(dl_device=state.__dlpack_device__(), max_version=(1, 0))
        tensor = torch.utils.dlpack.from_dlpack(capsule)
        assert tensor.data_ptr() == torch.from_dlpack(state).data_ptr()

    def test_other_devices_are_refused(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        for dl_device in ((CUDA, 99), (10, 0), (77, 0)):
            with pytest.raises((BufferError, qdp.QdpError)):
                state.__dlpack__(dl_device=dl_device, max_version=(1, 0))

    @pytest.mark.gpu
    def test_to_cpu(self, gpu: qdp.Engine, torch: Any) -> None:
        state = gpu.encode(X, 3, "amplitude")
        for copy in (None, True):
            capsule = state.__dlpack__(dl_device=(CPU, 0), copy=copy, max_version=(1, 0))
            tensor = torch.utils.dlpack.from_dlpack(capsule)
            assert tensor.device.type == "cpu"
            np.testing.assert_allclose(tensor.numpy(), EXPECTED, rtol=0, atol=1e-15)
        with pytest.raises((BufferError, ValueError)):
            state.__dlpack__(dl_device=(CPU, 0), copy=False, max_version=(1, 0))
        on_host = np.from_dlpack(state, device="cpu")
        np.testing.assert_allclose(on_host, EXPECTED, rtol=0, atol=1e-15)

    def test_cpu_stream(self, cpu: qdp.Engine) -> None:
        state = cpu.encode(X, 3, "amplitude")
        assert capsule_name(state.__dlpack__(stream=None)) == "dltensor"
        with pytest.raises((qdp.QdpError, BufferError, TypeError)):
            state.__dlpack__(stream="fast")

    @pytest.mark.gpu
    def test_cuda_streams(self, gpu: qdp.Engine, torch: Any) -> None:
        state = gpu.encode(X, 3, "amplitude")
        own = torch.cuda.Stream()
        for stream in (None, -1, 1, 2, own.cuda_stream):
            tensor = torch.utils.dlpack.from_dlpack(state.__dlpack__(stream=stream))
            torch.cuda.synchronize()
            np.testing.assert_allclose(to_host(tensor), EXPECTED, rtol=0, atol=1e-15)
        # DLPack forbids 0, which may mean either default stream, and knows no other negative.
        for stream in (0, -2):
            with pytest.raises((qdp.QdpError, ValueError), match="stream"):
                state.__dlpack__(stream=stream)

    def test_exchange_table(self) -> None:
        table: Any = vars(qdp.StateBatch)["__dlpack_c_exchange_api__"]
        assert capsule_name(table) == "dlpack_exchange_api"
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype = ctypes.c_void_p
        get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        # The header: a version of two uint32, then the table of the previous version.
        address = get_pointer(table, b"dlpack_exchange_api")
        major, minor = (ctypes.c_uint32 * 2).from_address(address)
        assert (major, minor) >= (1, 2)


class TestLifetime:
    def test_state_outlives_engine(self, device: str, torch: Any) -> None:
        engine = qdp.Engine(device)
        state = engine.encode(X, 3, "amplitude")
        del engine
        gc.collect()
        np.testing.assert_allclose(state.numpy(), EXPECTED, rtol=0, atol=1e-15)
        tensor = torch.from_dlpack(state[1:])
        del state
        gc.collect()
        np.testing.assert_allclose(to_host(tensor), EXPECTED[1:], rtol=0, atol=1e-15)

    def test_engine_outlives_state(self, engine: qdp.Engine) -> None:
        for _ in range(3):
            state = engine.encode(X, 3, "amplitude")
            np.testing.assert_allclose(state.numpy(), EXPECTED, rtol=0, atol=1e-15)
            del state

    def test_an_array_outlives_its_state(self, cpu: qdp.Engine) -> None:
        arrays = [
            way(cpu.encode(X, 3, "amplitude")) for way in (np.asarray, np.from_dlpack, _numpy)
        ]
        gc.collect()
        others = [cpu.encode(np.ones((5, 8)), 3, "amplitude") for _ in range(20)]
        for array in arrays:
            np.testing.assert_allclose(array, EXPECTED, rtol=0, atol=1e-15)
        assert len(others) == 20

    def test_memory_comes_back(self, cpu: qdp.Engine) -> None:
        """States, views, arrays and unconsumed capsules of 16 MiB each, 200 times over."""

        def one_round() -> None:
            state = cpu.encode([1.0], 20, "amplitude")
            view = state[:1]
            capsules = [
                state.__dlpack__(),
                state.__dlpack__(max_version=(1, 0)),
                view.__dlpack__(copy=True),
            ]
            assert np.asarray(state)[0, 0] == 1
            assert len(capsules) == 3

        for _ in range(5):
            one_round()
        before = resident_bytes()
        for _ in range(200):
            one_round()
        assert resident_bytes() - before < 200 * 2**20  # each leak would be 3 GiB

    @pytest.mark.gpu
    def test_capsules_free_device_memory(self, gpu: qdp.Engine, torch: Any) -> None:
        def one_round() -> None:
            state = gpu.encode(np.ones(4), 24, "amplitude")  # 256 MiB
            state.__dlpack__()
            state.__dlpack__(max_version=(1, 0))
            state[:1].__dlpack__(copy=True)
            torch.from_dlpack(state)

        one_round()
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        for _ in range(50):
            one_round()
        torch.cuda.synchronize()
        assert free - torch.cuda.mem_get_info()[0] < 2**30

    def test_states_are_collected(self, device: str) -> None:
        """An out= array is held by its states and let go with them."""
        if device != "cpu":
            pytest.skip("NumPy arrays are written by the CPU engine")

        class Tracked(np.ndarray):  # a plain ndarray takes no weak reference
            pass

        out = np.empty((5, 8), np.complex128).view(Tracked)
        gone = weakref.ref(out)
        state = qdp.Engine(device).encode(X, 3, "amplitude", out=out)
        del out
        gc.collect()
        np.testing.assert_allclose(state[2].numpy(), EXPECTED[2], rtol=0, atol=1e-15)
        del state
        gc.collect()
        assert gone() is None


def _numpy(state: qdp.StateBatch) -> Any:
    return state.numpy()


class TestNumPy:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_asarray(self, dtype: Any, engine_for: Any) -> None:
        state = engine_for(dtype).encode(X, 3, "amplitude")
        array = np.asarray(state)
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        reference.assert_states(array, X, 3, "amplitude")
        np.testing.assert_array_equal(state.numpy(), array)

    def test_dtype_and_copy(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        small = np.asarray(state, dtype=np.complex64)
        assert small.dtype == np.complex64
        np.testing.assert_allclose(small, EXPECTED, rtol=0, atol=1e-7)
        same = np.asarray(state, dtype=np.complex128)
        np.testing.assert_allclose(same, EXPECTED, rtol=0, atol=1e-15)
        separate = np.array(state, copy=True)
        separate[:] = 0
        np.testing.assert_allclose(state.numpy(), EXPECTED, rtol=0, atol=1e-15)
        with pytest.raises(ValueError, match=r"(?i)copy"):
            np.asarray(state, dtype=np.complex64, copy=False)

    def test_cpu_arrays_share_memory(self, cpu: qdp.Engine) -> None:
        state = cpu.encode(X, 3, "amplitude")
        arrays = [np.asarray(state), np.asarray(state, copy=False), np.from_dlpack(state)]
        assert len({a.ctypes.data for a in arrays}) == 1
        assert np.asarray(state[2]).ctypes.data == arrays[0][2].ctypes.data

    @pytest.mark.gpu
    def test_device_memory_needs_a_copy(self, gpu: qdp.Engine) -> None:
        with pytest.raises(ValueError, match=r"(?i)copy"):
            np.asarray(gpu.encode(X, 3, "amplitude"), copy=False)

    def test_numpy_functions(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        np.testing.assert_allclose(np.abs(np.asarray(state)) ** 2, np.abs(EXPECTED) ** 2)
        np.testing.assert_allclose(np.linalg.norm(state, axis=1), 1)


class TestOut:
    def test_numpy(self) -> None:
        for dtype in DTYPES:
            out = np.full((5, 8), 7, dtype)
            engine = qdp.Engine("cpu", precision=dtype)  # type: ignore[arg-type]
            state = engine.encode(X, 3, "amplitude", out=out)
            reference.assert_states(out, X, 3, "amplitude")
            assert np.asarray(state).ctypes.data == out.ctypes.data
            engine.encode(X[::-1], 3, "amplitude", out=out)
            reference.assert_states(out, X[::-1], 3, "amplitude")
            np.testing.assert_array_equal(state.numpy(), out)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_torch(self, dtype: Any, device: str, engine_for: Any, torch: Any) -> None:
        out = torch.full((5, 8), 7, dtype=getattr(torch, dtype), device=device)
        address = out.data_ptr()
        state = engine_for(dtype).encode(X, 3, "amplitude", out=out)
        reference.assert_states(to_host(out), X, 3, "amplitude")
        assert torch.from_dlpack(state).data_ptr() == address
        rows = torch.zeros(9, 8, dtype=out.dtype, device=device)
        engine_for(dtype).encode(X, 3, "amplitude", out=rows[2:7])
        reference.assert_states(to_host(rows[2:7]), X, 3, "amplitude")
        assert not to_host(rows[:2]).any()
        assert not to_host(rows[7:]).any()

    def test_every_value_is_written(self, engine: qdp.Engine, device: str, torch: Any) -> None:
        """Zeros of a one-hot or padded state too: an out= array holds anything before."""
        for encoding, x in (("basis", [[3], [0]]), ("amplitude", [[1.0], [2.0]]), ("angle", None)):
            data = np.zeros((2, 4)) if x is None else np.array(x)
            out = torch.full((2, 16), float("nan"), dtype=torch.complex128, device=device)
            engine.encode(data, 4, encoding, out=out)
            reference.assert_states(to_host(out), data, 4, encoding)

    def test_a_state_as_out(self, engine: qdp.Engine) -> None:
        state = engine.encode(X, 3, "amplitude")
        again = engine.encode(X[::-1], 3, "amplitude", out=state)
        reference.assert_states(state.numpy(), X[::-1], 3, "amplitude")
        np.testing.assert_array_equal(again.numpy(), state.numpy())

    def test_empty_batch(self, engine: qdp.Engine, device: str, torch: Any) -> None:
        out = torch.empty(0, 8, dtype=torch.complex128, device=device)
        assert engine.encode(X[:0], 3, "amplitude", out=out).shape == (0, 8)

    def test_one_sample_takes_a_row_of_a_batch(self, engine: Any, device: str, torch: Any) -> None:
        out = torch.empty(1, 8, dtype=torch.complex128, device=device)
        engine.encode(X[0], 3, "amplitude", out=out)
        reference.assert_states(to_host(out), X[:1], 3, "amplitude")

    def test_wrong_shape(self, engine: qdp.Engine, device: str, torch: Any) -> None:
        for shape in ((5, 7), (4, 8), (8, 5), (40,), (5, 8, 1), (5, 16), ()):
            out = torch.zeros(shape, dtype=torch.complex128, device=device)
            with pytest.raises(qdp.ShapeError, match="out") as caught:
                engine.encode(X, 3, "amplitude", out=out)
            assert caught.value.argument == "out"
            assert "5" in caught.value.expected
            assert "8" in caught.value.expected
            assert not out.any()

    def test_wrong_dtype(self, engine_for: Any, device: str, torch: Any) -> None:
        for dtype in ("complex64", "float64", "float32", "int64"):
            out = torch.zeros(5, 8, dtype=getattr(torch, dtype), device=device)
            with pytest.raises(qdp.DTypeError, match="out") as caught:
                engine_for("complex128").encode(X, 3, "amplitude", out=out)
            assert caught.value.argument == "out"
            assert "complex128" in caught.value.expected
            assert dtype in caught.value.got

    def test_rows_apart(self, engine: qdp.Engine, device: str, torch: Any) -> None:
        """Rows may lie apart: the gaps stay as they are, and the state knows its strides."""
        wide = torch.full((10, 16), 7, dtype=torch.complex128, device=device)
        out = wide[::2, 4:12]
        state = engine.encode(X, 3, "amplitude", out=out)
        reference.assert_states(to_host(out), X, 3, "amplitude")
        assert (wide[1::2] == 7).all()
        assert (wide[:, :4] == 7).all()
        assert (wide[:, 12:] == 7).all()
        for view, x in ((state, X), (state[1:4], X[1:4]), (state[3], X[3])):
            reference.assert_states(view.numpy(), x, 3, "amplitude")
            reference.assert_states(to_host(torch.from_dlpack(view)), x, 3, "amplitude")
            reference.assert_states(to_host(view.torch()), x, 3, "amplitude")
        copied = torch.utils.dlpack.from_dlpack(state.__dlpack__(copy=True))
        reference.assert_states(to_host(copied), X, 3, "amplitude")

    def test_rows_with_gaps_or_overlaps(self, engine: Any, device: str, torch: Any) -> None:
        wide = torch.zeros(10, 16, dtype=torch.complex128, device=device)
        for out in (
            wide[:5, ::2],
            wide[:8, :5].T,
            wide[0, :8].expand(5, 8),
            wide.flatten().as_strided((5, 8), (4, 1)),
            wide.flatten().as_strided((5, 8), (8, 0)),
        ):
            assert out.shape == (5, 8)
            with pytest.raises(qdp.QdpError, match="out"):
                engine.encode(X, 3, "amplitude", out=out)
        assert not wide.any()

    def test_reversed_numpy_out(self, cpu: qdp.Engine) -> None:
        """A negative stride is written correctly or refused."""
        memory = np.full((5, 8), 7, np.complex128)
        for out in (memory[::-1], memory[:, ::-1]):
            try:
                cpu.encode(X, 3, "amplitude", out=out)
            except qdp.QdpError:
                assert (out == 7).all()
            else:
                reference.assert_states(out, X, 3, "amplitude")

    def test_unwritable(self, cpu: qdp.Engine) -> None:
        out = np.zeros((5, 8), np.complex128)
        out.setflags(write=False)
        with pytest.raises((qdp.QdpError, BufferError)):
            cpu.encode(X, 3, "amplitude", out=out)
        assert not out.any()

    def test_wrong_byte_order(self, cpu: qdp.Engine) -> None:
        out = np.zeros((5, 8), np.dtype("complex128").newbyteorder("S"))
        with pytest.raises(qdp.QdpError, match="byte order"):
            cpu.encode(X, 3, "amplitude", out=out)

    def test_not_an_array(self, engine: qdp.Engine) -> None:
        for out in ([[0j] * 8] * 5, 3, "out", object()):
            with pytest.raises((qdp.QdpError, TypeError)):
                engine.encode(X, 3, "amplitude", out=out)

    @pytest.mark.gpu
    def test_wrong_device(self, gpu: qdp.Engine, cpu: qdp.Engine, torch: Any) -> None:
        host = torch.zeros(5, 8, dtype=torch.complex128)
        for engine, out in ((gpu, host), (gpu, host.numpy()), (cpu, host.to(gpu.device))):
            with pytest.raises(qdp.DeviceMismatchError, match="out") as caught:
                engine.encode(X, 3, "amplitude", out=out)
            assert caught.value.argument == "out"
