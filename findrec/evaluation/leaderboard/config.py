"""The file of a leaderboard: which configurations are trained, on which data, and what is measured.

A row is a set of changes to the run configuration that all rows share. Changes are written as a tree or with
dotted keys, `{training: {epochs: 3}}` or `{training.epochs: 3}`. They are merged in this order, later ones
winning: the file `config`, `base`, the command line, the data set, the row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator, model_validator

from findrec.baseline_configs import AnyBaseline, BaselineConfig
from findrec.config import RunConfig, parse_config
from findrec.errors import FindRecError, suggest
from findrec.evaluation.compare.results import check_metric
from findrec.evaluation.leaderboard.keys import SUGGESTED, Budget, Published, check_published
from findrec.evaluation.leaderboard.trees import Tree, expand, merge, put
from findrec.evaluation.suites.suites import check_suite
from findrec.paths import find_asset
from findrec.schema import Part, flatten, parse_yaml, read_mapping, validate

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# Keys of a run that the leaderboard sets itself.
_RESERVED = {
    "name": "each run is named by its row and seed",
    "training.seed": "list seeds under `seeds`",
    "evaluation.baselines": "list baselines without training under `baselines`, and models as rows",
}
_OF_ALL = {"runs": "the folder is the same for all runs: set it in `base`"}


class LeaderboardConfig(Part):
    """The keys of the file."""

    name: str = Field(pattern=_NAME, max_length=100)
    config: str | None = None  # name or path of a run configuration that all rows share
    base: dict[str, Any] = Field({})  # keys of the run configuration, for all rows
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    data: dict[str, dict[str, Any] | None] = Field(min_length=1)  # changes by the label of a data set
    rows: dict[str, dict[str, Any] | None] = Field(min_length=1)  # changes by the label of a row
    budget: Budget | None = None  # the same for all rows, which then cannot set it themselves
    reference: str  # the row with which all others are compared
    baselines: list[AnyBaseline] = Field([])  # without training, evaluated once for each data set
    suites: dict[str, list[int]] = Field({})  # levels by kind of suite (findrec evaluate --suite)
    metrics: list[str] = Field(["ndcg@10", "recall@10"], min_length=1)  # as in findrec compare
    published: list[Published] = Field([])  # results of others, shown beside the rows

    @field_validator("seeds", "metrics")
    @classmethod
    def _check_distinct(cls, given: list[Any]) -> list[Any]:
        if len(set(given)) < len(given):
            raise ValueError("values must be distinct")
        return given

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, given: list[str]) -> list[str]:
        for metric in given:
            check_metric(metric, SUGGESTED)
        return given

    @field_validator("suites")
    @classmethod
    def _check_suites(cls, given: dict[str, list[int]]) -> dict[str, list[int]]:
        for kind, levels in given.items():
            check_suite(kind, levels)
            if not levels:
                raise ValueError(f"suite {kind} has no levels: list some, or leave it out")
        return given

    @field_validator("data", "rows")
    @classmethod
    def _check_labels(cls, given: dict[str, Any]) -> dict[str, Any]:
        folders: dict[str, str] = {}
        for label in given:
            if (other := folders.setdefault(folder_name(label).lower(), label)) != label:
                raise ValueError(f"{other!r} and {label!r} would share a folder: change one of the labels")
        return given

    @model_validator(mode="after")
    def _check(self) -> LeaderboardConfig:
        if self.reference not in self.rows:
            raise ValueError(
                f"reference: no row is labelled {self.reference!r}{suggest(self.reference, self.rows)} "
                f"(rows: {', '.join(self.rows)})"
            )
        check_published(self.published, list(self.data))
        titles = [baseline.title for baseline in self.baselines]
        for baseline in self.baselines:
            if not isinstance(baseline, BaselineConfig):
                raise ValueError(f"baselines: {baseline.title} is trained; make it a row, with its seeds")
            if baseline.title in self.rows or titles.count(baseline.title) > 1:
                raise ValueError(
                    f"baselines: two lines of the table are named {baseline.title!r}; set the `label` of one"
                )
        return self

    @property
    def untrained(self) -> list[BaselineConfig]:
        """The baselines."""
        return [baseline for baseline in self.baselines if isinstance(baseline, BaselineConfig)]


def folder_name(label: str) -> str:
    """The label as part of a path; raises `ValueError` if no letter or digit is left of it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._")
    if not name:
        raise ValueError(f"the label {label!r} has no letter from a to z and no digit to name a folder by")
    return name


@dataclass(frozen=True)
class Run:
    """One training of the leaderboard.

    Attributes:
        data: label of its data set.
        row: label of its row.
        seed: its `training.seed`.
        tree: the keys of its configuration that were given; keys with defaults stay open.
        config: its configuration.
    """

    data: str
    row: str
    seed: int
    tree: Tree
    config: RunConfig

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.data}, {self.row}, seed {self.seed}"


@dataclass(frozen=True)
class Leaderboard:
    """A leaderboard that was read and checked, without its data.

    Attributes:
        config: its keys.
        source: the text of its file.
        overrides: the changes from the command line.
        shared: the keys of the run configuration that all rows share.
        runs: all trainings, by data set, then row, then seed.
        baselines: by data set, the configuration under which its baselines are evaluated.
        only: the rows that were chosen besides the reference; empty for all.
    """

    config: LeaderboardConfig
    source: str
    overrides: tuple[str, ...]
    shared: Tree
    runs: tuple[Run, ...]
    baselines: Mapping[str, RunConfig]
    only: tuple[str, ...] = ()

    @property
    def rows(self) -> list[str]:
        """The labels of its rows, in order."""
        return list(dict.fromkeys(run.row for run in self.runs))

    def of(self, data: str, row: str) -> list[Run]:
        """The runs of one cell of the table, by seed."""
        return [run for run in self.runs if (run.data, run.row) == (data, row)]


def load_leaderboard(path: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Leaderboard:
    """Read the file of a leaderboard and the configurations of all its runs.

    Args:
        path: the file.
        overrides: `key=value`, of the leaderboard (`seeds=[0]`) or of the run configuration of all rows
            (`training.epochs=3`).
        only: rows to train and compare with the reference; by default all.

    Raises:
        FindRecError: for unknown keys, impossible values or labels, or a row without a valid configuration.
    """
    tree, source = read_mapping(path), path.read_text(encoding="utf-8-sig")
    _refuse_repeated_keys(source, path)
    shared: Tree = {}
    for override in overrides:
        key, value = _parse_override(override)
        if key.partition(".")[0] in LeaderboardConfig.model_fields.keys() - {"data", "rows"}:
            put(tree, key, value)  # `data.` begins keys of the run configuration, as in `findrec train`
        else:
            put(shared, key, value)
    config = validate(LeaderboardConfig, tree, str(path))
    for label in only:
        if label not in config.rows:
            raise FindRecError(
                f"--only {label!r}: {path} has no such row{suggest(label, config.rows)} "
                f"(rows: {', '.join(config.rows)})"
            )
    budget = {} if config.budget is None else config.budget.run_keys
    reserved = _RESERVED | dict.fromkeys(budget, "`budget` sets it for all rows")
    of_all = reserved | _OF_ALL
    base = _base(config, path, reserved)
    base = merge(base, _checked(shared, "the command line", reserved))
    base = merge(base, expand(budget, f"{path}, budget"))
    parse_config(base, source=f"{path}, what all rows share")
    wanted = [row for row in config.rows if not only or row in (*only, config.reference)]
    runs, baselines = [], {}
    for data, changes in config.data.items():
        here = f"{path}, data {data!r}"
        of_data = merge(base, _checked(changes or {}, here, of_all))
        folder = f"{base.get('runs', 'runs')}/{config.name}/{folder_name(data)}"
        given = [b.model_dump(mode="json", exclude_unset=True) | {"name": b.name} for b in config.untrained]
        evaluated = merge(of_data, {"evaluation": {"baselines": given}})
        baselines[data] = parse_config(evaluated | {"name": "baselines", "runs": folder}, source=here)
        for row in wanted:
            where = f"{path}, row {row!r}"
            of_row = merge(of_data, _checked(config.rows[row] or {}, where, of_all))
            for seed in config.seeds:
                name = f"{folder_name(row)}-s{seed}"
                own = {"training": {"seed": seed}, "evaluation": {"baselines": []}}
                whole = merge(of_row, own) | {"name": name, "runs": folder}
                if isinstance(store := whole["training"].get("checkpoint_store"), str):
                    # Checkpoints are stored by their path below `runs`, here that of one data set.
                    store = f"{store.rstrip('/')}/{config.name}/{folder_name(data)}"
                    whole = merge(whole, {"training": {"checkpoint_store": store}})
                parsed = parse_config(whole, source=where)
                runs.append(Run(data, row, seed, whole, parsed))
    return Leaderboard(config, source, tuple(overrides), base, tuple(runs), baselines, tuple(only))


def _base(config: LeaderboardConfig, path: Path, reserved: Mapping[str, str]) -> Tree:
    """The keys that all rows share, from `config` and `base`."""
    base: Tree = {}
    if config.config is not None:
        beside = path.parent / config.config
        file = beside if beside.is_file() else find_asset(config.config, "configs")
        base = expand(read_mapping(file), str(file))
        base.pop("name", None)
        if isinstance(base.get("evaluation"), dict):
            base["evaluation"].pop("baselines", None)
    return merge(base, _checked(config.base, f"{path}, base", reserved))


def _checked(tree: Mapping[str, Any], where: str, reserved: Mapping[str, str]) -> Tree:
    """The changes as a tree; raises `FindRecError` for keys that the leaderboard sets itself."""
    expanded = expand(tree, where)
    for section in ("training", "evaluation"):  # into which the leaderboard merges keys of its own
        if not isinstance(expanded.get(section, {}), dict):
            raise FindRecError(f"{where}: {section} is {expanded[section]!r}, not a section of keys")
    for key in flatten(expanded):
        for other, instead in reserved.items():
            if key == other or key.startswith(f"{other}."):
                raise FindRecError(f"{where}: {key} cannot be set here: {instead}")
    return expanded


def _parse_override(override: str) -> tuple[str, Any]:
    key, sep, value = override.partition("=")
    if not sep:
        raise FindRecError(
            f"{override!r} is not an override: write key=value, e.g. seeds=[0] or training.epochs=3"
        )
    return key, parse_yaml(value, f"the value of {override!r}")


def _refuse_repeated_keys(text: str, path: Path) -> None:
    """Raise `FindRecError` if a mapping has a key twice; YAML would silently take the last one."""
    nodes, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            nodes += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            nodes.append(value)
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise FindRecError(
                    f"{path}, line {line}: {key.value!r} is already in line {lines[key.value]}. Each label "
                    "and key can be used once: rename or delete one"
                )
