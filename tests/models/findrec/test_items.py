"""Item vectors, against the written-out formula, and where the gradients go."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.folder.features import ModalRows
from findrec.models.findrec.config import ControlConfig
from findrec.models.findrec.items import COSINE_SCALE, LOGIT_SCALE, Gate, ItemVectors, Rows, row_width
from findrec.models.findrec.views import Views
from findrec.tables.initial_rows import TABLE_STD

DIM, NUM = 8, 12
WIDTHS = {"text": 5, "image": 3}
Array = NDArray[np.float64]


def make_items(modalities: tuple[str, ...], gates: str = "learned") -> ItemVectors:
    torch.manual_seed(0)
    items = ItemVectors(
        {m: WIDTHS[m] for m in modalities}, DIM, ControlConfig.model_validate({"gates": gates})
    )
    for p in items.parameters():  # away from zeros and ones
        p.data += 0.1 * torch.randn_like(p)
    return items


def make_inputs(modalities: tuple[str, ...]) -> tuple[Tensor, dict[str, ModalRows]]:
    """Table rows and features of items: the padding, unknown ones, and known ones without a modality."""
    torch.manual_seed(1)
    rows_nw = torch.randn(NUM, row_width(DIM, len(modalities))) * TABLE_STD * DIM**-0.5
    rows_nw[[0, 3, 7]] = 0
    features = {}
    for m in modalities:
        present = torch.rand(NUM) < 0.6
        present[0], present[3], present[4], present[5] = False, True, True, False
        features[m] = ModalRows(torch.randn(NUM, WIDTHS[m]) * present[:, None], present)
    return rows_nw, features


def make_views(modalities: tuple[str, ...]) -> Views:
    source, true = {}, {}
    features = make_inputs(modalities)[1]
    for m in modalities:
        source[m] = torch.arange(NUM)
        source[m][[1, 4, 5, 8]] = torch.tensor([4, 5, 8, 1])
        true[m] = source[m] == torch.arange(NUM)
    row, content = torch.ones(NUM, dtype=torch.bool), torch.ones(NUM, dtype=torch.bool)
    row[[0, 3, 7, 2, 8]] = False  # unknown, and hidden
    content[[1, 6]] = False
    present = {m: features[m].present[source[m]] & content for m in modalities}
    return Views(source, true, present, row, content)


def written_out(
    items: ItemVectors,
    rows_nw: Tensor,
    features: Mapping[str, ModalRows],
    views: Views | None,
    order: Tensor | None,
) -> Array:
    """The vectors of `items.forward` in float64, one item at a time."""

    def as64(tensor: Tensor) -> Array:
        array: Array = tensor.detach().numpy().astype(np.float64)
        return array

    weights = {name: as64(p) for name, p in items.named_parameters()}
    rows = as64(rows_nw)
    gates: dict[str, Array] = {m: np.zeros(NUM) for m in features}
    latents: dict[str, Array] = {m: np.zeros((NUM, DIM)) for m in features}
    present: dict[str, Array] = {m: np.zeros(NUM) for m in features}
    memory = {
        m: rows[:, DIM * (1 + k) : DIM * (2 + k)] * 0.5 * np.sqrt(DIM) for k, m in enumerate(items.names)
    }
    has_row = [bool((rows[i, :DIM] != 0).any()) for i in range(NUM)]
    known = has_row if views is None else views.row_U.tolist()
    for m, i in product(features, range(NUM)):
        shown = i if views is None else int(views.source_U[m][i])
        if not (features[m].present if views is None else views.present_U[m])[i]:
            continue
        x = as64(features[m].values[shown])
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = x * weights[f"norms.{m}.weight"] + weights[f"norms.{m}.bias"]
        latent = weights[f"projections.{m}.weight"] @ x
        present[m][i], latents[m][i], gates[m][i] = 1.0, latent, 1.0
        if items.gates is not None and known[i]:
            own = memory[m][i]
            cosine = latent @ own / (np.linalg.norm(latent) * np.linalg.norm(own))
            evidence = np.array([COSINE_SCALE * cosine, np.linalg.norm(latent - own) / TABLE_STD])
            hidden = torch.from_numpy(
                weights[f"gates.{m}.hidden.weight"] @ evidence + weights[f"gates.{m}.hidden.bias"]
            )
            out = weights[f"gates.{m}.out.weight"][0] @ torch.nn.functional.gelu(hidden).numpy()
            gates[m][i] = 1 / (1 + np.exp(-LOGIT_SCALE * (out + weights[f"gates.{m}.out.bias"][0])))
    vectors = rows[:, :DIM] * np.array(known)[:, None]
    for m in features:
        gate = gates[m] if order is None else gates[m][order.numpy()] * present[m]
        vectors = vectors + gate[:, None] * latents[m]
        vectors = vectors + ((1 - gate) * np.array(known))[:, None] * memory[m]
    return vectors


@pytest.mark.parametrize("modalities", [("text",), ("text", "image")])
@pytest.mark.parametrize("gates", ["learned", "open"])
@pytest.mark.parametrize("with_views", [False, True])
@pytest.mark.parametrize("with_order", [False, True])
def test_vectors_are_those_of_the_formula(
    modalities: tuple[str, ...], gates: str, with_views: bool, with_order: bool
) -> None:
    items = make_items(modalities, gates)
    rows_nw, features = make_inputs(modalities)
    views = make_views(modalities) if with_views else None
    order = torch.randperm(NUM) if with_order else None
    found, weights = items(items.split(rows_nw), items.encode(features), features, views, order)
    want = written_out(items, rows_nw, features, views, order)
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-4, atol=1e-5)
    assert (found[0] == 0).all()  # the padding
    assert set(weights.logit_n) == (set(modalities) if gates == "learned" else set())
    if gates == "learned":  # all the cases of the docstring are among the items
        gate_n, present_n = weights.gate_n["text"], weights.present_n["text"]
        assert (gate_n[~present_n] == 0).all()
        assert ((gate_n > 0) & (gate_n < 1)).any()
        assert with_order or (gate_n == 1).any()


def test_a_missing_modality_is_never_read() -> None:
    items = make_items(("text", "image"))
    rows_nw, features = make_inputs(("text", "image"))
    other = {m: ModalRows(rows.values.clone(), rows.present) for m, rows in features.items()}
    for rows in other.values():
        rows.values[~rows.present] = 1e3
    split = items.split(rows_nw)
    found = [items(split, items.encode(f), f)[0] for f in (features, other)]
    assert torch.equal(*found)
    assert torch.equal(items.trusting(split, features), items.trusting(split, other))


@pytest.mark.parametrize("trusting", [False, True])
def test_the_ranking_loss_trains_ids_and_projections_but_neither_memories_nor_gates(trusting: bool) -> None:
    items = make_items(("text",))
    rows_nw, features = make_inputs(("text",))
    rows_nw.requires_grad_()
    split = items.split(rows_nw)
    vectors = items.trusting(split, features)
    if not trusting:
        vectors, _ = items(split, items.encode(features), features, make_views(("text",)))
    (vectors * torch.randn_like(vectors)).sum().backward()
    assert rows_nw.grad is not None
    assert (rows_nw.grad[:, DIM:] == 0).all()
    shown = torch.ones(NUM, dtype=torch.bool) if trusting else make_views(("text",)).row_U
    assert torch.equal(rows_nw.grad[:, :DIM].abs().sum(1) > 0, shown)
    assert items.gates is not None
    assert all(p.grad is None for p in items.gates.parameters())
    for module in (items.norms, items.projections):
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_gates_are_trained_by_their_logits_alone() -> None:
    items = make_items(("text",))
    rows_nw, features = make_inputs(("text",))
    rows_nw.requires_grad_()
    _, weights = items(items.split(rows_nw), items.encode(features), features)
    weights.logit_n["text"].sum().backward()
    assert items.gates is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in items.gates.parameters())
    assert all(p.grad is None for p in items.projections.parameters())
    assert rows_nw.grad is None  # evidence is detached


@pytest.mark.parametrize("modalities", [("text",), ("text", "image")])
def test_trusting_is_forward_with_all_gates_at_one(modalities: tuple[str, ...]) -> None:
    learned, opened = make_items(modalities), make_items(modalities, "open")
    opened.load_state_dict(learned.state_dict(), strict=False)
    rows_nw, features = make_inputs(modalities)
    split = learned.split(rows_nw)
    trusting = learned.trusting(split, features)
    latents = learned.encode(features)
    torch.testing.assert_close(opened(split, latents, features)[0], trusting)
    assert not torch.allclose(learned(split, latents, features)[0], trusting, atol=1e-3)
    assert learned.gates is not None
    for gate in learned.gates.values():
        assert isinstance(gate, Gate)
        torch.nn.init.constant_(gate.out.bias, 100.0)
    torch.testing.assert_close(learned(split, latents, features)[0], trusting)
    assert (trusting[0] == 0).all()


def test_rows_are_split_into_the_id_and_scaled_memories() -> None:
    items = make_items(("text", "image"))
    rows_nw, _ = make_inputs(("text", "image"))
    rows = items.split(rows_nw)
    assert isinstance(rows, Rows)
    assert rows_nw.shape == (NUM, row_width(DIM, 2)) == (NUM, 3 * DIM)
    assert torch.equal(rows.id_nd, rows_nw[:, :DIM])
    for k, m in enumerate(("text", "image")):
        torch.testing.assert_close(
            rows.memory_nd[m], rows_nw[:, DIM * (k + 1) : DIM * (k + 2)] * DIM**0.5 / 2
        )
    assert (~rows.known_n).nonzero().squeeze(1).tolist() == [0, 3, 7]


def test_content_is_trusted_before_training() -> None:
    items = ItemVectors({"text": 5}, DIM, ControlConfig())
    rows_nw, features = make_inputs(("text",))
    rows = items.split(rows_nw)
    _, weights = items(rows, items.encode(features), features)
    known_n = features["text"].present & rows.known_n
    torch.testing.assert_close(
        weights.gate_n["text"][known_n], torch.sigmoid(torch.tensor(2.0)).expand(int(known_n.sum()))
    )
