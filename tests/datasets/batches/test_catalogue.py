"""Item features by id, and their permutation for a share of the items."""

import torch
from planted import NUM_ITEMS, planted_folder

from findrec.datasets.batches.catalogue import Catalogue


def test_rows_follow_ids_and_noise_swaps_whole_items(tmp_path):
    folder = planted_folder(tmp_path / "data", num_users=5)
    clean = Catalogue(folder, ["text", "image"])
    ids = torch.tensor([0, 7, 3, 60])
    whole = clean.all_features("cpu")
    for name, rows in clean.features(ids).items():
        assert torch.equal(rows.values, whole[name].values[ids])
        assert torch.equal(rows.present, whole[name].present[ids])
    noisy = Catalogue(folder, ["text", "image"], noise=0.3, seed=1).all_features("cpu")
    moved = (noisy["text"].values != whole["text"].values).any(1)
    assert int(moved.sum()) == round(0.3 * NUM_ITEMS)
    assert not moved[0]
    # A permutation: every item's features are still some item's, and modalities move together.
    assert torch.equal(noisy["text"].values.sort(0).values, whole["text"].values.sort(0).values)
    source = [int((whole["text"].values == row).all(1).nonzero()[0]) for row in noisy["text"].values]
    assert torch.equal(noisy["image"].values, whole["image"].values[source])
