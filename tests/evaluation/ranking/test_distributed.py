"""Ranks of a sharded item table equal those of a single process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import forked
from planted import planted_folder
from ranks_on_workers import PROTOCOL, parts, work

from findrec.evaluation.metrics.metrics import Ranks
from findrec.evaluation.ranking import distributed as sharded
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import target_rank
from findrec.tables.exchange import Shards


@pytest.mark.parametrize("piece", [1, 7, 40, 1000])
@pytest.mark.parametrize("offered", [False, True])
@pytest.mark.parametrize("interests", [1, 3])
def test_counts_of_pieces_add_up(piece, offered, interests):
    """Own items, excluded ones (targets among them), ties, NaN, several targets a user, late items."""
    g = torch.Generator().manual_seed(3)
    items, users, cases = 40, 5, 11
    vectors = torch.randint(-2, 3, (items + 1, 4), generator=g).float()  # small integers: many ties
    vectors[0], vectors[9] = 0, torch.nan
    queries = torch.randint(-2, 3, (users, interests, 4), generator=g).float()
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
        rules=Rules(
            own_ids_BN=own,
            own_bonus_BN=bonus,
            exclude_ids_BN=out,
            since_V=since,
            time_C=time if offered else None,
        ),
    )
    assert int(equal.max()) > 0
    request = sharded._Request(queries.flatten(1), own, bonus, out, row, target, time)
    actual = sharded._count_round(Shards(items + 1), vectors, request, since, piece)
    assert torch.equal(actual, torch.stack([greater, equal], 1))


@pytest.mark.parametrize(
    ("world", "features", "sample"), [(2, "none", None), (3, "none", 40), (2, "score", None)]
)
def test_workers_rank_as_a_single_process(tmp_path, world, features, sample):
    folder = planted_folder(tmp_path / "data", num_users=70)  # 5 blocks of 16: the last round is not full
    out = str(tmp_path / "ranks")
    with forked(work, world, str(tmp_path / "meeting"), str(folder.path), features, sample, out):
        model, table, catalogue = parts(folder, features, placement="replicated")
        scorer = ModelScorer(model, table.weight, catalogue, max_length=16, device="cpu", name="model")
        want = rank_split(scorer, folder, "valid", replace(PROTOCOL, sample=sample))
    got = Ranks.concat([Ranks.from_array(np.load(f"{out}.{rank}.npy")) for rank in range(world)])
    assert len(np.unique(got.user)) == (sample or 70)
    assert np.array_equal(got.to_array(), want.to_array())
