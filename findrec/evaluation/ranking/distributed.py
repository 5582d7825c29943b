"""Exact ranks with an item table that is sharded over workers.

Counts of items with a higher or equal score add up over parts of the catalogue. In each round every worker
takes a block of users; the vectors of all blocks are gathered, every worker counts among its own rows, one
piece at a time, and the counts are summed for the worker of the block. The vectors of the targets are
gathered too and appended to each piece, excluded from the counts. Scores are those of `target_rank`, pair by
pair in float64, so results do not depend on the sharding.

Shape letters: B users, C cases, N repeat candidates, M excluded items, D = K d (K vectors of a user), n rows
of this worker, p rows of a piece, E distinct targets, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.evaluation import Part, evaluation_blocks
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.metrics.metrics import Ranks
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.base import Query
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.inner_product import make_queries, signs_of
from findrec.models.base import SequenceModel
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import target_rank
from findrec.tables.exchange import Route, Shards

_PIECE_ROWS = 1 << 18


@runtime_checkable
class ShardedRowsTable(Protocol):
    """A table that is sharded by rows."""

    shards: Shards
    weight: Tensor  # [n, d] the rows this worker holds

    def lookup(self, ids_U: Tensor) -> Tensor:
        """Rows `[U, d]` of distinct ids; a collective of all workers."""


@torch.no_grad()
def rank_split_sharded(
    model: SequenceModel,
    table: ShardedRowsTable,
    catalogue: Catalogue,
    folder: DataFolder,
    split: Part,
    protocol: RankingProtocol,
    *,
    piece_rows: int = _PIECE_ROWS,
) -> Ranks:
    """Rank this worker's blocks (every world-th) with a sharded table; see `rank_split`.

    A collective of all workers. In addition to its rows, a worker needs memory for a copy of `piece_rows` of
    them and, if the model scores items by content, for the item vectors of its rows.
    """
    shards, device = table.shards, table.weight.device
    model.eval()
    vectors_nd = model.item_vectors(table.weight, catalogue, shards.local)
    candidates = Candidates.of(folder, protocol.candidates)
    since_V = None if candidates.since_V is None else candidates.since_V.to(device)
    blocks = evaluation_blocks(folder, split, protocol.users_per_block, protocol.sample)
    parts = []
    for start in range(0, len(blocks), shards.world):
        mine = blocks[start : start + shards.world]
        query = None
        if shards.rank < len(mine):
            query = protocol.query(folder, split, mine[shards.rank], candidates)
        request = _make_request(model, table, catalogue, query)
        counts_C2 = _count_round(shards, vectors_nd, request, since_V, piece_rows)
        if query is not None:
            greater, equal = counts_C2.cpu().numpy().T
            parts.append(Ranks(query.cases.user.numpy(), query.cases.target.numpy(), greater, equal))
    return Ranks.concat(parts)


@dataclass(frozen=True)
class _Request:
    """One block of users and its target cases, sent to all workers."""

    users_BD: Tensor  # K vectors of each user, concatenated, D = K d
    own_ids_BN: Tensor
    own_bonus_BN: Tensor
    exclude_BM: Tensor
    row_C: Tensor
    target_C: Tensor
    time_C: Tensor


def _make_request(
    model: SequenceModel, table: ShardedRowsTable, catalogue: Catalogue, query: Query | None
) -> _Request:
    """The request of this worker's block; an empty one, which joins the lookup too, if no block is left."""
    device = table.weight.device
    ids = torch.zeros((0, 0), dtype=torch.int64, device=device)
    if query is None:
        table.lookup(ids.flatten())
        return _Request(ids.float(), ids, ids.float(), ids, ids.flatten(), ids.flatten(), ids.flatten())
    batch = query.block.batch.to(device)
    users = make_queries(model(batch, table.lookup(batch.ids), catalogue.features(batch.ids)), batch)
    if (signs_d := signs_of(model, device)) is not None:
        users = users.times(signs_d)
    none = ids.new_zeros(len(users.users_Bd), 0)
    return _Request(
        users_BD=users.users_Bd.flatten(1),
        own_ids_BN=none if users.own_ids_BN is None else users.own_ids_BN,
        own_bonus_BN=none.float() if users.own_bonus_BN is None else users.own_bonus_BN,
        exclude_BM=none if query.seen_BM is None else query.seen_BM.to(device),
        row_C=query.cases.row.to(device),
        target_C=query.cases.target.to(device),
        time_C=query.cases.time.to(device),
    )


def _count_round(
    shards: Shards, vectors_nd: Tensor, request: _Request, since_V: Tensor | None, piece_rows: int
) -> Tensor:
    """Counts `[C, 2]` of greater and equal items in the catalogue for the targets of this worker's block."""
    blocks, num_cases = _gather(shards, request)
    target_E = torch.unique(torch.cat([block.target_C for block in blocks]))
    route = Route(shards, target_E)
    target_Ed = route.to_requesters(vectors_nd[route.index_R])
    counts = torch.zeros(sum(num_cases), 2, dtype=torch.int64, device=vectors_nd.device)
    first = max(1, shards.local.start)  # without the padding
    for low in range(first, shards.local.stop, piece_rows):
        piece = range(low, min(low + piece_rows, shards.local.stop))
        here = slice(piece.start - shards.local.start, piece.stop - shards.local.start)
        start = 0
        for block, size in zip(blocks, num_cases, strict=True):
            if size:
                piece_counts = _count_piece(piece, vectors_nd[here], target_E, target_Ed, block, since_V)
                counts[start : start + size] += piece_counts
            start += size
    return shards.scatter_sum(counts, num_cases)


def _count_piece(
    piece: range,
    piece_pd: Tensor,
    all_target_E: Tensor,
    all_target_Ed: Tensor,
    block: _Request,
    since_V: Tensor | None,
) -> Tensor:
    """Counts `[C, 2]` among the rows of one piece."""
    needed = torch.searchsorted(all_target_E, torch.unique(block.target_C))
    target_E, target_Ed = all_target_E[needed], all_target_Ed[needed]

    def local_index(ids: Tensor) -> Tensor:
        """Index of ids among padding, piece and appended targets; 0 for other ids."""
        inside = (ids >= piece.start) & (ids < piece.stop)
        index = torch.searchsorted(target_E, ids).clamp_(max=len(target_E) - 1)
        appended = torch.where(target_E[index] == ids, index + len(piece) + 1, 0)
        return torch.where(inside, ids - piece.start + 1, appended)

    padding = piece_pd.new_zeros(1, piece_pd.shape[1])
    appended_E = torch.arange(len(target_E), device=piece_pd.device) + len(piece) + 1
    since = None
    if since_V is not None:
        since = torch.cat([since_V[:1], since_V[piece.start : piece.stop], since_V[target_E]])
    greater, equal = target_rank(
        block.users_BD.view(len(block.users_BD), -1, piece_pd.shape[1]),
        torch.cat([padding, piece_pd, target_Ed]),
        block.row_C,
        local_index(block.target_C),
        rules=Rules(
            own_ids_BN=local_index(block.own_ids_BN),
            own_bonus_BN=block.own_bonus_BN,
            exclude_ids_BN=torch.cat(
                [local_index(block.exclude_BM), appended_E.expand(len(block.users_BD), -1)], 1
            ),
            since_V=since,
            time_C=None if since is None else block.time_C,
        ),
    )
    return torch.stack([greater, equal], 1)


def _gather(shards: Shards, request: _Request) -> tuple[list[_Request], list[int]]:
    """Gather all workers' blocks, padded to equal row lengths, and the numbers of their cases."""
    device = request.users_BD.device
    users, width, own, excluded, cases = shards.lengths(
        len(request.users_BD),
        request.users_BD.shape[1],
        request.own_ids_BN.shape[1],
        request.exclude_BM.shape[1],
        len(request.target_C),
        device=device,
    )
    # Vectors differ in width only for a worker without a block.
    widths = {
        "users_BD": max(width),
        "own_ids_BN": max(own),
        "own_bonus_BN": max(own),
        "exclude_BM": max(excluded),
    }
    columns: list[Sequence[Tensor]] = []
    for field in fields(request):
        value: Tensor = getattr(request, field.name)
        if field.name in widths:
            value = F.pad(value, (0, widths[field.name] - value.shape[1]))
        lengths = cases if field.name.endswith("_C") else users
        columns.append(torch.split(shards.gather_uneven(value, lengths), lengths))
    return [_Request(*parts) for parts in zip(*columns, strict=True)], cases
