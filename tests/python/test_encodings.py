"""Every encoding against the reference, on both devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import reference
from cases import CASES, PRECISIONS, QUBITS, Case

if TYPE_CHECKING:
    from collections.abc import Callable

    import qdp


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("convention", reference.CONVENTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(
    case: Case, convention: str, precision: str, engine_for: Callable[[Any], qdp.Engine]
) -> None:
    engine = engine_for(precision)
    for n in QUBITS:
        x = case.samples(n)
        options = {"convention": convention, **case.options(n)}
        data = case.cast(x, precision)
        states = engine.encode(data, n, case.encoding, **options).numpy()
        assert states.dtype == precision
        reference.assert_states(states, x, n, case.encoding, **options)
        # A single sample is a batch of one, given as a row or as a vector.
        for single in (data[:1], data[0]):
            alone = engine.encode(single, n, case.encoding, **options).numpy()
            assert alone.shape == (1, 2**n)
            reference.assert_states(alone, x[:1], n, case.encoding, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("complex_input", [False, True], ids=["real", "complex"])
def test_amplitude_lengths(
    precision: str, complex_input: bool, engine_for: Callable[[Any], qdp.Engine]
) -> None:
    """Any length up to 2**n, with the rest of the state exactly zero."""
    engine = engine_for(precision)
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 5, 8, 11):
        lengths = {1, 2, 3, 2 ** (n - 1) - 1, 2 ** (n - 1) + 1, 2**n - 1, 2**n}
        for length in sorted(k for k in lengths if 1 <= k <= 2**n):
            x = rng.normal(size=(3, length)).astype(np.float32).astype(np.float64)
            data = x + 1j * x[::-1] if complex_input else x
            states = engine.encode(data, n, "amplitude").numpy()
            reference.assert_states(states, data, n, "amplitude")
            assert not states[:, length:].any()


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140], ids=str)
def test_amplitude_of_any_magnitude(scale: float, engine_for: Callable[[Any], qdp.Engine]) -> None:
    """The norm is taken without under- or overflow, in float32 too."""
    x = np.random.default_rng(2).normal(size=(3, 13)) * scale
    for precision in PRECISIONS:
        states = engine_for(precision).encode(x, 4, "amplitude").numpy()
        reference.assert_states(states, x, 4, "amplitude")
    if scale in (1e-30, 1e30):
        states = engine_for(None).encode(x.astype(np.float32), 4, "amplitude").numpy()
        reference.assert_states(states, x.astype(np.float32), 4, "amplitude")


def test_sum_of_squares_stays_accurate(engine: qdp.Engine) -> None:
    """A large value first, then many small ones that a naive float32 sum would lose."""
    x = np.full(2**16, 1.0, np.float32)
    x[0] = 4096.0
    states = engine.encode(x, 16, "amplitude").numpy()
    reference.assert_states(states, x, 16, "amplitude")


@pytest.mark.parametrize(
    ("encoding", "largest"),
    [("angle", 1e4), ("phase", 1e4), ("iqp-z", 1e4), ("zz", 100), ("iqp-embedding", 100)],
)
def test_large_angles(
    encoding: str, largest: float, engine_for: Callable[[Any], qdp.Engine]
) -> None:
    """Angles of many turns are reduced to the precision that their own rounding leaves."""
    x = np.random.default_rng(3).uniform(-largest, largest, size=(3, 4)).astype(np.float32)
    for precision in PRECISIONS:
        states = engine_for(precision).encode(x, 4, encoding).numpy()
        reference.assert_states(states, x, 4, encoding)


def test_states_are_normalised(engine: qdp.Engine) -> None:
    for case in CASES:
        for n in (1, 4, 9):
            states = engine.encode(case.samples(n), n, case.encoding, **case.options(n)).numpy()
            norms = np.linalg.norm(states, axis=1)
            np.testing.assert_allclose(norms, 1, rtol=0, atol=1e-12, err_msg=str(case))


def test_defaults(engine: qdp.Engine) -> None:
    """The options that nobody names: Y rotation, two zz repetitions, one repeat, full, qdp."""
    x = np.random.default_rng(4).uniform(-2, 2, size=(2, 4))
    full = {"entanglement": "full", "convention": "qdp"}
    for encoding, options in (
        ("angle", {"rotation": "y", "convention": "qdp"}),
        ("zz", {"reps": 2, **full}),
        ("iqp-embedding", {"reps": 1, **full}),
    ):
        named = engine.encode(x, 4, encoding, **options).numpy()
        np.testing.assert_array_equal(engine.encode(x, 4, encoding).numpy(), named)
    np.testing.assert_array_equal(
        engine.encode(x, 2).numpy(), engine.encode(x, 2, "amplitude").numpy()
    )


def test_a_row_depends_on_its_sample_alone(engine: qdp.Engine) -> None:
    """A batch holds exactly what its samples give one by one."""
    for case in CASES:
        for n in (1, 3, 7):
            x = case.samples(n, batch=9)
            whole = engine.encode(x, n, case.encoding, **case.options(n)).numpy()
            for row, sample in zip(whole, x, strict=True):
                alone = engine.encode(sample, n, case.encoding, **case.options(n)).numpy()[0]
                np.testing.assert_allclose(row, alone, rtol=0, atol=1e-14, err_msg=str(case))


def test_many_samples(engine: qdp.Engine) -> None:
    """Batches beyond any tile or grid dimension of 65,535."""
    for case in CASES:
        if case.fixed and case.encoding != "angle":
            continue
        x = case.samples(2, batch=70_001)
        states = engine.encode(x, 2, case.encoding, **case.options(2)).numpy()
        for rows in (slice(0, 50), slice(35_000, 35_050), slice(-50, None)):
            reference.assert_states(states[rows], x[rows], 2, case.encoding, **case.options(2))


def test_plan_equals_encode(engine: qdp.Engine) -> None:
    for case in CASES:
        for convention in reference.CONVENTIONS:
            options: dict[str, Any] = {"convention": convention, **case.options(5)}
            plan = engine.plan(5, case.encoding, **options)
            assert (plan.num_qubits, plan.encoding) == (5, case.encoding)
            assert plan.convention == convention
            x = case.samples(5)
            expected = engine.encode(x, 5, case.encoding, **options).numpy()
            for _ in range(2):
                np.testing.assert_array_equal(plan.encode(x).numpy(), expected)


def test_num_features(engine: qdp.Engine) -> None:
    for n in (1, 2, 7, 20):
        for encoding in ("angle", "phase", "iqp-z", "zz", "iqp-embedding"):
            assert engine.num_features(n, encoding) == n
        assert engine.num_features(n, "iqp") == n + n * (n - 1) // 2
        assert engine.num_features(n, "amplitude") == 2**n
