"""qdp.torch.encode: tensor in, tensor out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, PRECISIONS

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402

X = np.random.default_rng(10).uniform(-2, 2, size=(4, 6))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equals_engine_and_reference(precision: Any, device: str, engine_for: Any) -> None:
    for case in CASES:
        for convention in reference.CONVENTIONS:
            for n in (1, 4, 7):
                x = case.samples(n)
                options: dict[str, Any] = {"convention": convention, **case.options(n)}
                t = torch.from_numpy(case.cast(x, precision)).to(device)
                result = qdp.torch.encode(t, n, case.encoding, **options)
                assert type(result) is torch.Tensor
                assert result.device == t.device
                assert result.shape == (len(x), 2**n)
                assert result.dtype == getattr(torch, precision)
                assert not result.requires_grad
                states = result.cpu().numpy()
                reference.assert_states(states, x, n, case.encoding, **options)
                same = engine_for(None).encode(t, n, case.encoding, **options).numpy()
                np.testing.assert_array_equal(states, same)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32", "int64"])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_precision(dtype: str, precision: Any, device: str) -> None:
    t = torch.arange(1, 9, device=device).to(getattr(torch, dtype))
    result = qdp.torch.encode(t, 3, "amplitude", precision=precision)
    follows = "complex128" if dtype in ("float64", "int64") else "complex64"
    assert result.dtype == getattr(torch, precision or follows)
    reference.assert_states(result.cpu().numpy(), np.arange(1, 9), 3, "amplitude")


def test_single_sample_and_strides(device: str) -> None:
    t = torch.from_numpy(X).to(device)
    for view in (t[0], t[:, 2], t[::2], t[:, ::2], t.T, t[1].expand(3, 6), t[:0]):
        result = qdp.torch.encode(view, 3, "amplitude")
        reference.assert_states(result.cpu().numpy(), view.cpu().numpy(), 3, "amplitude")


def test_result_is_torchs_own(device: str) -> None:
    """Every call gives memory of its own, which later calls leave alone."""
    t = torch.from_numpy(X).to(device)
    results = [qdp.torch.encode(t + k, 6, "angle") for k in range(5)]
    assert len({r.data_ptr() for r in results}) == 5
    for k, result in enumerate(results):
        reference.assert_states(result.cpu().numpy(), X + k, 6, "angle")
    results[0].mul_(2).add_(1j)  # writable


def test_out(device: str) -> None:
    t = torch.from_numpy(X).to(device)
    out = torch.full((4, 64), float("nan"), dtype=torch.complex128, device=device)
    address = out.data_ptr()
    result = qdp.torch.encode(t, 6, "phase", out=out)
    assert result.data_ptr() == out.data_ptr() == address
    reference.assert_states(out.cpu().numpy(), X, 6, "phase")
    for wrong, error in (
        (torch.empty(4, 32, dtype=torch.complex128, device=device), qdp.ShapeError),
        (torch.empty(4, 64, dtype=torch.float64, device=device), qdp.DTypeError),
        (torch.empty(64, 4, dtype=torch.complex128, device=device).T, qdp.QdpError),
    ):
        with pytest.raises(error, match="out"):
            qdp.torch.encode(t, 6, "phase", out=wrong)


def test_autograd_knows_of_out(device: str) -> None:
    """A gradient that needs what was there before is refused, not taken from the new states."""
    t = torch.from_numpy(X).to(device)
    out = torch.empty(4, 64, dtype=torch.complex128, device=device)
    weight = torch.ones(4, 64, dtype=out.dtype, device=device, requires_grad=True)
    engine = qdp.Engine(device)

    def job() -> None:
        engine.encode_async(t, 6, "phase", out=out).result()

    for write in (
        lambda: qdp.torch.encode(t, 6, "phase", out=out),
        lambda: engine.encode(t, 6, "phase", out=out),
        job,
    ):
        write()
        loss = (weight * out).real.sum()
        before = out._version
        write()
        assert out._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_is_not_written_is_not_counted(device: str) -> None:
    t = torch.from_numpy(X).to(device)
    out = torch.ones(3, 64, dtype=torch.complex128, device=device)
    engine = qdp.Engine(device)
    for call in (
        lambda: qdp.torch.encode(t, 6, "phase", out=out),
        lambda: engine.encode(t, 6, "phase", out=out),
        lambda: engine.encode_async(t, 6, "phase", out=out),
    ):
        with pytest.raises(qdp.ShapeError):
            call()
    assert out._version == 0
    with pytest.raises(qdp.NonFiniteError):
        qdp.torch.encode(t[:3] * torch.inf, 6, "phase", out=out, validate="now")
    assert out._version > 0


def test_out_that_requires_grad_is_refused(device: str) -> None:
    out = torch.zeros(4, 64, dtype=torch.complex128, device=device, requires_grad=True)
    with pytest.raises(qdp.QdpError):
        qdp.torch.encode(torch.from_numpy(X).to(device), 6, "phase", out=out)
    assert not out.detach().any()


@pytest.mark.gpu
def test_out_on_another_device() -> None:
    out = torch.zeros(4, 64, dtype=torch.complex128)
    with pytest.raises(qdp.DeviceMismatchError, match="out"):
        qdp.torch.encode(torch.from_numpy(X).to("cuda:0"), 6, "phase", out=out)


def test_errors(device: str) -> None:
    t = torch.from_numpy(X).to(device)
    with pytest.raises(qdp.FeatureCountError):
        qdp.torch.encode(t, 5, "angle")
    with pytest.raises(qdp.InvalidArgumentError, match="encoding"):
        qdp.torch.encode(t, 6, "amplitudes")
    with pytest.raises(qdp.ShapeError):
        qdp.torch.encode(t.reshape(2, 2, 6), 6, "angle")
    bad = t.clone()
    bad[2, 1] = float("inf")
    with pytest.raises(qdp.NonFiniteError) as caught:
        qdp.torch.encode(bad, 6, "angle", validate="now")
    assert (caught.value.sample, caught.value.position) == (2, 1)
    for data in (None, "tensor", object()):
        with pytest.raises((qdp.QdpError, TypeError)):
            qdp.torch.encode(data, 6, "angle")  # type: ignore[arg-type]
    reference.assert_states(qdp.torch.encode(t, 6, "angle").cpu().numpy(), X, 6, "angle")
