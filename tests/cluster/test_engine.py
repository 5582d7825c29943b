"""DeepSpeed ZeRO workers against the plain single-process reference: every factor, on real workers."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from planted import NUM_ITEMS, make_config, planted_folder

from findrec.config import dump_config
from findrec.datasets.memory import write_data_folder

SCRIPT = """
import json, os, sys, torch, torch.distributed as dist
from datetime import timedelta
from pathlib import Path
torch.set_num_threads(1)
stage, world, rank, folder_path, checkpoints, out, tree, meeting = sys.argv[1:]
world, rank = int(world), int(rank)
from findrec.config import parse_config
from findrec.datasets.folder import DataFolder
from findrec.training.build import build_table, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker
config = parse_config(json.loads(tree))
folder = DataFolder.open(Path(folder_path))
torch.manual_seed(0)
model, table = build_tower_model(config, folder), build_table(config, folder)
if stage == "plain":
    tower = PlainTower(model, config.training.optim)
else:
    from findrec.cluster.engine import DeepSpeedTower
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=120))
    tower = DeepSpeedTower(model, config.training.optim, stage=int(stage),
                           accumulation=config.training.microbatches // world, device=torch.device("cpu"))
losses = []
class Log:
    def log(self, step, epoch, values):
        if "train/loss" in values:
            losses.append([values["train/loss"], values["grad_norm/tower"], values["grad_norm/table"]])
run_training(config, folder, Path(checkpoints), tower, table,
             worker=Worker(rank, world), log=Log())
if rank == 0:
    from safetensors.torch import save_file
    state = {k: v.detach().clone() for k, v in model.state_dict().items()} | {"table": table.weight}
    save_file(state, out)
    Path(out + ".json").write_text(json.dumps(losses))
if dist.is_initialized():  # else the first to exit may take the others' gloo threads down
    dist.barrier()
    dist.destroy_process_group()
"""


def run(stage, world, data, checkpoints, out, config):
    meeting = f"{out}.{uuid.uuid4().hex}"  # a file, for a port found free may be taken by the time it is used
    workers = []
    for rank in range(world):
        environment = os.environ | {
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "FINDREC_QUIET": "1",
        }
        arguments = [str(stage), str(world), str(rank), str(data), str(checkpoints), str(out)]
        tree = json.dumps(config.model_dump(mode="json"))
        workers.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *arguments, tree, meeting], env=environment, cwd="/"
            )
        )
    assert [w.wait(timeout=300) for w in workers] == [0] * world
    from safetensors.torch import load_file

    return load_file(out), json.loads(Path(str(out) + ".json").read_text())


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    folder = planted_folder(path / "data", num_users=60)
    config = make_config(epochs=2, microbatches=6, optim={"lr": 0.005, "clip_tower": 0.05, "clip_table": 0.5})
    reference = run("plain", 1, folder.path, path / "plain", path / "plain.out", config)
    return path, folder, config, reference


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_same_training_as_the_plain_reference(planted, stage, world):
    path, folder, config, (want, want_losses) = planted
    name = f"s{stage}w{world}"
    got, losses = run(stage, world, folder.path, path / name, path / f"{name}.out", config)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-4, atol=1e-5)
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.slow
def test_checkpoint_moves_between_worker_counts_and_stages(planted):
    """Two epochs on one plain process = one on two ZeRO-2 workers, then one on a ZeRO-1 worker."""
    import shutil

    path, folder, config, (want, want_losses) = planted
    first = path / "moved"
    run(2, 2, folder.path, first, path / "moved.out", config)
    steps = sorted(p.name for p in first.glob("step-*"))
    assert len(steps) == 2
    shutil.rmtree(first / steps[-1])  # as if the run had been killed in its second epoch
    got, losses = run(1, 1, folder.path, first, path / "moved2.out", config)
    half = len(want_losses) - len(losses)
    assert 0 < half < len(want_losses)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses[half:]), rtol=1e-4, atol=1e-5)
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.slow
def test_a_warm_start_on_workers_is_that_of_one_process(planted):
    """A finished run continued on a catalogue with two more items: ZeRO-2 on two workers, plain on one."""
    path, folder, config, _ = planted
    runs = path / "runs"
    config = config.model_copy(update={"runs": str(runs), "name": "yesterday"})
    run("plain", 1, folder.path, runs / "yesterday/checkpoints", path / "yesterday.out", config)
    (runs / "yesterday/config.yaml").write_text(dump_config(config))
    new = [NUM_ITEMS + 1, NUM_ITEMS + 2]
    grown = write_data_folder(
        path / "grown",
        [[*folder.histories([u]).item.tolist(), *new] for u in range(folder.num_users)],
        features={m: grow(folder.feature(m), len(new)) for m in folder.modalities},
    )
    training = config.training.model_copy(update={"warm_start": "yesterday", "epochs": 1})
    warm = config.model_copy(update={"training": training, "name": "today"})
    want, want_losses = run("plain", 1, grown.path, path / "one", path / "one.out", warm)
    got, losses = run(2, 2, grown.path, path / "two", path / "two.out", warm)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-4, atol=1e-5)
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def grow(table, more):
    """A feature table's rows (NaN where missing) with `more` rows after them."""
    rows = table.rows(torch.arange(1, len(table)))
    known = torch.where(rows.present[:, None], rows.values, torch.nan)
    return torch.cat([known, torch.ones(more, table.dim)]).numpy()
