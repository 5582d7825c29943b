"""Which runs train on GPUs, with how many workers, and what the user is told."""

import re

import pytest
import torch
from planted import make_config, planted_folder

from findrec import nvidia, ray_session
from findrec.cluster.plan import machines
from findrec.cluster.plan.dry_run import check_memory_fits, describe, make_plan
from findrec.cluster.plan.machines import Machine, use_gpus
from findrec.config import load_config, parse_config
from findrec.errors import FindRecError


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
        monkeypatch.setattr(dry_run, "this_machine", lambda memory=memory: with_gpus(2, memory=memory)[0])
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
