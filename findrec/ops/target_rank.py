"""How many catalogue items outrank each target, and how many tie with it: exact, and fast.

The score of a pair is the float64 sum, in the fixed order k = 0..d-1, of the products x_k * y_k of the
stored float32 vectors, plus an optional bonus. Such a product is exact in float64, so the score is the
same number on every device, in any block and next to any neighbours, fused multiply-add or not.

Screen: a float32 matrix product, whatever its order of summation, is within
    |fl(x . y) - x . y| <= gamma_d |x|^T |y| <= gamma_d ||x|| ||y||,   gamma_d = d u / (1 - d u), u = 2^-24
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the second step is Cauchy-Schwarz).
The float64 score obeys the same bound with u = 2^-53. A pair further than the sum of both from the
target's score is decided by the screen, the few others are scored again in float64; the counts are exact.

Shape letters: B users, V items (ids 1..V), C cases (a user and a target), N own items of a user, d width,
P pairs, S special pairs (a user's own and excluded items).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from findrec.ops.counting import CaseOrder, Counts, find_keys, pair_keys, sum_true, too_late

_SAFE_NORM = 2.0**60  # vectors up to here cannot overflow a float32 product
_PAIRS = 1 << 20  # (case, special item) pairs corrected at once


def target_rank(
    users_Bd: Tensor,
    items_Vd: Tensor,
    row_C: Tensor,
    target_C: Tensor,
    *,
    own_ids_BN: Tensor | None = None,
    own_bonus_BN: Tensor | None = None,
    exclude_ids_BN: Tensor | None = None,
    since_V: Tensor | None = None,
    time_C: Tensor | None = None,
    tile_mib: int = 64,
    impl: Literal["auto", "screened", "exact"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact counts of items above and level with each target, over the whole catalogue.

    Args:
        users_Bd: float32 `[B, d]` user vectors.
        items_Vd: float32 `[V + 1, d]` item vectors; row 0 is padding and never counts.
        row_C: int64 `[C]`, the row of `users_Bd` each case belongs to.
        target_C: int64 `[C]`, the target item (1..V) of each case.
        own_ids_BN: int64 `[B, N]` items whose score gets a bonus, 0-padded; of repeats the first counts.
        own_bonus_BN: float32 `[B, N]` that bonus.
        exclude_ids_BN: int64 `[B, M]` items that do not compete (the seen filter), 0-padded. A case's own
            target is never excluded.
        since_V: int64 `[V + 1]`, with `time_C`: item v competes in the cases with `time_C >= since_V[v]`.
        time_C: int64 `[C]`; a case's own target is there whatever its time.
        tile_mib: the working memory of the screen in MiB; no result depends on it.
        impl: `screened` as above, `exact` scores every pair in float64 (the reference), `auto` is `screened`.

    Returns:
        `(greater, equal)`, int64 `[C]`; `equal` leaves out the target itself. The expected rank is
        `1 + greater + equal / 2`. A target whose score is NaN ranks last; another item's NaN never counts.
    """
    _check(users_Bd, items_Vd, row_C, target_C)
    num_users, num_items = len(users_Bd), len(items_Vd) - 1
    if (since_V is None) != (time_C is None):
        raise ValueError("since_V and time_C must be given together")
    offer = _Offer(since_V, time_C)
    everyone = torch.arange(len(row_C), device=row_C.device)
    special = _specials(num_users, num_items, own_ids_BN, own_bonus_BN, exclude_ids_BN, users_Bd.device)
    base_C = dot64(users_Bd, items_Vd, row_C, target_C)
    place_C, known_C = find_keys(special.key, row_C * (num_items + 1) + target_C)
    t_C = base_C.clone()
    if len(special.key):
        t_C += torch.where(known_C, special.bonus[place_C], 0.0)

    counts = Counts(torch.zeros_like(row_C), torch.zeros_like(row_C))
    finite_C = torch.where(t_C.isnan(), torch.inf, t_C)  # a NaN target is set right at the end
    with _full_float32(users_Bd.device):
        _count_catalogue(users_Bd, items_Vd, row_C, finite_C, offer, counts, tile_mib, impl == "exact")
    met_C = offer.has(target_C, everyone)  # the target has met itself
    counts.greater -= ((base_C > finite_C) & met_C).long()
    counts.equal -= ((base_C == finite_C) & met_C).long()
    if len(special.key):
        _correct(users_Bd, items_Vd, row_C, target_C, finite_C, offer, special, counts)

    lost = t_C.isnan().nonzero()[:, 0]
    if len(lost):
        rivals = offer.size(lost, num_items) - met_C[lost].long()
        for place_P, s_P in _special_pairs(special, row_C[lost]):
            out_P = ~special.counted[s_P] & (special.item[s_P] != target_C[lost[place_P]])
            out_P &= offer.has(special.item[s_P], lost[place_P])
            rivals.index_add_(0, place_P, -out_P.long())
        counts.greater[lost], counts.equal[lost] = rivals, 0
    return counts.greater, counts.equal


@dataclass(frozen=True)
class _Offer:
    """Which items compete in which cases: all of them, or those that are there at the case's time."""

    since_V: Tensor | None
    time_C: Tensor | None

    def has(self, item_P: Tensor, case_P: Tensor) -> Tensor:
        """`[P]` bool for pairs of an item and a case."""
        if self.since_V is None or self.time_C is None:
            return torch.ones_like(item_P, dtype=torch.bool)
        return self.since_V[item_P] <= self.time_C[case_P]

    def late(self, item_T: Tensor, case_n: Tensor) -> Tensor | None:
        """`[n, T]` bool, what is missing in a tile of items; None where nothing is."""
        if self.since_V is None or self.time_C is None:
            return None
        return too_late(self.since_V[item_T], self.time_C[case_n])

    def size(self, case_n: Tensor, num_items: int) -> Tensor:
        """`[n]` int64, how many of the items 1..V compete in some cases."""
        if self.since_V is None or self.time_C is None:
            return torch.full_like(case_n, num_items)
        return torch.searchsorted(self.since_V[1:].sort().values, self.time_C[case_n], right=True)


def dot64(users_Bd: Tensor, items_Vd: Tensor, row_P: Tensor, item_P: Tensor) -> Tensor:
    """The float64 scores of pairs `(users_Bd[row_P], items_Vd[item_P])`, summed in the order of the width."""
    width = users_Bd.shape[1]
    step = max(1, (1 << 21) // max(1, width))
    parts = []
    for lo in range(0, len(row_P), step):
        x_dP = users_Bd[row_P[lo : lo + step]].T.double()
        y_dP = items_Vd[item_P[lo : lo + step]].T.double()
        acc = x_dP.new_zeros(x_dP.shape[1])
        for k in range(width):
            acc.addcmul_(x_dP[k], y_dP[k])
        parts.append(acc)
    return torch.cat(parts) if parts else users_Bd.new_zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class _Specials:
    """Pairs of a user and an own or excluded item, ascending in `key = row * (V + 1) + item`."""

    key: Tensor  # [S] int64
    row: Tensor  # [S]
    item: Tensor  # [S]
    bonus: Tensor  # [S] float64, 0 for items that are only excluded
    counted: Tensor  # [S] bool, False for excluded items
    start: Tensor  # [B + 1] where each row's pairs begin


def _specials(
    num_users: int,
    num_items: int,
    own_ids_BN: Tensor | None,
    own_bonus_BN: Tensor | None,
    exclude_ids_BN: Tensor | None,
    device: torch.device,
) -> _Specials:
    if (own_ids_BN is None) != (own_bonus_BN is None):
        raise ValueError("own_ids_BN and own_bonus_BN must be given together")
    stride = num_items + 1
    none = torch.zeros(0, dtype=torch.int64, device=device)
    own, bonus = none, none.double()
    if own_ids_BN is not None and own_bonus_BN is not None:
        own, place = pair_keys(own_ids_BN, stride).sort(stable=True)
        bonus = own_bonus_BN[own_ids_BN > 0].double()[place]
        first = torch.ones_like(own, dtype=torch.bool)
        first[1:] = own[1:] != own[:-1]
        own, bonus = own[first], bonus[first]
    out = torch.unique(pair_keys(exclude_ids_BN, stride)) if exclude_ids_BN is not None else none
    key = torch.unique(torch.cat([own, out]))
    place, is_own = find_keys(own, key)
    row = key // stride
    return _Specials(
        key=key,
        row=row,
        item=key % stride,
        bonus=torch.where(is_own, bonus[place], 0.0) if len(own) else torch.zeros_like(key).double(),
        counted=~find_keys(out, key)[1],
        start=torch.searchsorted(row, torch.arange(num_users + 1, device=device)),
    )


def _count_catalogue(
    users_Bd: Tensor,
    items_Vd: Tensor,
    row_C: Tensor,
    t_C: Tensor,
    offer: _Offer,
    counts: Counts,
    tile_mib: int,
    exact: bool,
) -> None:
    """Add to `counts` how items 1..V compare with `t_C` by their scores without bonus."""
    user_norm_B = torch.linalg.vector_norm(users_Bd, dim=1, dtype=torch.float64)
    item_norm_V = torch.linalg.vector_norm(items_Vd, dim=1, dtype=torch.float64)
    # Written so that NaN is unsafe as well.
    safe_B = (user_norm_B < _SAFE_NORM) & (not exact)
    safe_V = item_norm_V < _SAFE_NORM
    everything = torch.arange(1, len(items_Vd), device=items_Vd.device)
    screened, rest = everything[safe_V[1:]], everything[~safe_V[1:]]
    tame_Vd, norm_V = (
        (items_Vd[1:], item_norm_V[1:]) if not len(rest) else (items_Vd[screened], item_norm_V[screened])
    )
    order = CaseOrder.of(row_C, len(users_Bd))
    pairs = max(1, (tile_mib << 20) // 16)  # a score, a comparison and the marks of doubt for each
    step = max(1, min(len(order.rows), 256, pairs))
    # Narrow tiles stay in a CPU's cache and leave fewer scores to search for doubtful ones; counts are
    # summed in float32, exact up to 2^24.
    tile = max(1, min(pairs // step, 4096 if users_Bd.device.type == "cpu" else 1 << 24))
    for lo in range(0, len(order.rows), step):
        hi = min(lo + step, len(order.rows))
        rows = order.rows[lo:hi]
        cases = list(order.slots(lo, hi))
        if bool(safe_B[rows].all()):
            slow = rest
            doubtful: list[tuple[Tensor, Tensor]] = []
            for a in range(0, len(screened), tile):
                b = min(a + tile, len(screened))
                scores_bT = users_Bd[rows] @ tame_Vd[a:b].T
                bound_b = _error_bound(users_Bd.shape[1], user_norm_B[rows], norm_V[a:b].max())
                for case_n in cases:
                    n = len(case_n)
                    late_nT = offer.late(screened[a:b], case_n)
                    case_P, place_P = _screen(
                        scores_bT[:n], bound_b[:n], case_n, t_C, late_nT, counts.greater
                    )
                    doubtful.append((case_P, screened[a:b][place_P]))
                if sum(len(case_P) for case_P, _ in doubtful) > _PAIRS:
                    _rescore(users_Bd, items_Vd, row_C, t_C, doubtful, counts)
            _rescore(users_Bd, items_Vd, row_C, t_C, doubtful, counts)
        else:
            slow = everything
        for a in range(0, len(slow), max(1, tile // 4)):
            some = slow[a : a + max(1, tile // 4)]
            scores_bT = _grid64(users_Bd[rows], items_Vd[some])
            for case_n in cases:
                t_n1 = t_C[case_n][:, None]
                scores_nT = scores_bT[: len(case_n)]
                if (late_nT := offer.late(some, case_n)) is not None:
                    scores_nT = scores_nT.masked_fill(late_nT, torch.nan)  # neither above nor level
                counts.greater[case_n] += (scores_nT > t_n1).sum(1)
                counts.equal[case_n] += (scores_nT == t_n1).sum(1)


def _error_bound(width: int, user_norm_b: Tensor, item_norm: Tensor) -> Tensor:
    """What separates a float32 score from its float64 one at most (see the head of this file)."""
    gamma = sum(width * u / (1 - width * u) for u in (2.0**-24, 2.0**-53))
    # Norms are rounded too (first factor); the last term covers subnormal numbers flushed to zero.
    return gamma * (1 + 1e-6) * user_norm_b * item_norm + width * 2.0**-125 * (1 + user_norm_b + item_norm)


def _screen(
    scores_nT: Tensor,
    bound_n: Tensor,
    case_n: Tensor,
    t_C: Tensor,
    late_nT: Tensor | None,
    greater_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Count what the screen decides of one tile, for one case of each row; returns the doubtful pairs.

    They are given as cases `[P]` and places in the tile `[P]`.
    """
    t_n = t_C[case_n]
    if late_nT is not None:
        scores_nT = scores_nT.masked_fill(late_nT, torch.nan)  # neither above, nor level, nor in doubt
    # Rounding to float32 may step inwards by half a unit; one unit outwards undoes it.
    high_n = torch.nextafter((t_n + bound_n).float(), t_n.new_tensor(torch.inf).float())
    low_n = torch.nextafter((t_n - bound_n).float(), t_n.new_tensor(-torch.inf).float())
    above_n = sum_true(torch.gt, scores_nT, high_n)
    greater_C[case_n] += above_n
    open_n = (sum_true(torch.ge, scores_nT, low_n) > above_n).nonzero()[:, 0]
    near = scores_nT[open_n]
    n, place_P = ((near >= low_n[open_n, None]) & (near <= high_n[open_n, None])).nonzero(as_tuple=True)
    return case_n[open_n[n]], place_P


def _rescore(
    users_Bd: Tensor,
    items_Vd: Tensor,
    row_C: Tensor,
    t_C: Tensor,
    doubtful: list[tuple[Tensor, Tensor]],
    counts: Counts,
) -> None:
    """Count the doubtful pairs by their float64 scores, and forget them."""
    if doubtful:
        case_P, item_P = (torch.cat(parts) for parts in zip(*doubtful, strict=True))
        score_P = dot64(users_Bd, items_Vd, row_C[case_P], item_P)
        counts.greater.index_add_(0, case_P, (score_P > t_C[case_P]).long())
        counts.equal.index_add_(0, case_P, (score_P == t_C[case_P]).long())
        doubtful.clear()


def _grid64(x_bd: Tensor, y_td: Tensor) -> Tensor:
    """All scores of some users and items, in the order of `dot64`."""
    x_bd, y_dt = x_bd.double(), y_td.T.double()
    acc = x_bd.new_zeros(len(x_bd), y_dt.shape[1])
    for k in range(x_bd.shape[1]):
        acc.addcmul_(x_bd[:, k : k + 1], y_dt[k])
    return acc


def _correct(
    users_Bd: Tensor,
    items_Vd: Tensor,
    row_C: Tensor,
    target_C: Tensor,
    t_C: Tensor,
    offer: _Offer,
    special: _Specials,
    counts: Counts,
) -> None:
    """Take own and excluded items out of the counts, and own ones back in with their bonus."""
    base_S = dot64(users_Bd, items_Vd, special.row, special.item)
    final_S = base_S + special.bonus
    for case_P, s_P in _special_pairs(special, row_C):
        base_P, final_P, t_P = base_S[s_P], final_S[s_P], t_C[case_P]
        counted_P = special.counted[s_P]
        item_P = special.item[s_P]
        rival_P = (item_P != target_C[case_P]) & offer.has(item_P, case_P)
        greater_P = ((final_P > t_P) & counted_P).long() - (base_P > t_P).long()
        equal_P = ((final_P == t_P) & counted_P).long() - (base_P == t_P).long()
        counts.greater.index_add_(0, case_P, greater_P * rival_P)
        counts.equal.index_add_(0, case_P, equal_P * rival_P)


def _special_pairs(special: _Specials, row_C: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of a case and a special item of its row, as places `[P]` in `row_C` and in `special`."""
    first_C, size_C = special.start[row_C], (special.start[1:] - special.start[:-1])[row_C]
    ends = size_C.cumsum(0)
    lo = 0
    while lo < len(row_C):
        before = int(ends[lo - 1]) if lo else 0
        hi = max(lo + 1, int(torch.searchsorted(ends, before + _PAIRS, right=True)))
        size = size_C[lo:hi]
        case_P = torch.repeat_interleave(torch.arange(lo, hi, device=row_C.device), size)
        within = torch.arange(len(case_P), device=row_C.device) - (ends[lo:hi] - size - before)[case_P - lo]
        yield case_P, first_C[case_P] + within
        lo = hi


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Switch TF32, bfloat16 products and autocast off: the bound speaks of IEEE float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(users_Bd: Tensor, items_Vd: Tensor, row_C: Tensor, target_C: Tensor) -> None:
    if users_Bd.dtype != torch.float32 or items_Vd.dtype != torch.float32:
        raise ValueError(f"vectors must be float32, got {users_Bd.dtype} and {items_Vd.dtype}")
    if users_Bd.shape[1] != items_Vd.shape[1]:
        raise ValueError(f"users are {users_Bd.shape[1]} wide, items {items_Vd.shape[1]}")
    if len(row_C) != len(target_C):
        raise ValueError(f"{len(row_C)} rows for {len(target_C)} targets")
    if len(row_C) and not (int(row_C.min()) >= 0 and int(row_C.max()) < len(users_Bd)):
        raise ValueError(f"rows must lie in 0..{len(users_Bd) - 1}")
    if len(target_C) and not (int(target_C.min()) >= 1 and int(target_C.max()) < len(items_Vd)):
        raise ValueError(f"targets must lie in 1..{len(items_Vd) - 1}; 0 is padding")
