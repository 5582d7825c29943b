"""Checkpoints in an object store, served on this machine: the real protocol, no renames."""

import os
import shutil
import uuid

import pytest
import torch
from planted import make_config, planted_folder

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.evaluation.validation import validate
from findrec.tables.base import ITEMS
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import (
    TrainState,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from findrec.training.checkpoints.store import CheckpointStore, Sender
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

moto = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


@pytest.fixture
def bucket(monkeypatch):
    server = moto.ThreadedMotoServer(port=0, ip_address="127.0.0.1", verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"  # what is stored outlives the server
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/runs/one"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def saved(root, step):
    state = TrainState(epoch=0, step=step, plan="p", best=-1.0, best_step=-1, stale=0)
    tensors = {"weight": torch.full((5, 3), float(step))}
    return save_checkpoint(root, state, tower=tensors, optimizer_state=tensors, tables={ITEMS: tensors})


def test_there_and_back(bucket, tmp_path):
    store = CheckpointStore(bucket)
    assert store.names() == []
    path = saved(tmp_path / "here", 7)
    store.push(path)
    store.push(path)  # again is as good as once
    assert store.names() == ["step-00000007"]
    store.fetch_newest(tmp_path / "there")
    again = load_checkpoint(latest_checkpoint(tmp_path / "there"))
    assert again.state.step == 7
    assert torch.equal(again.tower["weight"], torch.full((5, 3), 7.0))


def test_an_older_one_on_disk_is_passed_a_newer_one_kept(bucket, tmp_path):
    store = CheckpointStore(bucket)
    store.push(saved(tmp_path / "here", 7))
    saved(tmp_path / "old", 3)
    store.fetch_newest(tmp_path / "old")
    assert latest_checkpoint(tmp_path / "old").name == "step-00000007"
    saved(tmp_path / "new", 9)
    store.fetch_newest(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").glob("step-*")) == ["step-00000009"]


@pytest.mark.parametrize("damage", ["cut", "missing", "uncommitted"])
def test_a_damaged_newest_one_is_passed_over_loudly(bucket, tmp_path, capsys, damage):
    store = CheckpointStore(bucket)
    for step in (3, 7):
        store.push(saved(tmp_path / "here", step))
    files, newest = store._files, f"{store._root}/step-00000007"
    if damage == "cut":
        files.pipe(f"{newest}/tower.safetensors", files.cat(f"{newest}/tower.safetensors")[:-1])
    else:
        files.rm(f"{newest}/{'tower.safetensors' if damage == 'missing' else 'manifest.json'}")
    store.fetch_newest(tmp_path / "there")
    assert latest_checkpoint(tmp_path / "there").name == "step-00000003"
    assert ("step-00000007 is not used" in capsys.readouterr().out) == (damage != "uncommitted")


def test_retention(bucket, tmp_path):
    store = CheckpointStore(bucket)
    for step in range(1, 6):
        store.push(saved(tmp_path / "here", step))
    store.prune(5, keep=2, protected={"step-00000002"})
    assert store.names() == ["step-00000002", "step-00000004", "step-00000005"]


def test_sending_runs_beside_training_and_survives_local_retention(bucket, tmp_path):
    store = CheckpointStore(bucket)
    sender = Sender(store, keep=2)
    for step in (1, 2, 3):
        path = saved(tmp_path / "here", step)
        sender.send(path, ())
        shutil.rmtree(path)
    sender.close()
    assert store.names()[-1] == "step-00000003"
    store.fetch_newest(tmp_path / "there")
    assert latest_checkpoint(tmp_path / "there").name == "step-00000003"
    assert not any(files for _, _, files in os.walk(tmp_path / "here" / ".sending"))


def test_a_failing_address_gives_a_warning_and_stops_nothing(bucket, tmp_path, capsys):
    sender = Sender(CheckpointStore("s3://no-such-bucket/run"), keep=2)
    sender.send(saved(tmp_path / "here", 1), ())
    sender.close()
    output = capsys.readouterr().out
    assert (
        "WARNING: checkpoint step-00000001 is on disk but could not be sent to s3://no-such-bucket/run"
        in output
    )


def test_an_address_of_no_known_kind_is_refused():
    with pytest.raises(FindRecError, match="checkpoint_store"):
        CheckpointStore("what://is/this")


def test_each_training_of_a_run_has_its_own_place(tmp_path):
    config = parse_config({"runs": str(tmp_path), "training": {"checkpoint_store": "memory://all/"}})
    checkpoints = tmp_path / "mine" / "baselines" / "sasrec" / "checkpoints"
    assert CheckpointStore.of(config, checkpoints).address == "memory://all/mine/baselines/sasrec"
    assert CheckpointStore.of(parse_config({}), checkpoints) is None


def test_a_training_goes_on_where_the_store_left_it(bucket, tmp_path):
    folder = planted_folder(tmp_path / "data", num_users=40)
    config = make_config(epochs=3, checkpoint_store=bucket)

    def train(checkpoints, stop_after=None):
        torch.manual_seed(0)
        tower = PlainTower(build_tower_model(config, folder), config.training.optim)
        table = build_tables(config, folder)[ITEMS]
        seen = []

        def after_epoch(values):
            seen.append(values)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        run_training(
            config,
            folder,
            checkpoints,
            tower,
            {ITEMS: table},
            worker=Worker(),
            validate=validate,
            after_epoch=after_epoch,
        )
        return table.weight, len(seen)

    whole, _ = train(tmp_path / "whole" / "checkpoints")
    CheckpointStore(f"{bucket}/run").prune(10**9, keep=1, protected=())
    CheckpointStore(f"{bucket}/run")._drop(CheckpointStore(f"{bucket}/run").names()[-1])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "first" / "checkpoints", stop_after=2)
    again, epochs = train(tmp_path / "elsewhere" / "checkpoints")
    assert epochs == 1
    assert torch.equal(again, whole)


def test_names_are_ordered_by_step_and_copies_are_ignored(tmp_path):
    store = CheckpointStore(str(tmp_path / "store"))
    for step in (99_999_999, 100_000_000, 7):
        store.push(saved(tmp_path / "here", step))
    shutil.copytree(tmp_path / "store" / "step-100000000", tmp_path / "store" / "step-99999999-copy")
    assert store.names() == ["step-00000007", "step-99999999", "step-100000000"]
    store.fetch_newest(tmp_path / "there")
    assert [path.name for path in list_checkpoints(tmp_path / "there")] == ["step-100000000"]
    store.prune(10**9, keep=1, protected=())
    assert store.names() == ["step-100000000"]


def test_a_newer_version_in_the_store_is_refused(tmp_path):
    store = CheckpointStore(str(tmp_path / "store"))
    store.push(saved(tmp_path / "here", 7))
    manifest = tmp_path / "store" / "step-00000007" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FindRecError, match=r"store/step-00000007 was written by a newer version"):
        store.fetch_newest(tmp_path / "there")
    assert not [path for path in (tmp_path / "there").iterdir() if path.is_dir()]
    assert store.names() == ["step-00000007"]
