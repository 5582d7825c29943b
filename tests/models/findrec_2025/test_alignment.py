"""Alignment terms do what each is for, and the diagnostics see what they are to see."""

import pytest
import torch

from findrec.datasets.folder.features import ModalRows
from findrec.models.findrec_2025.alignment import DIAGNOSTICS, Alignment, diagnose_alignment, prior_term
from findrec.models.findrec_2025.config import AlignConfig
from findrec.models.findrec_2025.latents import ModalEncoder


def latents_of(mean, std=0.5):
    """Latents with the given means, as an encoder would return them for items that all have the modality."""
    encoder = ModalEncoder(4, mean.shape[1], dropout=0.0)
    rows = ModalRows(torch.zeros(len(mean), 4), torch.ones(len(mean), dtype=torch.bool))
    latent = encoder(rows)
    noise = std * torch.randn_like(mean)
    return type(latent)(mean + noise, mean, torch.full_like(mean, std).log() * 2, latent.present_n)


def test_alignment_pulls_latents_to_the_id_vectors():
    """A few steps on the Stein term alone bring shifted latents to the reference's mean and spread."""
    torch.manual_seed(0)
    encoder = ModalEncoder(9, 8, dropout=0.0)
    with torch.no_grad():
        encoder.mean.bias += 2.0
    rows = ModalRows(torch.randn(200, 9), torch.ones(200, dtype=torch.bool))
    table = torch.randn(200, 8) * 0.02 + 5.0  # units and place of the rows must not matter
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    alignment = Alignment(AlignConfig(rows=100), ["text"], 8)
    values = []
    for _ in range(60):
        term = alignment({"text": encoder(rows)}, table)["stein_text"]
        values.append(term.reported.item())
        optimizer.zero_grad()
        term.value.backward()
        optimizer.step()
    assert values[-1] < 0.1 * values[0]
    z = encoder(rows).z_Ud
    assert z.mean(0).abs().mean() < 0.3
    assert 0.6 < z.std(0).mean() < 1.4


def test_prior_is_zero_at_the_prior_and_free_below_its_bits():
    torch.manual_seed(0)
    encoder = ModalEncoder(5, 4, dropout=0.0)
    for layer in (encoder.mean, encoder.logvar):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    rows = ModalRows(torch.randn(10, 5), torch.ones(10, dtype=torch.bool))
    term = prior_term(encoder(rows), AlignConfig(free_bits=0.05, kl_weight=2.0))
    assert term.reported.item() == pytest.approx(0.0, abs=1e-6)
    assert term.value.item() == pytest.approx(0.1)


def fit(config, num_steps=150):
    """Train free latents of 120 items on one term alone; returns them and the (fixed) ID rows."""
    torch.manual_seed(0)
    ids = torch.randn(120, 8)
    z = torch.nn.Parameter(torch.randn(120, 8) * 0.5 + 1.0)
    alignment = Alignment(config, ["text"], 8)
    optimizer = torch.optim.Adam([z, *alignment.parameters()], lr=0.05)
    for _ in range(num_steps):
        optimizer.zero_grad()
        terms = alignment({"text": latents_of(z, std=1e-3)}, ids)
        sum(term.value for name, term in terms.items() if not name.startswith("kl")).backward()
        optimizer.step()
    return diagnose_alignment({"text": latents_of(z.detach())}, ids, 512), terms


def test_only_pairing_ties_an_item_to_its_own_id():
    """Stein matches the samples as wholes and leaves each item where it is; pairing moves it to its own."""
    stein, _ = fit(AlignConfig(weight=1.0))
    paired, _ = fit(AlignConfig(kind="none", paired_weight=1.0))
    assert stein["ksd_text"] < 0.05
    assert stein["latent_cosine_text"] < 0.3
    assert paired["latent_cosine_text"] > 0.8


def test_the_public_codes_term_collapses_the_latents_where_stein_spreads_them():
    stein, _ = fit(AlignConfig(weight=1.0))
    legacy, terms = fit(AlignConfig(kind="legacy", weight=1.0))
    assert legacy["latent_std_text"] < 0.5 * stein["latent_std_text"]
    assert terms["legacy_text"].reported < -5  # a discrepancy cannot be


@pytest.mark.parametrize(
    ("mean", "std", "rank"),
    [
        (torch.zeros(200, 8) + 3.0, (0.0, 1e-6), (0.0, 8.0)),  # a point
        (torch.randn(200, 1) * torch.ones(8), (0.8, 1.2), (1.0, 1.01)),  # a line
        (torch.randn(200, 8), (0.8, 1.2), (7.0, 8.0)),
    ],
)
def test_diagnostics_tell_collapse_from_health(mean, std, rank):
    result = diagnose_alignment({"text": latents_of(mean)}, torch.randn(200, 8), 512)
    assert set(result) == {f"{name}_text" for name in DIAGNOSTICS}
    assert std[0] <= result["latent_std_text"] <= std[1]
    assert rank[0] <= result["latent_rank_text"] <= rank[1]
    assert result["bandwidth_text"] > 0
