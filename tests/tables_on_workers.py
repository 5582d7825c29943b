"""What a worker does in the tests of item tables: the same microbatches whatever the placement of rows."""

import itertools
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from findrec.config import LossConfig, OptimConfig
from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.tables import row_sums
from findrec.tables.item_table import ItemTable
from findrec.tables.sharded_table import ShardedItemTable
from findrec.tables.table_spec import TableSpec

DIM = 8
STEPS = 2
TABLES = {"replicated": ItemTable, "sharded": ShardedItemTable}
UNTRAINED = (1, 16, 30)
TOKENS = (5, 0, 17, 1, 40)  # of the microbatches, in turn


@dataclass(frozen=True)
class Case:
    kind: str
    clip: float
    accumulation: int
    repeat: bool
    transform: bool
    only_trained: bool
    num_items: int = 30

    def spec(self):
        count = torch.arange(self.num_items + 1) % 7 + 1
        if self.only_trained:
            count[list(UNTRAINED)] = 0
        loss = LossConfig(kind=self.kind, negatives=12)
        optim = OptimConfig(weight_decay=10, clip_table=self.clip)
        return TableSpec(
            *(self.num_items, DIM),
            seed=1,
            loss=loss,
            optim=optim,
            train_count=count,
            only_trained=self.only_trained,
        )


# Own items, a transform, only trained items: each with and without each other; two of the four for each
# combination of accumulation and clipping.
OPTIONS = ((False, False, False), (True, True, False), (True, False, True), (False, True, True))
CASES = [
    Case(kind, clip, accumulation, *options)
    for kind, (odd, clip), accumulation in itertools.product(
        ("exact", "sampled", "gbce"), enumerate((0.0, 0.02)), (1, 3)
    )
    for options in OPTIONS[(odd + accumulation // 2) % 2 :: 2]
] + [Case(kind, 0.0, 1, False, False, False, num_items=4) for kind in ("exact", "sampled", "gbce")]


def train(table, case, mine, total):
    """`STEPS` steps of `total` microbatches, of which this worker has `mine`; everything worth comparing."""
    result = {}
    classes = torch.arange(1, case.num_items + 1)
    if case.only_trained:
        classes = classes[~torch.isin(classes, torch.tensor(UNTRAINED))]
    num_targets = sum(TOKENS[m % len(TOKENS)] for m in range(total))
    content = torch.randn(case.num_items + 1, DIM, generator=torch.Generator().manual_seed(7))
    gain = torch.linspace(0.5, 1.5, DIM, requires_grad=True)

    def transform(ids, rows):
        index = torch.arange(ids.start, ids.stop) if isinstance(ids, range) else ids
        return rows * gain + content[index]

    for step in range(STEPS):
        for m in mine:
            g = torch.Generator().manual_seed(1000 * step + m)
            size = TOKENS[m % len(TOKENS)]
            target = classes[torch.randint(len(classes), (size,), generator=g)]
            ids = torch.unique(classes[torch.randint(len(classes), (m % 4 * 5,), generator=g)])
            ids = torch.cat([torch.zeros(1, dtype=torch.int64), ids])
            mix = torch.randn(size, len(ids), generator=g)
            x = table.lookup(ids)
            h = mix @ x + torch.randn(size, DIM, generator=g)
            repeat = random_repeat_bonus(size, m % 3 + 1, classes, g) if case.repeat else None
            loss = table.catalogue_loss(
                *(h, target, num_targets),
                repeat=repeat,
                generator=g,
                transform=transform if case.transform else None,
            )
            surrogate = (h * loss.dh).sum()
            if loss.scored is not None:
                surrogate = surrogate + (loss.scored.vectors * loss.scored.gradient).sum()
            surrogate.backward()
            table.push(ids, x.grad)
            if loss.scored is not None:
                table.push(loss.scored.ids, loss.scored.rows.grad)
            result |= {f"loss/{step}/{m}": loss.loss, f"dh/{step}/{m}": loss.dh}
            if case.repeat:
                result[f"dbonus/{step}/{m}"] = loss.dbonus
        result[f"norm/{step}"] = torch.tensor(table.step(2e-4))
    result |= {f"table/{name}": value for name, value in table.state().items()}
    if case.transform:
        result["gain"] = gain.grad
    return {name: value.detach().clone() for name, value in result.items()}


def random_repeat_bonus(size, num_candidates, classes, g):
    """Bonuses for a few items of each third token's row."""
    row = torch.arange(size) // 3
    ids = torch.stack(
        [classes[torch.randperm(len(classes), generator=g)[:num_candidates]] for _ in range(size // 3 + 1)]
    )
    ids[:, -1] = 0  # not every row has as many
    seen = (torch.rand(size, num_candidates, generator=g) < 0.7) & (ids[row] > 0)
    return RepeatBonus(ids, row, seen, torch.randn(size, num_candidates, generator=g) * seen)


def work(rank, world, meeting, out, gpu_forms):
    """One worker: all cases in both placements, into a file of its own; perhaps in the forms for GPUs."""
    if gpu_forms:
        row_sums.is_cpu = lambda device: False
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    result = {}
    for number, case in enumerate(CASES):
        total = world * case.accumulation
        for placement, make in TABLES.items():
            table = make(case.spec())
            values = train(table, case, range(rank, total, world), total)
            result |= {f"{number}/{placement}/{name}": value for name, value in values.items()}
    save_file(result, f"{out}.{rank}")
    dist.barrier()  # else the first to exit may take the others' gloo threads down
    dist.destroy_process_group()
