"""The demo: real accuracies from real kernels, and a picture of them."""

import sys

import numpy as np
import pytest
import qdp
from qdp import cli, demo

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra demo")
matplotlib_image = pytest.importorskip("matplotlib.image", reason="needs the extra demo")
pytest.importorskip("rich", reason="needs the extra demo")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "new" / "folder"


@pytest.fixture(scope="module")
def results(output):
    return {result.encoding: result for result in demo.run(output, "cpu")}


def test_accuracy_is_near_the_classical_baseline(results):
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


def test_kernels_are_fidelities(results):
    for result in results.values():
        assert result.kernel.shape == (1797, 1797)
        np.testing.assert_allclose(np.diag(result.kernel), 1, atol=1e-12)
        np.testing.assert_allclose(result.kernel, result.kernel.T, atol=1e-12)
        assert result.kernel.min() >= 0
        assert np.linalg.eigvalsh(result.kernel[:200, :200]).min() > -1e-10


def test_amplitude_kernel_is_the_squared_cosine(results):
    pixels, _ = sklearn_datasets.load_digits(return_X_y=True)
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    np.testing.assert_allclose(results["amplitude"].kernel, (unit @ unit.T) ** 2, atol=1e-12)


def test_fidelity_keeps_the_phase():
    state = qdp.Engine("cpu").encode([[0.0], [np.pi], [np.pi / 2]], 1, "phase")
    kernel = demo.fidelity_kernel(state)
    np.testing.assert_allclose(kernel, [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]], atol=1e-15)


def test_test_images_do_not_leak_into_the_features():
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


def test_picture_shows_the_kernels(results, output):
    picture = matplotlib_image.imread(output / "kernels.png")
    height, width = picture.shape[:2]
    assert width > 2 * height > 1000
    panels = np.array_split(picture[height // 4 : 3 * height // 4, :, :3], 3, axis=1)
    for panel in panels:
        assert panel.std() > 0.1


def test_the_command_prints_the_table(tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for word in ("amplitude", "angle", "zz", "RBF", "states/s", "on cpu", "kernels.png"):
        assert word in text
    assert (tmp_path / "kernels.png").exists()


def test_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert 'pip install "qdp[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_gpu_kernels_agree(results, tmp_path):
    for result in demo.run(tmp_path, "cuda:0"):
        np.testing.assert_allclose(result.kernel, results[result.encoding].kernel, atol=1e-10)
        assert result.accuracy == pytest.approx(results[result.encoding].accuracy, abs=0.01)
