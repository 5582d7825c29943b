"""The two views of one training set give the same user vectors: all positions of a window, or each prefix."""

import numpy as np
import pytest
import torch
from planted import make_config, planted_folder

from findrec.datasets.batches.plan import cut_prefixes, cut_windows
from findrec.datasets.batches.windows import train_batch
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tables, build_tower_model


@pytest.mark.parametrize("kind", ["mamba", "gru", "transformer"])
def test_both_objectives_see_the_same_user_vector_for_the_same_history(tmp_path, kind):
    folder = planted_folder(tmp_path / "data", num_users=6)
    config = make_config()
    stream = config.model.stream.model_copy(update={"kind": kind})
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"stream": stream}),
            "data": config.data.model_copy(update={"max_length": 64}),
        }
    )
    torch.manual_seed(0)
    model, table = build_tower_model(config, folder).eval(), build_tables(config, folder)[ITEMS]
    catalogue = build_catalogue(config, folder)

    def vectors(windows):
        batch = train_batch(folder, windows, np.arange(len(windows)))
        out = model(batch, table.weight[batch.ids], catalogue.features(batch.ids))
        return batch.target, out.h.detach()

    # Windows longer than any history: the whole history before a target is seen in both views.
    targets, h = vectors(cut_windows(folder, 64, 0.5))
    alone_targets, alone = vectors(cut_prefixes(folder, 64))
    assert len(targets) == int((folder.valid_start - 1).sum())
    assert torch.equal(targets, alone_targets)
    torch.testing.assert_close(h, alone, rtol=1e-4, atol=1e-5)
