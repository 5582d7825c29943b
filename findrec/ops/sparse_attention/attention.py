"""Causal attention at three granularities: the latest steps, compressed blocks, and selected blocks.

The output at step t is the gated sum of three attentions with keys and values of their own, as in Native
Sparse Attention (arXiv 2502.11089, equation 5):

    o_t = sum over c in {window, block, selected}  g_t^c  softmax(q_t K_c' / sqrt(h)) V_c

* window: the latest w steps, t included;
* block: one key and value for each block of l steps, every d steps, that has ended (the caller compresses
  them, see `cut_blocks`); zero before the first one has;
* selected: the steps of n blocks of l' steps: the query's own, the one before, the first, and those with the
  largest weights in the block branch (`importance.py`), the same for all heads of a group.

Blocks are counted from the beginning of a sequence, so a step sees the same in a longer sequence, and padding
after a sequence changes nothing. With `share` > 1, the first of `share` queries selects for all of them; the
selection is still causal, and keys are gathered n l' times per selection instead of per query.

| impl        | what                                                             | memory               |
|-------------|------------------------------------------------------------------|----------------------|
| `reference` | dense attention in float64 under masks built by loops            | L x L                |
| `fused`     | torch's fused attention over blocks of queries                   | linear: L n l'/share |

`auto` is `fused`. The work per query is w + t/d + n l' keys.
Shape letters: B rows, L steps, P queries, H heads, G groups of heads, N compressed blocks, h width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from findrec.ops.sparse_attention import _fused, _positions, _reference
from findrec.ops.sparse_attention._positions import leader_positions
from findrec.ops.sparse_attention.sizes import SparseSizes

__all__ = ["Branch", "Branches", "Impl", "cut_blocks", "leader_positions", "sparse_attention"]

Impl = Literal["auto", "reference", "fused"]


@dataclass(frozen=True)
class Branch:
    """Queries, keys and values of one branch, and the weight of its output."""

    q: Tensor  # [B, L, H, h], or [B, P, H, h] with positions
    k: Tensor  # [B, L, G, h]; of the block branch [B, N, G, h]
    v: Tensor  # like k
    gate: Tensor | None  # [B, L or P, H]; None: not in the sum (a block branch that only scores blocks)


@dataclass(frozen=True)
class Branches:
    """The branches to compute; without `gate`, `block` only serves to select blocks."""

    window: Branch | None = None  # the latest steps
    block: Branch | None = None  # compressed blocks; needed with `selected`
    selected: Branch | None = None  # selected blocks

    def given(self) -> dict[str, Branch]:
        """The branches that are not None, by name."""
        return {name: branch for name, branch in vars(self).items() if branch is not None}


def sparse_attention(
    branches: Branches,
    sizes: SparseSizes,
    *,
    position_BP: Tensor | None = None,
    leader_q: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The gated sum `[B, L, H, h]` of the branches.

    Args:
        branches: queries, keys, values and gates of each branch.
        sizes: sizes of blocks, of the window and of the selection.
        position_BP: `[B, P]` int64; computes `[B, P, H, h]` at these positions only, whose queries and gates
            the branches then hold.
        leader_q: `[B, P, H, h]`, queries of the block branch at `leader_positions(position_BP, sizes)`;
            needed for selected blocks at positions if `sizes.share` > 1.
        impl: see the table of this module; positions have one implementation.

    Raises `ValueError` for shapes that do not fit, branches that are missing or an unknown `impl`.
    """
    _check(branches, sizes, position_BP, leader_q, impl)
    scorer = branches.block
    outputs = []
    for name, branch in branches.given().items():
        if branch.gate is None:
            continue
        if position_BP is not None:
            mixed = _at(name, branch, scorer, position_BP, leader_q, sizes)
        elif impl == "reference":
            mixed = _dense(name, branch, scorer, sizes)
        else:
            mixed = _whole(name, branch, scorer, sizes)
        outputs.append(mixed * branch.gate[..., None])
    return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]


def cut_blocks(x_BLGh: Tensor, sizes: SparseSizes) -> Tensor:
    """The steps `[B, N, l, G, h]` of each compressed block of keys or values, as a view."""
    if x_BLGh.shape[1] < sizes.block:
        b, _, groups, width = x_BLGh.shape
        return x_BLGh.new_zeros(b, 0, sizes.block, groups, width)
    return x_BLGh.unfold(1, sizes.block, sizes.stride).permute(0, 1, 4, 2, 3)


def _whole(name: str, branch: Branch, scorer: Branch | None, sizes: SparseSizes) -> Tensor:
    q, k, v = branch.q, branch.k, branch.v
    if name == "window":
        return _fused.window_branch(q, k, v, sizes)
    if name == "block":
        return _fused.block_branch(q, k, v, sizes)
    assert scorer is not None
    return _fused.selective_branch(q, k, v, scorer.q, scorer.k, sizes)


def _dense(name: str, branch: Branch, scorer: Branch | None, sizes: SparseSizes) -> Tensor:
    length = branch.q.shape[1]
    if name == "window":
        mask = _reference.window_mask(length, sizes)[None, None]
    elif name == "block":
        mask = _reference.block_mask(length, sizes)[None, None]
    else:
        assert scorer is not None
        mask = _reference.selection_mask(scorer.q.detach(), scorer.k.detach(), sizes)
    return _reference.dense_attention(branch.q, branch.k, branch.v, mask).to(branch.q.dtype)


def _at(
    name: str,
    branch: Branch,
    scorer: Branch | None,
    position_BP: Tensor,
    leader_q: Tensor | None,
    sizes: SparseSizes,
) -> Tensor:
    q, k, v = branch.q, branch.k, branch.v
    if name == "window":
        return _positions.window_at(q, k, v, position_BP, sizes)
    if name == "block":
        return _positions.block_at(q, k, v, position_BP, sizes)
    assert scorer is not None
    leaders = scorer.q if leader_q is None else leader_q
    return _positions.selective_at(q, k, v, leaders, scorer.k, position_BP, sizes)


def _check(
    branches: Branches,
    sizes: SparseSizes,
    position_BP: Tensor | None,
    leader_q: Tensor | None,
    impl: str,
) -> None:
    if impl not in ("auto", "reference", "fused"):
        raise ValueError(f"implementation {impl!r} is unknown: 'auto', 'reference' or 'fused'")
    block, selected = branches.block, branches.selected
    if selected is not None and block is None:
        raise ValueError("selected blocks need the block branch, whose attention selects them (gate=None)")
    given = list(branches.given().values())
    if not any(branch.gate is not None for branch in given):
        raise ValueError("no branch with a gate was given: give window, block or selected")
    for branch in given:
        b, num_queries, heads, width = branch.q.shape
        if branch.k.shape != branch.v.shape or branch.k.shape[::3] != (b, width) or heads % branch.k.shape[2]:
            raise ValueError(
                f"q {tuple(branch.q.shape)} [B, L, H, h], k {tuple(branch.k.shape)} and v "
                f"{tuple(branch.v.shape)} [B, L, G, h] do not fit: G must divide H"
            )
        if branch.gate is not None and branch.gate.shape != (b, num_queries, heads):
            raise ValueError(f"gate {tuple(branch.gate.shape)} must be [B, L, H] {(b, num_queries, heads)}")
    if position_BP is None and block is not None:
        blocks = sizes.num_blocks(block.q.shape[1])
        if block.k.shape[1] != blocks:
            raise ValueError(
                f"the block branch has {block.k.shape[1]} keys, but {block.q.shape[1]} steps have {blocks} "
                f"blocks of {sizes.block} steps every {sizes.stride}: use `cut_blocks`"
            )
    if position_BP is not None and selected is not None and sizes.share > 1 and leader_q is None:
        raise ValueError(
            f"with share={sizes.share}, selected blocks at positions need leader_q, the queries that select"
        )
