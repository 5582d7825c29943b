"""What is particular to FindRec: noise only in training, its auxiliary terms, the stream alone."""

from __future__ import annotations

import pytest
import torch
from small_models import make_model

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import Out
from findrec.models.findrec_2025.config import AlignConfig, FindRec2025Config, RoutingConfig
from findrec.models.findrec_2025.latents import ModalEncoder


def make_batch(num_items: int = 40) -> Batch:
    item = torch.randint(1, num_items + 1, (3, 20))
    return Batch.build(item, torch.full((3,), 20), torch.arange(3), torch.arange(60), torch.ones(60).long())


def run(config: FindRec2025Config, *, train: bool = True) -> Out:
    torch.manual_seed(0)
    batch = make_batch()
    model = make_model(config, {"text": 9}).train(train)
    features = {"text": ModalRows(torch.randn(len(batch.ids), 9), batch.ids > 0)}
    out: Out = model(batch, torch.randn(len(batch.ids), config.dim) * 0.1, features)
    return out


def test_latents_are_noisy_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = ModalEncoder(9, 8, dropout=0.0)
    rows = ModalRows(torch.randn(6, 9), torch.tensor([False, True, True, True, False, True]))
    trained = encoder(rows)
    assert not torch.allclose(trained.z_Ud[1], trained.mean_nd[0], atol=1e-3)
    encoder.eval()
    latents = encoder(rows)
    assert torch.equal(latents.z_Ud[latents.present_n], latents.mean_nd)
    assert torch.equal(latents.z_Ud[~rows.present], encoder.missing.expand(2, -1))


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        (AlignConfig(), {"stein_text", "kl_text", "balance", "z"}),
        (AlignConfig(kind="mmd"), {"mmd_text", "kl_text", "balance", "z"}),
        (AlignConfig(kind="none"), {"kl_text", "balance", "z"}),
        (AlignConfig(score="kde", kernel="imq", rows=8), {"stein_text", "kl_text", "balance", "z"}),
        (AlignConfig(kind="legacy"), {"legacy_text", "kl_text", "balance", "z"}),
        (AlignConfig(paired_weight=0.1), {"stein_text", "paired_text", "kl_text", "balance", "z"}),
    ],
)
def test_terms_follow_the_configuration(align: AlignConfig, expected: set[str]) -> None:
    out = run(FindRec2025Config(dim=16, repeat=False, align=align))
    assert set(out.aux) == expected
    assert out.diagnostics["gate_entropy"] == pytest.approx(1.386, abs=0.05)  # ln 4: starts even
    assert 0.25 <= out.diagnostics["expert_load_max"] < 0.5
    assert out.aux["balance"].value.item() == pytest.approx(1e-2 * out.aux["balance"].reported.item())


def test_without_modalities_it_is_the_stream_alone() -> None:
    torch.manual_seed(0)
    batch = make_batch()
    model = make_model(FindRec2025Config(dim=16, repeat=False)).train()
    out = model(batch, torch.randn(len(batch.ids), 16), {})
    assert out.h.shape == (60, 16)
    assert not out.aux


def test_training_starts_near_the_stream_alone() -> None:
    """The modal correction begins small against the stream's own vector."""
    with_text = run(FindRec2025Config(dim=16, repeat=False), train=False).h
    torch.manual_seed(0)
    batch = make_batch()
    model = make_model(FindRec2025Config(dim=16, repeat=False), {"text": 9}).eval()
    features = {"text": ModalRows(torch.randn(len(batch.ids), 9), batch.ids > 0)}
    rows = torch.randn(len(batch.ids), 16) * 0.1
    assert torch.allclose(model(batch, rows, features).h, with_text, atol=1e-6)
    model.control = None  # type: ignore[assignment]
    alone = model(batch, rows, features).h
    assert torch.nn.functional.cosine_similarity(alone, with_text, dim=1).mean() > 0.9


def test_sparse_routing_trains() -> None:
    out = run(FindRec2025Config(dim=16, repeat=False, routing=RoutingConfig(top_k=2)))
    assert out.h.isfinite().all()
    assert out.diagnostics["gate_entropy"] <= 0.6932  # at most ln 2: two experts


def test_without_a_router_all_experts_weigh_the_same() -> None:
    out = run(FindRec2025Config(dim=16, repeat=False, routing=RoutingConfig(kind="mean")))
    assert set(out.aux) == {"stein_text", "kl_text"}
    assert out.diagnostics["gate_entropy"] == pytest.approx(1.38629, abs=1e-4)  # ln 4, exactly even
