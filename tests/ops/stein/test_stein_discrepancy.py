"""The Stein discrepancy against its definition by automatic differentiation, and what it is used for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bench.memory import peak_bytes
from bench.stein import make_run
from torch import Tensor

from findrec.ops.stein import _pair_sums
from findrec.ops.stein.stein_discrepancy import mmd, stein_discrepancy
from findrec.ops.stein.stein_scores import gaussian_score, kde_score

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"gaussian": gaussian_score, "kde": kde_score}


def kernel_value(kernel: str, x: Tensor, y: Tensor, h2: float) -> Tensor:
    r2 = (x - y).square().sum()
    return torch.exp(-r2 / (2 * h2)) if kernel == "rbf" else (1 + r2 / h2).rsqrt()


def langevin_stein(kernel: str, x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, h2: float) -> Tensor:
    """u(x, y) with every derivative of the kernel taken by autograd."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    k = kernel_value(kernel, x, y, h2)
    kx, ky = torch.autograd.grad(k, (x, y), create_graph=True)
    trace = sum(torch.autograd.grad(kx[i], y, retain_graph=True)[0][i] for i in range(len(x)))
    return (k * (sx @ sy) + sx @ ky + sy @ kx + trace).detach()


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("score", ["gaussian", "kde"])
def test_equals_the_definition(kernel: str, score: str, impl: str) -> None:
    torch.manual_seed(0)
    Z, A = torch.randn(7, 5).double() * 1.3 + 0.2, torch.randn(11, 5).double()
    S, h2 = SCORES[score](Z, A), 2.7
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    total = sum(langevin_stein(kernel, Z[i], Z[j], S[i], S[j], h2) for i, j in pairs)
    expected = total / len(pairs) * A.var(0, correction=0).mean() / 5
    options = {"score": score, "kernel": kernel, "bandwidth2": h2, "impl": impl}
    assert stein_discrepancy(Z, A, **options).item() == pytest.approx(float(expected), rel=1e-10)  # type: ignore[arg-type]


MEASURES: dict[str, Callable[..., Tensor]] = {
    **{
        f"{score} {kernel}": partial(stein_discrepancy, score=score, kernel=kernel)  # type: ignore[arg-type]
        for score in SCORES
        for kernel in ("rbf", "imq")
    },
    "mmd": mmd,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 1), (3, 2, 5), (2, 9, 4), (17, 30, 3), (1100, 257, 8)], ids=str)
def test_implementations_agree(
    shape: tuple[int, int, int], dtype: torch.dtype, measure: Callable[..., Tensor]
) -> None:
    """Value and gradient, against the reference in float64; the largest shape is no multiple of a tile."""
    torch.manual_seed(0)
    n, m, width = shape
    Z, A = (1.3 * torch.randn(n, width) + 5).to(dtype), (torch.randn(m, width) + 5).to(dtype)
    exact = Z.double().requires_grad_()
    expected = measure(exact, A.double(), impl="reference")
    (expected_grad,) = torch.autograd.grad(expected, exact)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for impl in ("reference", "tiled"):
        own = Z.clone().requires_grad_()
        result = measure(own, A, impl=impl)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
        (grad,) = torch.autograd.grad(result, own)
        tolerated = max(tolerance, torch.finfo(dtype).eps) * float(expected_grad.abs().max())
        assert (grad.double() - expected_grad).abs().max() <= tolerated


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_gradient_is_that_of_finite_differences(
    measure: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pair_sums, "TILE_ELEMENTS", 21)  # three rows of seven
    torch.manual_seed(0)
    Z, A = torch.randn(7, 3).double().requires_grad_(), torch.randn(5, 3).double()
    assert torch.autograd.gradcheck(lambda Z: measure(Z, A, bandwidth2=2.0), Z)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_autocast_changes_nothing(measure: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    Z, A = torch.randn(40, 6), torch.randn(30, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure(Z, A)
    assert torch.equal(cast, measure(Z, A))


@pytest.mark.slow
def test_memory_of_the_tiled_pass_is_far_below_one_matrix_of_pairs() -> None:
    n = 6144
    assert peak_bytes(make_run, "tiled", (n, 64)) < 4 * n * n


@pytest.mark.parametrize("score", ["gaussian", "kde"])
def test_scores_are_gradients_of_their_log_densities(score: str) -> None:
    torch.manual_seed(0)
    Z, A = torch.randn(4, 3).double().requires_grad_(), torch.randn(50, 3).double() * 2
    if score == "kde":
        c = (4 / (5 * 50)) ** (2 / 7)
        centre = A.mean(0) + (1 - c) ** 0.5 * (A - A.mean(0))
        variance = c * A.var(0, correction=0).mean()
        mixture = centre.var(0, correction=0).mean() + variance
        assert mixture.item() == pytest.approx(A.var(0, correction=0).mean().item())  # as wide as A
        logp = torch.logsumexp(-(Z[:, None] - centre).square().sum(2) / (2 * variance), dim=1).sum()
        (expected,) = torch.autograd.grad(logp, Z)
        assert torch.allclose(kde_score(Z, A), expected)
    else:
        # With many rows the shrinkage vanishes and the score is that of the empirical normal law.
        A = torch.randn(200_000, 3).double() @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.5]]).double()
        law = torch.distributions.MultivariateNormal(A.mean(0), A.t().cov(correction=0))
        (expected,) = torch.autograd.grad(law.log_prob(Z).sum(), Z)
        assert torch.allclose(gaussian_score(Z, A), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("score", ["gaussian", "kde"])
def test_least_near_the_reference(score: str, kernel: str) -> None:
    torch.manual_seed(0)
    width = 16
    A, Z = torch.randn(512, width) * 3 + 1, torch.randn(512, width) * 3 + 1
    options = {"score": score, "kernel": kernel}
    equal = stein_discrepancy(Z, A, **options).item()  # type: ignore[arg-type]
    assert abs(equal) < 0.01
    moved = {
        "shifted": Z + 2.0,
        "collapsed": (Z - 1) * 0.3 + 1,
        "spread out": (Z - 1) * 2 + 1,
        "one point": torch.ones_like(Z) + 0.01 * torch.randn_like(Z),
        "on a line": Z[:, :1].expand_as(Z),
    }
    for name, other in moved.items():
        worse = stein_discrepancy(other, A, **options).item()  # type: ignore[arg-type]
        assert worse > 0.01 + 3 * abs(equal), name


def test_mmd_tells_samples_apart_and_is_unbiased() -> None:
    torch.manual_seed(0)
    A = torch.randn(400, 8)
    equal = [mmd(torch.randn(100, 8), A, bandwidth2=8.0).item() for _ in range(50)]
    spread = torch.tensor(equal).std().item()
    assert abs(sum(equal) / 50) < 4 * spread / 50**0.5 + 2e-3
    assert min(equal) < 0
    assert mmd(torch.randn(400, 8) + 1, A).item() > 0.05
    assert mmd(torch.randn(400, 8) * 0.3, A).item() > 0.05
    explicit = torch.exp(-torch.cdist(A[:5], A[7:10]).square() / 16).mean()
    Z, R = A[:5], A[7:10]
    within = [torch.exp(-torch.cdist(X, X).square() / 16) for X in (Z, R)]
    means = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in within]
    assert mmd(Z, R, bandwidth2=8.0).item() == pytest.approx((sum(means) - 2 * explicit).item(), abs=1e-6)


@pytest.mark.parametrize("measure", [stein_discrepancy, mmd])
def test_units_and_gradient(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    Z, A = (torch.randn(64, 6) + 0.5).requires_grad_(), torch.randn(64, 6).requires_grad_()
    value = measure(Z, A)
    assert measure(100 * Z, 100 * A).item() == pytest.approx(value.item(), rel=1e-3)
    value.backward()  # type: ignore[no-untyped-call]
    assert A.grad is None
    assert Z.grad is not None
    assert (Z.grad.mean(0) > 0).all()  # going downhill moves the sample back


def test_too_few_rows_and_degenerate_references() -> None:
    Z = torch.randn(1, 4, requires_grad=True)
    for value in (stein_discrepancy(Z, torch.randn(9, 4)), mmd(Z, torch.randn(9, 4))):
        assert value.item() == 0.0
        value.backward()  # type: ignore[no-untyped-call]
    assert stein_discrepancy(torch.randn(0, 4), torch.randn(9, 4)).item() == 0.0
    assert stein_discrepancy(torch.randn(5, 4), torch.ones(9, 4)).isfinite()
    assert stein_discrepancy(torch.ones(5, 4), torch.randn(9, 4)).isfinite()
    with pytest.raises(ValueError, match="one width"):
        mmd(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="unknown"):
        stein_discrepancy(torch.randn(3, 4), torch.randn(3, 4), score="free")  # type: ignore[arg-type]
    for name in ("kernel", "impl"):
        with pytest.raises(ValueError, match="'other' is unknown"):
            stein_discrepancy(torch.randn(3, 4), torch.randn(3, 4), **{name: "other"})  # type: ignore[arg-type]
