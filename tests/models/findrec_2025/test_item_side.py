"""Item vectors with content: what is added, what a missing modality adds, what goes without an id."""

import pytest
import torch
from small_models import make_model

from findrec.datasets.folder.features import ModalRows
from findrec.models.findrec_2025.config import FindRec2025Config
from findrec.models.findrec_2025.item_side import ItemSide


def test_content_is_added_and_a_missing_modality_adds_nothing():
    torch.manual_seed(0)
    side = ItemSide({"text": 5, "image": 3}, 4, 0.0)
    rows = torch.randn(6, 4)
    text = ModalRows(torch.randn(6, 5), torch.tensor([False, True, True, False, True, True]))
    image = ModalRows(torch.randn(6, 3), torch.tensor([False, True, False, False, True, False]))
    out = side(rows, {"text": text, "image": image})
    want = rows.clone()
    for i in range(6):
        for name, modal in (("text", text), ("image", image)):
            if modal.present[i]:
                want[i] += side.projections[name](side.norms[name](modal.values[i]))
    torch.testing.assert_close(out, want)
    assert torch.equal(out[[0, 3]], rows[[0, 3]])


def test_id_dropout_leaves_whole_items_to_their_content_in_training_only():
    torch.manual_seed(0)
    side = ItemSide({"text": 5}, 4, 0.5)
    rows = torch.randn(200, 4)
    features = {"text": ModalRows(torch.randn(200, 5), torch.ones(200, dtype=torch.bool))}
    content = side.eval()(torch.zeros_like(rows), features)
    torch.testing.assert_close(side(rows, features), rows + content)
    ids = side.train()(rows, features) - content
    dropped = ids.abs().sum(1) < 1e-6
    assert 60 < int(dropped.sum()) < 140
    torch.testing.assert_close(ids[~dropped], rows[~dropped], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("where", "scores", "inputs"),
    [("none", False, False), ("input", False, True), ("score", True, False), ("both", True, True)],
)
def test_where_content_is_used(where, scores, inputs):
    config = FindRec2025Config.model_validate({"dim": 16, "items": {"features": where}})
    torch.manual_seed(0)
    model = make_model(config, {"text": 5}, max_length=8).eval()
    rows = torch.randn(3, 16)
    features = {"text": ModalRows(torch.randn(3, 5), torch.ones(3, dtype=torch.bool))}
    assert model.content_scores == scores
    assert torch.equal(model.item_transform(rows, features), rows) == (not scores)
    assert model.content_inputs == inputs
