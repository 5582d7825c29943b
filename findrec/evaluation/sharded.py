"""Exact ranks while the item table's rows lie on several workers: nobody holds them all.

Counts of items above and level with a target add up over parts of the catalogue. In a round every worker
takes a block of users; all workers see the blocks' vectors and count among their own rows, a piece at a
time; the counts go back and are summed. A target's score is needed everywhere: its vector comes from its
holder and stands behind the piece's rows, where it does not compete. So scores are those of `target_rank`,
pair by pair in float64, and no digit depends on how rows are placed.

Shape letters: B users, C cases, N own items, M items taken out, n rows of this worker, p rows of a piece,
E distinct targets, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.datasets.batches import Part, evaluation_blocks
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import DataFolder
from findrec.evaluation.candidates import Candidates, Rule
from findrec.evaluation.metrics import Ranks
from findrec.evaluation.scorers import UserBlock, make_queries
from findrec.models.base import SequenceModel
from findrec.ops.target_rank import target_rank
from findrec.tables.exchange import Route, Shards
from findrec.tables.sharded_table import ShardedItemTable

_PIECE_ROWS = 1 << 18


@torch.no_grad()
def rank_split_sharded(
    model: SequenceModel,
    table: ShardedItemTable,
    catalogue: Catalogue,
    folder: DataFolder,
    split: Part,
    *,
    users_per_block: int,
    max_length: int,
    mask_seen: bool,
    candidates: Rule = "all",
    sample: int | None = None,
    piece_rows: int = _PIECE_ROWS,
) -> Ranks:
    """`rank_split` of a model whose table is sharded: this worker's blocks (every world-th), as there.

    A collective of all workers. Beside its rows a worker holds `piece_rows` of them once more, and, for a
    model that scores content, the vectors made of its rows.
    """
    shards, device = table.shards, table.weight.device
    model.eval()
    vectors_nd = model.item_vectors(table.weight, catalogue, shards.own)
    since_V = Candidates.of(folder, candidates).since_V
    since_V = None if since_V is None else since_V.to(device)
    blocks = evaluation_blocks(folder, split, users_per_block, sample)
    parts = []
    for start in range(0, len(blocks), shards.world):
        mine = blocks[start : start + shards.world]
        block = None
        if shards.rank < len(mine):
            block = UserBlock.read(folder, split, mine[shards.rank], max_length)
        asked = _ask(model, table, catalogue, block, mask_seen=mask_seen)
        counts_C2 = _count_round(shards, vectors_nd, asked, since_V, piece_rows)
        if block is not None:
            greater, equal = counts_C2.cpu().numpy().T
            user, target = block.cases.user.numpy(), block.cases.target.numpy()
            parts.append(Ranks(user, target, greater, equal, np.zeros((0, 0), dtype=np.int64)))
    return Ranks.concat(parts)


@dataclass(frozen=True)
class _Asked:
    """What one block of users asks of the catalogue."""

    users_Bd: Tensor
    own_ids_BN: Tensor
    own_bonus_BN: Tensor
    out_BM: Tensor
    row_C: Tensor
    target_C: Tensor
    time_C: Tensor


def _ask(
    model: SequenceModel,
    table: ShardedItemTable,
    catalogue: Catalogue,
    block: UserBlock | None,
    *,
    mask_seen: bool,
) -> _Asked:
    """This worker's block; one of nobody where there is none left (its rows are looked up all the same)."""
    device = table.weight.device
    ids = torch.zeros((0, 0), dtype=torch.int64, device=device)
    if block is None:
        table.lookup(ids.flatten())
        nobody = table.weight[:0]
        return _Asked(nobody, ids, ids.float(), ids, *(ids.flatten(),) * 3)
    batch = block.batch.to(device)
    found = make_queries(model(batch, table.lookup(batch.ids), catalogue.features(batch.ids)), batch)
    none = ids.new_zeros(len(found.users_Bd), 0)
    return _Asked(
        users_Bd=found.users_Bd,
        own_ids_BN=none if found.own_ids_BN is None else found.own_ids_BN,
        own_bonus_BN=none.float() if found.own_bonus_BN is None else found.own_bonus_BN,
        out_BM=block.padded_items().to(device) if mask_seen else none,
        row_C=block.cases.row.to(device),
        target_C=block.cases.target.to(device),
        time_C=block.cases.time.to(device),
    )


def _count_round(
    shards: Shards, vectors_nd: Tensor, asked: _Asked, since_V: Tensor | None, piece_rows: int
) -> Tensor:
    """`[C, 2]` items above and level with each target of this worker's block, over the whole catalogue."""
    blocks, num_cases = _gather(shards, asked)
    target_E = torch.unique(torch.cat([block.target_C for block in blocks]))
    route = Route(shards, target_E)
    target_Ed = route.to_askers(vectors_nd[route.place_R])
    counts = torch.zeros(sum(num_cases), 2, dtype=torch.int64, device=vectors_nd.device)
    first = max(1, shards.own.start)  # without the padding
    for low in range(first, shards.own.stop, piece_rows):
        piece = range(low, min(low + piece_rows, shards.own.stop))
        here = slice(piece.start - shards.own.start, piece.stop - shards.own.start)
        done = 0
        for block, size in zip(blocks, num_cases, strict=True):
            if size:
                found = _count_piece(piece, vectors_nd[here], target_E, target_Ed, block, since_V)
                counts[done : done + size] += found
            done += size
    return shards.scatter_sum(counts, num_cases)


def _count_piece(
    piece: range,
    piece_pd: Tensor,
    all_target_E: Tensor,
    all_target_Ed: Tensor,
    block: _Asked,
    since_V: Tensor | None,
) -> Tensor:
    """`[C, 2]` counts among the rows of one piece."""
    place = torch.searchsorted(all_target_E, torch.unique(block.target_C))
    target_E, target_Ed = all_target_E[place], all_target_Ed[place]

    def place_of(ids: Tensor) -> Tensor:
        """Where ids stand in the padding, the piece and the targets behind it; 0 for those that do not."""
        inside = (ids >= piece.start) & (ids < piece.stop)
        place = torch.searchsorted(target_E, ids).clamp_(max=len(target_E) - 1)
        behind = torch.where(target_E[place] == ids, place + len(piece) + 1, 0)
        return torch.where(inside, ids - piece.start + 1, behind)

    rivals = piece_pd.new_zeros(1, piece_pd.shape[1])
    behind_E = torch.arange(len(target_E), device=piece_pd.device) + len(piece) + 1
    since = None
    if since_V is not None:
        since = torch.cat([since_V[:1], since_V[piece.start : piece.stop], since_V[target_E]])
    greater, equal = target_rank(
        block.users_Bd,
        torch.cat([rivals, piece_pd, target_Ed]),
        block.row_C,
        place_of(block.target_C),
        own_ids_BN=place_of(block.own_ids_BN),
        own_bonus_BN=block.own_bonus_BN,
        exclude_ids_BN=torch.cat([place_of(block.out_BM), behind_E.expand(len(block.users_Bd), -1)], 1),
        since_V=since,
        time_C=None if since is None else block.time_C,
    )
    return torch.stack([greater, equal], 1)


def _gather(shards: Shards, asked: _Asked) -> tuple[list[_Asked], list[int]]:
    """All workers' blocks and the numbers of their cases; short rows are filled up with padding."""
    device = asked.users_Bd.device
    users, own, out, cases = shards.lengths(
        *(len(asked.users_Bd), asked.own_ids_BN.shape[1], asked.out_BM.shape[1], len(asked.target_C)),
        device=device,
    )
    width = {"own_ids_BN": max(own), "own_bonus_BN": max(own), "out_BM": max(out)}
    columns: list[Sequence[Tensor]] = []
    for field in fields(asked):
        value: Tensor = getattr(asked, field.name)
        if field.name in width:
            value = F.pad(value, (0, width[field.name] - value.shape[1]))
        lengths = cases if field.name.endswith("_C") else users
        columns.append(torch.split(shards.gather_uneven(value, lengths), lengths))
    return [_Asked(*parts) for parts in zip(*columns, strict=True)], cases
