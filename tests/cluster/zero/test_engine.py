"""DeepSpeed ZeRO workers against the plain single-process reference: every factor, on real workers."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_workers import Outcome, Workers
from planted import NUM_ITEMS, make_config, planted_folder

from findrec.config import RunConfig, dump_config, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.models.configs import CONFIGS
from findrec.training.checkpoints.checkpoint import read_state

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


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


@dataclass
class Setting:
    """Made-up data, a configuration, and what the plain reference makes of them."""

    path: Path
    folder: DataFolder
    config: RunConfig
    workers: Callable[[int], Workers]
    want: Outcome

    def train(self, stage, world, name=None, config=None, folder=None, *, gpu_paths=False):
        place = self.path / (name or f"stage{stage}world{world}")
        data = (folder or self.folder).path
        return self.workers(world).train(
            stage, data, place / "checkpoints", config or self.config, gpu_paths=gpu_paths
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    folder = planted_folder(path / "data", num_users=60)
    config = make_config(
        epochs=3,
        microbatches=12,
        tokens=64,
        keep=3,
        optim={"lr": 0.005, "clip_tower": 0.05, "clip_table": 0.5},
    )
    with ExitStack() as stack:

        @cache
        def workers(world):
            return stack.enter_context(Workers(world, path))

        want = workers(1).train("plain", folder.path, path / "plain", config)
        yield Setting(path, folder, config, workers, want)


def changed(config, **sections):
    """A configuration with some keys changed."""
    tree = config.model_dump(mode="json")
    for section, values in sections.items():
        if "name" in values:  # another model keeps the values of the keys that both have
            fields = CONFIGS[values["name"]].model_fields
            tree[section] = {key: value for key, value in tree[section].items() if key in fields}
        for key, value in values.items():
            old = tree[section].get(key)
            tree[section][key] = old | value if isinstance(old, dict) else value
    return parse_config(tree)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 3), (1, 2), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_same_training_as_the_plain_reference(setting, stage, world):
    assert_same(setting.train(stage, world), setting.want)


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 1), (3, 2)])
def test_an_offloaded_optimizer_is_the_same_training(setting, stage, world):
    config = changed(setting.config, cluster={"offload_optimizer": True})
    assert_same(setting.train(stage, world, f"offload{stage}{world}", config), setting.want)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (3, 2)])
def test_products_in_bfloat16_are_those_of_the_plain_reference(setting, stage, world):
    """Weights that differ in their last bit may round to neighbours, so that trainings drift apart slowly."""
    config = changed(setting.config, training={"precision": "bfloat16"})
    want = setting.train("plain", 1, f"bf16plain{stage}{world}", config)
    got = setting.train(stage, world, f"bf16{stage}{world}", config)
    torch.testing.assert_close(got.losses[:3], want.losses[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.losses[:, 0], want.losses[:, 0], rtol=0.02, atol=0)
    assert not torch.equal(want.losses, setting.want.losses)
    assert all(value.dtype == setting.want.weights[name].dtype for name, value in got.weights.items())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_same_number_of_workers_gives_the_same_bits(setting, stage):
    first, second = (setting.train(stage, 2, f"bits{stage}{turn}") for turn in (1, 2))
    assert torch.equal(first.losses, second.losses)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.mark.parametrize(
    ("stage", "kind", "offload"), [(1, "sampled", False), (2, "gbce", True), (3, "exact", True)]
)
def test_with_the_code_for_gpus_a_training_continues_bit_for_bit(setting, stage, kind, offload):
    """Torch's forms of all operations, bfloat16 products, checkpoints saved beside training."""
    training = {"precision": "bfloat16", "loss": {"kind": kind, "negatives": 16}, "save_steps": 3, "keep": 99}
    config = changed(setting.config, training=training, cluster={"offload_optimizer": offload})
    name = f"gpu{stage}"
    whole = setting.train(stage, 2, name, config, gpu_paths=True)
    steps = sorted((setting.path / name / "checkpoints").glob("step-*"))
    for path in steps[len(steps) // 2 :]:  # as if the run had been killed
        shutil.rmtree(path)
    rest = setting.train(stage, 2, name, config, gpu_paths=True)
    assert 0 < len(rest.losses) < len(whole.losses)
    assert torch.equal(rest.losses, whole.losses[-len(rest.losses) :])
    assert all(torch.equal(rest.weights[name], value) for name, value in whole.weights.items())


OTHER_MODELS = {
    "sasrec": {"name": "sasrec"},
    "gru": {"stream": {"kind": "gru"}},
    "transformer": {"stream": {"kind": "transformer"}},
    "2025": {
        "name": "findrec-2025",
        "align": {"kind": "legacy"},
        "items": {"features": "both", "id_dropout": 0.2},
        "routing": {"heads": 2, "experts": 2},
    },
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_stage_3_reaches_every_weight_of_every_model(setting, name, checkpointed):
    """A module that uses another's weights without calling it would meet empty ones."""
    training = {"epochs": 1}
    config = changed(setting.config, model=OTHER_MODELS[name], training=training)
    want = setting.train("plain", 1, f"{name}{checkpointed}plain", config)
    config = changed(config, training={"checkpoint_activations": checkpointed})
    assert_same(setting.train(3, 2, f"{name}{checkpointed}", config), want)


@pytest.mark.parametrize("legs", [[(1, 2), (3, 2), (0, 1)], [(2, 4), (3, 2), (1, 3)]], ids=str)
def test_a_checkpoint_moves_between_stages_and_worker_counts(setting, legs):
    """Three epochs on one plain process = one each at another ZeRO stage, on other workers."""
    for epoch, (stage, world) in enumerate(legs, start=1):
        got = setting.train(stage, world, f"moved{legs}")
        checkpoints = setting.path / f"moved{legs}" / "checkpoints"
        for step in checkpoints.glob("step-*"):  # as if the run had been killed in its next epoch
            if epoch < len(legs) and json.loads((step / "state.json").read_text())["epoch"] > epoch:
                shutil.rmtree(step)
        expected = len(setting.want.losses) * (len(legs) - epoch + 1) // len(legs)
        assert len(got.losses) == pytest.approx(expected, abs=1)
        assert_same(got, setting.want, slice(-len(got.losses), None))


@pytest.mark.parametrize(("kind", "modalities", "stage"), [("exact", "all", 2), ("sampled", [], 3)])
def test_a_sharded_table_trains_validates_and_moves_like_a_replicated_one(setting, kind, modalities, stage):
    """Two epochs on one plain process = one on three workers with rows of their own, then one on two; with a
    checkpoint of three files between, read by a single process too.
    """
    loss, optim = {"kind": kind, "negatives": 16}, {"clip_table": 0.05}
    training = {"epochs": 2, "loss": loss, "optim": optim}
    config = changed(setting.config, training=training, model={"modalities": modalities})
    spread = changed(config, training={"table": "sharded"})
    name = f"{kind}-rows"
    want = setting.train("plain", 1, f"{name}1", config)
    assert_same(setting.train(stage, 3, f"{name}3", spread), want)
    moved, alone, reference = (setting.path / f"{name}{n}" / "checkpoints" for n in (3, 4, 1))
    first, last = sorted(moved.glob("step-*"))
    assert len(list(first.glob("table-*.safetensors"))) == 3
    states = [read_state(sorted(place.glob("step-*"))[-1]) for place in (moved, reference)]
    assert states[0].best == pytest.approx(states[1].best, abs=1e-3)
    shutil.rmtree(last)  # as if the run had been killed in its second epoch
    shutil.copytree(moved, alone)
    for world, place, how in ((2, f"{name}3", spread), (1, f"{name}4", config)):
        got = setting.train("plain" if world == 1 else stage, world, place, how)
        assert 0 < len(got.losses) < len(want.losses)
        assert_same(got, want, slice(-len(got.losses), None))


def test_a_warm_start_on_workers_is_that_of_one_process(setting):
    """A finished run continued on a catalogue with two more items: ZeRO-2 on two workers, plain on one."""
    runs = setting.path / "runs"
    config = setting.config.model_copy(update={"runs": str(runs), "name": "yesterday"})
    setting.train("plain", 1, "runs/yesterday", config)
    (runs / "yesterday/config.yaml").write_text(dump_config(config))
    new = [NUM_ITEMS + 1, NUM_ITEMS + 2]
    folder = setting.folder
    grown = write_data_folder(
        setting.path / "grown",
        [[*folder.histories([u]).item.tolist(), *new] for u in range(folder.num_users)],
        features={m: grow(folder.feature(m), len(new)) for m in folder.modalities},
    )
    warm = changed(config, training={"warm_start": "yesterday", "epochs": 1})
    warm = warm.model_copy(update={"name": "today"})
    want = setting.train("plain", 1, "one", warm, grown)
    assert_same(setting.train(2, 2, "two", warm, grown), want)


def grow(table, more):
    """A feature table's rows (NaN where missing) with `more` rows after them."""
    rows = table.rows(torch.arange(1, len(table)))
    known = torch.where(rows.present[:, None], rows.values, torch.nan)
    return torch.cat([known, torch.ones(more, table.dim)]).numpy()
