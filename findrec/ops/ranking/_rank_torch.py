"""Counting items above and level with targets by torch's matrix products: any device, no compiler needed.

A tile's scores are screened with a proven error bound, the doubtful pairs scored again in float64. With
`float32` the bound is that of `target_rank`; with `bfloat16` (for hardware that multiplies it faster)
    |fl(x^ . y^) - x . y| <= ||x - x^|| ||y|| + ||x^|| ||y - y^|| + 2 gamma_d ||x^|| ||y^||
where x^ and y^ are the rounded vectors, whose residuals are measured, not estimated, and gamma_d is that of
float32 sums (twice: bfloat16 units add two products at once and flush subnormal numbers); the product's own
rounding to bfloat16 moves a score s by at most 2^-8 |s|.

A user may have K vectors; the score is then the largest of the K inner products. If every product is within
its own bound of its float64 value, the largest product is within the largest bound of the largest value, so
the screen needs nothing but that maximum.

Shape letters: B users, K vectors of a user, T items, C cases, n cases of a slot, b users of a block, d width,
P pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from findrec.ops._tiles import GPU_TILE_BYTES, tile_bytes
from findrec.ops.precision import full_float32
from findrec.ops.ranking.counting import CaseOrder, Counts, sum_true, too_late

SAFE_NORM = 2.0**60  # vectors up to here cannot overflow a float32 product
Kind = Literal["float32", "bfloat16", "float64"]
_PAIRS = 1 << 20  # doubtful pairs scored together
_NORMED = 1 << 10  # vectors at a time on a CPU: a float64 copy of them stays in a cache


def torch_count(
    users_Bd: Tensor,
    items_Td: Tensor,
    row_C: Tensor,
    t_C: Tensor,
    *,
    kind: Kind,
    since_T: Tensor | None = None,
    time_C: Tensor | None = None,
    tile_mib: int = 64,
) -> Counts:
    """How the items compare with the float64 scores `t_C`; `float64` screens nothing (the reference).

    `users_Bd` is `[B, d]`, or `[B, K, d]` where the largest of K inner products is the score.
    """
    counts = Counts(torch.zeros_like(row_C), torch.zeros_like(row_C))
    vectors = users_Bd.shape[1] if users_Bd.dim() == 3 else 1
    user_norm_B = _norms(users_Bd.reshape(-1, users_Bd.shape[-1])).view(len(users_Bd), vectors).amax(1)
    item_norm_T = _norms(items_Td)
    # Written so that NaN is unsafe as well.
    safe_B = (user_norm_B < SAFE_NORM) & (kind != "float64")
    safe_T = item_norm_T < SAFE_NORM
    everything = torch.arange(len(items_Td), device=items_Td.device)
    screened, rest = everything[safe_T], everything[~safe_T]
    order = CaseOrder.of(row_C, len(users_Bd))
    # A score, a comparison and the marks of doubt for each.
    pairs = max(1, tile_bytes(items_Td.device, tile_mib << 20) // (16 * vectors))
    step = max(1, min(len(order.rows), max(1, 256 // vectors), pairs))
    # Narrow tiles stay in a CPU's cache and leave fewer scores to search for doubtful ones; counts are
    # summed in float32, exact up to 2^24.
    tile = max(1, min(pairs // step, 4096 if users_Bd.device.type == "cpu" else 1 << 24))
    with full_float32(users_Bd.device):  # the bounds speak of IEEE sums
        for lo in range(0, len(order.rows), step):
            hi = min(lo + step, len(order.rows))
            rows = order.rows[lo:hi]
            cases = list(order.slots(lo, hi))
            slow = everything
            if bool(safe_B[rows].all()):
                slow = rest
                screen = _Screen(users_Bd[rows], user_norm_B[rows], kind)
                doubtful: list[tuple[Tensor, Tensor]] = []
                for a in range(0, len(screened), tile):
                    some = screened[a : a + tile]
                    tame_td = items_Td[some] if len(rest) else items_Td[a : a + tile]
                    scores_bT, bound_b = screen.scores(tame_td, item_norm_T[some])
                    for case_n in cases:
                        late_nT = _late(since_T, time_C, some, case_n)
                        n = len(case_n)
                        decided = _decide(
                            scores_bT[:n], bound_b[:n], case_n, t_C, late_nT, counts, screen.slip
                        )
                        doubtful.append((decided[0], some[decided[1]]))
                    if sum(len(case_P) for case_P, _ in doubtful) > _PAIRS:
                        _rescore(users_Bd, items_Td, row_C, t_C, doubtful, counts)
                _rescore(users_Bd, items_Td, row_C, t_C, doubtful, counts)
            for a in range(0, len(slow), max(1, tile // 4)):
                some = slow[a : a + max(1, tile // 4)]
                scores_bT = grid64(users_Bd[rows], items_Td[some])
                for case_n in cases:
                    t_n1 = t_C[case_n][:, None]
                    scores_nT = scores_bT[: len(case_n)]
                    if (late_nT := _late(since_T, time_C, some, case_n)) is not None:
                        scores_nT = scores_nT.masked_fill(late_nT, torch.nan)  # neither above nor level
                    counts.greater[case_n] += (scores_nT > t_n1).sum(1)
                    counts.equal[case_n] += (scores_nT == t_n1).sum(1)
    return counts


def _norms(x_Nd: Tensor) -> Tensor:
    """`[N]` float64; torch makes a float64 copy of what it is given, so it is given a little at a time."""
    norm_N = x_Nd.new_empty(len(x_Nd), dtype=torch.float64)
    # Into one tensor: small results between the large copies would keep the memory of each from being reused.
    size = _NORMED if x_Nd.device.type == "cpu" else max(1, GPU_TILE_BYTES // (8 * max(1, x_Nd.shape[1])))
    parts = (torch.split(x, size) for x in (x_Nd, norm_N))
    for x_nd, norm_n in zip(*parts, strict=True):
        torch.linalg.vector_norm(x_nd, dim=1, dtype=torch.float64, out=norm_n)
    return norm_N


def score_pairs(x_Pd: Tensor, y_Pd: Tensor) -> Tensor:
    """The float64 scores `[P]` of pairs of float32 vectors, summed in the order of the width.

    With `x` of shape `[P, K, d]` the largest of the K scores; NaN where one of them is.
    """
    if x_Pd.dim() == 3:
        return torch.stack([score_pairs(x_Pd[:, k], y_Pd) for k in range(x_Pd.shape[1])]).amax(0)
    x_dP, y_dP = x_Pd.T.double(), y_Pd.T.double()
    acc = x_dP.new_zeros(x_dP.shape[1])
    for k in range(len(x_dP)):
        acc.addcmul_(x_dP[k], y_dP[k])
    return acc


def grid64(x_bd: Tensor, y_td: Tensor) -> Tensor:
    """All scores `[b, t]` of users (`[b, d]` or `[b, K, d]`) and items, in the order of `score_pairs`."""
    if x_bd.dim() == 3:
        return torch.stack([grid64(x_bd[:, k], y_td) for k in range(x_bd.shape[1])]).amax(0)
    x_bd, y_dt = x_bd.double(), y_td.T.double()
    acc = x_bd.new_zeros(len(x_bd), y_dt.shape[1])
    for k in range(x_bd.shape[1]):
        acc.addcmul_(x_bd[:, k : k + 1], y_dt[k])
    return acc


class _Screen:
    """Approximate scores of a block of users, and what separates them from the float64 ones at most."""

    def __init__(self, users_bd: Tensor, norm_b: Tensor, kind: Kind) -> None:
        self._users_bd, self._norm_b = users_bd, norm_b
        self._half = kind == "bfloat16"
        self.slip = 2.0**-8 if self._half else 0.0  # of a score, by its own rounding
        if self._half:
            self._half_bd = users_bd.bfloat16()
            self._left_b = _residual(users_bd, self._half_bd)

    def scores(self, items_td: Tensor, norm_t: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, t]` float32, and their bounds `[b]` float64."""
        width = items_td.shape[1]
        single, double = (width * u / (1 - width * u) for u in (2.0**-24, 2.0**-53))
        x_b, y = self._norm_b, norm_t.max()
        # Norms are rounded too (the factor); the last term covers subnormal numbers flushed to zero.
        tiny_b = width * 2.0**-125 * (1 + x_b + y)
        if not self._half:
            bound_b = (single + double) * x_b * y
            return _largest(self._users_bd @ items_td.T), bound_b * (1 + 1e-6) + tiny_b
        half_td = items_td.bfloat16()
        left = _residual(items_td, half_td).max()
        hat_b, hat = x_b + self._left_b, y + left
        bound_b = self._left_b * y + hat_b * left + 2 * single * hat_b * hat + double * x_b * y
        return _largest((self._half_bd @ half_td.T).float()), bound_b * (1 + 1e-6) + 4 * tiny_b


def _residual(x_nd: Tensor, rounded_nd: Tensor) -> Tensor:
    norm_n: Tensor = torch.linalg.vector_norm(x_nd - rounded_nd.float(), dim=-1, dtype=torch.float64)
    return norm_n.amax(1) if norm_n.dim() == 2 else norm_n


def _largest(scores: Tensor) -> Tensor:
    """`[b, t]` from the scores of one vector of each user `[b, t]`, or of K `[b, K, t]`."""
    return scores.amax(1) if scores.dim() == 3 else scores


def _late(since_T: Tensor | None, time_C: Tensor | None, some: Tensor, case_n: Tensor) -> Tensor | None:
    """`[n, t]` bool, what is missing among some items; None where nothing is."""
    if since_T is None or time_C is None:
        return None
    return too_late(since_T[some], time_C[case_n])


def _decide(
    scores_nT: Tensor,
    bound_n: Tensor,
    case_n: Tensor,
    t_C: Tensor,
    late_nT: Tensor | None,
    counts: Counts,
    slip: float,
) -> tuple[Tensor, Tensor]:
    """Count what the screen decides of one tile, for one case of each row; returns the doubtful pairs.

    They are given as cases `[P]` and columns of the tile `[P]`.
    """
    t_n = t_C[case_n]
    if late_nT is not None:
        scores_nT = scores_nT.masked_fill(late_nT, torch.nan)  # neither above, nor level, nor in doubt
    # A score s may have slipped by `slip * |s|`: s (1 - slip sign s) is what it was at least.
    high_n, low_n = t_n + bound_n, t_n - bound_n
    high_n = high_n / (1 - slip * high_n.sign())
    low_n = low_n / (1 + slip * low_n.sign())
    # Rounding to float32 may step inwards by half a unit; one unit outwards undoes it.
    high_n, low_n = high_n.float(), low_n.float()
    high_n = torch.nextafter(high_n, torch.full_like(high_n, torch.inf))
    low_n = torch.nextafter(low_n, torch.full_like(low_n, -torch.inf))
    above_n = sum_true(torch.gt, scores_nT, high_n)
    counts.greater[case_n] += above_n
    open_n = (sum_true(torch.ge, scores_nT, low_n) > above_n).nonzero()[:, 0]
    near = scores_nT[open_n]
    n, column_P = ((near >= low_n[open_n, None]) & (near <= high_n[open_n, None])).nonzero(as_tuple=True)
    return case_n[open_n[n]], column_P


def _rescore(
    users_Bd: Tensor,
    items_Td: Tensor,
    row_C: Tensor,
    t_C: Tensor,
    doubtful: list[tuple[Tensor, Tensor]],
    counts: Counts,
) -> None:
    """Count the doubtful pairs by their float64 scores, and forget them."""
    if not doubtful:
        return
    all_P, items_P = (torch.cat(parts) for parts in zip(*doubtful, strict=True))
    step = max(1, (1 << 21) // max(1, users_Bd[:1].numel()))
    for lo in range(0, len(all_P), step):
        case_P, item_P = all_P[lo : lo + step], items_P[lo : lo + step]
        score_P = score_pairs(users_Bd[row_C[case_P]], items_Td[item_P])
        counts.greater.index_add_(0, case_P, (score_P > t_C[case_P]).long())
        counts.equal.index_add_(0, case_P, (score_P == t_C[case_P]).long())
    doubtful.clear()
