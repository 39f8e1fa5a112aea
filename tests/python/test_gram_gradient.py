"""qdp.gram: gradients by the samples, and what torch may ask of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import qdp
from test_gram import cases, keywords, pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from cases import Case


@cases
@pytest.mark.parametrize("tile", [300, None])
def test_gradients(case: Case, tile: Any, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    import qdp.torch

    for n in (1, 2, 4):
        x, y = (torch.from_numpy(data[:4]).to(device).requires_grad_() for data in pair(case, n))
        options = keywords(case, n)
        if case.encoding == "basis":
            with pytest.raises(qdp.InvalidArgumentError, match="basis"):
                qdp.gram(x, y, tile=tile, **options)
            continue
        weight = torch.rand(4, 4, device=device, dtype=torch.float64)
        actual = torch.autograd.grad(qdp.gram(x, y, tile=tile, **options), (x, y), weight)
        alone = torch.autograd.grad(qdp.gram(x, tile=tile, **options), x, weight)

        def states(data: Any, n: int = n) -> Any:
            return qdp.torch.encode(data, n, case.encoding, **case.options(n))

        whole = (states(x) @ states(y).mH).abs() ** 2
        same = (states(x) @ states(x).mH).abs() ** 2
        want = torch.autograd.grad(whole, (x, y), weight)
        torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            alone, torch.autograd.grad(same, (x,), weight), rtol=1e-9, atol=1e-11
        )
        if n == 2:
            assert torch.autograd.gradcheck(
                lambda a, b, o=options: qdp.gram(a, b, tile=tile, **o), (x, y)
            )
        # By one of the two alone.
        (only,) = torch.autograd.grad(qdp.gram(x, y.detach(), tile=tile, **options), x, weight)
        torch.testing.assert_close(only, want[0], rtol=1e-9, atol=1e-11)
        (only,) = torch.autograd.grad(qdp.gram(x.detach(), y, tile=tile, **options), y, weight)
        torch.testing.assert_close(only, want[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile", [300, None])
@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_batched_gradients(encoding: str, tile: Any, device: str) -> None:
    """Many of one matrix, mapped over together, and of its gradient."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(5, 3, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.rand(4, 3, device=device, dtype=torch.float64, requires_grad=True)

    def gram(*samples: Any) -> Any:
        return qdp.gram(*samples, encoding=encoding, tile=tile)

    def one_by_one(result: Any, of: Any, weights: Any) -> Any:
        every = (torch.autograd.grad(result, of, w, retain_graph=True) for w in weights)
        return tuple(map(torch.stack, zip(*every, strict=True)))

    for samples in ((x,), (x, y)):
        matrix = gram(*samples)
        weights = torch.rand(2, *matrix.shape, device=device, dtype=torch.float64)
        want = one_by_one(matrix, samples, weights)
        for again in (False, True):
            found = torch.autograd.grad(
                matrix,
                samples,
                weights,
                is_grads_batched=True,
                retain_graph=True,
                create_graph=again,
            )
            torch.testing.assert_close(found, want)
        weights = torch.rand(2, *found[0].shape, device=device, dtype=torch.float64)
        want = one_by_one(found[0], x, weights)
        second = torch.autograd.grad(found[0], x, weights, is_grads_batched=True)
        torch.testing.assert_close(second, want)
    samples = (x[:2].detach(), y[:2].detach())
    for derivative, f in (
        (torch.autograd.functional.jacobian, gram),
        (torch.autograd.functional.hessian, lambda *samples: gram(*samples).square().sum()),
    ):
        found = derivative(f, samples, vectorize=True)
        torch.testing.assert_close(found, derivative(f, samples))
    assert torch.autograd.gradcheck(gram, (x,), check_batched_grad=True)


@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_gradients_of_batched_gradients(encoding: str, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    many = torch.rand(4, 3, 3, dtype=torch.float64, device=device)

    def derivatives(*, batched: bool) -> list[Any]:
        result = qdp.gram(x, encoding=encoding)

        def gradient(weights: Any) -> Any:
            options = {"create_graph": True, "is_grads_batched": batched}
            return torch.autograd.grad(result, x, weights, **options)[0]

        first = gradient(many) if batched else torch.stack([gradient(w) for w in many])
        return [first, *torch.autograd.grad(first.square().sum(), x)]

    torch.testing.assert_close(derivatives(batched=True), derivatives(batched=False))


def test_hooks_on_saved_tensors(device: str) -> None:
    """They change no second derivative."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 2, device=device, dtype=torch.float64, requires_grad=True)

    def second() -> Any:
        matrix = qdp.gram(x, encoding="zz")
        (first,) = torch.autograd.grad(matrix.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    want = second()
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(second(), want)


@pytest.mark.parametrize("encoding", ["amplitude", "angle", "zz"])
def test_second_derivatives(encoding: str, device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(3, 2, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.rand(2, 2, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a: qdp.gram(a, encoding=encoding), (x,))
    assert torch.autograd.gradgradcheck(lambda a, b: qdp.gram(a, b, encoding=encoding), (x, y))
    assert torch.autograd.gradgradcheck(lambda b: qdp.gram(x.detach(), b, encoding=encoding), (y,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_transforms_are_refused(device: str) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    x = torch.rand(4, 3, device=device)

    def total(x: Any, y: Any = None) -> Any:
        return qdp.gram(x, y, encoding="angle").sum()

    transforms: list[Callable[[], Any]] = [
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.grad(lambda y: total(x, y))(x),
        lambda: torch.func.vmap(total)(x[None]),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.hessian(total)(x),
    ]
    for transformed in transforms:
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            transformed()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            total(dual)
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            next(qdp.gram_blocks(dual, encoding="angle"))
        # What is not differentiated is nobody else's matter.
        torch.testing.assert_close(total(x), total(x.clone()))
    # Nor do they go through its gradient.
    leaf = x.clone().requires_grad_()
    matrix = qdp.gram(leaf, encoding="angle")
    ones = torch.ones_like(matrix)
    (first,) = torch.autograd.grad(matrix, leaf, ones, create_graph=True)
    for result in (matrix, first):

        def pulled(cotangent: Any, result: Any = result) -> Any:
            return torch.autograd.grad(result, leaf, cotangent, retain_graph=True)[0]

        weight = torch.ones_like(result)
        with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
            torch.func.vmap(pulled)(weight[None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(weight, weight)
            with pytest.raises(RuntimeError, match=r"qdp.gram has gradients by torch\.autograd"):
                pulled(dual)
            batched = torch.autograd.grad(
                result, leaf, weight[None], is_grads_batched=True, retain_graph=True
            )
            torch.testing.assert_close(batched[0][0], pulled(weight))
