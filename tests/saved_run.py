"""A run folder as training leaves it, with weights drawn at random instead of learnt."""

import json

import torch

from findrec.config import dump_config, parse_config
from findrec.tables.base import ITEMS
from findrec.training.build import build_tower_model, table_shapes
from findrec.training.checkpoints.checkpoint import TrainState, checkpoint_folder, save_checkpoint
from findrec.training.runs import training_jobs

MAX_LENGTH = 12


def save_run(path, data, /, *overrides, **sections):
    """Write `path` (config, checkpoints of every trained model, measured values); returns the path."""
    tree = {
        "name": "small",
        "data": {"folder": str(data.path), "max_length": MAX_LENGTH},
        "model": {"dim": 16, "stream": {"layers": 1}},
        "tracking": {"enabled": False},
        "cluster": {"threads": 1},
    } | sections
    config = parse_config(tree, overrides)
    for job in training_jobs(config, path):
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "config.yaml").write_text(dump_config(job.config))
        torch.manual_seed(0)
        network = build_tower_model(job.config, data)
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        table = 0.5 * torch.randn(data.num_items + 1, table_shapes(job.config, data)[ITEMS].dim)
        table[0] = 0
        state = TrainState(epoch=1, step=40, plan="", best=0.1, best_step=40, stale=0)
        save_checkpoint(
            checkpoint_folder(job.folder),
            state,
            tower=network.state_dict(),
            optimizer_state={},
            tables={"items": {"weight": table}},
        )
    lines = [
        {"step": s, "epoch": 0, "time": 1.0 * s, "train/loss": 5.0 / s, "aux/stein": 0.1}
        | {"diagnostics/ksd_text": 2.0 / s, "diagnostics/gate_entropy": 1.0}
        | {"train/targets": 50, "train/seconds": 2.0}
        for s in range(1, 41)
    ]
    lines.append({"step": 40, "epoch": 0, "memory/worker_peak_gib": 0.75})
    lines.append({"step": 40, "epoch": 0, "valid/ndcg@10": 0.25})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
