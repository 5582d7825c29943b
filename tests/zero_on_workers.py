"""What a worker does in the test of weights that a model's loss uses itself."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from findrec.config import OptimConfig
from findrec.models.base import Microbatch, Model, StepLoss
from findrec.tables.view import Tables
from findrec.training.tower import PlainTower, Tower

WIDTH = 128  # its square is more than DeepSpeed keeps whole on every worker
MICROBATCHES = 2


class OwnWeights(Model[Tensor]):
    """Uses a matrix of its own in `loss`, outside of any module that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("constant", torch.arange(3.0), persistent=False)

    def loss(self, microbatch: Microbatch[Tensor], tables: Tables) -> StepLoss:
        hidden = self.layer(microbatch.examples @ self.matrix)
        total = (hidden @ self.matrix).square().sum() / microbatch.num_targets
        return StepLoss(total, total.detach())


def steps(tower: Tower, rank: int, world: int) -> list[list[float]]:
    """The loss of this worker's microbatches and the norm of the gradient, for a few steps."""
    values = []
    for step in range(3):
        loss = 0.0
        for index in range(rank, MICROBATCHES, world):
            generator = torch.Generator().manual_seed(MICROBATCHES * step + index)
            # As rows of a table, inputs need a gradient.
            rows = torch.randn(8, WIDTH, generator=generator).requires_grad_()
            microbatch = Microbatch(rows, None, 16, MICROBATCHES, 0)  # type: ignore[arg-type]
            share = tower.loss(microbatch, Tables({}, 16, 0))
            tower.backward(share.total)
            loss += float(share.loss)
        values.append([loss, tower.step(1e-2)])
    return values


def plain() -> list[list[float]]:
    """The same steps in one process without DeepSpeed."""
    torch.manual_seed(0)
    return steps(PlainTower(OwnWeights(), OptimConfig()), 0, 1)


def work(rank: int, world: int, meeting: str, out: str) -> None:
    """One worker: the steps under ZeRO stages 1 and 3, and the buffer of the model to evaluate with."""
    from findrec.cluster.zero.engine import DeepSpeedTower

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for stage in (1, 3):
        torch.manual_seed(0)
        tower = DeepSpeedTower(
            OwnWeights(),
            OptimConfig(),
            stage=stage,
            accumulation=MICROBATCHES // world,
            device=torch.device("cpu"),
        )
        values = steps(tower, rank, world)
        buffer = tower.whole_model().get_buffer("constant").tolist()
        Path(f"{out}.{stage}.{rank}").write_text(json.dumps([values, buffer]))
    dist.barrier()
    dist.destroy_process_group()
