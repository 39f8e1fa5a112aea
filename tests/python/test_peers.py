"""Every encoding against the libraries people use today, run live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import live
import numpy as np
import pytest
import reference
from cases import CASES, PRECISIONS, QUBITS, Case

if TYPE_CHECKING:
    from collections.abc import Callable

    import qdp

# A peer rounds too: its sums are not pairwise and its gates act one after another.
PEER_ROUNDING = 4


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("library", live.LIBRARIES)
def test_equals_library(library: str, case: Case, engine_for: Callable[[Any], qdp.Engine]) -> None:
    pytest.importorskip(library, exc_type=ImportError)
    for n in QUBITS:
        x, options = case.samples(n, batch=2), case.options(n)
        conventions = live.states_by_convention(library, x, n, case.encoding, **options)
        for convention, expected in conventions.items():
            for precision in PRECISIONS:
                actual = engine_for(precision).encode(
                    case.cast(x, precision), n, case.encoding, convention=convention, **options
                )
                reference.assert_close(
                    actual.numpy(), expected, x, n, case.encoding, slack=PEER_ROUNDING, **options
                )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conventions(case: Case, engine: qdp.Engine) -> None:
    """What the design says a convention changes, and nothing else."""
    for n in (1, 2, 5, 10):
        x, options = case.samples(n), case.options(n)
        mine, qiskit, pennylane = (
            engine.encode(x, n, case.encoding, convention=c, **options).numpy()
            for c in reference.CONVENTIONS
        )
        if case.encoding == "angle":
            doubled = engine.encode(2 * x, n, "angle", convention="qiskit", **options).numpy()
            np.testing.assert_allclose(mine, doubled, rtol=0, atol=1e-14)
            assert not np.allclose(mine, qiskit)
        else:
            np.testing.assert_array_equal(mine, qiskit)
        if case.encoding == "amplitude" or (case.encoding == "basis" and x.shape[1] == 1):
            np.testing.assert_array_equal(pennylane, qiskit)
        else:
            reversed_ = live.bit_reverse(qiskit, n)
            reference.assert_close(pennylane, reversed_, x, n, case.encoding, slack=2, **options)


class TestKnownEqualities:
    """The equalities of the design, each library called as its users call it."""

    N = 5
    X = np.random.default_rng(5).uniform(-np.pi, np.pi, size=(3, N))

    def test_angle_is_qiskit_ry_of_twice_the_angle(self, engine: qdp.Engine, qiskit: Any) -> None:
        from qiskit.circuit import ParameterVector

        circuit = qiskit.QuantumCircuit(self.N)
        x = ParameterVector("x", self.N)
        for k in range(self.N):
            circuit.ry(x[k], k)
        expected = live.qiskit_states(circuit, 2 * self.X)
        actual = engine.encode(self.X, self.N, "angle").numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)

    def test_angle_is_pennylane_angle_embedding_reversed(
        self, engine: qdp.Engine, pennylane: Any
    ) -> None:
        def circuit(x: Any) -> Any:
            pennylane.AngleEmbedding(x, wires=range(self.N), rotation="Y")
            return pennylane.state()

        node = pennylane.QNode(circuit, pennylane.device("default.qubit", wires=self.N))
        expected = live.bit_reverse(node(2 * self.X), self.N)
        actual = engine.encode(self.X, self.N, "angle").numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)

    def test_phase_is_qiskit_h_then_p(self, engine: qdp.Engine, qiskit: Any) -> None:
        from qiskit.circuit import ParameterVector

        circuit = qiskit.QuantumCircuit(self.N)
        x = ParameterVector("x", self.N)
        circuit.h(range(self.N))
        for k in range(self.N):
            circuit.p(x[k], k)
        actual = engine.encode(self.X, self.N, "phase").numpy()
        np.testing.assert_allclose(actual, live.qiskit_states(circuit, self.X), rtol=0, atol=1e-14)

    @pytest.mark.usefixtures("qiskit")
    def test_phase_is_half_a_z_feature_map(self, engine: qdp.Engine) -> None:
        from qiskit.circuit.library import z_feature_map

        expected = live.qiskit_states(z_feature_map(self.N, reps=1), self.X / 2)
        actual = engine.encode(self.X, self.N, "phase").numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)

    @pytest.mark.usefixtures("qiskit")
    @pytest.mark.parametrize("reps", [1, 2, 3])
    def test_zz_without_pairs_is_z_feature_map(self, reps: int, engine: qdp.Engine) -> None:
        from qiskit.circuit.library import z_feature_map

        expected = live.qiskit_states(z_feature_map(self.N, reps=reps), self.X)
        actual = engine.encode(self.X, self.N, "zz", reps=reps, entanglement="none").numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)

    @pytest.mark.usefixtures("pennylane")
    def test_iqp_embedding_then_hadamards_is_iqp(self, engine: qdp.Engine) -> None:
        expected = live.bit_reverse(
            live.pennylane(self.X, self.N, "iqp-embedding", hadamards_after=True), self.N
        )
        j, k = np.triu_indices(self.N, 1)
        weights = self.X[:, j] * self.X[:, k]
        singles = self.X.copy()
        for pair, (a, b) in enumerate(zip(j, k, strict=True)):
            singles[:, a] += weights[:, pair]
            singles[:, b] += weights[:, pair]
        actual = engine.encode(np.hstack([singles, -2 * weights]), self.N, "iqp").numpy()
        overlap = np.abs(np.sum(actual.conj() * expected, axis=1))
        np.testing.assert_allclose(overlap, 1, rtol=0, atol=1e-13)  # up to a global phase


@pytest.mark.usefixtures("torch")
def test_equality_table_runs(cpu: qdp.Engine) -> None:
    """The published table's script on a small size: every encoding, small errors only."""
    import equality_table

    rows = equality_table.measure(cpu.device, max_qubits=3, libraries=["torch"])
    assert {row["encoding"] for row in rows} == {case.encoding for case in CASES}
    assert {row["convention"] for row in rows} == set(reference.CONVENTIONS)
    for row in rows:
        assert 0 <= row["error"] < {"complex64": 1e-4, "complex128": 1e-12}[row["dtype"]]
    table = equality_table.markdown(rows)
    assert table.count("\n") == 2 + len(rows)
