"""Alignment terms against their formulas, the Stein derivation of the conditional one, and diagnostics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from findrec.models.findrec.alignment import DIAGNOSTICS, alignment_terms, diagnose_alignment
from findrec.models.findrec.config import AlignConfig
from findrec.models.findrec.items import Rows
from findrec.ops.stein.stein_scores import gaussian_score
from findrec.tables.initial_rows import TABLE_STD

DIM, NUM = 6, 40
KINDS = ["conditional", "marginal", "mmd"]


def make_case(num: int = NUM) -> tuple[Rows, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Rows, latents, presence, and the indices of the items that can be aligned."""
    torch.manual_seed(0)
    scale = TABLE_STD * DIM**-0.5
    memory_Ud = (scale * torch.randn(num, DIM) + 0.3 * scale).requires_grad_()
    latent_Ud = (2 * scale * torch.randn(num, DIM)).requires_grad_()
    known_U, present_U = torch.rand(num) < 0.8, torch.rand(num) < 0.8
    rows = Rows(torch.randn(num, DIM) * known_U[:, None], {"text": memory_Ud})
    return rows, {"text": latent_Ud}, {"text": present_U}, (known_U & present_U).nonzero().squeeze(1)


def pooled_bandwidth2(Z: Tensor, A: Tensor) -> Tensor:
    """Half the median squared distance within both samples together."""
    return torch.nn.functional.pdist(torch.cat([Z, A])).square().median() / 2


def plain_conditional(Z: Tensor, A: Tensor) -> Tensor:
    return sum((z - a).square().sum() for z, a in zip(Z, A, strict=True)) / TABLE_STD**2 / len(Z)


def plain_marginal(Z: Tensor, A: Tensor) -> Tensor:
    """The unbiased Stein discrepancy, pair by pair."""
    unit = DIM**0.5 / TABLE_STD
    Z, A = Z * unit, A * unit
    S, h2 = gaussian_score(Z, A), pooled_bandwidth2(Z, A)
    total, n = torch.zeros((), dtype=Z.dtype), len(Z)
    for i in range(n):
        for j in range(n):
            difference = Z[i] - Z[j]
            r2 = difference @ difference
            trace = DIM / h2 - r2 / h2**2
            u = S[i] @ S[j] + difference @ (S[i] - S[j]) / h2 + trace
            total = total + (i != j) * u * torch.exp(-r2 / (2 * h2))
    return total / (n * (n - 1)) * A.var(0, correction=0).mean() / DIM


def plain_mmd(Z: Tensor, A: Tensor) -> Tensor:
    h2, n = pooled_bandwidth2(Z, A), len(Z)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-(x[:, None] - y[None]).square().sum(2) / (2 * h2))

    within = (kernel(Z, Z).sum() - n) / (n * (n - 1)) + (kernel(A, A).sum() - n) / (n * (n - 1))
    return within - 2 * kernel(Z, A).mean()


@pytest.mark.parametrize(
    ("kind", "plain"),
    [("conditional", plain_conditional), ("marginal", plain_marginal), ("mmd", plain_mmd)],
)
def test_each_term_is_that_of_the_formula(kind: str, plain: Any) -> None:
    rows, latents, present, use_n = make_case()
    assert 10 < len(use_n) < NUM
    config = AlignConfig.model_validate({"kind": kind, "weight": 0.3})
    term = alignment_terms(rows, latents, present, config)["align_text"]
    want = plain(rows.memory_nd["text"][use_n].detach().double(), latents["text"][use_n].detach().double())
    assert term.reported.item() == pytest.approx(want.item(), rel=1e-3, abs=1e-6)
    assert term.value.item() == pytest.approx(0.3 * want.item(), rel=1e-3, abs=1e-6)
    assert not term.reported.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_memories_of_known_items_with_content_only(kind: str) -> None:
    rows, latents, present, use_n = make_case()
    config = AlignConfig.model_validate({"kind": kind})
    alignment_terms(rows, latents, present, config)["align_text"].value.backward()
    assert latents["text"].grad is None
    gradient = rows.memory_nd["text"].grad
    assert gradient is not None
    assert torch.equal((gradient.abs().sum(1) > 0).nonzero().squeeze(1), use_n)
    if kind == "conditional":  # each memory is drawn straight to the latent of its own item
        residual_nd = (rows.memory_nd["text"] - latents["text"]).detach()[use_n]
        torch.testing.assert_close(gradient[use_n], 2 * residual_nd / TABLE_STD**2 / len(use_n))


def test_none_has_no_term() -> None:
    rows, latents, present, _ = make_case()
    assert alignment_terms(rows, latents, present, AlignConfig(kind="none")) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_only_pairwise_kinds_take_a_sample_of_the_items(kind: str) -> None:
    rows, latents, present, use_n = make_case()
    config = AlignConfig.model_validate({"kind": kind, "rows": 8})
    alignment_terms(rows, latents, present, config)["align_text"].value.backward()
    gradient = rows.memory_nd["text"].grad
    assert gradient is not None
    reached = int((gradient.abs().sum(1) > 0).sum())
    assert reached == (len(use_n) if kind == "conditional" else 8)


@pytest.mark.parametrize("width2", [0.5, 3.0])
@pytest.mark.parametrize("h2", [0.7, 2.0])
def test_the_conditional_term_is_a_stein_discrepancy_of_pairs_up_to_a_constant(
    width2: float, h2: float
) -> None:
    """The V-statistic of the kernel 1[i = j] k(r_i, r_j), its derivatives by autograd.

    The score of N(0, s^2 I) at r is -r / s^2, and s^2 = `width2`.
    """
    torch.manual_seed(0)
    n = 7
    memory_nd, latent_nd = torch.randn(2, n, DIM, dtype=torch.float64)
    residual_nd = memory_nd - latent_nd

    def stein_kernel(i: int, j: int) -> Tensor:
        x, y = residual_nd[i].clone().requires_grad_(), residual_nd[j].clone().requires_grad_()
        k = float(i == j) * torch.exp(-(x - y).square().sum() / (2 * h2))
        by_x, by_y = torch.autograd.grad(k, (x, y), create_graph=True)
        trace = sum(torch.autograd.grad(by_x[a], y, retain_graph=True)[0][a] for a in range(DIM))
        score_x, score_y = -x / width2, -y / width2
        return (k * score_x @ score_y + score_x @ by_y + score_y @ by_x + trace).detach()

    statistic = sum(stein_kernel(i, j) for i in range(n) for j in range(n)) / n**2
    constant = DIM / h2 / n
    formula = residual_nd.square().sum() / width2**2 / n**2
    torch.testing.assert_close(statistic, formula + constant)
    # The model's term is that formula times a constant, so both have the same minimum.
    rows = Rows(torch.ones(n, DIM), {"text": memory_nd})
    terms = alignment_terms(rows, {"text": latent_nd}, {"text": rows.known_n}, AlignConfig())
    torch.testing.assert_close(terms["align_text"].reported, formula * n * width2**2 / TABLE_STD**2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [0, 1])
def test_terms_of_no_and_of_one_item_are_finite(kind: str, num: int) -> None:
    rows, latents, _, _ = make_case()
    present_U = torch.zeros(NUM, dtype=torch.bool)
    present_U[rows.known_n.nonzero()[:num, 0]] = True
    config = AlignConfig.model_validate({"kind": kind})
    term = alignment_terms(rows, latents, {"text": present_U}, config)["align_text"]
    term.value.backward()
    assert rows.memory_nd["text"].grad.isfinite().all()
    if num == 1 and kind == "conditional":  # there is an item to align
        assert term.reported > 0
    else:
        assert term.reported == 0
    diagnostics = diagnose_alignment(rows, latents, {"text": present_U}, config)
    assert all(value == 0 for value in diagnostics.values())


def diagnosed(memory_Ud: Tensor, latent_Ud: Tensor) -> dict[str, float]:
    rows = Rows(torch.ones_like(memory_Ud), {"text": memory_Ud})
    values = diagnose_alignment(rows, {"text": latent_Ud}, {"text": rows.known_n}, AlignConfig(rows=300))
    assert set(values) == {f"{name}_text" for name in DIAGNOSTICS}
    return {name.removesuffix("_text"): float(value) for name, value in values.items()}


def test_diagnostics_tell_aligned_memories_from_others() -> None:
    torch.manual_seed(0)
    latent_Ud = 0.1 * torch.randn(300, DIM) + 0.5
    aligned = diagnosed(latent_Ud.clone(), latent_Ud)
    assert aligned["latent_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert abs(aligned["ksd"]) < 0.02
    # The cloud is right and each item has the memory of another: only the cosine notices.
    exchanged = diagnosed(latent_Ud.roll(1, 0), latent_Ud)
    assert abs(exchanged["latent_cosine"]) < 0.2
    assert exchanged["ksd"] == pytest.approx(aligned["ksd"], abs=0.02)
    random = diagnosed(0.5 * torch.randn(300, DIM), latent_Ud)
    assert abs(random["latent_cosine"]) < 0.5
    assert random["ksd"] > 0.2


@pytest.mark.parametrize(
    ("latent_Ud", "std", "rank"),
    [
        (torch.zeros(200, DIM) + 3.0, (0.0, 1e-5), (0.0, DIM)),  # a point
        (torch.linspace(-2, 2, 200)[:, None] * torch.ones(DIM), (1.0, 1.3), (1.0, 1.01)),  # a line
        (torch.randn(200, DIM, generator=torch.Generator().manual_seed(0)), (0.9, 1.1), (DIM - 1, DIM)),
    ],
)
def test_diagnostics_tell_collapse_from_health(
    latent_Ud: Tensor, std: tuple[float, float], rank: tuple[float, float]
) -> None:
    values = diagnosed(torch.randn_like(latent_Ud), latent_Ud)
    assert std[0] <= values["latent_std"] <= std[1]
    assert rank[0] <= values["latent_rank"] <= rank[1]
