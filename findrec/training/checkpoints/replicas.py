"""Compares the workers' copies of weights before a checkpoint is saved.

Every worker makes the same updates to its copy of a replicated table and of the tower, so the copies stay
equal bit for bit, and rank 0 saves its own. Should they ever differ (an operation that is not deterministic,
a faulty machine), training would go on with the gradients of several models, and no loss would show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from findrec.errors import FindRecError
from findrec.tables.base import Table
from findrec.tables.collectives import COLLECTIVES
from findrec.tables.exchange import Shards
from findrec.training.tower import Tower
from findrec.training.worker import Worker

_BLOCK_BYTES = (256 << 10, 8 << 20)  # fits into the cache of a CPU core; keeps a GPU busy


def check_replicas(tower: Tower, tables: Mapping[str, Table], worker: Worker, step: int) -> None:
    """Raise `FindRecError`, on all workers, if their copies of any weights differ (a collective call).

    Reads all replicated tensors once and exchanges 8 bytes for each. What is sharded is not compared.
    """
    if worker.world == 1:
        return
    copies = _replicated(tower, tables)
    if not copies:
        return
    with COLLECTIVES.call("comparison of the copies of the weights"):
        digests_Wn = Shards(0).gather(torch.stack([digest(value) for value in copies.values()])).tolist()
    differing = {}
    for name, digests_W in zip(copies, zip(*digests_Wn, strict=True), strict=True):
        ((common, _),) = Counter(digests_W).most_common(1)  # of equally many, that of the lowest rank
        if ranks := [rank for rank, value in enumerate(digests_W) if value != common]:
            differing[name] = ranks
    if differing:
        name, ranks = next(iter(differing.items()))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise FindRecError(
            f"the workers' copies of {name}{more} are not equal any more after step {step}: rank "
            f"{', '.join(map(str, ranks))} of {worker.world} differs from the others. All make the same "
            "updates, so a machine or a library does not compute reliably. This checkpoint is not saved; "
            "start the same command again: it continues from the checkpoint before"
        )


def _replicated(tower: Tower, tables: Mapping[str, Table]) -> dict[str, Tensor]:
    """The tensors of which every worker holds a copy, by their names in the message."""
    copies: dict[str, Tensor] = {}
    for name, table in tables.items():
        if not table.sharded:
            copies |= {f"table {name!r} ({part})": value for part, value in table.state().items()}
    if tower.replicated:
        copies |= {f"the weights {name!r}": value for name, value in tower.model.named_parameters()}
    return copies


@torch.no_grad()
def digest(value: Tensor) -> Tensor:
    """A digest `[]` (int64) of the bits of a tensor, on its device.

    The sum of its 64-bit words, each multiplied by a random odd number: one changed word always changes the
    digest, and differences of several do not cancel but by a chance that can be neglected.
    """
    flat = value.detach().reshape(-1)
    block_bytes = _BLOCK_BYTES[flat.device.type != "cpu"]
    size = block_bytes // flat.element_size()
    words = -(-min(size, len(flat)) * flat.element_size() // 8)
    buffer = torch.zeros(words, dtype=torch.int64, device=flat.device)
    high = torch.empty_like(buffer)
    factors = _factors(block_bytes // 8, flat.device)[:words]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for low in range(0, len(flat), size):
        block = flat[low : low + size]
        if len(block) < size:
            buffer.zero_()  # what is left of the block before
        buffer.view(flat.dtype)[: len(block)] = block
        torch.bitwise_right_shift(buffer, 32, out=high)
        high.bitwise_and_(0xFFFFFFFF).bitwise_xor_(buffer)  # else the high bits of words could cancel
        total = 31 * total + high.mul_(factors).sum()
    return total


@cache
def _factors(num: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (num,), generator=generator).bitwise_or_(1).to(device)
