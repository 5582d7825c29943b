"""Which runs train on GPUs, with how many workers, and what the user is told."""

import re

import pytest
import ray
import torch
from planted import make_config, planted_folder

from findrec import nvidia, ray_session
from findrec.cluster.plan import machines
from findrec.cluster.plan.dry_run import check_memory_fits, describe
from findrec.cluster.plan.machines import Machine, use_gpus
from findrec.cluster.plan.memory import FEATURE_TABLES
from findrec.cluster.plan.plan import make_plan
from findrec.config import load_config, parse_config
from findrec.errors import FindRecError
from findrec.training.build import build_catalogue


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch):
    monkeypatch.setattr(machines, "built_for_gpus", lambda: True)


def with_gpus(*counts, memory=None):
    return [Machine(f"m{n}", 16, 64 << 30, gpus, memory) for n, gpus in enumerate(counts)]


@pytest.mark.parametrize(
    ("overrides", "counts", "workers", "gpu", "said"),
    [
        ([], (0,), 2, False, ""),
        ([], (1,), 1, True, "1 instead of 2 workers"),
        ([], (2,), 2, True, ""),
        ([], (1, 1), 2, True, ""),
        (["cluster.gpu=true"], (1,), 1, True, "1 instead of 2 workers"),
        (["cluster.gpu=false"], (1,), 2, False, ""),
        (["cluster.workers=2"], (1,), 2, False, "ON THE CPU.*cluster.workers=1 .*cluster.gpu=false"),
        (
            ["cluster.workers=6"],
            (3, 1),
            6,
            False,
            "ON THE CPU.*cluster.workers=4 .*cluster.gpu=false",
        ),
        (["cluster.workers=2", "cluster.min_workers=1"], (1,), 2, True, ""),
        (["cluster.workers=2", "cluster.gpu=true"], (1,), 2, True, ""),  # placing them will fail, or wait
    ],
)
def test_workers_follow_the_gpus_only_where_their_number_is_not_set(
    overrides, counts, workers, gpu, said, capsys
):
    config = parse_config({}, overrides)
    placed, on_gpus = use_gpus(config, with_gpus(*counts), announce=True)
    assert (placed.cluster.workers, on_gpus) == (workers, gpu)
    shown = capsys.readouterr()
    text = (shown.out + shown.err).replace("\n", " ")
    assert re.search(said, text) if said else not text
    if placed is not config:
        assert placed.training.microbatches % placed.cluster.workers == 0
        changed = placed.model_copy(update={"cluster": config.cluster})
        assert changed == config, "nothing but the number of workers differs"
    use_gpus(config, with_gpus(*counts))
    assert not capsys.readouterr().out


def test_the_number_of_workers_divides_the_microbatches(monkeypatch):
    config = parse_config({"training": {"microbatches": 12}})
    five = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 6})})
    five.cluster.model_fields_set.discard("workers")
    assert use_gpus(five, with_gpus(5))[0].cluster.workers == 4


@pytest.mark.parametrize("name", ["demo", "complete-journey"])
def test_the_configurations_of_the_readme_use_the_one_gpu_there_is(name):
    config, gpu = use_gpus(load_config(name), with_gpus(1))
    assert gpu
    assert config.cluster.workers == 1


def test_a_build_for_cpus_never_trains_on_gpus_that_ray_counts(monkeypatch, capsys):
    monkeypatch.setattr(machines, "built_for_gpus", lambda: False)
    assert use_gpus(parse_config({}), with_gpus(4), announce=True)[1] is False
    assert "4 GPUs are not used: the installed PyTorch is the build for CPUs" in "".join(capsys.readouterr())
    with pytest.raises(FindRecError, match="build for CPUs"):
        use_gpus(parse_config({}, ["cluster.gpu=true"]), with_gpus(4))


def test_unknown_memory_of_gpus_is_not_checked_and_said_so(tmp_path):
    folder = planted_folder(tmp_path / "planted")
    config = make_config()
    unknown, small, large = (with_gpus(2, memory=memory) for memory in (None, 1 << 20, 80 << 30))
    plan = make_plan(config, folder, unknown)
    assert plan.gpu
    check_memory_fits(plan, folder, unknown)
    (line,) = [line for line in describe(plan) if "on each GPU" in line]
    assert line.endswith("of unknown, not checked")
    with pytest.raises(FindRecError, match=r"a GPU of m0 has 0\.0 GiB"):
        check_memory_fits(make_plan(config, folder, small), folder, small)
    (line,) = [line for line in describe(make_plan(config, folder, large)) if "on each GPU" in line]
    assert line.endswith("of 80.0 GiB")


def test_the_dry_run_says_that_it_did_not_check_gpus(tmp_path, monkeypatch, capsys):
    from findrec.cluster.plan import dry_run

    folder = planted_folder(tmp_path / "planted")
    config = parse_config(make_config().model_dump(mode="json"), [f"data.folder={folder.path}"])
    for memory, said in ((None, "the memory of GPUs was not checked"), (80 << 30, "it fits; start it")):
        monkeypatch.setattr(machines, "this_machine", lambda memory=memory: with_gpus(2, memory=memory)[0])
        dry_run.dry_run(config)
        assert said in "".join(capsys.readouterr())


def test_gpus_that_pytorch_cannot_use_are_not_given_to_ray(monkeypatch, capsys):
    """The driver counts them, but is too old for this build."""
    given = {}

    def cluster(cores, environment, **options):
        given.update(options)
        raise FindRecError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ray_session, "local_cluster", cluster)
    monkeypatch.setattr(ray_session, "find_driver", lambda: nvidia.Driver("535.1", ("NVIDIA A100",)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for overrides, warned in (([], True), (["cluster.gpu=false"], False)):
        with (
            pytest.raises(FindRecError, match="far enough"),
            ray_session.ray_session(parse_config({}, overrides)),
        ):
            pass
        assert given["num_gpus"] == 0
        assert ("NVIDIA A100 is not used" in "".join(capsys.readouterr())) == warned


def test_the_machines_of_a_cluster_are_asked_for_the_memory_of_their_gpus(monkeypatch):
    """One answers, one has no driver, one does not answer in time, one is lost; the last has no GPU."""
    ids = [letter * 56 for letter in "abcde"]
    gpus = (2, 1, 1, 1, 0)
    nodes = [Machine("m", 8, 1 << 34, count, node=node) for node, count in zip(ids, gpus, strict=True)]
    asked, options, cancelled = [], {}, []

    class Task:
        def __init__(self, node=None):
            self.node = node

        def options(self, scheduling_strategy):
            return Task(scheduling_strategy.node_id)

        def remote(self):
            asked.append(self.node)
            return self

    def remote(**given):
        options.update(given)
        return lambda function: Task() if function is nvidia.gpu_memory else None

    def get(task):
        if task.node == ids[3]:
            raise ray.exceptions.RayError("lost")
        return {ids[0]: 80 << 30, ids[1]: None}[task.node]

    def wait(tasks, **_):
        late = [task for task in tasks if task.node == ids[2]]
        return [task for task in tasks if task not in late], late

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "cancel", lambda task, force: cancelled.append((task.node, force)))
    found = machines.with_gpu_memory(nodes)
    assert [m.gpu_memory for m in found] == [80 << 30, None, None, None, None]
    assert asked == ids[:4]
    assert options["num_cpus"] == 0
    assert cancelled == [(ids[2], True)]
    asked.clear()
    assert machines.with_gpu_memory(found[:1] + nodes[4:]) == found[:1] + nodes[4:]
    assert not asked, "what is known, and machines without GPUs, are not asked"


@pytest.mark.parametrize("kept", [True, False])
def test_feature_tables_are_counted_where_they_are_kept(tmp_path, monkeypatch, kept):
    """By the rule of `Catalogue.keep_on`, with what the other parts of the plan leave free."""
    # A measurement differs by some kilobytes from the next one, about the size of these tables.
    monkeypatch.setattr("findrec.cluster.plan.plan.measure_microbatch", lambda *_: 500_000)
    folder = planted_folder(tmp_path / "planted")
    config = make_config()
    size = build_catalogue(config, folder).nbytes
    host = make_plan(config, folder, with_gpus(2, memory=1 << 20)).memory
    assert not [part for part in host.parts if part.name == FEATURE_TABLES]
    (ahead,) = [part.bytes for part in host.parts if part.name == "features read ahead"]
    rest = host.total("device") - ahead
    free = 4 * size  # a quarter of it is for the tables
    plan = make_plan(config, folder, with_gpus(2, memory=rest + (free if kept else free - 1)))
    assert plan.memory.total("device") - rest == (size if kept else ahead)
    assert plan.memory.total("host") == host.total("host")
    (line,) = [line for line in describe(plan) if line.startswith("  features ")]
    assert ("kept on the GPUs after the first step" if kept else "read from host memory") in line
    cpu = make_plan(config, folder, [Machine("m", 16, 64 << 30)])
    assert not [line for line in describe(cpu) if line.startswith("  features ")]
