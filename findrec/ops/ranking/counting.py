"""Count, for each case, the values of its user's row that lie above the target's.

The ranker of inner products (`target_rank`) and that of all other scorers (`rank_dense`) share two
optimisations: cases are processed in slots (the k-th case of every user at once, a leading slice of the
tile), and comparisons are summed as float32.

Shape letters: B users, T items of a tile, C cases, n users of a slot, S excluded pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from findrec.ops._tiles import tile_bytes

EXCLUDED = torch.iinfo(torch.int64).min  # key of an item that does not count


def rank_dense(
    keys: Callable[[int, int], Tensor],
    num_items: int,
    row_C: Tensor,
    target_C: Tensor,
    *,
    num_users: int,
    exclude_ids_BN: Tensor | None = None,
    since_V: Tensor | None = None,
    time_C: Tensor | None = None,
    tile_mib: int = 64,
) -> tuple[Tensor, Tensor]:
    """Items above and equal to each target for any scorer, as `target_rank` counts them.

    `keys(lo, hi)` returns int64 order keys `[B, hi - lo]` of the items lo..hi-1 in a new tensor.

    Keys are compared as integers, so an order by (score, popularity) packed into one key is exact; a key
    must be above `EXCLUDED`. The catalogue is traversed twice in tiles (once for the targets' keys), or
    once where one tile holds it. `since_V` and `time_C` are those of `target_rank`.
    """
    pair_bytes = 24 if since_V is None else 40
    tile = max(1, tile_bytes(row_C.device, tile_mib << 20) // (pair_bytes * max(1, num_users)))
    spans = [(lo, min(lo + tile, num_items + 1)) for lo in range(1, num_items + 1, tile)]
    order = CaseOrder.of(row_C, num_users)
    key_C = torch.zeros_like(row_C)
    for lo, hi in spans:
        key_BT = keys(lo, hi)
        inside_C = (target_C >= lo) & (target_C < hi)
        key_C[inside_C] = key_BT[row_C[inside_C], target_C[inside_C] - lo]
    stride = num_items + 1
    excluded_S = (
        torch.unique(pair_keys(exclude_ids_BN, stride)) if exclude_ids_BN is not None else row_C.new_zeros(0)
    )
    counts = Counts(torch.zeros_like(row_C), torch.zeros_like(row_C))
    for lo, hi in spans:
        if len(spans) > 1:
            key_BT = keys(lo, hi)
        item_S = excluded_S % stride
        inside_S = (item_S >= lo) & (item_S < hi)
        key_BT[(excluded_S // stride)[inside_S], item_S[inside_S] - lo] = EXCLUDED
        key_BT = key_BT[order.rows]
        for case_n in order.slots(0, len(order.rows)):
            key_nT = key_BT[: len(case_n)]
            if since_V is not None and time_C is not None:
                late_nT = too_late(since_V[lo:hi], time_C[case_n])
                key_nT = key_nT if late_nT is None else key_nT.masked_fill(late_nT, EXCLUDED)
            above_n = sum_true(torch.gt, key_nT, key_C[case_n])
            counts.greater[case_n] += above_n
            counts.equal[case_n] += sum_true(torch.ge, key_nT, key_C[case_n]) - above_n
    _, excluded_C = find_keys(excluded_S, row_C * stride + target_C)
    if since_V is not None and time_C is not None:
        excluded_C |= since_V[target_C] > time_C
    return counts.greater, counts.equal - (
        ~excluded_C
    ).long()  # an excluded target was not compared with itself


def too_late(since_T: Tensor, time_n: Tensor) -> Tensor | None:
    """`[n, T]` bool, which items of a tile appear after the time of which case; None where none does."""
    if not len(since_T) or since_T.max() <= time_n.min():
        return None
    return since_T > time_n[:, None]


@dataclass
class Counts:
    """Items above (`greater`) and equal to the target of each case."""

    greater: Tensor  # [C] int64
    equal: Tensor  # [C] int64


@dataclass(frozen=True)
class CaseOrder:
    """Rows by falling number of cases, so that the k-th cases of all rows are a leading slice of them."""

    rows: Tensor  # [R] rows that have a case
    start: Tensor  # [R] index of a row's first case in `case`
    size: Tensor  # [R] number of cases of a row
    case: Tensor  # [C] cases grouped by row

    @staticmethod
    def of(row_C: Tensor, num_users: int) -> CaseOrder:
        """Group cases by the row `row_C` they belong to."""
        size_B = torch.bincount(row_C, minlength=num_users)
        start_B = size_B.cumsum(0) - size_B
        rows = torch.argsort(size_B, descending=True, stable=True)[: int((size_B > 0).sum())]
        return CaseOrder(rows, start_B[rows], size_B[rows], torch.argsort(row_C, stable=True))

    def slots(self, lo: int, hi: int) -> Iterator[Tensor]:
        """For rows lo..hi-1: the first case of each, then the second of those that have two, ..."""
        size = self.size[lo:hi]
        deepest = int(size[0]) if len(size) else 0
        # Number of rows with a k-th case: sizes are descending, so search their negatives.
        active = torch.searchsorted(-size, torch.arange(deepest, device=size.device) * -1 - 1, right=True)
        for k, n in enumerate(active.tolist()):
            yield self.case[self.start[lo : lo + n] + k]


def pair_keys(ids_BN: Tensor, stride: int) -> Tensor:
    """`row * stride + id` of all ids that are not 0 (padding), row by row."""
    row = torch.arange(len(ids_BN), device=ids_BN.device)[:, None]
    return (row * stride + ids_BN)[ids_BN > 0]


def find_keys(sorted_keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of `wanted` in `sorted_keys`, and whether each is present."""
    if not len(sorted_keys):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    index = torch.searchsorted(sorted_keys, wanted).clamp(max=len(sorted_keys) - 1)
    return index, sorted_keys[index] == wanted


def sum_true(compare: Callable[..., Tensor], values_nT: Tensor, limit_n: Tensor) -> Tensor:
    """Row sums of a comparison. Summing a float32 mask is exact, and five times faster than a bool one."""
    mask = torch.empty(values_nT.shape, dtype=torch.float32, device=values_nT.device)
    compare(values_nT, limit_n[:, None], out=mask)
    return mask.sum(1).long()
