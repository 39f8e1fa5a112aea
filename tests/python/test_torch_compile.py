"""qdp.torch.encode where torch traces, compiles, transforms or watches it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import qdp
import reference
from cases import CASES, Case

torch = pytest.importorskip("torch", exc_type=ImportError)
import qdp.torch  # noqa: E402
from devices import DEVICE  # noqa: E402

# The compiler's own code warns of what torch itself has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
N = 4
EACH = tuple({case.encoding: case for case in reversed(CASES)}.values())
SMOOTH = [case for case in EACH if case.encoding != "basis"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


def arguments(case: Case, n: int) -> tuple[Any, dict[str, Any]]:
    """Samples, and the operator's keywords."""
    options = case.options(n)
    entanglement = options.pop("entanglement", None)
    if isinstance(entanglement, str):
        options["entanglement"] = entanglement
    elif entanglement is not None:
        options["pairs"] = [qubit for pair in entanglement for qubit in pair]
    return torch.from_numpy(case.samples(n)), {
        "num_qubits": n,
        "encoding": case.encoding,
        **options,
    }


def loss(states: Any) -> Any:
    """A number that every amplitude and its phase count in."""
    weight = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=torch.float32)
    return (states.real * weight).sum() + (states.imag * weight.flip(0)).sin().sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, device: str) -> None:
    x, options = arguments(case, N)
    x = x.to(device)
    inputs = [x, x.to(torch.complex64 if x.is_complex() else torch.float32), x[0], x[::2]]
    if case.encoding != "basis":
        inputs.append(x.clone().requires_grad_())
    for given in inputs:
        torch.library.opcheck(torch.ops.qdp.encode.default, (given,), options)
    if case.encoding != "basis":
        states = torch.ops.qdp.encode(x, **options)
        for given in (x, x.clone().requires_grad_()):
            torch.library.opcheck(torch.ops.qdp.encode_backward.default, (states, given), options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_whole(case: Case, device: str) -> None:
    """Forward and backward in one graph each, at batch sizes that were not compiled for."""
    options = case.options(N)

    def model(x: Any) -> Any:
        return loss(qdp.torch.encode(x * 1.0, N, case.encoding, **options))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 3, 1):
        x = torch.from_numpy(case.samples(N, batch=batch)).to(device)
        torch.testing.assert_close(compiled(x), model(x))
        if case.encoding == "basis":
            continue
        x.requires_grad_()
        (actual,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad(model(x), x)
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for the CPU with g++")
def test_compiled_code() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(6, N), qdp.torch.ZZFeatureMap(N, reps=1, affine=True)
    )
    compiled = torch.compile(model, fullgraph=True)
    x = torch.rand(5, 6)
    loss(compiled(x)).backward()
    actual = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss(model(x)).backward()
    for gradient, parameter in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_on_gpu(mode: str) -> None:
    """Also as CUDA graphs of torch's making."""
    model = torch.nn.Sequential(torch.nn.Linear(6, N), qdp.torch.AngleEncoding(N, affine=True))
    model.to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(5):
        x = torch.rand(5, 6, device=DEVICE)
        model.zero_grad()
        loss(compiled(x)).backward()
        actual = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        loss(model(x)).backward()
        for gradient, parameter in zip(actual, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_compiles_with_out(device: str) -> None:
    out = torch.zeros(3, 2**N, dtype=torch.complex64, device=device)
    x = torch.rand(3, N, device=device)

    def fill(x: Any, out: Any) -> Any:
        return qdp.torch.encode(x, N, "angle", out=out) * 2

    result = torch.compile(fill, fullgraph=True, backend="aot_eager")(x, out)
    torch.testing.assert_close(out, qdp.torch.encode(x, N, "angle"))
    torch.testing.assert_close(result, 2 * out)


def test_wrong_arguments_when_compiled(device: str) -> None:
    x = torch.rand(3, N + 1, device=device)
    compiled = torch.compile(
        lambda x: qdp.torch.encode(x, N, "angle") * 2, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(qdp.FeatureCountError):
        compiled(x)


def test_exports(device: str) -> None:
    x = torch.rand(3, N, device=device)
    model = qdp.torch.AngleEncoding(N, affine=True, device=device)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert torch.ops.qdp.encode.default in {node.target for node in program.graph.nodes}
    for given in (x, torch.rand(7, N, device=device)):
        torch.testing.assert_close(program.module()(given), model(given))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traces(mode: Any, device: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x: Any) -> Any:
        return qdp.torch.encode(x, N, "zz", entanglement=[(0, 1), (3, 2)]).abs()

    graph = make_fx(f, tracing_mode=mode)(torch.rand(2, N, device=device))
    x = torch.rand(2, N, device=device)
    torch.testing.assert_close(graph(x), f(x))


def test_fake_and_meta_tensors(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for shape, dtype, result in (
            ((3, N), torch.float64, torch.complex128),
            ((N,), torch.bfloat16, torch.complex64),
        ):
            states = qdp.torch.encode(torch.empty(shape, dtype=dtype, device=device), N, "angle")
            assert states.device == torch.device(device)
            assert (tuple(states.shape), states.dtype) == (
                (shape[0] if len(shape) == 2 else 1, 2**N),
                result,
            )
    assert qdp.torch.encode(torch.empty(3, N, device="meta"), N, "angle").shape == (3, 2**N)


def test_dispatch_modes_see_it(device: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        seen: list[Any]

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(f)
            return f(*args, **(kwargs or {}))

    x = torch.rand(2, N, device=device)
    with Watch() as watch:  # type: ignore[no-untyped-call]
        watch.seen = []
        states = qdp.torch.encode(x, N, "angle")
    assert watch.seen == [torch.ops.qdp.encode.default]
    torch.testing.assert_close(states, qdp.torch.encode(x, N, "angle"), rtol=0, atol=0)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_vmap(case: Case, device: str) -> None:
    x = torch.from_numpy(case.samples(N, batch=6)).to(device)

    def encode(x: Any) -> Any:
        return qdp.torch.encode(x, N, case.encoding)

    expected = encode(x)
    one_by_one = torch.func.vmap(encode)(x)
    torch.testing.assert_close(one_by_one, expected[:, None], rtol=0, atol=0)
    batches = torch.func.vmap(encode)(x.reshape(2, 3, -1))
    torch.testing.assert_close(batches, expected.reshape(2, 3, -1), rtol=0, atol=0)
    columns = torch.func.vmap(encode, in_dims=1, out_dims=2)(x.reshape(3, 2, -1))
    for k in range(2):
        torch.testing.assert_close(
            columns[..., k], encode(x.reshape(3, 2, -1)[:, k]), rtol=0, atol=0
        )
    nested = torch.func.vmap(torch.func.vmap(encode))(x.reshape(2, 3, -1))
    torch.testing.assert_close(nested, expected.reshape(2, 3, 1, -1), rtol=0, atol=0)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_function_transforms(case: Case, device: str) -> None:
    """Gradients of each sample, Jacobians and Hessians, as torch.func composes them."""
    x = torch.from_numpy(case.samples(2, batch=3)).to(device)

    def f(sample: Any) -> Any:
        return loss(qdp.torch.encode(sample, 2, case.encoding))

    each = torch.func.vmap(torch.func.grad(f))(x)
    recorded = x.clone().requires_grad_()
    (together,) = torch.autograd.grad(sum(f(row) for row in recorded), recorded)
    torch.testing.assert_close(each, together)
    jacobian = torch.func.jacrev(lambda s: qdp.torch.encode(s, 2, case.encoding).real)(x[0])
    forward = torch.func.jacfwd(lambda s: qdp.torch.encode(s, 2, case.encoding).real)(x[0])
    torch.testing.assert_close(jacobian, forward)
    hessian = torch.func.hessian(f)(x[0])
    reverse = torch.func.jacrev(torch.func.jacrev(f))(x[0])
    torch.testing.assert_close(hessian, reverse)
    torch.testing.assert_close(hessian, hessian.T)


def test_functionalized_views(device: str) -> None:
    x = torch.rand(5, N, device=device)

    def f(x: Any) -> Any:
        y = x.clone()
        y[0] += 1
        return qdp.torch.encode(y[1:], N, "angle").abs()

    torch.testing.assert_close(torch.func.functionalize(f)(x), f(x))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(narrow: Any, device: str) -> None:
    """It narrows what a layer gives, and never the states."""
    layer = torch.nn.Linear(N, N, device=device)
    encoding = qdp.torch.AngleEncoding(N)
    x = torch.rand(3, N, device=device)
    with torch.autocast(torch.device(device).type, dtype=narrow):
        hidden = layer(x)
        assert hidden.dtype == narrow
        states = encoding(hidden)
        assert states.dtype == torch.complex64
        assert encoding(x.double()).dtype == torch.complex128
        loss(states).backward()
    reference.assert_states(
        states.detach().cpu().numpy(), hidden.detach().double().cpu().numpy(), N, "angle"
    )
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_checkpoints(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.rand(3, N, device=device, requires_grad=True)

    def f(x: Any) -> Any:
        return loss(qdp.torch.encode(x, N, "iqp-embedding"))

    (actual,) = torch.autograd.grad(checkpoint(f, x, use_reentrant=False), x)
    (expected,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_threads(device: str) -> None:
    """As DataParallel runs its replicas: forwards and backwards from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    def run(seed: int) -> Any:
        x = torch.full((64, N), seed / 10, device=device, requires_grad=True)
        for _ in range(20):
            (gradient,) = torch.autograd.grad(loss(qdp.torch.encode(x, N, "zz")), x)
        return gradient

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(8)))
    for seed, gradient in enumerate(together):
        torch.testing.assert_close(gradient, run(seed), rtol=0, atol=0)


@pytest.mark.parametrize("before", ["import qdp.torch", "import torch._dynamo, qdp.torch"])
def test_compiler_is_imported_by_whoever_compiles(before: str) -> None:
    program = f"""
import sys
{before}
import torch
print("torch._dynamo" in sys.modules)
x = torch.rand(2, 3)
f = lambda x: qdp.torch.encode(x, 3, "phase") * 2
y = torch.compile(f, fullgraph=True, backend="eager")(x)
assert torch.equal(y, f(x))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str("_dynamo" in before)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_training_step_in_a_cuda_graph(case: Case) -> None:
    """Forward, backward and optimizer captured together; replays follow the eager steps."""
    torch.manual_seed(2)
    n = 6
    x = torch.from_numpy(case.samples(n, batch=16)).float().to(DEVICE)
    target = torch.rand(16, device=DEVICE)

    def make() -> Any:
        torch.manual_seed(3)
        encodings = {
            "amplitude": qdp.torch.AmplitudeEncoding,
            "angle": qdp.torch.AngleEncoding,
            "phase": qdp.torch.PhaseEncoding,
            "iqp": qdp.torch.IQPEncoding,
            "iqp-z": qdp.torch.IQPZEncoding,
            "zz": qdp.torch.ZZFeatureMap,
            "iqp-embedding": qdp.torch.IQPEmbedding,
        }
        encoding = encodings[case.encoding](n, affine=True, device=DEVICE)
        head = torch.nn.Linear(2**n, 1, device=DEVICE)
        parameters = [*encoding.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2, capturable=True)

        def step() -> Any:
            optimizer.zero_grad(set_to_none=False)
            error = (head(encoding(x).abs().square())[:, 0] - target).square().mean()
            error.backward()
            optimizer.step()
            return error

        return step, parameters

    eager, expected = make()
    step, parameters = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    for _ in range(5):
        graph.replay()
    for _ in range(3 + 5):
        error = eager()
    torch.testing.assert_close(static, error, rtol=1e-3, atol=1e-5)
    for a, b in zip(parameters, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    qdp.torch.check()


@pytest.mark.gpu
def test_every_device() -> None:
    """Samples say where the work is done, whatever the current device is."""
    for k in range(torch.cuda.device_count()):
        x = torch.rand(3, N, device=f"cuda:{k}", dtype=torch.float64, requires_grad=True)
        states = qdp.torch.encode(x, N, "iqp-embedding")
        assert states.device == x.device
        (gradient,) = torch.autograd.grad(loss(states), x)
        host = x.detach().cpu().requires_grad_()
        (expected,) = torch.autograd.grad(loss(qdp.torch.encode(host, N, "iqp-embedding")), host)
        np.testing.assert_allclose(gradient.cpu(), expected, rtol=0, atol=1e-5)
