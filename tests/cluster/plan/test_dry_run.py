"""The plan of a run, compared with the memory of real workers."""

import re

import numpy as np
import pytest
from engine_workers import Workers
from planted import make_config, planted_folder

from findrec.cluster.plan import dry_run, machines
from findrec.cluster.plan import plan as plan_module
from findrec.cluster.plan.dry_run import RAY_BYTES, check_memory_fits, describe
from findrec.cluster.plan.machines import Machine, place_workers
from findrec.cluster.plan.memory import tower_parts
from findrec.cluster.plan.plan import make_plan
from findrec.config import parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.train_dist import main
from findrec.training.runs import training_jobs

ROOMY = [Machine("here", cpus=8, memory=64 << 30)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_folder(tmp_path_factory.mktemp("plan") / "planted")


def changed(config, *overrides):
    return parse_config(config.model_dump(mode="json"), overrides)


def test_the_plan_names_every_part(planted):
    config = changed(make_config(), "cluster.workers=2", "training.epochs=3")
    plan = make_plan(config, planted, ROOMY)
    text = "\n".join(describe(plan))
    assert "2 on here" in text
    assert f"{plan.num_steps:,} per epoch, {3 * plan.num_steps:,} in total" in text
    assert f"items: {60 * 3 * 32:,} parameters, replicated" in text
    for part in ("weights", "gradients", "optimizer"):
        assert re.search(f"tower {part} .*MiB\n", text)
        assert re.search(f"table {part} .*MiB\n", text)
    assert plan.num_targets == int((planted.valid_start - 1).sum())
    assert plan.shards == [1, 1]
    assert plan.num_shards == 1


def test_a_plan_that_does_not_fit_is_refused_with_what_would(planted):
    config = changed(make_config(microbatches=6), "cluster.workers=3", "cluster.cpus_per_worker=1")
    small = [Machine("small", cpus=8, memory=2_700 << 20)]
    plan = make_plan(config, planted, small)
    with pytest.raises(FindRecError, match=r"small has 2\.6 GiB .* 3 workers need") as error:
        check_memory_fits(plan, planted, small)
    (fits,) = re.findall(r"(cluster\.workers=\d)", str(error.value))
    again = make_plan(changed(config, fits), planted, small)
    check_memory_fits(again, planted, small)
    tiny = [Machine("tiny", cpus=8, memory=1 << 30)]
    with pytest.raises(FindRecError, match="No change of a single setting"):
        check_memory_fits(make_plan(config, planted, tiny), planted, tiny)


def test_an_evaluator_beside_training_needs_its_room(planted):
    config = changed(make_config(), "evaluation.evaluator=async")
    plan = make_plan(config, planted, ROOMY)
    assert plan.evaluator_bytes > make_plan(make_config(), planted, ROOMY).evaluator_bytes == 0
    (line,) = (line for line in describe(plan) if "evaluator" in line)
    assert f"{plan.evaluator_bytes / 2**20:,.1f} MiB" in line
    need = config.cluster.workers * plan.memory.total("device", "host") + RAY_BYTES
    small = [Machine("small", cpus=8, memory=need + (1 << 20))]
    check_memory_fits(make_plan(make_config(), planted, small), planted, small)
    with pytest.raises(FindRecError, match=r"evaluation\.evaluator=inline"):
        check_memory_fits(make_plan(config, planted, small), planted, small)


def test_large_microbatches_are_named_as_what_to_lower(tmp_path):
    rng = np.random.default_rng(0)
    folder = write_data_folder(tmp_path / "data", [rng.integers(1, 5000, 400) for _ in range(400)])
    config = changed(make_config(), "training.tokens=60000", "data.max_length=400", "model.dim=128")
    config = changed(config, "model.stream.layers=8")
    machine = Machine("here", cpus=8, memory=7 << 30)
    with pytest.raises(FindRecError) as error:
        check_memory_fits(make_plan(config, folder, [machine]), folder, [machine])
    assert re.search("training.tokens=(30000|15000|7500)", str(error.value))
    assert "training.checkpoint_activations=true" in str(error.value)


@pytest.fixture(scope="module")
def long_histories(tmp_path_factory):
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 3000, int(length)) for length in rng.integers(100, 400, 60)]
    return write_data_folder(tmp_path_factory.mktemp("plan") / "long", histories)


@pytest.mark.parametrize("name", ["findrec", "sasrec"])
def test_the_extrapolated_memory_is_that_of_the_whole_microbatch(long_histories, name, monkeypatch):
    training = {"tokens": 10_000, "microbatches": 1}
    config = parse_config({"model": {"name": name}, "training": training, "cluster": {"workers": 1}})
    extrapolated = make_plan(config, long_histories, ROOMY).sizes
    assert extrapolated.shape.positions > plan_module.MAX_MEASURED
    monkeypatch.setattr(plan_module, "MAX_MEASURED", 1 << 30)
    whole = make_plan(config, long_histories, ROOMY).sizes
    assert extrapolated.activations == pytest.approx(whole.activations, rel=0.05)
    for size in ("rows", "length", "targets", "distinct"):
        assert getattr(extrapolated.shape, size) == pytest.approx(getattr(whole.shape, size), rel=0.15), size


def test_the_memory_for_remote_data_is_measured_without_reading_it(long_histories, monkeypatch):
    config = parse_config({"model": {"name": "sasrec"}, "training": {"tokens": 6000}})
    read = make_plan(config, long_histories, ROOMY).sizes

    def refuse(*_):
        raise AssertionError("events were read")

    monkeypatch.setattr(DataFolder, "remote", property(lambda _: True))
    monkeypatch.setattr(DataFolder, "histories", refuse)
    generated = make_plan(config, long_histories, ROOMY).sizes
    for size in ("rows", "length", "targets"):
        assert getattr(generated.shape, size) == getattr(read.shape, size)
    assert generated.shape.distinct >= read.shape.distinct  # all events have different items
    assert generated.activations == pytest.approx(read.activations, rel=0.1)


def test_placement_fills_machines_and_counts_gpus():
    nodes = [Machine("a", 2, 1 << 34, gpus=1), Machine("b", 8, 1 << 34, gpus=2), Machine("c", 1, 1 << 34)]
    config = parse_config({"cluster": {"workers": 6}})
    assert [(m.name, n) for m, n in place_workers(config, nodes, gpu=False)] == [("b", 6)]
    config = parse_config({"cluster": {"workers": 3}})
    assert [(m.name, n) for m, n in place_workers(config, nodes, gpu=True)] == [("b", 2), ("a", 1)]
    with pytest.raises(FindRecError, match="1 are left over"):
        place_workers(parse_config({"cluster": {"workers": 4}}), nodes, gpu=True)


@pytest.mark.parametrize("offload", [False, True])
def test_a_stage_more_never_takes_more_of_the_gpu(offload):
    def on_gpu(stage, workers):
        parts = tower_parts(100_000_000, stage, workers, gpu=True, offload=offload and stage > 0)
        return sum(part.bytes for part in parts if part.location == "device")

    sizes = [on_gpu(stage, 8) for stage in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert on_gpu(3, 64) < on_gpu(3, 8)
    with pytest.raises(ValueError, match="stage 4"):
        tower_parts(10, 4, 2, gpu=True, offload=False)


def test_from_the_command_line_nothing_is_started(planted, tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    config = changed(make_config(), f"data.folder={planted.path}", "cluster.workers=2")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    given = ["--config", str(tmp_path / "run.yaml"), "--dry-run"]
    assert main(given) == 0
    output = capsys.readouterr()
    assert "it fits" in output.out + output.err
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    assert main([*given, "data.folder=nowhere"]) == 2
    assert "Prepare it first" in capsys.readouterr().err


def test_every_training_of_a_run_is_planned_with_all_its_tables(planted, monkeypatch, capsys):
    """The model is trained in two stages, the first of which has tables of items and of users."""
    model = {"name": "toy_models:TwoStages", "dim": 16}
    tree = make_config().model_dump(mode="json") | {"model": model}
    config = parse_config(tree, [f"data.folder={planted.path}", "evaluation.baselines=[sasrec]"])
    monkeypatch.setattr(machines, "this_machine", lambda: ROOMY[0])
    dry_run.dry_run(config)
    said = capsys.readouterr()
    text = said.out + said.err
    assert re.findall("training of (.*)", text) == ["TwoStages/edges", "TwoStages", "sasrec"]
    assert f"users: {planted.num_users * 16:,} parameters" in text
    assert text.count(f"items: {60 * 16:,} parameters") == 3
    first = training_jobs(config, planted.path)[0]
    plan = make_plan(first.config, planted, ROOMY)
    rows = planted.num_users + planted.num_items + 2
    assert (
        sum(part.bytes for part in plan.memory.parts if part.name == "table optimizer") == 2 * 4 * 16 * rows
    )


def popular(path, num_items, num_users, length):
    rng = np.random.default_rng(0)
    items = (num_items ** rng.random((num_users, length))).astype(np.int64)
    text = rng.normal(size=(num_items, 32)).astype(np.float32)
    items[0, 0] = num_items
    return write_data_folder(path, list(items.clip(1)), features={"text": text})


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_items", "stage", "overrides"),
    [
        (500, 2, ["model.dim=32"]),
        (60_000, 1, ["model.dim=64"]),
        (60_000, 2, ["model.dim=64", "training.table=sharded"]),
        (60_000, 3, ["model.dim=64", "training.tokens=6000", "training.checkpoint_activations=true"]),
    ],
)
def test_real_workers_need_the_memory_that_is_planned(tmp_path, num_items, stage, overrides):
    """Peaks of whole workers, a checkpoint and a validation with them, to within a factor of 1.5."""
    folder = popular(tmp_path / "data", num_items, num_users=32, length=203)
    config = parse_config(
        {"training": {"epochs": 1, "microbatches": 2, "tokens": 3200}, "cluster": {"workers": 2}},
        [f"cluster.zero_stage={stage}", *overrides],
    )
    planned = make_plan(config, folder, ROOMY).memory.total("device", "host")
    with Workers(2, tmp_path) as workers:
        measured = max(workers.train(stage, folder.path, tmp_path / "checkpoints", config).peak_bytes)
    print(f"{num_items} items: {measured / 2**20:.0f} MiB measured, {planned / 2**20:.0f} planned")
    assert measured / 1.5 < planned < measured * 1.5
