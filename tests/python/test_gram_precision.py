"""qdp.gram: products of matrices in full precision, where torch may multiply in less."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qdp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def precisions() -> Iterator[Callable[[str], None]]:
    """Sets how torch may multiply float32, and puts it back."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    places = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]

    def choose(name: str) -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "bf16" else name
        torch.backends.mkldnn.matmul.fp32_precision = name

    yield choose
    for place, name in zip(places, before, strict=True):
        place.fp32_precision = name


def shortened(x: Any, bits: int) -> Any:
    """What a type that lacks the last bits of a float32 has in its place."""
    import torch

    rounded = (x.contiguous().view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)
    return rounded.view(torch.float32)


def short_products(name: str) -> Any:
    """A mode of torch's in which the host multiplies float32 as another type, where it may, as some
    hosts and all GPUs do. It records the settings that it finds.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.found: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            on_host = func is torch.ops.aten.mm.default and args[0].device.type == "cpu"
            if on_host and args[0].dtype == torch.float32:
                place = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
                self.found.append(place.fp32_precision)
                if place.fp32_precision == name:
                    args = [shortened(x, {"tf32": 13, "bf16": 16}[name]) for x in args]
            return func(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize("name", ["tf32", "bf16"])
@pytest.mark.parametrize("encoding", ["angle", "amplitude", "zz"])
def test_matrix_products_are_in_full_precision(
    encoding: str, name: str, device: str, precisions: Any
) -> None:
    """Neither autocast nor a lower precision of products that the process asked for reaches them,
    in gradients of any order; and the setting is the same throughout, as other threads see it.
    """
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(3)
    x, weight = rng.uniform(0.1, 1, size=(40, 6)), rng.normal(size=(40, 40))
    kind = torch.device(device).type

    def derivatives(dtype: Any) -> list[Any]:
        a = torch.from_numpy(x).to(device, dtype).requires_grad_()
        w = torch.from_numpy(weight).to(device, dtype)
        matrix = qdp.gram(a, encoding=encoding)
        (first,) = torch.autograd.grad(matrix, a, w)
        recorded = torch.autograd.grad(qdp.gram(a, encoding=encoding), a, w, create_graph=True)
        again = qdp.gram(a, encoding=encoding)
        batched = torch.autograd.grad(again, a, w[None], is_grads_batched=True)
        plain = qdp.gram(a.detach(), encoding=encoding)
        return [result.detach() for result in (plain, matrix, first, *recorded, *batched)]

    wanted = derivatives(torch.float64)
    mode = short_products(name)
    precisions(name)
    with torch.autocast(kind, dtype=torch.bfloat16), mode:
        found = derivatives(torch.float32)
    for result, want in zip(found, wanted, strict=True):
        scale = float(want.abs().max())
        assert float((result - want).abs().max()) < 5e-6 * scale
    assert set(mode.found) <= {name}
    assert mode.found or encoding == "zz" or kind == "cuda"


def test_second_derivatives_are_in_full_precision(device: str, precisions: Any) -> None:
    """Though they are computed long after the call."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    rng = np.random.default_rng(4)
    x = rng.uniform(0.1, 1, size=(20, 6))

    def second(dtype: Any) -> Any:
        a = torch.from_numpy(x).to(device, dtype).requires_grad_()
        matrix = qdp.gram(a)
        (first,) = torch.autograd.grad(matrix.pow(2).sum(), a, create_graph=True)
        with mode:
            return torch.autograd.grad(first.pow(2).sum(), a)[0]

    mode = short_products("tf32")
    want = second(torch.float64)
    precisions("tf32")
    found = second(torch.float32)
    assert float((found - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert set(mode.found) <= {"tf32"}


@pytest.mark.parametrize("place", ["cuda.matmul", "mkldnn.matmul", "all"])
def test_either_way_to_ask_for_less_precision(place: str, device: str, precisions: Any) -> None:
    """torch refuses to say its precision in the old way once it was set in the new one."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(5, 4, device=device)
    want = qdp.gram(x, encoding="angle")
    precisions("none")
    everywhere = torch.backends.fp32_precision
    try:
        if place == "all":
            torch.backends.fp32_precision = "tf32"
        else:
            operator.attrgetter(place)(torch.backends).fp32_precision = "tf32"
        torch.testing.assert_close(qdp.gram(x, encoding="angle"), want, rtol=0, atol=2e-6)
    finally:
        torch.backends.fp32_precision = everywhere


def test_factors_are_split_without_loss() -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    from qdp.torch.fidelity import PARTS, split

    for dtype in (torch.float32, torch.complex64):
        x = torch.randn(7, 5, dtype=dtype)
        for count, bits in PARTS.values():
            for data in (x, x.mH.contiguous().mH, x.T[1::2]):
                parts = split(data, count, bits)
                assert len(parts) == count
                assert torch.equal(
                    sum(part.to(torch.complex128) for part in parts), data.to(torch.complex128)
                )
                for part in parts[:-1]:
                    real = torch.view_as_real(part) if part.is_complex() else part
                    assert torch.equal(shortened(real, bits), real)
