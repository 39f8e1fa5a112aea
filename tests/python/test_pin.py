"""Page-locked arrays: what may be pinned, what is refused, and how long it lasts."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qdp
import reference
import torch

RNG = np.random.default_rng()


class Borrowed:
    """Exports an array's memory, and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device


WITHOUT_GAPS = {
    "vector": lambda: np.ones(1000),
    "batch": lambda: np.ones((10, 100)),
    "transposed": lambda: np.ones((10, 100)).T,
    "reversed": lambda: np.ones((10, 100))[::-1, ::-1],
    "three dimensions": lambda: np.ones((5, 10, 20)).transpose(1, 2, 0),
    "a part": lambda: np.ones(2000)[501:1501],
    "one row of gaps": lambda: np.ones((1, 2000))[:, :1000],
    "float16": lambda: np.ones(4000, np.float16),
    "bool": lambda: np.ones(8000, bool),
    "read-only": lambda: np.frombuffer(bytes(8000)),
    "torch": lambda: torch.ones(1000, dtype=torch.float64),
    "torch bfloat16": lambda: torch.ones(40, 100, dtype=torch.bfloat16).T,
    "torch with a gradient": lambda: torch.ones(1000, dtype=torch.float64, requires_grad=True),
    "torch view": lambda: torch.ones(30, 100, dtype=torch.float64)[10:20],
    "dlpack": lambda: Borrowed(np.ones((10, 100))),
}

WITH_GAPS = {
    "every other": lambda: np.ones(1000)[::2],
    "columns": lambda: np.ones((10, 100))[:, :50],
    "repeated": lambda: np.broadcast_to(np.ones(100), (10, 100)),
    "diagonal": lambda: np.ones((10, 10)).diagonal(),
    "torch": lambda: torch.ones(10, 100)[:, ::2],
    "torch expanded": lambda: torch.ones(100).expand(10, 100),
    "dlpack": lambda: Borrowed(np.ones(1000)[::3]),
}


@pytest.mark.parametrize("make", WITHOUT_GAPS.values(), ids=WITHOUT_GAPS)
def test_arrays_without_gaps(make: Any) -> None:
    array = make()
    with qdp.pin(array) as pinned:
        assert pinned.array is array
        assert pinned.nbytes == 8000
    assert not pinned.pinned
    assert pinned.array is array


@pytest.mark.parametrize("make", WITH_GAPS.values(), ids=WITH_GAPS)
def test_arrays_with_gaps(make: Any) -> None:
    with pytest.raises(qdp.InvalidArgumentError, match="without gaps") as caught:
        qdp.pin(make())
    assert caught.value.argument == "array"


@pytest.mark.parametrize("empty", [np.ones(0), np.ones((0, 5)), torch.ones(3, 0)])
def test_empty_arrays(empty: Any) -> None:
    with pytest.raises(qdp.InvalidArgumentError, match="at least one byte"):
        qdp.pin(empty)


@pytest.mark.parametrize("value", [[1.0, 2.0], 3, None, "array", b"bytes"])
def test_what_is_no_array(value: Any) -> None:
    with pytest.raises(qdp.InvalidArgumentError, match=type(value).__name__):
        qdp.pin(value)


def test_a_producer_that_refuses() -> None:
    class Refuses(Borrowed):
        def __dlpack__(self, **_options: Any) -> Any:
            raise BufferError("not today")

    with pytest.raises(qdp.InvalidArgumentError, match="not today") as caught:
        qdp.pin(Refuses(np.ones(10)))
    assert isinstance(caught.value.__cause__, BufferError)


def test_it_keeps_the_array() -> None:
    tensor = torch.ones(100)
    alive = weakref.ref(tensor)
    pinned = qdp.pin(tensor)
    del tensor
    gc.collect()
    assert alive() is not None
    del pinned
    gc.collect()
    assert alive() is None


def test_the_memory_outlives_the_array_until_it_is_closed() -> None:
    """A tensor may be given other memory: what was locked must stay mapped all the same."""
    tensor = torch.ones(1 << 20)
    pinned = qdp.pin(tensor)
    tensor.set_(torch.zeros(4).untyped_storage())
    pinned.close()
    assert pinned.array is tensor


def test_a_resize_in_place_is_refused_while_pinned() -> None:
    array = np.ones(100)
    pinned = qdp.pin(array)
    with pytest.raises(ValueError, match="resize"):
        array.resize(1 << 20)
    pinned.close()


def test_closing() -> None:
    pinned = qdp.pin(np.ones(10))
    pinned.close()
    pinned.close()
    assert not pinned.pinned
    again = qdp.pin(pinned.array)
    assert again.pinned == qdp_can_pin()
    assert str(again.pinned) in repr(again)


def test_an_exception_inside_closes_it() -> None:
    with pytest.raises(KeyError), qdp.pin(np.ones(10)) as pinned:
        raise KeyError
    assert not pinned.pinned


def test_closing_from_many_threads() -> None:
    for _ in range(20):
        pinned = qdp.pin(np.ones(1000))
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _, p=pinned: p.close(), range(8)))
        assert not pinned.pinned


def test_states_are_those_of_the_array(engine: qdp.Engine) -> None:
    data = RNG.normal(size=(50, 1000))
    with qdp.pin(data):
        for part in (data, data[3:40], data[:, 100:900], data[::-2], data[7]):
            states = engine.encode(part, 10).numpy()
            reference.assert_states(states, np.atleast_2d(part), 10, "amplitude")
    reference.assert_states(engine.encode(data, 10).numpy(), data, 10, "amplitude")


def qdp_can_pin() -> bool:
    """Whether this machine has a device to lock pages for."""
    return bool(qdp.device_info()["devices"])


def test_without_a_gpu_nothing_is_locked() -> None:
    assert qdp.pin(np.ones(10)).pinned == qdp_can_pin()


@pytest.mark.gpu
class TestOnTheGpu:
    def test_torch_sees_it(self) -> None:
        tensor = torch.ones(1 << 16)
        assert not tensor.is_pinned()
        with qdp.pin(tensor) as pinned:
            assert pinned.pinned
            assert tensor.is_pinned()
        assert not tensor.is_pinned()

    def test_twice(self) -> None:
        array = np.ones(1 << 16)
        with qdp.pin(array):
            for other in (array, array[::-1], array[100:], array[:-100], array.reshape(2, -1).T):
                with pytest.raises(qdp.InvalidArgumentError, match="page-locked") as caught:
                    qdp.pin(other)
                assert caught.value.argument == "array"
        qdp.pin(array).close()

    def test_what_torch_has_pinned(self) -> None:
        with pytest.raises(qdp.InvalidArgumentError, match="page-locked"):
            qdp.pin(torch.ones(1 << 16, pin_memory=True))

    def test_on_a_device(self) -> None:
        with pytest.raises(qdp.DeviceMismatchError, match="cuda"):
            qdp.pin(torch.ones(10, device="cuda"))

    def test_dropping_it_lets_the_pages_go(self) -> None:
        tensor = torch.ones(1 << 16)
        for _ in range(3):
            pinned = qdp.pin(tensor)
            assert tensor.is_pinned()
            del pinned
            assert not tensor.is_pinned()

    def test_closing_it_waits_for_calls_that_copy(self, gpu: qdp.Engine) -> None:
        array = np.random.default_rng(5).normal(size=(256, 2**16))
        want = gpu.encode(array, 16).numpy()
        for _ in range(3):
            pinned = qdp.pin(array)
            futures = [gpu.encode_async(array, 16) for _ in range(3)]
            pinned.close()
            assert not pinned.pinned
            for future in futures:
                assert (future.result().numpy() == want).all()
            assert not torch.from_numpy(array).is_pinned()
