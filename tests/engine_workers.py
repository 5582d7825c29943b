"""Trainings by real worker processes over gloo, without Ray: `Workers` starts them, each runs `main`.

Starting a process and importing DeepSpeed takes longer than the trainings of a test, so that workers stay
and train one configuration after the other.
"""

import json
import os
import subprocess
import sys
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[1] / "evaluation" / "benchmarks"  # pytest's own `pythonpath`
PATIENCE_S = 300


@dataclass(frozen=True)
class Outcome:
    """What a training left: weights and table by name, `[loss, two gradient norms]` of each step, peaks."""

    weights: dict
    losses: torch.Tensor
    peak_bytes: list  # of each worker's resident set since it started, Linux


class Workers:
    """`world` processes of one thread each; a context manager."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder
        self._processes = []

    def __enter__(self):
        # They rendezvous by a file: a free port may be taken by the time it is used.
        meeting = self.folder / f"{uuid.uuid4().hex}.meeting"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FINDREC_QUIET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
        for rank in range(self.world):
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(rank), str(self.world), str(meeting)],
                    env=environment | {"LOCAL_RANK": str(rank)},
                    cwd="/",
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        return self

    def train(self, tower, data, checkpoints, config, *, gpu_paths=False):
        """A training with `tower`: `plain` (of one worker), or a ZeRO stage, with the code for GPUs."""
        job = {
            "gpu_paths": gpu_paths,
            "tower": tower,
            "data": str(data),
            "checkpoints": str(checkpoints),
            "out": str(self.folder / uuid.uuid4().hex),
            "config": config.model_dump(mode="json"),
        }
        for process in self._processes:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        reports = [json.loads(_answer(process)) for process in self._processes]
        losses = torch.tensor(reports[0]["losses"])
        return Outcome(load_file(job["out"]), losses, [report["peak_bytes"] for report in reports])

    def __exit__(self, *error):
        for process in self._processes:
            process.stdin.close()
            if error[0] is not None:
                process.kill()
            process.stdout.close()
        ended = [process.wait(timeout=60) for process in self._processes]
        assert error[0] is not None or ended == [0] * self.world


def _answer(process):
    """The line that begins with `{`: libraries print others."""
    for line in process.stdout:
        if line.startswith("{"):
            return line
    raise AssertionError(f"a worker ended with exit code {process.wait(timeout=PATIENCE_S)}")


def main(rank, world, meeting):
    """One worker: a training for each line that is read."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    from gpu_paths import gpu_paths  # only in a worker

    for line in sys.stdin:
        job = json.loads(line)
        with gpu_paths() if job.pop("gpu_paths") else nullcontext():
            print(json.dumps(train(rank, world, **job)), flush=True)
    dist.barrier()  # else the first to exit may take the others' gloo threads down
    dist.destroy_process_group()


def train(rank, world, tower, data, checkpoints, out, config):
    """One training on this worker; returns the result of `Workers.train`."""
    from bench.memory import peak_rss_bytes

    from findrec.cluster.zero.engine import DeepSpeedTower
    from findrec.config import parse_config
    from findrec.datasets.folder.data_folder import DataFolder
    from findrec.evaluation.validation import validate
    from findrec.training.allocator import keep_freed_memory
    from findrec.training.build import build_tables, build_tower_model
    from findrec.training.checkpoints.checkpoint import latest_checkpoint, load_checkpoint
    from findrec.training.loop import run_training
    from findrec.training.tower import PlainTower, Tower
    from findrec.training.worker import Worker

    keep_freed_memory()
    config = parse_config(config)
    folder = DataFolder.open(Path(data))
    torch.manual_seed(config.training.seed)
    model, tables = build_tower_model(config, folder), build_tables(config, folder)
    if tower == "plain":
        engine: Tower = PlainTower(model, config.training.optim)
    else:
        engine = DeepSpeedTower(
            model,
            config.training.optim,
            stage=tower,
            accumulation=config.training.microbatches // world,
            device=torch.device("cpu"),
            offload_optimizer=config.cluster.offload_optimizer,
        )
    losses = []

    class Log:
        def log(self, step, epoch, values):
            if "train/loss" in values:
                losses.append([values["train/loss"], values["grad_norm/tower"], values["grad_norm/table"]])

    run_training(
        config,
        folder,
        Path(checkpoints),
        engine,
        tables,
        worker=Worker(rank, world),
        validate=validate,
        log=Log(),
    )
    weights = {k: v.detach().clone() for k, v in engine.weights().items()}
    if rank == 0:  # the table of the last checkpoint: workers may hold a part each
        rows = load_checkpoint(latest_checkpoint(Path(checkpoints))).table["weight"]
        save_file(weights | {"table": rows}, out)
    return {"losses": losses, "peak_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
