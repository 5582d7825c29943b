"""The queries that indexes are measured with: a run's test users in blocks, and some of them one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.evaluation.candidates import Candidates
from findrec.evaluation.report import draw_users
from findrec.evaluation.scorers import ModelScorer, Queries, UserBlock
from findrec.evaluation.topk import Late


@dataclass(frozen=True)
class Query:
    """What a block of users, or one user, asks for."""

    users: Queries
    seen_BN: Tensor | None  # items to leave out
    late: Late | None

    def single(self, row: int) -> Query:
        """One user of the block, without the padding that others made necessary."""
        users, own, bonus = self.users.users_Bd, self.users.own_ids_BN, self.users.own_bonus_BN
        if own is not None and bonus is not None:
            there = own[row] > 0
            own, bonus = own[row : row + 1, there], bonus[row : row + 1, there]
        seen, late = self.seen_BN, self.late
        return Query(
            Queries(users[row : row + 1], own, bonus),
            None if seen is None else seen[row : row + 1, seen[row] > 0],
            None if late is None else (late[0], late[1][row : row + 1]),
        )


def drawn_queries(
    config: RunConfig, scorer: ModelScorer, folder: DataFolder, users: int, mask_seen: bool
) -> list[Query]:
    """At most `users` test users in blocks, drawn by the run's seed, as the run's own protocol lists them."""
    drawn = draw_users(folder, "test", users, seed=config.training.seed)
    offer = Candidates.of(folder, config.evaluation.candidates)
    found = []
    for lo in range(0, len(drawn), config.evaluation.users_per_block):
        rows = drawn[lo : lo + config.evaluation.users_per_block]
        block = UserBlock.read(folder, "test", rows, config.data.max_length)
        seen_BN = block.padded_items() if mask_seen else None
        found.append(Query(scorer.queries(block), seen_BN, offer.late(block.cases, len(rows))))
    return found


def single_queries(blocks: list[Query], count: int, seed: int) -> list[Query]:
    """The first `count` users of the blocks in random order, one by one."""
    everyone = [(block, row) for block in blocks for row in range(len(block.users.users_Bd))]
    order = np.random.default_rng(seed).permutation(len(everyone))
    return [everyone[place][0].single(everyone[place][1]) for place in order[:count]]
