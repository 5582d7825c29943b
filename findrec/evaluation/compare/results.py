"""Reads the results of a run: the ranks and the metrics row of each model, checked against each other.

Only the result files of the run folder are read (`evaluate.write_results`): the rank of every case, from
which any per-case metric can be computed, and the metrics rows, which state the protocol. Neither models nor
the data folder are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from findrec.errors import FindRecError, suggest
from findrec.evaluation.metrics.metrics import (
    FloatArray,
    IntArray,
    case_metrics,
    describe_limit,
    expected_rank,
    reported,
    user_means,
)
from findrec.evaluation.scoring.base import UNKNOWN
from findrec.files import read_json
from findrec.paths import resolve

ALL_MODELS = "all"
_COUNTS = ("user", "target", "greater", "equal")
_SIMPLE = ("mrr", "mean_rank", "auc")
_AT_K = re.compile(r"(ndcg|recall|mrr)@([1-9][0-9]{0,8})")
_OTHER_NAMES = {"hr": "recall", "hit": "recall", "hits": "recall", "hitrate": "recall", "hit_rate": "recall"}


@dataclass(frozen=True)
class Evaluated:
    """The results of one model of a run on one split."""

    run: Path
    model: str
    row: Mapping[str, Any]  # its row of metrics.json
    data: Mapping[str, str]  # name and hash of the data, from the metadata of ranks.parquet
    user: IntArray  # [C]
    target: IntArray  # [C]
    rank: FloatArray  # [C] expected ranks

    @property
    def settings(self) -> dict[str, Any]:
        """The data and the protocol of the measurement; comparable results have equal settings."""
        protocol = {
            k: v for k, v in self.row.items() if k not in ("model", "ranks") and isinstance(v, str | int)
        }
        return dict(self.data) | protocol

    @property
    def limit(self) -> int | None:
        """Ranks are known only up to this one; None: all ranks are known."""
        return list_limit(self.row)


def read_models(run: Path, split: str, wanted: Sequence[str] = (), *, whole: bool = True) -> list[Evaluated]:
    """The results of some models of a run on one split, checked for damage.

    `wanted` are the names of the models, of which the run must have one; `("all",)` are all of them. Without
    names they are all models, or only the first if not `whole`. Raises `FindRecError` if the run was not
    evaluated on the split, has none of the models, or its files are damaged.
    """
    rows = read_rows(run)
    splits = [name for name in rows if name not in ("strata", "sampled")]
    if split not in splits:
        raise FindRecError(
            f"{run} was not evaluated on a split {split!r}{suggest(split, splits)} "
            f"(available: {', '.join(splits) or 'none'})"
        )
    by_model = {str(row["model"]): row for row in rows[split]}
    if not by_model:
        raise FindRecError(f"{run} holds no results of the {split} split. {_repair(run)}")
    names = list(by_model) if whole or ALL_MODELS in wanted else list(by_model)[:1]
    if wanted and ALL_MODELS not in wanted:  # each run may hold other models
        names = [name for name in dict.fromkeys(wanted) if name in by_model]
        if not names:
            raise FindRecError(
                f"{run} has no model {' or '.join(map(repr, wanted))}{suggest(wanted[0], by_model)} "
                f"(available: {', '.join(by_model)})"
            )
    for name in names:
        if not isinstance(by_model[name].get("protocol"), str) or not by_model[name].get("items"):
            raise FindRecError(f"{run / 'metrics.json'} has no protocol for {name}. {_repair(run)}")
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


def _damaged(path: Path, problem: str) -> FindRecError:
    return FindRecError(f"{path} is damaged: {problem}. {_repair(path.parent)}")


def _repair(run: Path) -> str:
    name = run.name if run.parent == resolve("runs") else run  # others are found by their path
    return f"Write the results again with `findrec evaluate {name}`."


def read_rows(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics rows of a run by split; raises `FindRecError` if there are none or they are damaged."""
    path = run / "metrics.json"
    try:
        rows = read_json(path)
    except FileNotFoundError:
        raise FindRecError(f"{run} has no metrics.json: it was not evaluated. {_repair(run)}") from None
    except ValueError as error:  # of the text or of its encoding
        raise _damaged(path, str(error)) from None
    if not isinstance(rows, dict) or not all(
        isinstance(part, list) and all(isinstance(row, dict) and "model" in row for row in part)
        for part in rows.values()
    ):
        raise _damaged(path, "it holds no rows of models by split")
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
            raise _damaged(path, what)
        table = pq.read_table(path, columns=list(wanted), filters=[("split", "==", split)])
    except FileNotFoundError:
        raise FindRecError(f"{run} has no ranks.parquet: it was not evaluated. {_repair(run)}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise _damaged(path, str(error)) from None
    if any(table.column(name).null_count for name in wanted):
        raise _damaged(path, "it has empty cells")
    return table


def _check_ranks(run: Path, model: str, split: str, own: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Check that the ranks are possible and that they agree with the metrics row."""
    broken = ""
    rank, items, limit = own["rank"], int(row["items"]), list_limit(row)
    expected = expected_rank(own["greater"], own["equal"])
    lowest = 0 if limit is None else UNKNOWN
    known = rank[np.isfinite(rank)]
    if not len(rank):
        broken = f"it has no rows of {model} on the {split} split"
    elif (own["greater"] < lowest).any() or (own["equal"] < 0).any() or not np.array_equal(rank, expected):
        broken = f"ranks of {model} do not follow from its counts"
    elif (own["user"] < 0).any() or (own["target"] < 1).any():
        broken = f"user rows or target ids of {model} are negative"
    elif (known > (limit or items)).any() or (own["target"] > items).any():
        broken = f"{model} has ranks or targets beyond its {items:,} items"
    elif "cases" in row and row["cases"] != len(rank):
        broken = f"it has {len(rank):,} cases of {model}, metrics.json has {row['cases']:,}"
    elif isinstance(row.get("mrr"), float):
        mrr = float(user_means(own["user"], 1.0 / rank).mean())
        if abs(mrr - row["mrr"]) > 1e-9:
            broken = f"it gives {model} an mrr of {mrr:.6f}, metrics.json has {row['mrr']:.6f}"
    if broken:
        raise _damaged(run / "ranks.parquet", broken)


def check_same(origin: Mapping[str, Evaluated]) -> None:
    """Raise `FindRecError` unless all results, by label, have the data, protocol and cases of the first."""
    (first, one), *others = origin.items()
    for label, other in others:
        ours, theirs = one.settings, other.settings
        keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        differ = [f"{key}: {theirs.get(key)!r}, not {ours.get(key)!r}" for key in keys]
        if not differ and not np.array_equal(one.user, other.user):
            differ.append(f"users: {_only(one.user, other.user)}")
        elif not differ and not np.array_equal(one.target, other.target):
            (case,) = np.nonzero(one.target != other.target)
            differ.append(
                f"targets of {len(case):,} cases: the first, of user row {one.user[case[0]]}, is item "
                f"{other.target[case[0]]}, not {one.target[case[0]]}"
            )
        if differ:
            raise FindRecError(
                f"{label} ({other.run}) cannot be compared with {first} ({one.run}): {'; '.join(differ)}. "
                "Comparable results have the same cases and protocol; evaluate both in the same way."
            )


def list_limit(row: Mapping[str, Any]) -> int | None:
    """The largest rank that a metrics row knows; None: all ranks are known."""
    match = re.fullmatch(describe_limit(0).replace("0", "([0-9]+)"), str(row.get("ranks", "")))
    return int(match[1]) if match else None


def _only(one: IntArray, other: IntArray) -> str:
    """Describe how the users of two results differ."""
    for ours, theirs, change in ((one, other, "missing"), (other, one, "additional")):
        alone = np.setdiff1d(ours, theirs)
        if len(alone):
            return f"{len(alone):,} are {change}, the first is user row {alone[0]}"
    return "the same users have different numbers of targets"


def metric_values(one: Evaluated, metric: str) -> FloatArray:
    """The metric of each case, `[C]`; raises `FindRecError` if it is unknown or not the saved mean."""
    check_metric(metric, one.row)
    at_k = _AT_K.fullmatch(metric)
    if metric == "auc" and one.row.get("candidates") == "available":
        raise FindRecError(
            f"{one.run}: auc cannot be compared with evaluation.candidates=available: each case has its own "
            "number of candidates, which ranks.parquet does not contain. Compare mean_rank, mrr, ndcg@k or "
            "recall@k"
        )
    if not reported(metric, one.limit):
        raise FindRecError(
            f"{one.run}: the ranks of {one.model} are known within {describe_limit(one.limit or 0)}, so its "
            f"{metric} is unknown. Compare ndcg@k, recall@k or mrr@k up to k = {one.limit}"
        )
    values = case_metrics(one.rank, [int(at_k[2])] if at_k else [], int(one.row["items"]))[metric]
    stored = one.row.get(metric)
    mean = float(user_means(one.user, values).mean())
    if isinstance(stored, float) and abs(mean - stored) > 1e-9 * max(1.0, abs(stored)):
        raise FindRecError(
            f"{one.run}: the ranks of {one.model} give {metric} = {mean:.6f}, metrics.json has {stored:.6f}. "
            f"{_repair(one.run)}"
        )
    return values


def check_metric(metric: str, row: Iterable[str] = ()) -> None:
    """Raise `FindRecError`, with a suggestion, if a metric is not a mean over users that ranks can give.

    `row` are the names of further metrics to suggest, those of a metrics row.
    """
    if metric in _SIMPLE or _AT_K.fullmatch(metric):
        return
    known = [*(name for name in row if _AT_K.fullmatch(name)), *_SIMPLE]
    name, at, k = metric.lower().partition("@")
    if name == "coverage":
        hint = ": it is computed from all lists together and is not a mean over users"
    elif _AT_K.fullmatch(f"{_OTHER_NAMES.get(name, name)}@{k}"):
        hint = f"; did you mean '{_OTHER_NAMES.get(name, name)}{at}{k}'?"
    else:
        hint = suggest(metric.lower(), known)
    raise FindRecError(
        f"no metric {metric!r} to compare{hint} (known: ndcg@K, recall@K and mrr@K for any K >= 1, "
        f"{', '.join(_SIMPLE)})"
    )
