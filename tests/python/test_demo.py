"""The demo: real accuracies from real kernels, and a picture of them."""

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import qdp
from qdp import cli, demo

Results: TypeAlias = dict[str, demo.Result]

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra demo")
matplotlib_image = pytest.importorskip("matplotlib.image", reason="needs the extra demo")
pytest.importorskip("rich", reason="needs the extra demo")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "new" / "folder"


@pytest.fixture(scope="module")
def run(output: Path) -> tuple[Results, str]:
    """What the demo returns, and what it prints."""
    with redirect_stdout(StringIO()) as text:
        results = demo.run(output, "cpu")
    return {result.encoding: result for result in results}, text.getvalue()


@pytest.fixture(scope="module")
def results(run: tuple[Results, str]) -> Results:
    return run[0]


def test_accuracy_is_near_the_classical_baseline(results: Results) -> None:
    assert {name: result.num_qubits for name, result in results.items()} == {
        "amplitude": 6,
        "angle": 8,
        "zz": 8,
    }
    for result in results.values():
        assert 0.93 < result.accuracy <= 1
        assert 0.93 < result.baseline <= 1
        assert result.accuracy > result.baseline - 0.03
        assert result.states_per_second > 0


def test_kernels_are_fidelities(results: Results) -> None:
    for result in results.values():
        assert result.kernel.shape == (1797, 1797)
        np.testing.assert_allclose(np.diag(result.kernel), 1, atol=1e-12)
        np.testing.assert_allclose(result.kernel, result.kernel.T, atol=1e-12)
        assert result.kernel.min() >= 0
        assert np.linalg.eigvalsh(result.kernel[:200, :200]).min() > -1e-10


def test_amplitude_kernel_is_the_squared_cosine(results: Results) -> None:
    pixels, _ = sklearn_datasets.load_digits(return_X_y=True)
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    np.testing.assert_allclose(results["amplitude"].kernel, (unit @ unit.T) ** 2, atol=1e-12)


def test_fidelity_keeps_the_phase() -> None:
    state = qdp.Engine("cpu").encode([[0.0], [np.pi], [np.pi / 2]], 1, "phase")
    kernel = demo.fidelity_kernel(state)
    np.testing.assert_allclose(kernel, [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]], atol=1e-15)


def test_test_images_do_not_leak_into_the_features() -> None:
    pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
    split = demo._split(labels)
    assert set(split.train).isdisjoint(split.test)
    assert len(split.train) + len(split.test) == len(labels)
    features = demo._principal_components(pixels, split.train)
    changed = pixels.copy()
    changed[split.test] *= 100
    again = demo._principal_components(changed, split.train)
    np.testing.assert_allclose(again[split.train], features[split.train], atol=1e-9)
    assert features[split.train, 0].std() == pytest.approx(1, rel=1e-3)


def test_picture_shows_the_kernels(results: Results, output: Path) -> None:
    picture = matplotlib_image.imread(output / "kernels.png")
    height, width = picture.shape[:2]
    assert width > 2 * height > 1000
    panels = np.array_split(picture[height // 4 : 3 * height // 4, :, :3], 3, axis=1)
    for panel in panels:
        assert panel.std() > 0.1


def test_the_table_shows_the_results(run: tuple[Results, str], output: Path) -> None:
    results, text = run
    for word in ("RBF", "states/s", "on cpu", str(output / "kernels.png")):
        assert word in text
    for result in results.values():
        line = next(line for line in text.splitlines() if result.encoding in line)
        assert f"{result.accuracy:.1%}" in line
        assert f"{result.states_per_second:,.0f}" in line


def test_the_command_passes_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments))
    assert cli.main(["demo", "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert cli.main(["demo"]) == 0
    assert calls == [(tmp_path, "cpu"), (Path("demo-output"), None)]


def test_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert 'pip install "qdp[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_gpu_kernels_agree(results: Results, tmp_path: Path) -> None:
    for result in demo.run(tmp_path, "cuda:0"):
        np.testing.assert_allclose(result.kernel, results[result.encoding].kernel, atol=1e-10)
        assert result.accuracy == pytest.approx(results[result.encoding].accuracy, abs=0.01)
