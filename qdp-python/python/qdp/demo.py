"""Handwritten digits as quantum states: fidelity kernels in a support vector machine.

The 1797 images of scikit-learn's digits become amplitude states of 6 qubits (64 pixels), and,
reduced to 8 principal components, angle and zz states of 8 qubits. The fidelity
``|<psi_i|psi_j>|**2`` of two states is the kernel of a support vector machine, which stands
beside a classical one with an RBF kernel on the same features. Both choose C and their kernel's
width from grids of equal size by cross-validation on the training split; principal components
and scale are fitted on that split too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

import qdp
from qdp._io import require

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Result", "fidelity_kernel", "run"]

Array: TypeAlias = npt.NDArray[Any]

COMPONENTS = 8
TEST_SIZE = 0.3
SEED = 0
C_GRID = (1.0, 10.0, 100.0)
#: Radians per standard deviation of the first principal component. A larger angle makes a
#: narrower kernel; the pair phases of zz, products with 2 pi, call for smaller angles.
ANGLE_WIDTHS = (0.3, 0.6, 0.9)
ZZ_WIDTHS = (0.025, 0.05, 0.1)
#: In units of 1 / (features * variance), which scikit-learn calls "scale".
RBF_GAMMAS = (0.3, 1.0, 3.0)

MEASURED_SECONDS = 0.5
MINIMUM_REPEATS = 5


@dataclass(frozen=True)
class Result:
    """One encoding: its accuracy, its speed and its kernel matrix over all samples."""

    encoding: str
    num_qubits: int
    accuracy: float
    baseline: float
    states_per_second: float
    kernel: Array


@dataclass(frozen=True)
class _Split:
    """Row indices of the training and test samples, and the class of every sample."""

    train: Array
    test: Array
    labels: Array


def run(output: Path, device: str | None = None) -> list[Result]:
    """Run the demo on ``device``, print its table and save ``output/kernels.png``."""
    console = require("rich.console", "demo").Console()
    datasets = require("sklearn.datasets", "demo")
    require("matplotlib.figure", "demo")  # before the work, not after it

    engine = qdp.Engine(device)
    pixels, labels = datasets.load_digits(return_X_y=True)
    split = _split(labels)
    components = _principal_components(pixels, split.train)

    with console.status("encoding digits, choosing C and widths"):
        pixel_baseline = _rbf_accuracy(pixels, split)
        component_baseline = _rbf_accuracy(components, split)
        results = [
            _evaluate(engine, "amplitude", 6, [pixels], split, pixel_baseline),
            *(
                _evaluate(
                    engine,
                    encoding,
                    COMPONENTS,
                    [width * components for width in widths],
                    split,
                    component_baseline,
                )
                for encoding, widths in (("angle", ANGLE_WIDTHS), ("zz", ZZ_WIDTHS))
            ),
        ]

    output.mkdir(parents=True, exist_ok=True)
    picture = output / "kernels.png"
    _draw(results, labels, picture)
    console.print(_table(results, engine.device, split))
    console.print(f"kernel matrices: {picture}", soft_wrap=True)
    return results


def fidelity_kernel(state: qdp.StateBatch) -> Array:
    """Fidelities ``|<psi_i|psi_j>|**2`` of all pairs, shape ``(batch, batch)``.

    States on a GPU are multiplied there where torch is installed, else on the host.
    """
    if state.device != "cpu":
        try:
            psi = state.torch()
        except ImportError:
            pass
        else:
            kernel: Array = (psi.conj() @ psi.T).abs().square().cpu().numpy()
            return kernel
    amplitudes = state.numpy()
    fidelities: Array = np.square(np.abs(amplitudes.conj() @ amplitudes.T))
    return fidelities


def _split(labels: Array) -> _Split:
    selection = require("sklearn.model_selection", "demo")
    train, test = selection.train_test_split(
        np.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=SEED
    )
    return _Split(train, test, labels)


def _principal_components(pixels: Array, train: Array) -> Array:
    """Principal components in units of the first one's standard deviation, by the training rows."""
    pca = require("sklearn.decomposition", "demo").PCA(COMPONENTS, random_state=SEED)
    pca.fit(pixels[train])
    components: Array = pca.transform(pixels) / np.sqrt(pca.explained_variance_[0])
    return components


def _rbf_accuracy(features: Array, split: _Split) -> float:
    svm = require("sklearn.svm", "demo")
    scale = 1 / (features.shape[1] * features[split.train].var())
    search = _search(
        svm.SVC(kernel="rbf"), {"C": C_GRID, "gamma": [scale * factor for factor in RBF_GAMMAS]}
    )
    search.fit(features[split.train], split.labels[split.train])
    return float(search.score(features[split.test], split.labels[split.test]))


def _search(model: Any, grid: dict[str, Sequence[float]]) -> Any:
    selection = require("sklearn.model_selection", "demo")
    folds = selection.StratifiedKFold(5, shuffle=True, random_state=SEED)
    return selection.GridSearchCV(model, grid, cv=folds)


def _evaluate(
    engine: qdp.Engine,
    encoding: str,
    num_qubits: int,
    candidates: Sequence[Array],
    split: _Split,
    baseline: float,
) -> Result:
    """Fit on the kernel of every candidate scaling, keep the best by cross-validation."""
    svm = require("sklearn.svm", "demo")
    train, test, labels = split.train, split.test, split.labels
    fitted = []
    for features in candidates:
        kernel = fidelity_kernel(engine.encode(features, num_qubits, encoding))
        search = _search(svm.SVC(kernel="precomputed"), {"C": C_GRID})
        search.fit(kernel[np.ix_(train, train)], labels[train])
        fitted.append((search, kernel))
    search, kernel = max(fitted, key=lambda pair: float(pair[0].best_score_))
    return Result(
        encoding,
        num_qubits,
        float(search.score(kernel[np.ix_(test, train)], labels[test])),
        baseline,
        _states_per_second(engine, candidates[0], num_qubits, encoding),
        kernel,
    )


def _states_per_second(engine: qdp.Engine, data: Array, num_qubits: int, encoding: str) -> float:
    """Rate of encoding the whole data set from NumPy until the states exist; median of repeats."""
    seconds: list[float] = []
    while len(seconds) < MINIMUM_REPEATS or sum(seconds) < MEASURED_SECONDS:
        began = time.perf_counter()
        engine.encode(data, num_qubits, encoding).synchronize()
        seconds.append(time.perf_counter() - began)
    return len(data) / float(np.median(seconds))


def _table(results: Sequence[Result], device: str, split: _Split) -> Any:
    table = require("rich.table", "demo").Table(
        title=f"digits: {len(split.train)} training and {len(split.test)} test images, on {device}",
        caption="accuracy on the test images; RBF: a classical kernel on the same features",
    )
    table.add_column("encoding")
    for heading in ("qubits", "accuracy", "RBF", "states/s"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.encoding,
            str(result.num_qubits),
            f"{result.accuracy:.1%}",
            f"{result.baseline:.1%}",
            f"{result.states_per_second:,.0f}",
        )
    return table


def _draw(results: Sequence[Result], labels: Array, path: Path) -> None:
    """Draw the kernel matrices side by side, the samples sorted by class."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=(13, 4.5), layout="constrained")
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(11)) - 0.5
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, result in zip(panels, results, strict=True):
        image = axes.imshow(
            result.kernel[np.ix_(order, order)],
            cmap="magma",
            vmin=0,
            vmax=1,
            interpolation="antialiased",
        )
        axes.set_title(
            f"{result.encoding}, {result.num_qubits} qubits\n"
            f"accuracy {result.accuracy:.1%} (RBF {result.baseline:.1%})"
        )
        axes.set_xticks((edges[:-1] + edges[1:]) / 2, range(10))
        axes.set_yticks((edges[:-1] + edges[1:]) / 2, range(10))
        axes.tick_params(length=0)
        for edge in edges[1:-1]:
            axes.axhline(edge, color="white", linewidth=0.4, alpha=0.5)
            axes.axvline(edge, color="white", linewidth=0.4, alpha=0.5)
        axes.set_xlabel("digit")
    panels[0].set_ylabel("digit")
    figure.colorbar(image, ax=list(panels), label="fidelity", fraction=0.05, pad=0.01)
    figure.savefig(path, dpi=150, bbox_inches="tight")
