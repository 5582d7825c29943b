"""How many catalogue items outrank each target, and how many tie with it: exact, and fast.

The score of a pair is the float64 sum, in the fixed order k = 0..d-1, of the products x_k * y_k of the
stored float32 vectors, plus an optional bonus. Such a product is exact in float64, so the score is the
same number on every device, in any block and next to any neighbours, fused multiply-add or not.

A cheaper product only screens. With a proven bound on how far it may be from the score, every pair whose
product is further than that from the target's score is decided; the few others are scored in float64.

* `int16` (compiled, the default on a CPU): a user x and a tile of items y are rounded to multiples of a unit,
  x^ = u q with whole q of at most 16 bits and |q| < 2^15.5. Sums of their products are then exact in 32 bits
  (|sum| <= |q_x| |q_y| < 2^31 by Cauchy-Schwarz, for any part of the sum too), so only rounding separates
      |x^ . y^ - x . y| <= ||x - x^|| ||y|| + ||x^|| ||y - y^||,   ||x - x^|| <= u sqrt(d) / 2.
  Twice as many of these products as float32 ones fit into an instruction, and the bound is 16 times tighter
  than that of bfloat16.
* `float32` (compiled) and `torch` (any device): a float32 sum, whatever its order, is within
      |fl(x . y) - x . y| <= gamma_d |x|^T |y| <= gamma_d ||x|| ||y||,   gamma_d = d u / (1 - d u), u = 2^-24
  (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the second step is Cauchy-Schwarz).
* `bfloat16` (torch): for hardware that multiplies it much faster; see `_rank_torch`.

The float64 score obeys the second bound with u = 2^-53, which is added to each.

A user may have K vectors (interests); the score of an item is then the largest of the K inner products, taken
before it is compared with the target's. `torch` screens it; the bound is the largest of the K bounds.

Shape letters: B users, K vectors of a user, V items (ids 1..V), C cases (a user and a target), N own items of
a user, d width, P pairs, S special pairs (a user's own and excluded items).
"""

from __future__ import annotations

import torch
from torch import Tensor

from findrec.ops.ranking._rank_special import Offer, Specials
from findrec.ops.ranking._rank_torch import score_pairs
from findrec.ops.ranking.counting import find_keys
from findrec.ops.ranking.item_rows import Impl, ItemRows, TensorRows
from findrec.ops.ranking.rules import ALL_COMPETE, Rules


def target_rank(
    users_Bd: Tensor,
    items_Vd: Tensor | ItemRows,
    row_C: Tensor,
    target_C: Tensor,
    *,
    rules: Rules = ALL_COMPETE,
    tile_mib: int = 64,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact counts of items above and level with each target, over the whole catalogue.

    Args:
        users_Bd: float32 user vectors, `[B, d]`, or `[B, K, d]` where the largest of K inner products is
            the score (NaN where one of them is).
        items_Vd: float32 `[V + 1, d]` item vectors; row 0 is padding and never counts. Or `ItemRows`: a
            catalogue in a file or in shards.
        row_C: int64 `[C]`, the row of `users_Bd` each case belongs to.
        target_C: int64 `[C]`, the target item (1..V) of each case.
        rules: bonuses of single items, excluded items and times of availability. A case's own target always
            competes.
        tile_mib: the working memory of torch's forms in MiB; the compiled ones need hardly any. No result
            depends on it.
        impl: a screen as above (all give the same counts); `exact` scores every pair in float64 (the
            reference); `auto` is `int16` on a CPU with a compiler, else `torch`.

    Returns:
        `(greater, equal)`, int64 `[C]`; `equal` leaves out the target itself. The expected rank is
        `1 + greater + equal / 2`. A target whose score is NaN ranks last; another item's NaN never counts.

    Raises `ValueError` for vectors of another dtype than float32 (the score is defined by those numbers) and
    for an `impl` that cannot work here.
    """
    items = TensorRows(items_Vd) if isinstance(items_Vd, Tensor) else items_Vd
    _check(users_Bd, items, row_C, target_C)
    rules.check()
    if users_Bd.dim() == 3 and users_Bd.shape[1] == 1:
        users_Bd = users_Bd[:, 0]
    num_users, num_items = len(users_Bd), items.num_items
    offer = Offer(rules.since_V, rules.time_C)
    special = Specials.of(num_users, num_items, rules, users_Bd.device)
    base_C = dot64(users_Bd, items, row_C, target_C)
    index_C, known_C = find_keys(special.key, row_C * (num_items + 1) + target_C)
    t_C = base_C.clone()
    if len(special.key):
        t_C += torch.where(known_C, special.bonus[index_C], 0.0)

    finite_C = torch.where(t_C.isnan(), torch.inf, t_C)  # a NaN target is set right at the end
    counts = items.count(
        users_Bd,
        row_C,
        finite_C,
        since_V=rules.since_V,
        time_C=rules.time_C,
        impl=impl,
        tile_mib=tile_mib,
    )
    # The target was compared with itself.
    met_C = offer.has(target_C, torch.arange(len(row_C), device=row_C.device))
    counts.greater -= ((base_C > finite_C) & met_C).long()
    counts.equal -= ((base_C == finite_C) & met_C).long()
    if len(special.key):
        base_S = dot64(users_Bd, items, special.row, special.item)
        special.correct(base_S, row_C, target_C, finite_C, offer, counts)

    lost = t_C.isnan().nonzero()[:, 0]
    if len(lost):
        rivals = offer.size(lost, num_items) - met_C[lost].long()
        for index_P, s_P in special.pairs(row_C[lost]):
            out_P = ~special.counted[s_P] & (special.item[s_P] != target_C[lost[index_P]])
            out_P &= offer.has(special.item[s_P], lost[index_P])
            rivals.index_add_(0, index_P, -out_P.long())
        counts.greater[lost], counts.equal[lost] = rivals, 0
    return counts.greater, counts.equal


def dot64(users_Bd: Tensor, items_Vd: Tensor | ItemRows, row_P: Tensor, item_P: Tensor) -> Tensor:
    """The float64 scores of pairs `(users_Bd[row_P], items_Vd[item_P])`, summed in the order of the width."""
    items = TensorRows(items_Vd) if isinstance(items_Vd, Tensor) else items_Vd
    step = max(1, (1 << 21) // max(1, users_Bd[:1].numel()))
    parts = [
        score_pairs(users_Bd[row_P[lo : lo + step]], items.rows(item_P[lo : lo + step]))
        for lo in range(0, len(row_P), step)
    ]
    return torch.cat(parts) if parts else users_Bd.new_zeros(0, dtype=torch.float64)


def _check(users_Bd: Tensor, items: ItemRows, row_C: Tensor, target_C: Tensor) -> None:
    if users_Bd.dtype != torch.float32:
        raise ValueError(f"user vectors must be float32, got {users_Bd.dtype}: convert them first")
    if users_Bd.dim() == 3 and not users_Bd.shape[1]:
        raise ValueError("every user needs one vector or more")
    if users_Bd.shape[-1] != items.width:
        raise ValueError(f"users are {users_Bd.shape[-1]} wide, items {items.width}")
    if len(row_C) != len(target_C):
        raise ValueError(f"{len(row_C)} rows for {len(target_C)} targets")
    if len(row_C) and not (int(row_C.min()) >= 0 and int(row_C.max()) < len(users_Bd)):
        raise ValueError(f"rows must lie in 0..{len(users_Bd) - 1}")
    if len(target_C) and not (int(target_C.min()) >= 1 and int(target_C.max()) <= items.num_items):
        raise ValueError(f"targets must lie in 1..{items.num_items}; 0 is padding")
