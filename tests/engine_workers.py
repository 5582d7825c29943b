"""Trainings by real worker processes over gloo, without Ray: `run_workers` starts them, each runs `main`."""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Outcome:
    """What a training left: weights and table by name, `[loss, two gradient norms]` of each step, peaks."""

    weights: dict
    losses: torch.Tensor
    peak_bytes: list  # of each worker's resident set, Linux


def run_workers(tower, world, data, checkpoints, config):
    """Train with `tower` (`plain`, or a ZeRO stage) on `world` processes of one thread each."""
    out = f"{checkpoints}.{uuid.uuid4().hex}"  # the workers meet in a file: a free port may be taken
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FINDREC_QUIET": "1"}
    tree = json.dumps(config.model_dump(mode="json"))
    workers = []
    for rank in range(world):
        arguments = [str(v) for v in (tower, world, rank, data, checkpoints, out, tree)]
        workers.append(
            subprocess.Popen(
                [sys.executable, __file__, *arguments], env=environment | {"LOCAL_RANK": str(rank)}, cwd="/"
            )
        )
    assert [w.wait(timeout=300) for w in workers] == [0] * world
    reports = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(world)]
    return Outcome(load_file(out), torch.tensor(reports[0]["losses"]), [r["peak_bytes"] for r in reports])


def main(tower_kind, world, rank, folder_path, checkpoints, out, tree):
    """One worker."""
    from findrec.bench.memory import peak_rss_bytes
    from findrec.config import parse_config
    from findrec.datasets.folder import DataFolder
    from findrec.training.allocator import keep_freed_memory
    from findrec.training.build import build_table, build_tower_model
    from findrec.training.loop import run_training
    from findrec.training.tower import PlainTower
    from findrec.training.worker import Worker

    torch.set_num_threads(1)
    keep_freed_memory()
    world, rank = int(world), int(rank)
    config = parse_config(json.loads(tree))
    folder = DataFolder.open(Path(folder_path))
    torch.manual_seed(0)
    model, table = build_tower_model(config, folder), build_table(config, folder)
    if tower_kind == "plain":
        tower = PlainTower(model, config.training.optim)
    else:
        from findrec.cluster.engine import DeepSpeedTower

        dist.init_process_group(
            "gloo",
            init_method=f"file://{out}.meeting",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=120),
        )
        tower = DeepSpeedTower(
            model,
            config.training.optim,
            stage=int(tower_kind),
            accumulation=config.training.microbatches // world,
            device=torch.device("cpu"),
            offload_optimizer=config.cluster.offload_optimizer,
        )
    losses = []

    class Log:
        def log(self, step, epoch, values):
            if "train/loss" in values:
                losses.append([values["train/loss"], values["grad_norm/tower"], values["grad_norm/table"]])

    run_training(config, folder, Path(checkpoints), tower, table, worker=Worker(rank, world), log=Log())
    weights = {k: v.detach().clone() for k, v in tower.weights().items()}
    if rank == 0:
        save_file(weights | {"table": table.weight}, out)
    Path(f"{out}.{rank}.json").write_text(json.dumps({"losses": losses, "peak_bytes": peak_rss_bytes()}))
    if dist.is_initialized():  # else the first to exit may take the others' gloo threads down
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
