"""Explanations: shares of the parts of item vectors, occlusion, and exchanged gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import make_model
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.capabilities import Explanation
from findrec.models.findrec.explain import explain, item_shares
from findrec.models.findrec.items import row_width

DIM, NUM_ITEMS = 16, 40
WIDTHS = {"text": 9, "image": 5}


class Case:
    """A model in training mode with a batch; items 5 and 11 are unknown, every fourth has no image."""

    def __init__(self, *modalities: str, items: Tensor | None = None, **control: Any) -> None:
        torch.manual_seed(0)
        item = torch.randint(1, NUM_ITEMS + 1, (3, 20)) if items is None else items
        users, length = item.shape
        position = torch.arange(item.numel())
        self.batch = Batch.build(
            item, torch.full((users,), length), torch.arange(users), position, torch.ones_like(position)
        )
        ids = self.batch.ids
        dims = {m: WIDTHS[m] for m in modalities}
        tree = {"name": "findrec", "dim": DIM, "dropout": 0.5, "repeat": False, "control": control}
        self.model = make_model(tree, dims, num_items=NUM_ITEMS).train()
        rows = torch.randn(NUM_ITEMS + 1, row_width(DIM, len(dims))) * 0.05
        rows[[0, 5, 11]] = 0
        self.rows = rows[ids]
        self.features = {}
        for m, width in dims.items():
            present = (ids > 0) & ((ids % 4 > 0) | (m == "text"))
            self.features[m] = ModalRows(torch.randn(len(ids), width) * present[:, None], present)

    def explain(self, **changes: Any) -> Explanation:
        return explain(self.model, self.batch, self.rows, self.features, **changes)

    def shares(self) -> Tensor:
        return item_shares(self.model, self.rows, self.features).detach()

    def remember(self, name: str, latent_Ud: Tensor) -> None:
        """Let the memories of known items be these latents."""
        items = self.model.items
        begin = DIM * (1 + items.names.index(name))
        known_U1 = (self.rows[:, :DIM] != 0).any(1, keepdim=True)
        self.rows[:, begin : begin + DIM] = latent_Ud.detach() / items.memory_scale * known_U1

    def judge_by_cosine(self, name: str) -> None:
        """A gate that is near 1 where latent and memory agree, and near 0 elsewhere."""
        gate = self.model.items.gates[name]
        for parameter in gate.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            gate.hidden.weight[0, 0] = gate.out.weight[0, 0] = 1.0
            gate.out.bias -= 5.0  # a cosine of 1 gives 8


def test_shares_of_real_items_sum_to_one_and_name_their_parts() -> None:
    case = Case("text", "image")
    result, shares = case.explain(), case.shares()
    assert result.experts == ("id", "text", "text remembered", "image", "image remembered")
    assert torch.allclose(shares[1:].sum(1), torch.ones(len(shares) - 1))
    assert (shares[0] == 0).all()  # the padding
    assert (shares >= 0).all()
    expected = shares[case.batch.index.flatten()[case.batch.position]]
    assert torch.equal(result.gates_THE, expected[:, None])
    ids = case.batch.ids
    unknown = shares[(ids == 5) | (ids == 11)]
    assert len(unknown)
    assert (unknown[:, [0, 2, 4]] == 0).all()  # neither row nor memories
    no_image = shares[(ids % 4 == 0) & (ids > 0)]
    assert (no_image[:, 3] == 0).all()
    assert (no_image[:, 4] > 0).all()  # its memory takes its place


def test_shares_are_the_lengths_of_the_parts() -> None:
    case = Case("text")
    items = case.model.items
    rows, latents = items.split(case.rows), items.encode(case.features)
    _, weights = items(rows, latents, case.features)
    gate_U1 = weights.gate_n["text"][:, None]
    parts = [rows.id_nd, gate_U1 * latents["text"], (1 - gate_U1) * rows.memory_nd["text"]]
    parts = [part * ((k != 2) | rows.known_n[:, None]) for k, part in enumerate(parts)]
    length_UE = torch.stack([part.norm(dim=1) for part in parts], 1)
    want = (length_UE / length_UE.sum(1, keepdim=True).clamp(min=1e-12)).detach()
    torch.testing.assert_close(case.shares(), want)


def test_the_output_is_that_of_the_evaluated_model_and_its_mode_is_restored() -> None:
    case = Case("text", "image")
    for training in (True, False):
        case.model.train(training)
        result = case.explain()
        assert case.model.training is training
        case.model.eval()
        assert torch.equal(result.whole.h, case.model(case.batch, case.rows, case.features).h)
    assert set(result.without) == {"text", "image"}
    for name, out in result.without.items():
        assert not torch.allclose(out.h, result.whole.h, atol=1e-3), name
        assert not torch.allclose(out.h, result.bare.h, atol=1e-3), name


def test_the_mode_is_restored_after_an_error() -> None:
    case = Case("text")
    case.features = {}
    with pytest.raises(KeyError):
        case.explain()
    assert case.model.training


@pytest.mark.parametrize("gates", ["learned", "open"])
def test_a_modality_with_a_zero_projection_contributes_nothing(gates: str) -> None:
    case = Case("text", "image", gates=gates)
    nn.init.zeros_(case.model.items.projections["text"].weight)
    case.remember("text", torch.zeros(len(case.rows), DIM))
    result = case.explain()
    assert (result.gates_THE[:, 0, 1:3] == 0).all()
    assert torch.allclose(result.without["text"].h, result.whole.h, atol=1e-6)
    assert not torch.allclose(result.without["image"].h, result.whole.h, atol=1e-3)


def test_exchanged_gates_matter_if_and_only_if_some_content_is_swapped() -> None:
    case = Case("text")
    case.rows[1:, :DIM] += 1e-3  # all items are known, so that all have a gate of their own
    case.judge_by_cosine("text")
    latent_Ud = case.model.items.encode(case.features)["text"]
    case.remember("text", latent_Ud)
    true = case.explain()
    assert len(true.shuffled) == 4
    for out in true.shuffled:
        assert torch.allclose(out.h, true.whole.h, atol=1e-4)
    swapped_Ud = latent_Ud.clone()
    swapped_Ud[1::2] = swapped_Ud[1::2].roll(1, 0)
    case.remember("text", swapped_Ud)
    wrong = case.explain()
    for out in wrong.shuffled:
        assert (out.h - wrong.whole.h).norm(dim=1).mean() > 0.1 * wrong.whole.h.norm(dim=1).mean()
    again, other = case.explain(), case.explain(seed=1)
    assert all(torch.equal(a.h, b.h) for a, b in zip(wrong.shuffled, again.shuffled, strict=True))
    assert not torch.equal(wrong.shuffled[0].h, other.shuffled[0].h)
    assert len(case.explain(draws=2).shuffled) == 2


def test_gates_that_are_not_learned_or_alone_are_not_exchanged() -> None:
    assert Case("text", gates="open").explain().shuffled == []
    assert Case("text", items=torch.full((1, 3), 7)).explain().shuffled == []


def test_a_model_of_ids_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="without modalities"):
        Case().explain()
