"""Vectors of items by content, of a whole catalogue at once and in parts."""

import pytest
import torch
from planted import NUM_ITEMS, planted_folder
from small_models import make_model

from findrec.datasets.batches.catalogue import Catalogue


class Watched(Catalogue):
    """Notes how many items are asked for at once."""

    most = 0

    def features(self, ids_n):
        self.most = max(self.most, len(ids_n))
        return super().features(ids_n)


@pytest.mark.parametrize(
    ("tree", "width"),
    [
        ({"name": "findrec", "dim": 16}, 48),
        ({"name": "findrec-2025", "dim": 16, "items": {"features": "score"}}, 16),
    ],
)
@pytest.mark.parametrize("part", [None, range(5, 47)])
def test_features_that_are_too_large_are_transformed_in_parts(tmp_path, monkeypatch, part, tree, width):
    folder = planted_folder(tmp_path / "data", num_users=5)
    torch.manual_seed(0)
    model = make_model(tree, {"text": 12, "image": 8}, num_items=NUM_ITEMS).eval()
    rows = torch.randn(NUM_ITEMS + 1 if part is None else len(part), width)
    at_once = Watched(folder, ["text", "image"])
    want = model.item_vectors(rows, at_once, part)
    assert at_once.most == len(rows)
    monkeypatch.setattr("findrec.models.base._FEATURE_BYTES", 10 * 4 * (12 + 8))
    in_parts = Watched(folder, ["text", "image"])
    found = model.item_vectors(rows, in_parts, part)
    assert in_parts.most == 10
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
