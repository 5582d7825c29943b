"""What holds for the repository as a whole: sizes, folders that are no packages, files that parse."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import findrec
from findrec.cluster.zero.config import deepspeed_config
from findrec.config import ClusterConfig, RunConfig, load_config
from findrec.datasets.sources.recipe import load_recipe
from findrec.models.config import ModelConfig, SequenceConfig
from findrec.models.configs import CONFIGS
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
    if path.stem != "shop":  # which is for recipes of users
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
    result = {path.name: json.loads(path.read_text()) for path in (ROOT / "cluster").glob("*.json")}
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
    assert result == want


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


def pins(file: str) -> dict[str, list[Requirement]]:
    """The exact requirements in a file, by name; some have a version for each range of Pythons."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line[:1].isalnum():
            requirement = Requirement(line.split("#")[0].rstrip(" \\"))
            assert str(requirement.specifier).startswith("=="), line
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def declared(extras: tuple[str, ...]) -> list[Requirement]:
    """What `pyproject.toml` asks for with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    waiting = list(project["dependencies"]) + [line for extra in extras for line in optional[extra]]
    requirements = [Requirement(line) for line in waiting]
    own = [extra for r in requirements if r.name == "findrec" for extra in r.extras]
    nested = [Requirement(line) for extra in own for line in optional[extra]]
    return [r for r in requirements + nested if r.name != "findrec"]


def model_words(name: str, config: type[ModelConfig]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What only the folder of a model may say: its modules, its classes and its name; and its own keys."""
    own = set(config.model_fields) - set(SequenceConfig.model_fields)
    words = [rf"models[./]{name}\b", rf"\b{config.__name__}\b", rf"\bname[:=] ?[\"']?{name}\b(?!-)"]
    if name != findrec.__name__:  # the project is called like one of its models
        words += [rf"(?i:\b{name}\b)"]
    return re.compile("|".join(words)), re.compile("|".join(rf"\bmodel\.{key}\b(?!\()" for key in own))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_outside_its_folder_knows_a_model(name: str) -> None:
    words, keys = model_words(name, CONFIGS[name])
    package, models = ROOT / "findrec", ROOT / "findrec" / "models"
    folders = {other: models / other.replace("-", "_") for other in CONFIGS}
    known = {}
    for path in [*package.rglob("*.py"), *package.rglob("*.j2")]:
        text, place = path.read_text(), path.relative_to(package).as_posix()
        if folders[name] not in path.parents and (found := words.search(text)):
            known[place] = found.group()
        # Other models have keys and attributes of the same names.
        if not set(folders.values()) & set(path.parents) and (found := keys.search(text)):
            known[place] = found.group()
    assert known.pop("models/configs.py"), "the registry names every model"
    assert known == {}


def test_each_version_that_is_held_says_why() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalnum()]
    assert lines
    assert [line for line in lines if "  # " not in line] == []


def test_the_lock_is_what_the_project_asks_for() -> None:
    """Fails where `make lock` was not run after a change of pyproject.toml or constraints.txt."""
    locked, held = pins("requirements.lock"), pins("constraints.txt")
    assert "torch" not in locked  # its build depends on the machine
    everything = locked | {"torch": held["torch"]}
    for requirement in declared(("cpu", "dev")):
        found = everything[canonicalize_name(requirement.name)]
        assert [p for p in found if not requirement.specifier.contains(version(p))] == []
    for_gpus = {str(canonicalize_name(r.name)): r for r in declared(("gpu", "mamba"))}
    for name, (pin,) in held.items():
        if name in for_gpus and name not in locked:
            assert for_gpus[name].specifier.contains(version(pin)), name
        else:
            assert [version(p) for p in everything[name]] == [version(pin)]
    text = (ROOT / "requirements.lock").read_text()
    assert text.count("==") <= text.count("--hash=sha256:")
    assert "://" not in text


def test_hosted_ci_runs_the_targets_of_ci_run_on_all_supported_pythons() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["make"]
    entries = job["strategy"]["matrix"]["include"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make setup", "make ${{ matrix.targets }}"]
    run = {target for entry in entries for target in entry["targets"].split()}
    (stages,) = re.findall(r"for stage in (.*); do", (ROOT / ".ci" / "run").read_text())
    assert run | {"setup"} == set(stages.split())
    assert run <= targets
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = SpecifierSet(project["requires-python"])
    pythons = [f"3.{minor}" for minor in range(40) if supported.contains(f"3.{minor}")]
    assert [entry["python"] for entry in entries if entry["targets"] == "test"] == pythons
    assert {entry["python"] for entry in entries} == set(pythons)
    assert f"needs Python {pythons[0]} to {pythons[-1]}" in (ROOT / ".ci" / "setup_env.py").read_text()
    assert f"You need Python {pythons[0]} to {pythons[-1]}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_issue_forms_parse(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) > 0
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    newest = re.search(r"^## (\S+) — (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert (citation["version"], citation["date-released"]) == newest.groups()
    assert citation["version"] == findrec.__version__


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
        "findrec/cli/app.py",
        "findrec/assets/datasets/ml-100k.yaml",
        "findrec/assets/configs/demo.yaml",
        "findrec/assets/cluster/README.md",
    ):
        assert name in names
    sources = {p.relative_to(ROOT).as_posix() for p in own_files(".cpp", ".h", ".j2", ".js", ".css", ".svg")}
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
    package, checkout, result = done.stdout.split()
    assert package == str(tmp_path / "site" / "findrec")
    assert checkout == "None"
    assert result.endswith("configs/demo.yaml")
