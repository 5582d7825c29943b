"""Ranks with the catalogue's rows on several workers: the very counts of one process that holds them all."""

import numpy as np
import pytest
import torch
from forked import forked
from planted import planted_folder
from ranks_on_workers import HOW, parts, work

from findrec.evaluation import sharded
from findrec.evaluation.evaluate import rank_split
from findrec.evaluation.metrics import Ranks
from findrec.evaluation.scorers import ModelScorer
from findrec.ops.target_rank import target_rank
from findrec.tables.exchange import Shards


@pytest.mark.parametrize("piece", [1, 7, 40, 1000])
@pytest.mark.parametrize("offered", [False, True])
def test_counts_over_pieces_add_up_to_those_of_the_whole(piece, offered):
    """Own items, excluded ones (targets among them), ties, NaN, several targets a user, late items."""
    g = torch.Generator().manual_seed(3)
    items, users, cases = 40, 5, 11
    vectors = torch.randint(-2, 3, (items + 1, 4), generator=g).float()  # small integers: many ties
    vectors[0], vectors[9] = 0, torch.nan
    queries = torch.randint(-2, 3, (users, 4), generator=g).float()
    row = torch.randint(users, (cases,), generator=g)
    target = torch.randint(1, items + 1, (cases,), generator=g)
    target[3] = 9
    own = torch.stack([torch.randperm(items, generator=g)[:6] for _ in range(users)])
    bonus = torch.randint(-2, 3, own.shape, generator=g).float()
    out = torch.cat([torch.randint(0, items + 1, (users, 5), generator=g), target[:users, None]], 1)
    since = torch.randint(0, 10, (items + 1,), generator=g) if offered else None
    time = torch.randint(0, 10, (cases,), generator=g)
    greater, equal = target_rank(
        *(queries, vectors, row, target),
        own_ids_BN=own,
        own_bonus_BN=bonus,
        exclude_ids_BN=out,
        since_V=since,
        time_C=time if offered else None,
    )
    assert int(equal.max()) > 0
    asked = sharded._Asked(queries, own, bonus, out, row, target, time)
    found = sharded._count_round(Shards(items + 1), vectors, asked, since, piece)
    assert torch.equal(found, torch.stack([greater, equal], 1))


@pytest.mark.parametrize(
    ("world", "features", "sample"), [(2, "none", None), (3, "none", 40), (2, "score", None)]
)
def test_workers_rank_as_one_process_does(tmp_path, world, features, sample):
    folder = planted_folder(tmp_path / "data", num_users=70)  # 5 blocks of 16: the last round is not full
    out = str(tmp_path / "ranks")
    with forked(work, world, str(tmp_path / "meeting"), str(folder.path), features, sample, out):
        model, table, catalogue = parts(folder, features, placement="replicated")
        scorer = ModelScorer(model, table.weight, catalogue, max_length=16, device="cpu")
        want = rank_split(scorer, folder, "valid", **HOW, sample=sample)
    got = Ranks.concat([Ranks.from_array(np.load(f"{out}.{rank}.npy")) for rank in range(world)])
    assert len(np.unique(got.user)) == (sample or 70)
    assert np.array_equal(got.to_array(), want.to_array())
