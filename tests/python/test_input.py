"""What an engine takes: dtypes, strides and containers. The values are always right."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp
import reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOATS = ("float16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
COMPLEX = ("complex64", "complex128")
DOUBLE = {"float64", "complex128", "int64", "uint64"}


def values(dtype: str, shape: tuple[int, ...] = (3, 4)) -> NDArray[Any]:
    """Small values that every dtype holds, and no zeros but for bool's."""
    rng = np.random.default_rng(6)
    x = rng.integers(*((0, 2) if dtype == "bool" else (1, 9)), size=shape).astype(np.float64)
    x[..., 0] = 1
    if dtype.startswith(("float", "bfloat", "complex")):
        x = x / 4 - 1.125
    if dtype.startswith("complex"):
        return (x + 1j * x[::-1]).astype(dtype)
    return x.astype("float32" if dtype == "bfloat16" else dtype)


def precision_of(dtype: str) -> str:
    return "complex128" if dtype in DOUBLE else "complex64"


def check(engine: qdp.Engine, data: Any, x: NDArray[Any], n: int = 2, **kwargs: Any) -> None:
    """``data``, which holds the values ``x``, gives the states of ``x``."""
    states = engine.encode(data, n, kwargs.pop("encoding", "amplitude"), **kwargs).numpy()
    reference.assert_states(states, x, n, "amplitude")


class TestNumPy:
    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *COMPLEX, "bool"])
    def test_dtype(self, dtype: str, engine: qdp.Engine) -> None:
        x = values(dtype)
        state = engine.encode(x, 2, "amplitude")
        assert state.dtype == precision_of(dtype)
        check(engine, x, x)
        check(engine, x[0], x[:1])

    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *COMPLEX, "bool"])
    @pytest.mark.parametrize("precision", COMPLEX)
    def test_named_precision_wins(self, dtype: str, precision: Any, engine_for: Any) -> None:
        state = engine_for(precision).encode(values(dtype), 2, "amplitude")
        assert state.dtype == precision
        reference.assert_states(state.numpy(), values(dtype), 2, "amplitude")

    @pytest.mark.parametrize("encoding", ["angle", "phase", "zz", "iqp-embedding", "iqp-z"])
    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "bool"])
    def test_features_of_any_real_dtype(
        self, dtype: str, encoding: str, engine: qdp.Engine
    ) -> None:
        x = values(dtype)
        states = engine.encode(x, 4, encoding)
        assert states.dtype == precision_of(dtype)
        reference.assert_states(states.numpy(), x, 4, encoding)

    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
    def test_basis_of_any_real_dtype(self, dtype: str, engine: qdp.Engine) -> None:
        index = np.array([[0], [5], [7]]).astype(dtype)
        states = engine.encode(index, 3, "basis").numpy()
        np.testing.assert_array_equal(states, np.eye(8)[[0, 5, 7]])
        bits = np.array([[1, 0, 1], [0, 1, 1]]).astype(dtype)
        states = engine.encode(bits, 3, "basis").numpy()
        np.testing.assert_array_equal(states, np.eye(8)[[5, 6]])

    def test_large_integers_are_exact(self, engine: qdp.Engine) -> None:
        """int64 goes to float64 directly, not through float32."""
        x = np.array([2**24 + 1, 2**24 - 1], np.int64)
        states = engine.encode(x, 1, "amplitude").numpy()
        assert states[0, 0] != states[0, 1]
        reference.assert_states(states, x, 1, "amplitude")
        top = np.array([2**64 - 1, 1], np.uint64)  # no sign bit
        reference.assert_states(engine.encode(top, 1).numpy(), top, 1, "amplitude")

    @pytest.mark.parametrize(
        "dtype", ["O", "U4", "S4", "M8[s]", "m8[s]", "longdouble", "clongdouble", "i4,f4"]
    )
    def test_other_dtypes_are_refused(self, dtype: str, engine: qdp.Engine) -> None:
        with pytest.raises(qdp.DTypeError, match="data") as caught:
            engine.encode(np.zeros((2, 4), dtype), 2, "amplitude")
        assert caught.value.argument == "data"

    @pytest.mark.parametrize("encoding", ["angle", "basis", "phase", "iqp", "iqp-z", "zz"])
    def test_complex_features_are_refused(self, encoding: str, engine: qdp.Engine) -> None:
        with pytest.raises(qdp.DTypeError, match="complex"):
            engine.encode(np.ones((2, 1), np.complex64), 1, encoding)

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int16", "complex128"])
    def test_strides(self, dtype: str, engine: qdp.Engine) -> None:
        x = values(dtype, (8, 16))
        n = 4
        for view in (
            x[::-1],
            x[:, ::-1],
            x[::-2, ::-3],
            x[1:, 3:9],
            x[::3, 1::2],
            x.T[:, :7],
            np.asfortranarray(x),
            np.broadcast_to(x[2], (5, 16)),
            np.broadcast_to(x[:, 3:4], (8, 9)),
            np.lib.stride_tricks.sliding_window_view(x[0], 6),
            x.reshape(4, 2, 16)[:, 1],
            x[3],
            x[3, ::-1],
            x[::2, 5],
            x[:1],
            x[:, :1],
        ):
            check(engine, view, np.array(view), n)

    def test_one_value_repeated_by_a_zero_stride(self, engine: qdp.Engine) -> None:
        ones = np.broadcast_to(np.float32(2), (3, 8))
        assert ones.strides == (0, 0)
        check(engine, ones, np.array(ones), 3)

    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "i4", "i8", "u8", "c8", "c16"])
    def test_byte_order(self, dtype: str, engine: qdp.Engine) -> None:
        x = values(np.dtype(dtype).name)
        swapped = x.astype(np.dtype(dtype).newbyteorder("S"))
        assert not swapped.dtype.isnative
        state = engine.encode(swapped, 2, "amplitude")
        assert state.dtype == precision_of(x.dtype.name)
        check(engine, swapped, x)
        check(engine, swapped[:, ::-1], x[:, ::-1])

    def test_unaligned(self, engine: qdp.Engine) -> None:
        for dtype in ("f8", "f4", "i4", "c16"):
            record = np.zeros((3, 4), np.dtype([("tag", "u1"), ("x", dtype)]))
            record["x"] = values(np.dtype(dtype).name)
            assert not record["x"].flags.aligned
            check(engine, record["x"], np.array(record["x"]))

    def test_read_only(self, engine: qdp.Engine) -> None:
        x = values("float64")
        x.setflags(write=False)
        check(engine, x, x)

    def test_input_is_neither_kept_nor_changed(self, engine: qdp.Engine) -> None:
        import sys

        x = values("float64")
        before, count = x.copy(), sys.getrefcount(x)
        state = engine.encode(x, 2, "amplitude")
        expected = state.numpy().copy()
        assert sys.getrefcount(x) == count
        np.testing.assert_array_equal(x, before)
        x[:] = 7
        np.testing.assert_array_equal(state.numpy(), expected)

    def test_number_of_dimensions(self, engine: qdp.Engine) -> None:
        for x in (np.float64(3), np.array(3.0), np.ones((2, 2, 2)), np.ones((1, 1, 1, 4))):
            with pytest.raises(qdp.ShapeError, match="data") as caught:
                engine.encode(x, 2, "amplitude")
            assert caught.value.argument == "data"

    def test_empty_batch(self, engine: qdp.Engine) -> None:
        for shape, encoding, n in (((0, 4), "amplitude", 2), ((0, 3), "zz", 3), ((0, 6), "iqp", 3)):
            state = engine.encode(np.zeros(shape), n, encoding)
            assert state.shape == (0, 2**n)
            assert len(state) == 0
            assert state.nbytes == 0
            assert state.numpy().shape == (0, 2**n)

    def test_samples_without_values(self, engine: qdp.Engine) -> None:
        for shape in ((0,), (3, 0)):
            with pytest.raises(qdp.FeatureCountError) as caught:
                engine.encode(np.zeros(shape), 2, "amplitude")
            assert caught.value.got == 0


class TestLists:
    @pytest.mark.parametrize(
        ("data", "dtype"),
        [
            ([1.0, 2.0, 3.0], "complex128"),
            ([[1.0, 2.0], [3.0, 4.0]], "complex128"),
            ([[1, 2], [3, 4]], "complex128"),
            (((1, 2.5), (3, 4)), "complex128"),
            ([1 + 2j, 3], "complex128"),
            ([True, False, True], "complex64"),
            ([[True, False]], "complex64"),
        ],
    )
    def test_nested(self, data: Any, dtype: str, engine: qdp.Engine) -> None:
        state = engine.encode(data, 2, "amplitude")
        assert state.dtype == dtype
        reference.assert_states(state.numpy(), data, 2, "amplitude")

    def test_list_of_arrays(self, engine: qdp.Engine) -> None:
        x = values("float64")
        check(engine, list(x), x)

    @pytest.mark.parametrize(
        "data",
        [[], [[]], [[1.0], [2.0, 3.0]], [[1.0], 2.0], ["a", "b"], [None, 1.0], [[[1.0]]], [{}]],
        ids=repr,
    )
    def test_not_an_array(self, data: Any, engine: qdp.Engine) -> None:
        with pytest.raises(qdp.QdpError):
            engine.encode(data, 1, "amplitude")


def torch_dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class TestTorch:
    DTYPES = (*FLOATS, "bfloat16", *INTEGERS, *COMPLEX, "bool")

    def tensor(self, torch: Any, dtype: str, where: str, shape: tuple[int, ...] = (3, 4)) -> Any:
        return torch.from_numpy(values(dtype, shape)).to(getattr(torch, dtype)).to(where)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cpu_tensor(self, dtype: str, engine: qdp.Engine, torch: Any) -> None:
        t = self.tensor(torch, dtype, "cpu")
        assert engine.encode(t, 2, "amplitude").dtype == precision_of(dtype)
        check(engine, t, values(dtype))
        check(engine, t[0], values(dtype)[:1])

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cuda_tensor(self, dtype: str, gpu: qdp.Engine, torch: Any) -> None:
        t = self.tensor(torch, dtype, gpu.device)
        state = gpu.encode(t, 2, "amplitude")
        assert state.dtype == precision_of(dtype)
        assert state.device == gpu.device
        check(gpu, t, values(dtype))
        check(gpu, t[0], values(dtype)[:1])
        if dtype not in COMPLEX:
            states = gpu.encode(t, 4, "angle").numpy()
            reference.assert_states(states, values(dtype), 4, "angle")

    @pytest.mark.parametrize(
        "where", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)], ids=["host", "cuda"]
    )
    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int32", "complex64"])
    def test_strides(self, dtype: str, where: str, device: str, engine: Any, torch: Any) -> None:
        if where != "cpu" and device == "cpu":
            pytest.skip("a CPU engine takes no CUDA tensor: test_cuda_tensor_on_cpu_engine")
        t = self.tensor(torch, dtype, where, (8, 16))
        for view in (
            t[1:, 3:9],
            t[::3, 1::2],
            t.T[:, :7],
            t[2].expand(5, 16),
            t[:, 3:4].expand(8, 9),
            t.flatten().as_strided((5, 6), (1, 2), 3),
            t[3],
            t[::2, 5],
            t[:1],
            t[:, :1],
            t[:0],
        ):
            x = view.cpu().to(torch.complex128 if dtype in COMPLEX else torch.float64).numpy()
            check(engine, view, x, 4)

    def test_requires_grad_names_detach(self, engine: qdp.Engine, torch: Any) -> None:
        t = torch.ones(2, 4, requires_grad=True)
        for data in (t, t * 2):
            with pytest.raises(qdp.QdpError, match="detach"):
                engine.encode(data, 2, "amplitude")
        check(engine, t.detach(), np.ones((2, 4), np.float32))

    def test_lazy_bits_are_not_read_raw(self, engine: qdp.Engine, torch: Any) -> None:
        """A lazily conjugated or negated tensor gives its own values, or a typed error."""
        t = torch.from_numpy(values("complex64"))
        negated = t.conj().imag
        dense = negated.as_strided((2, 4), (4, 1))
        for lazy in (t.conj(), negated, dense):
            assert lazy.is_conj() or lazy.is_neg()
            plain = lazy.resolve_conj().resolve_neg().numpy()
            try:
                states = engine.encode(lazy, 2, "amplitude").numpy()
            except qdp.QdpError:
                continue
            reference.assert_states(states, plain, 2, "amplitude")

    def test_tensors_without_plain_memory(self, engine: qdp.Engine, torch: Any) -> None:
        sparse = torch.eye(4).to_sparse()
        meta = torch.ones(2, 4, device="meta")
        for data in (sparse, meta):
            with pytest.raises(qdp.QdpError):
                engine.encode(data, 2, "amplitude")

    def test_float8_is_refused(self, engine: qdp.Engine, torch: Any) -> None:
        with pytest.raises(qdp.DTypeError):
            engine.encode(torch.ones(2, 4).to(torch.float8_e4m3fn), 2, "amplitude")

    def test_parameter_and_subclass(self, engine: qdp.Engine, torch: Any) -> None:
        frozen = torch.nn.Parameter(torch.ones(2, 4), requires_grad=False)
        check(engine, frozen, np.ones((2, 4), np.float32))

    @pytest.mark.gpu
    def test_cuda_tensor_on_cpu_engine(self, cpu: qdp.Engine, torch: Any) -> None:
        with pytest.raises(qdp.DeviceMismatchError, match="cuda") as caught:
            cpu.encode(torch.ones(2, 4, device="cuda:0"), 2, "amplitude")
        assert caught.value.argument == "data"

    @pytest.mark.gpu
    def test_pinned_and_managed_host_memory(self, gpu: qdp.Engine, torch: Any) -> None:
        x = values("float64")
        check(gpu, torch.from_numpy(x).pin_memory(), x)


class Producer:
    """An array known only by its DLPack methods."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)


class OldProducer(Producer):
    """A producer from before DLPack 1.0: it knows neither max_version nor copy."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


class BrokenProducer(Producer):
    def __dlpack__(self, **kwargs: Any) -> Any:
        raise BufferError("this producer never exports")


class TestDLPack:
    @pytest.mark.parametrize("producer", [Producer, OldProducer])
    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *COMPLEX, "bool"])
    def test_any_producer(self, producer: type, dtype: str, engine: qdp.Engine) -> None:
        x = values(dtype, (8, 16))
        assert engine.encode(producer(x), 4, "amplitude").dtype == precision_of(dtype)
        for view in (x, x[::-1, ::-1], x[1::2, 3:9], x.T[:, :5], x[3]):
            check(engine, producer(view), np.array(view), 4)

    def test_the_producer_is_released(self, engine: qdp.Engine) -> None:
        import sys

        x = values("float64")
        count = sys.getrefcount(x)
        for producer in (Producer, OldProducer):
            check(engine, producer(x), x)
        with pytest.raises(qdp.FeatureCountError):
            engine.encode(Producer(x), 1, "amplitude")
        assert sys.getrefcount(x) == count

    def test_an_error_of_the_producer_is_reported(self, engine: qdp.Engine) -> None:
        with pytest.raises((qdp.QdpError, BufferError), match="never exports"):
            engine.encode(BrokenProducer(values("float64")), 2, "amplitude")

    def test_an_interrupt_is_no_error_of_the_producer(self, engine: qdp.Engine) -> None:
        class Interrupted(Producer):
            def __dlpack__(self, **kwargs: Any) -> Any:
                raise KeyboardInterrupt

        class Values(Interrupted):
            def __array__(self, *args: Any, **kwargs: Any) -> Any:
                return self.array

        class InterruptedValues:
            def __array__(self, *args: Any, **kwargs: Any) -> Any:
                raise KeyboardInterrupt

        x = values("float64")
        for source in (Interrupted(x), Values(x), InterruptedValues()):
            with pytest.raises(KeyboardInterrupt):
                engine.encode(source, 2, "amplitude")

    def test_tensors_without_memory(self, engine: qdp.Engine, torch: Any) -> None:
        """As compilers have of them; one does not hurt the other requests of a batch."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = torch.ones(8)
        functional = torch._to_functional_tensor(torch.ones(8))
        for tensor in (fake, functional):
            expected = "data: expected values in memory"
            with pytest.raises(qdp.InvalidArgumentError, match=expected):
                engine.encode(tensor, 3, "amplitude")
            with pytest.raises(qdp.InvalidArgumentError, match=expected):
                engine.encode_list([np.ones(8), tensor], 3, "amplitude")
            with engine.coalesce(3, "amplitude") as batch:
                handles = [batch.submit(np.ones(8)), batch.submit(tensor)]
            assert handles[0].result().shape == (1, 8)
            with pytest.raises(qdp.InvalidArgumentError, match=expected):
                handles[1].result()
            with engine.batcher(3) as batcher:
                with pytest.raises(qdp.InvalidArgumentError, match=expected):
                    batcher.encode(tensor)
                with pytest.raises(qdp.InvalidArgumentError, match=expected):
                    asyncio.run(batcher.encode_async(tensor))

    def test_states_are_input(self, engine: qdp.Engine) -> None:
        state = engine.encode(values("float32"), 2, "amplitude")
        again = engine.encode(state, 2, "amplitude").numpy()
        np.testing.assert_allclose(again, state.numpy(), rtol=0, atol=1e-6)
        check(engine, state[1:], values("float32")[1:])

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "complex64"])
    def test_jax(self, dtype: str, engine: qdp.Engine, jax: Any) -> None:
        with jax.enable_x64(True):
            x = jax.device_put(values(dtype), jax.devices("cpu")[0])
            assert x.dtype == dtype
            check(engine, x, values(dtype))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "complex64"])
    def test_cupy(self, dtype: str, gpu: qdp.Engine, cupy: Any) -> None:
        with cupy.cuda.Device(0):
            x = cupy.asarray(values(dtype, (8, 16)))
        for view in (x, x[::-1, ::-1], x[1::2, 3:9], x.T[:, :5], x[3]):
            check(gpu, view, cupy.asnumpy(view), 4)


class TestArrow:
    def test_fixed_size_list(self, engine: qdp.Engine, pyarrow: Any) -> None:
        for dtype in ("float16", "float32", "float64", "int8", "int32", "int64", "uint64"):
            x = values(dtype, (6, 4))
            array = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), 4)
            assert engine.encode(array, 2, "amplitude").dtype == precision_of(dtype)
            check(engine, array, x)
            check(engine, array.slice(2, 3), x[2:5])
            inner = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()).slice(4), 4)
            check(engine, inner, x[1:])

    def test_primitive_array_is_one_sample(self, engine: qdp.Engine, pyarrow: Any) -> None:
        x = values("float64")[0]
        array = pyarrow.array(x)
        check(engine, array, x)
        check(engine, array.slice(1, 2), x[1:3])
        check(engine, pyarrow.chunked_array([x[:1], x[1:]]), x)

    def test_what_cannot_be_read(self, engine: qdp.Engine, pyarrow: Any) -> None:
        class Once:
            """Its capsules are empty once they were used."""

            capsules = pyarrow.array([1.0] * 4).__arrow_c_array__()

            def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
                return self.capsules

        def batches() -> Any:
            yield pyarrow.record_batch({"x": [1.0]})
            raise ValueError("the rest is lost")

        once = Once()
        check(engine, once, np.ones(4))
        schema = pyarrow.schema([("x", pyarrow.float64())])
        broken = pyarrow.RecordBatchReader.from_batches(schema, batches())
        for source in (once, broken):
            with pytest.raises(qdp.InvalidArgumentError, match="data: expected Arrow data"):
                engine.encode(source, 2, "amplitude")

    def test_chunked_lists(self, engine: qdp.Engine, pyarrow: Any) -> None:
        x = values("float32", (6, 4))
        whole = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), 4)
        chunks = pyarrow.chunked_array([whole.slice(0, 1), whole.slice(1, 0), whole.slice(1, 5)])
        check(engine, chunks, x)
        check(engine, pyarrow.table({"states": chunks}), x)
        check(engine, pyarrow.table({"states": chunks}).slice(2, 3), x[2:5])
        check(engine, pyarrow.table({"states": chunks}).slice(2, 0), x[:0])

    def test_columns_are_features(self, engine: qdp.Engine, pyarrow: Any) -> None:
        x = values("float64", (6, 4))
        columns = {f"x{k}": x[:, k] for k in range(4)}
        table = pyarrow.table(columns)
        for data in (
            table,
            table.to_batches()[0],
            pyarrow.concat_tables([table.slice(0, 2), table.slice(2)]),
            pyarrow.RecordBatchReader.from_batches(table.schema, table.to_batches(2)),
        ):
            check(engine, data, x)
        states = engine.encode(table, 4, "angle").numpy()
        reference.assert_states(states, x, 4, "angle")
        mixed = pyarrow.table({"i": [1, 2, 3], "f": [0.5, 0.25, -1.0]})
        check(engine, mixed, np.array([[1, 0.5], [2, 0.25], [3, -1.0]]), 1)

    def test_nulls_are_refused(self, engine: qdp.Engine, pyarrow: Any) -> None:
        lists = pyarrow.list_(pyarrow.float64(), 2)
        for data in (
            pyarrow.array([1.0, None]),
            pyarrow.array([[1.0, 2.0], None], lists),
            pyarrow.array([[1.0, None], [2.0, 3.0]], lists),
            pyarrow.table({"a": [1.0, 2.0], "b": [3.0, None]}),
        ):
            with pytest.raises(qdp.QdpError, match="null"):
                engine.encode(data, 1, "amplitude")
        # A null outside the slice is nobody's business.
        check(engine, pyarrow.array([1.0, 2.0, None]).slice(0, 2), np.array([1.0, 2.0]), 1)

    def test_other_types_are_refused(self, engine: qdp.Engine, pyarrow: Any) -> None:
        for data in (
            pyarrow.array(["a", "b"]),
            pyarrow.table({"a": [1.0, 2.0], "b": ["x", "y"]}),
            pyarrow.array([{"a": 1}, {"a": 2}]).field("a").dictionary_encode(),
            pyarrow.nulls(3),
        ):
            with pytest.raises(qdp.QdpError):
                engine.encode(data, 1, "amplitude")

    def test_polars(self, engine: qdp.Engine, polars: Any) -> None:
        x = values("float64", (6, 4))
        frame = polars.DataFrame({f"x{k}": x[:, k] for k in range(4)})
        check(engine, frame, x)
        check(engine, polars.concat([frame[:2], frame[2:]], rechunk=False), x)
        rows = polars.Series("states", x.tolist(), dtype=polars.Array(polars.Float64, 4))
        check(engine, rows, x)
        check(engine, rows.to_frame(), x)
        check(engine, rows[2:5], x[2:5])
        check(engine, polars.Series(x[0].tolist()), x[0])
        with pytest.raises(qdp.QdpError, match="null"):
            engine.encode(polars.Series([1.0, None]), 1, "amplitude")
