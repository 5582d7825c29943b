"""DeepSpeed ZeRO workers against the plain single-process reference: every factor, on real workers."""

import json
import shutil

import pytest
import torch
from engine_workers import run_workers
from planted import NUM_ITEMS, make_config, planted_folder

from findrec.config import dump_config, parse_config
from findrec.datasets.memory import write_data_folder


def assert_same(got, want, steps=slice(None)):
    """Losses to 1e-5, gradient norms and weights to what float32 sums in another order leave."""
    losses = want.losses[steps]
    assert got.losses.shape == losses.shape
    torch.testing.assert_close(got.losses[:, 0], losses[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.losses, losses, rtol=1e-4, atol=1e-5)
    assert got.weights.keys() == want.weights.keys()
    for key in want.weights:
        torch.testing.assert_close(
            got.weights[key], want.weights[key], rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    folder = planted_folder(path / "data", num_users=60)
    config = make_config(
        epochs=3, microbatches=12, tokens=64, optim={"lr": 0.005, "clip_tower": 0.05, "clip_table": 0.5}
    )
    reference = run_workers("plain", 1, folder.path, path / "plain", config)
    return path, folder, config, reference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "world"), [(0, 1), (0, 3), (1, 2), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
)
def test_same_training_as_the_plain_reference(planted, stage, world):
    path, folder, config, want = planted
    assert_same(run_workers(stage, world, folder.path, path / f"s{stage}w{world}", config), want)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 1), (3, 2)])
def test_an_offloaded_optimizer_is_the_same_training(planted, stage, world):
    path, folder, config, want = planted
    cluster = config.cluster.model_copy(update={"offload_optimizer": True, "zero_stage": stage})
    config = config.model_copy(update={"cluster": cluster})
    assert_same(run_workers(stage, world, folder.path, path / f"offload{stage}w{world}", config), want)


OTHER_MODELS = {
    "sasrec": {"name": "sasrec"},
    "gru": {"stream": {"kind": "gru"}, "gaps": False},
    "transformer": {"stream": {"kind": "transformer"}, "routing": {"heads": 2, "kind": "mean"}},
    "content": {"items": {"features": "both", "id_dropout": 0.2}, "align": {"kind": "legacy"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_stage_3_reaches_every_weight_of_every_model(planted, name):
    """A module that uses another's weights without calling it would meet empty ones."""
    path, folder, config, _ = planted
    tree = config.model_dump(mode="json")
    for key, value in OTHER_MODELS[name].items():
        tree["model"][key] = tree["model"][key] | value if isinstance(value, dict) else value
    tree["training"]["epochs"] = 1
    config = parse_config(tree)
    want = run_workers("plain", 1, folder.path, path / f"{name}-plain", config)
    assert_same(run_workers(3, 2, folder.path, path / f"{name}-3", config), want)


@pytest.mark.slow
@pytest.mark.parametrize("legs", [[(1, 2), (3, 2), (0, 1)], [(2, 4), (3, 2), (1, 3)]], ids=str)
def test_a_checkpoint_moves_between_stages_and_worker_counts(planted, legs):
    """Three epochs on one plain process = one each at another ZeRO stage, on other workers."""
    path, folder, config, want = planted
    checkpoints = path / f"moved{legs}"
    for epoch, (stage, world) in enumerate(legs, start=1):
        got = run_workers(stage, world, folder.path, checkpoints, config)
        steps = sorted(checkpoints.glob("step-*"))
        read = {p: json.loads((p / "state.json").read_text())["epoch"] for p in steps}
        for step in steps:  # as if the run had been killed in its next epoch
            if epoch < len(legs) and read[step] > epoch:
                shutil.rmtree(step)
        assert len(got.losses) < len(want.losses) or epoch == 1
    assert_same(got, want, slice(-len(got.losses), None))


@pytest.mark.slow
def test_a_warm_start_on_workers_is_that_of_one_process(planted):
    """A finished run continued on a catalogue with two more items: ZeRO-2 on two workers, plain on one."""
    path, folder, config, _ = planted
    runs = path / "runs"
    config = config.model_copy(update={"runs": str(runs), "name": "yesterday"})
    run_workers("plain", 1, folder.path, runs / "yesterday/checkpoints", config)
    (runs / "yesterday/config.yaml").write_text(dump_config(config))
    new = [NUM_ITEMS + 1, NUM_ITEMS + 2]
    grown = write_data_folder(
        path / "grown",
        [[*folder.histories([u]).item.tolist(), *new] for u in range(folder.num_users)],
        features={m: grow(folder.feature(m), len(new)) for m in folder.modalities},
    )
    training = config.training.model_copy(update={"warm_start": "yesterday", "epochs": 1})
    warm = config.model_copy(update={"training": training, "name": "today"})
    want = run_workers("plain", 1, grown.path, path / "one", warm)
    assert_same(run_workers(2, 2, grown.path, path / "two", warm), want)


def grow(table, more):
    """A feature table's rows (NaN where missing) with `more` rows after them."""
    rows = table.rows(torch.arange(1, len(table)))
    known = torch.where(rows.present[:, None], rows.values, torch.nan)
    return torch.cat([known, torch.ones(more, table.dim)]).numpy()
