"""The encodings as modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import qdp
from cases import CASES

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402

MODULES: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    (qdp.torch.AmplitudeEncoding, "amplitude", {}),
    (qdp.torch.AngleEncoding, "angle", {}),
    (qdp.torch.AngleEncoding, "angle", {"rotation": "x", "convention": "pennylane"}),
    (qdp.torch.PhaseEncoding, "phase", {"convention": "pennylane"}),
    (qdp.torch.BasisEncoding, "basis", {"convention": "pennylane"}),
    (qdp.torch.IQPEncoding, "iqp", {}),
    (qdp.torch.IQPZEncoding, "iqp-z", {"precision": "complex128"}),
    (qdp.torch.ZZFeatureMap, "zz", {"reps": 1, "entanglement": [(0, 2), (1, 2)]}),
    (qdp.torch.IQPEmbedding, "iqp-embedding", {"entanglement": "linear"}),
)
modules = pytest.mark.parametrize(("module", "encoding", "options"), MODULES)
N = 3
BY_ENCODING = {case.encoding: case for case in reversed(CASES)}


def samples(encoding: str, device: str) -> Any:
    return torch.from_numpy(BY_ENCODING[encoding].samples(N)).float().to(device)


@modules
def test_is_the_encoding(module: Any, encoding: str, options: Any, device: str) -> None:
    x = samples(encoding, device)
    if encoding == "basis":
        x = torch.tensor([[0.0, 1, 1], [1, 0, 0]], device=device)
    states = module(N, **options)(x)
    torch.testing.assert_close(states, qdp.torch.encode(x, N, encoding, **options), rtol=0, atol=0)


def test_every_encoding_has_a_module() -> None:
    assert {encoding for _, encoding, _ in MODULES} == set(BY_ENCODING)
    assert {module.__name__ for module, _, _ in MODULES} | {"Encoding", "encode", "check"} == set(
        qdp.torch.__all__
    )


@modules
def test_affine_map(module: Any, encoding: str, options: Any, device: str) -> None:
    if encoding == "basis":
        with pytest.raises(TypeError):
            module(N, affine=True)
        return
    x = samples(encoding, device).double()
    model = module(N, affine=True, device=device, dtype=torch.float64, **options)
    plain = qdp.torch.encode(x, N, encoding, **options)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    assert [tuple(p.shape) for p in model.parameters()] == [(x.shape[1],)] * 2
    with torch.no_grad():
        model.weight.uniform_(0.5, 1.5)
        model.bias.uniform_(-0.5, 0.5)
    moved = qdp.torch.encode(x * model.weight + model.bias, N, encoding, **options)
    torch.testing.assert_close(model(x), moved, rtol=0, atol=1e-13)

    def states(weight: Any, bias: Any) -> Any:
        return torch.func.functional_call(model, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(states, (model.weight, model.bias))
    model.reset_parameters()
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)


def test_affine_map_of_shorter_amplitudes() -> None:
    model = qdp.torch.AmplitudeEncoding(4, num_features=5, affine=True)
    assert model(torch.rand(2, 5)).shape == (2, 16)
    assert sum(p.numel() for p in model.parameters()) == 10


@modules
def test_copies(module: Any, encoding: str, options: Any) -> None:
    kwargs = {} if encoding == "basis" else {"affine": True}
    model = module(N, **kwargs, **options)
    x = samples(encoding, "cpu")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert repr(other) == repr(model)
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    other = module(N, **kwargs, **options)
    other.load_state_dict(model.state_dict())


def test_says_what_it_is() -> None:
    model = qdp.torch.ZZFeatureMap(4, reps=1, convention="pennylane", affine=True)
    assert repr(model) == "ZZFeatureMap(num_qubits=4, reps=1, convention='pennylane', affine=True)"
    assert repr(qdp.torch.AngleEncoding(2)) == "AngleEncoding(num_qubits=2)"
    assert repr(qdp.torch.AmplitudeEncoding(2)) == "AmplitudeEncoding(num_qubits=2)"
    shorter = qdp.torch.AmplitudeEncoding(2, num_features=3)
    assert repr(shorter) == "AmplitudeEncoding(num_qubits=2, num_features=3)"


def test_options_are_its_own() -> None:
    pairs = [(0, 1)]
    model = qdp.torch.ZZFeatureMap(3, entanglement=pairs)
    x = torch.rand(2, 3)
    before = model(x)
    pairs[0] = (1, 2)
    assert torch.equal(model(x), before)
    assert not torch.equal(qdp.torch.ZZFeatureMap(3, entanglement=pairs)(x), before)


def test_base_is_no_encoding() -> None:
    with pytest.raises(TypeError, match="Encoding names no encoding"):
        qdp.torch.Encoding(2, {})


def test_either_half_of_a_map(device: str) -> None:
    """What is None of it is left out."""
    x = torch.rand(2, 3, device=device)
    model = qdp.torch.AngleEncoding(3, affine=True, device=device)
    bias, weight = (torch.rand(3, device=device) for _ in range(2))
    model.weight, model.bias = None, torch.nn.Parameter(bias)
    torch.testing.assert_close(model(x), qdp.torch.encode(x, 3, "angle", bias=bias))
    assert "affine=True" in repr(model)
    model.reset_parameters()
    torch.testing.assert_close(model(x), qdp.torch.encode(x, 3, "angle"))
    model.weight, model.bias = torch.nn.Parameter(weight), None
    torch.testing.assert_close(model(x), qdp.torch.encode(x, 3, "angle", weight=weight))
    model.weight = None
    torch.testing.assert_close(model(x), qdp.torch.encode(x, 3, "angle"))


def test_maps_of_arrays_are_refused() -> None:
    x = np.ones((2, 2))
    with pytest.raises(qdp.DTypeError, match="x: expected a tensor"):
        qdp.torch.AngleEncoding(2, affine=True)(x)
    assert qdp.torch.AngleEncoding(2)(x).shape == (2, 4)


def test_refuses_when_made() -> None:
    with pytest.raises(qdp.InvalidArgumentError, match="num_qubits"):
        qdp.torch.AngleEncoding(0)
    with pytest.raises(qdp.InvalidArgumentError, match="rotation"):
        qdp.torch.AngleEncoding(2, rotation="w")  # type: ignore[arg-type]
    wrong: Any
    for wrong in ([(0, 2)], [(0, 1.5)], [(0, 1, 1)], [0, 1], 3, "none of them"):
        with pytest.raises(qdp.InvalidArgumentError, match="entanglement"):
            qdp.torch.ZZFeatureMap(2, entanglement=wrong)
    with pytest.raises(qdp.InvalidArgumentError, match="convention"):
        qdp.torch.PhaseEncoding(2, convention="none")  # type: ignore[arg-type]
    for count in (0, 5):
        with pytest.raises(qdp.FeatureCountError):
            qdp.torch.AmplitudeEncoding(2, num_features=count)


def test_trains_in_a_sequence(device: str) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 3),
        qdp.torch.ZZFeatureMap(3, affine=True),
    ).to(device)
    x = torch.rand(8, 5, device=device)
    loss = model(x).abs()[:, 0].square().mean()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "angle", "rotation": "x"},
        {"encoding": "amplitude"},
        {"encoding": "zz", "reps": 3, "entanglement": [(2, 0)], "convention": "pennylane"},
        {"encoding": "iqp-embedding", "entanglement": "circular"},
        {"encoding": "zz", "entanglement": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", [None, "complex128"])
def test_plans_pickle(options: Any, precision: Any, device: str) -> None:
    plan = qdp.Engine(device, precision=precision).plan(3, **options)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        other = pickle.loads(pickle.dumps(plan, protocol))
        assert repr(other) == repr(plan)
        x = torch.rand(2, 3, device=device)
        torch.testing.assert_close(other.torch(x), plan.torch(x), rtol=0, atol=0)
