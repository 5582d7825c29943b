"""What is particular to UniSRec: text with and without ids, new items, and memorising histories."""

from __future__ import annotations

import pytest
import torch
from memorise import hit_rate_of_memorised
from small_models import make_model
from torch import Tensor

from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.unisrec.config import UniSRecConfig

DIM, WIDTH, ITEMS = 8, 5, 6


def score_vectors(rows: Tensor, present: Tensor, **keys: object) -> Tensor:
    torch.manual_seed(0)
    tree = {"name": "unisrec", "dim": DIM, "temperature": None, **keys}
    model = make_model(tree, {"text": WIDTH}).eval()
    text = torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))
    vectors: Tensor = model.item_transform(rows, {"text": ModalRows(text * present[:, None], present)})
    return vectors


def test_vectors_are_ids_plus_text_and_text_alone() -> None:
    rows, present = torch.randn(ITEMS, DIM), torch.arange(ITEMS) != 3
    zero = torch.zeros_like(rows)
    text = score_vectors(zero, present)
    assert text[present].abs().sum(1).min() > 0
    torch.testing.assert_close(score_vectors(rows, present), rows + text)
    assert torch.equal(score_vectors(rows, present, ids=False), text)
    assert not text[3].any()  # no text, and no shared vector in its place


def test_new_items_are_ranked_by_text_and_no_classes_in_training() -> None:
    assert UniSRecConfig().scores_content
    assert UniSRecConfig().content == ["text"]


def test_without_features_it_uses_ids() -> None:
    model = make_model({"name": "unisrec", "dim": DIM, "temperature": None, "ids": False})
    rows = torch.randn(4, DIM)
    assert not model.content_scores
    assert torch.equal(model.item_transform(rows, {}), rows)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(FindRecError, match=r"multiple of model\.heads=3"):
        make_model({"name": "unisrec", "dim": 8, "heads": 3})


@pytest.mark.parametrize("ids", [True, False])
def test_it_memorises_histories(ids: bool) -> None:
    assert (
        hit_rate_of_memorised({"name": "unisrec", "dim": 32, "ids": ids, "adaptor_dropout": 0.0}, steps=200)
        > 0.95
    )
