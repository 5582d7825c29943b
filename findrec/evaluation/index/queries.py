"""The queries that indexes are measured with: blocks of a run's test users, and single users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.display.wording import draw_users
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.base import Times
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors


@dataclass(frozen=True)
class VectorQuery:
    """The vectors of one or more users, and the items excluded from their lists."""

    users: UserVectors
    seen_BN: Tensor | None  # items to exclude
    times: Times | None

    def single(self, row: int) -> VectorQuery:
        """One user of the block, without padding."""
        part = slice(row, row + 1)
        users, own, bonus = self.users.users_Bd, self.users.own_ids_BN, self.users.own_bonus_BN
        if own is not None and bonus is not None:
            valid = own[row] > 0
            own, bonus = own[part, valid], bonus[part, valid]
        seen = self.seen_BN
        return VectorQuery(
            UserVectors(users[part], own, bonus),
            None if seen is None else seen[part, seen[row] > 0],
            None if self.times is None else self.times.rows(part),
        )


def drawn_queries(
    scorer: InnerProductScorer, folder: DataFolder, protocol: RankingProtocol, users: int, seed: int
) -> list[VectorQuery]:
    """Draw at most `users` test users and return their queries under the run's protocol, in blocks."""
    drawn = draw_users(folder, "test", users, seed=seed)
    candidates = Candidates.of(folder, protocol.candidates)
    queries = []
    for lo in range(0, len(drawn), protocol.users_per_block):
        query = protocol.query(folder, "test", drawn[lo : lo + protocol.users_per_block], candidates)
        vectors = scorer.signed_queries(query.block)
        queries.append(VectorQuery(vectors, query.seen_BM, query.list_times))
    return queries


def single_queries(blocks: list[VectorQuery], count: int, seed: int) -> list[VectorQuery]:
    """Up to `count` single-user queries of the blocks, in random order."""
    rows = [(block, row) for block in blocks for row in range(len(block.users.users_Bd))]
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[n][0].single(rows[n][1]) for n in order[:count]]
