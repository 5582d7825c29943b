"""Models of one or several finished runs on the same cases: read, checked to be comparable, compared.

Everything comes from what an evaluation leaves in a run folder (`evaluate.write_results`): the ranks of every
case, so that any metric of single cases can be computed, and the metrics rows, which say how they were
measured. No model is loaded and no data folder is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from findrec.errors import FindRecError, suggest
from findrec.evaluation.metrics import FloatArray, IntArray, case_metrics, user_means
from findrec.evaluation.significance import RESAMPLES, Comparison, compare_models

ALL_MODELS = "all"
_COUNTS = ("user", "target", "greater", "equal")
_SIMPLE = ("mrr", "mean_rank", "auc")
_AT_K = re.compile(r"(ndcg|recall|mrr)@([1-9][0-9]{0,8})")
_OTHER_NAMES = {"hr": "recall", "hit": "recall", "hits": "recall", "hitrate": "recall", "hit_rate": "recall"}


@dataclass(frozen=True)
class Evaluated:
    """What a run says about one model on one split."""

    run: Path
    model: str
    row: Mapping[str, Any]  # its line of metrics.json
    data: Mapping[str, str]  # what the ranks say they were measured on
    user: IntArray  # [C]
    target: IntArray  # [C]
    rank: FloatArray  # [C] expected ranks

    @property
    def settings(self) -> dict[str, Any]:
        """All about the measurement that is no measured value: equal wherever numbers may be compared."""
        said = {k: v for k, v in self.row.items() if k != "model" and isinstance(v, str | int)}
        return dict(self.data) | said


@dataclass(frozen=True)
class RunComparison:
    """The comparison, what it is about, and where each of its models comes from."""

    found: Comparison
    split: str
    protocol: str
    cases: int
    origin: Mapping[str, Evaluated]  # by the name in `found`


def compare_runs(
    runs: Sequence[Path],
    metrics: Sequence[str] = ("ndcg@10",),
    *,
    split: str = "test",
    models: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RunComparison:
    """Compare the models of a run with each other, or several runs' models.

    `models` names those to take from each run, `("all",)` all of them; by default one run is compared whole
    and of several runs each brings the model it is named for. Raises `FindRecError` when a run has no usable
    ranks, was measured on other data, under another protocol or on other cases than the first, when a metric
    or a model is not known, and when fewer than two models or two users are left.
    """
    again = sorted({str(run) for run in runs if list(runs).count(run) > 1})
    if again:
        raise FindRecError(f"{again[0]} is given more than once: a run does not differ from itself")
    found = [one for run in runs for one in _read_models(run, split, models, whole=len(runs) == 1)]
    if len(found) < 2:
        there = ", ".join(f"{one.model} of {one.run}" for one in found)
        raise FindRecError(
            f"a comparison needs two models, there is only {there}. Name a second run, or take the baselines "
            f"too (--model {ALL_MODELS})."
        )
    origin = dict(zip(_labels(found), found, strict=True))
    _check_same(origin)
    values = {name: {label: _values(one, name) for label, one in origin.items()} for name in metrics}
    first = found[0]
    if len(np.unique(first.user)) < 2:
        raise FindRecError(f"{first.run} has one user in the {split} split: an interval needs two or more")
    compared = compare_models(values, first.user, resamples=resamples, seed=seed)
    return RunComparison(compared, split, str(first.row["protocol"]), len(first.user), origin)


def _labels(found: Sequence[Evaluated]) -> list[str]:
    runs = {one.run for one in found}
    if len(runs) == 1:
        return [one.model for one in found]
    distinct = len({run.name for run in runs}) == len(runs)
    return [f"{one.run.name if distinct else one.run}: {one.model}" for one in found]


def _read_models(run: Path, split: str, wanted: Sequence[str], *, whole: bool) -> list[Evaluated]:
    rows = _read_rows(run)
    splits = [name for name in rows if name not in ("strata", "sampled")]
    if split not in splits:
        raise FindRecError(
            f"{run} was not evaluated on a split {split!r}{suggest(split, splits)} "
            f"(there: {', '.join(splits) or 'none'})"
        )
    by_model = {str(row["model"]): row for row in rows[split]}
    if not by_model:
        raise FindRecError(f"{run} holds no results of the {split} split. {_mend(run)}")
    names = list(by_model) if whole or ALL_MODELS in wanted else list(by_model)[:1]
    if wanted and ALL_MODELS not in wanted:
        names = list(dict.fromkeys(wanted))
    for name in names:
        if name not in by_model:
            raise FindRecError(
                f"{run} has no model {name!r}{suggest(name, by_model)} (there: {', '.join(by_model)})"
            )
        if not isinstance(by_model[name].get("protocol"), str) or not by_model[name].get("items"):
            raise FindRecError(f"{run / 'metrics.json'} does not say how {name} was measured. {_mend(run)}")
    table = _read_ranks(run, split)
    model_C = np.asarray(table.column("model").to_numpy(), dtype=object)
    data = {
        key.decode().removeprefix("findrec."): value.decode()
        for key, value in (table.schema.metadata or {}).items()
        if key.startswith(b"findrec.")
    }
    columns = {name: table.column(name).to_numpy() for name in (*_COUNTS, "rank")}
    models = []
    for name in names:
        own = {key: value[model_C == name] for key, value in columns.items()}
        _check_ranks(run, name, split, own, by_model[name])
        models.append(Evaluated(run, name, by_model[name], data, own["user"], own["target"], own["rank"]))
    return models


def _mend(run: Path) -> str:
    return f"Write the results again with `findrec evaluate {run.name}`."


def _read_rows(run: Path) -> dict[str, list[dict[str, Any]]]:
    path = run / "metrics.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FindRecError(f"{run} has no metrics.json: it was not evaluated. {_mend(run)}") from None
    except ValueError as error:  # of the text or of its encoding
        raise FindRecError(f"{path} is damaged: {error}. {_mend(run)}") from None
    if not isinstance(rows, dict) or not all(
        isinstance(part, list) and all(isinstance(row, dict) and "model" in row for row in part)
        for part in rows.values()
    ):
        raise FindRecError(f"{path} is damaged: it holds no rows of models by split. {_mend(run)}")
    return rows


def _read_ranks(run: Path, split: str) -> Any:
    path = run / "ranks.parquet"
    wanted = ("model", "split", *_COUNTS, "rank")
    try:
        schema = pq.read_schema(path)
        missing = [name for name in wanted if name not in schema.names]
        kinds = [name for name in _COUNTS if not missing and not pa.types.is_int64(schema.field(name).type)]
        if missing or kinds or not pa.types.is_float64(schema.field("rank").type):
            what = f"it has no column {missing[0]!r}" if missing else "its columns have other types"
            raise FindRecError(f"{path} is damaged: {what}. {_mend(run)}")
        table = pq.read_table(path, columns=list(wanted), filters=[("split", "==", split)])
    except FileNotFoundError:
        raise FindRecError(f"{run} has no ranks.parquet: it was not evaluated. {_mend(run)}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise FindRecError(f"{path} is damaged: {error}. {_mend(run)}") from None
    if any(table.column(name).null_count for name in wanted):
        raise FindRecError(f"{path} is damaged: it has empty cells. {_mend(run)}")
    return table


def _check_ranks(run: Path, model: str, split: str, own: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """The ranks are possible, and they are the ones that the metrics row was computed from."""
    broken = ""
    rank, items = own["rank"], int(row["items"])
    expected = 1.0 + own["greater"] + own["equal"] / 2.0
    if not len(rank):
        broken = f"no line is about {model} on the {split} split"
    elif (own["greater"] < 0).any() or (own["equal"] < 0).any() or not np.array_equal(rank, expected):
        broken = f"ranks of {model} do not follow from its counts"
    elif (own["user"] < 0).any() or (own["target"] < 1).any():
        broken = f"users or targets of {model} are no rows of a data folder"
    elif (rank > items).any() or (own["target"] > items).any():
        broken = f"{model} has ranks or targets beyond its {items:,} items"
    elif "cases" in row and row["cases"] != len(rank):
        broken = f"it has {len(rank):,} cases of {model}, metrics.json {row['cases']:,}"
    elif isinstance(row.get("mrr"), float):
        mrr = float(user_means(own["user"], 1.0 / rank).mean())
        if abs(mrr - row["mrr"]) > 1e-9:
            broken = f"it gives {model} an mrr of {mrr:.6f}, metrics.json says {row['mrr']:.6f}"
    if broken:
        raise FindRecError(f"{run / 'ranks.parquet'} is damaged: {broken}. {_mend(run)}")


def _check_same(origin: Mapping[str, Evaluated]) -> None:
    (first, one), *others = origin.items()
    for label, other in others:
        ours, theirs = one.settings, other.settings
        keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        differ = [f"{key}: {ours.get(key)!r} there, {theirs.get(key)!r} here" for key in keys]
        if not differ and not np.array_equal(one.user, other.user):
            differ.append(f"users: {_only(one.user, other.user)}")
        elif not differ and not np.array_equal(one.target, other.target):
            (place,) = np.nonzero(one.target != other.target)
            differ.append(
                f"targets of {len(place):,} cases: the first, of user row {one.user[place[0]]}, is item "
                f"{one.target[place[0]]} there, {other.target[place[0]]} here"
            )
        if differ:
            raise FindRecError(
                f"{label} ({other.run}) cannot be compared with {first} ({one.run}): {'; '.join(differ)}. "
                "Only numbers of the same cases, measured in the same way, can be; evaluate both alike."
            )


def _only(one: IntArray, other: IntArray) -> str:
    """In words how the cases' users differ."""
    for ours, theirs, where in ((one, other, "there"), (other, one, "here")):
        alone = np.setdiff1d(ours, theirs)
        if len(alone):
            return f"{len(alone):,} are only {where}, the first in row {alone[0]}"
    return "the same ones with other numbers of targets"


def _values(one: Evaluated, metric: str) -> FloatArray:
    """`[C]` the metric of each case."""
    at_k = _AT_K.fullmatch(metric)
    if metric not in _SIMPLE and at_k is None:
        _refuse(metric, one.row)
    if metric == "auc" and one.row.get("candidates") == "available":
        raise FindRecError(
            f"{one.run}: auc cannot be compared where candidates are those available at the time: each case "
            "has its own number of them, which ranks.parquet does not hold. Compare mean_rank, mrr, ndcg@k "
            "or recall@k"
        )
    values = case_metrics(one.rank, [int(at_k[2])] if at_k else [], int(one.row["items"]))[metric]
    said = one.row.get(metric)
    mean = float(user_means(one.user, values).mean())
    if isinstance(said, float) and abs(mean - said) > 1e-9 * max(1.0, abs(said)):
        raise FindRecError(
            f"{one.run}: the ranks of {one.model} give {metric} = {mean:.6f}, metrics.json says {said:.6f}. "
            f"{_mend(one.run)}"
        )
    return values


def _refuse(metric: str, row: Iterable[str]) -> None:
    known = [name for name in row if name in _SIMPLE or _AT_K.fullmatch(name)]
    name, at, k = metric.lower().partition("@")
    if name == "coverage":
        hint = ": it is a figure of all lists together, no mean over users that could be resampled"
    elif _AT_K.fullmatch(f"{_OTHER_NAMES.get(name, name)}@{k}"):
        hint = f"; did you mean '{_OTHER_NAMES.get(name, name)}{at}{k}'?"
    else:
        hint = suggest(metric.lower(), known)
    raise FindRecError(
        f"no metric {metric!r} to compare{hint} (known: ndcg@K, recall@K and mrr@K for any K from 1, "
        f"{', '.join(_SIMPLE)})"
    )
