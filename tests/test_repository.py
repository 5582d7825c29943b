"""What holds for the repository as a whole: sizes, folders that are no packages, files that parse."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import yaml

from findrec.cluster.deepspeed_config import deepspeed_config
from findrec.config import ClusterConfig, RunConfig, load_config
from findrec.datasets.recipe import load_recipe
from findrec.train_dist import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 400


def own_files(*suffixes: str) -> list[Path]:
    """Files in the folders we keep, without caches and build products."""
    folders = ("findrec", "tests", "evaluation", "cluster", "configs", "datasets", ".ci")
    files = [p for folder in folders for s in suffixes for p in (ROOT / folder).rglob(f"*{s}")]
    return [p for p in files if "__pycache__" not in p.parts and "assets" not in p.parts]


def test_no_module_is_too_long_to_read() -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in own_files(".py", ".cpp", ".h")}
    assert len(lengths) > 30
    assert {p: n for p, n in lengths.items() if n > LONGEST_FILE} == {}


def test_every_module_says_what_it_is_for() -> None:
    texts = {p: p.read_text().strip() for p in own_files(".py")}
    silent = [p for p, text in texts.items() if text and not text.startswith('"""')]
    assert silent == []


def test_top_level_folders_are_no_packages() -> None:
    for folder in ("cluster", "configs", "datasets", "evaluation", "tests"):
        assert list((ROOT / folder).rglob("__init__.py")) == []


def test_benchmark_programs_are_thin() -> None:
    programs = list((ROOT / "evaluation" / "benchmarks").glob("*.py"))
    assert programs
    assert [p.name for p in programs if len(p.read_text().splitlines()) >= 40] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_parse(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem  # so the run of a file is found under the file's name
    load_recipe(config.data.recipe)


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_parse_and_have_a_card(path: Path) -> None:
    assert load_recipe(str(path)).name == path.stem
    assert (path.with_suffix(".md")).is_file()


def test_ray_cluster_file_is_valid_for_ray() -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()), schema)


def test_deepspeed_examples_are_what_the_engine_tells_deepspeed() -> None:
    """The settings of cluster/README.md: 12 microbatches a step on two workers, all else by default."""
    stages = get_args(ClusterConfig.model_fields["zero_stage"].annotation)
    found = {path.name: json.loads(path.read_text()) for path in (ROOT / "cluster").glob("*.json")}
    config = RunConfig.model_validate({"training": {"microbatches": 12}, "cluster": {"workers": 2}})
    accumulation = config.training.microbatches // config.cluster.workers
    optim = config.training.optim
    want = {
        f"zero{stage}.json": deepspeed_config(optim, stage=stage, accumulation=accumulation)
        for stage in stages
    }
    want["zero2-offload.json"] = deepspeed_config(
        optim, stage=2, accumulation=accumulation, offload_optimizer=True
    )
    assert found == want


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda p: p.stem)
def test_cluster_examples_parse_and_run_the_job(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all("kind" in document for document in documents)
    entrypoint = documents[-1]["spec"]["entrypoint"].split()
    arguments = train_dist_arguments(entrypoint)
    name = Path(arguments.config)
    load_config(ROOT / name.relative_to("/findrec"), arguments.overrides)


def train_dist_arguments(command: list[str]) -> argparse.Namespace:
    """What the job is given in a command line `... -m findrec.train_dist ARGUMENTS`."""
    return parse_arguments(command[command.index("findrec.train_dist") + 1 :])


def test_the_slurm_example_is_bash_and_runs_the_job() -> None:
    script = ROOT / "cluster" / "slurm.sh"
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = script.read_text()
    (usage,) = [line for line in text.splitlines() if line.startswith("#   sbatch ")]
    given = usage.split()[3:]  # after `# sbatch cluster/slurm.sh`
    (line,) = [line for line in text.splitlines() if "-m findrec.train_dist" in line]
    shown = [word.strip('"') for word in line.removesuffix("&").split()]
    filled = {"$config": given[:1], "$tracking": ["tracking.enabled=false"], "$@": given[1:]}
    words = [part for word in shown for part in filled.get(word, [word])]
    arguments = train_dist_arguments(words)
    load_config(ROOT / arguments.config, arguments.overrides)


def test_constraints_pin_each_dependency_once() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [line.partition("==") for line in lines if line]
    assert all(version for _, _, version in pins)
    names = [name.lower() for name, _, _ in pins]
    assert len(names) == len(set(names))
    assert {"torch", "deepspeed", "ray", "mlflow"} <= set(names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tracked files: building in place would leave `build/` behind."""
    copy = tmp_path_factory.mktemp("copy")
    wanted = ["findrec", "configs", "datasets", "cluster", "evaluation"]
    files = [p for p in own_files("") if p.is_file() and p.relative_to(ROOT).parts[0] in wanted]
    files += [ROOT / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE")]
    for path in files:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-q", "-w", str(copy / "dist"), str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_carries_package_and_assets_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"findrec"}
    for name in (
        "findrec/cli.py",
        "findrec/assets/datasets/ml-100k.yaml",
        "findrec/assets/configs/demo.yaml",
        "findrec/assets/cluster/README.md",
    ):
        assert name in names
    sources = {p.relative_to(ROOT).as_posix() for p in own_files(".cpp", ".h")}
    assert sources
    assert sources <= set(names)
    assert not any(name.startswith("findrec/assets/evaluation/benchmarks") for name in names)


@pytest.mark.slow
def test_installed_wheel_finds_its_assets(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    probe = (
        "import sys; sys.path.insert(0, sys.argv[1]); import findrec.paths as p; "
        "print(p.PACKAGE, p.checkout(), p.find_asset('demo', 'configs'))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", probe, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    package, checkout, found = done.stdout.split()
    assert package == str(tmp_path / "site" / "findrec")
    assert checkout == "None"
    assert found.endswith("configs/demo.yaml")
