"""Why a trained FindRec said what it said about one user: experts, modalities and alignment, in numbers.

Every position shown is asked for the event that is known to have followed. A modality is judged by leaving it
out (`findrec.models.explain`): at a position, `change` is how far the user vector moves, in parts of its
length, and `gain` how much log-probability (nats, softmax over the whole catalogue) of the event that
followed is owed to it. Where items are scored by content, `gain` includes that the catalogue went without.
Parts do not add up: what two modalities both say, either can stand in for.

Shape letters: T positions, V items, H heads, E experts, C modalities and, where several, all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batch import Batch
from findrec.datasets.batches import train_batch
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError, suggest
from findrec.evaluation.load import load_scorer
from findrec.evaluation.report import Titles
from findrec.evaluation.scorers import ModelScorer, make_queries
from findrec.models.alignment import DIAGNOSTICS
from findrec.models.base import Out
from findrec.models.explain import explain, relative_change, withhold
from findrec.models.findrec import FindRec
from findrec.ops.target_rank import target_rank
from findrec.training.build import used_modalities
from findrec.training.metrics_log import read_lines
from findrec.training.runs import read_run_config, training_jobs

ALL = "all of them"  # the column of every modality missing at once
_TILE_BYTES = 64 << 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One asked-for position in words."""

    place: int  # of its event in the user's whole history, from 1
    time: str  # of its event, UTC
    item: str  # what the user had just met
    followed: str  # what came next
    part: str  # training, validation or test: where the event that followed belongs


@dataclass(frozen=True)
class Curve:
    """One measurement of the alignment over training."""

    name: str  # e.g. ksd_text
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Inspection:
    """All that is shown about one user's last positions."""

    user: str
    steps: list[Step]  # T
    gates_THE: Floats
    rank_T: Floats  # of the event that followed: 1 + greater + half of the ties
    log_probability_T: Floats
    modalities: list[str]
    columns: list[str]  # C: the modalities and, where several, `ALL`
    change_TC: Floats
    gain_TC: Floats
    shuffled_change: float | None  # means over positions and draws; None: no router, or one position
    shuffled_gain: float | None  # log-probability owed to each position having its own gates
    alignment: list[Curve]

    @property
    def mean_gates(self) -> Floats:
        """`[T, E]` mean gate over heads: how even gates are, for heads have experts of their own."""
        return np.asarray(self.gates_THE.mean(1))

    @property
    def entropy(self) -> Floats:
        """`[T]` mean gate entropy over heads in nats, from 0 to ln E."""
        gates = self.gates_THE
        return np.asarray(-(gates * np.log(np.maximum(gates, 1e-300))).sum(2).mean(1))


def inspect_run(run_folder: Path, user: str, last: int = 30) -> Inspection:
    """Explain the last `last` positions of a user (raw id) with the best checkpoint of a run.

    Raises `FindRecError` for a run without experts, an unknown user, a user of one event, or a run without
    a usable checkpoint.
    """
    config = read_run_config(run_folder)
    if config.model.name != "findrec":
        raise FindRecError(
            f"{run_folder} is a run of {config.model.name!r}, which has no experts and no modalities to "
            "inspect; give a run with model.name=findrec"
        )
    folder = open_data_folder(config.data, verify=False)
    if not used_modalities(config, folder):
        raise FindRecError(
            f"{run_folder} was trained on item ids alone: without a modality there is no routing to inspect. "
            f"Train with model.modalities=all on data that has features ({folder.path} has "
            f"{', '.join(folder.modalities) or 'none'})"
        )
    row = _find_user(folder, user)
    scorer = load_scorer(training_jobs(config, run_folder)[0], folder)
    return inspect_user(scorer, folder, row, last, alignment_curves(run_folder))


def inspect_user(
    scorer: ModelScorer, folder: DataFolder, row: int, last: int, alignment: Sequence[Curve] = ()
) -> Inspection:
    """The same for a user row of a data folder and a FindRec model at hand.

    The model is shown the user's last `scorer.max_length` events before the very last one, and is asked at
    the latest `last` of them. As in training, every event asked for is preceded by those before it of the
    same timestamp (the same basket).
    """
    assert isinstance(scorer.model, FindRec)
    length = int(folder.length[row])
    if length < 2:
        raise FindRecError(
            f"user {folder.user_ids[row]!r} has one event: nothing followed that could be asked for; choose "
            "a user with at least two"
        )
    start = max(0, length - 1 - scorer.max_length)
    first = max(start + 1, length - last)
    windows = Windows(*(np.array([value]) for value in (row, start, first, length)))
    batch = train_batch(folder, windows, np.array([0])).to(scorer.rows_Vd.device)
    features = scorer.catalogue.features(batch.ids)
    found = explain(scorer.model, batch, scorer.rows_Vd[batch.ids], features)

    rank_T, whole_T = _score(scorer, found.whole, batch, [])
    others = {name: (out, [name]) for name, out in found.without.items()}
    if len(others) > 1:
        others[ALL] = (found.bare, list(found.without))
    change, gain = [], []
    for out, missing in others.values():
        change.append(relative_change(found.whole, out))
        gain.append(whole_T - _score(scorer, out, batch, missing)[1])
    moved = [relative_change(found.whole, out).mean() for out in found.shuffled]
    lost = [(whole_T - _score(scorer, out, batch, [])[1]).mean() for out in found.shuffled]
    return Inspection(
        user=folder.user_ids[row],
        steps=_steps(folder, row, first, length),
        gates_THE=_array(found.gates_THE),
        rank_T=_array(rank_T),
        log_probability_T=_array(whole_T),
        modalities=list(found.without),
        columns=list(others),
        change_TC=_array(torch.stack(change, dim=1)),
        gain_TC=_array(torch.stack(gain, dim=1)),
        shuffled_change=float(torch.stack(moved).mean()) if moved else None,
        shuffled_gain=float(torch.stack(lost).mean()) if lost else None,
        alignment=list(alignment),
    )


def alignment_curves(run_folder: Path) -> list[Curve]:
    """What `model.align.diagnose_every` measured during training, by measurement and modality."""
    found: dict[str, Curve] = {}
    for line in read_lines(run_folder / "metrics.jsonl"):
        if "step" not in line:
            continue
        for key, value in line.items():
            name = key.removeprefix("diagnostics/")
            if name != key and name.startswith(DIAGNOSTICS) and _is_number(value):
                curve = found.setdefault(name, Curve(name, [], []))
                curve.steps.append(int(line["step"]))
                curve.values.append(float(value))
    order = {kind: place for place, kind in enumerate(DIAGNOSTICS)}
    return sorted(found.values(), key=lambda curve: (order[_kind(curve.name)], curve.name))


def _kind(name: str) -> str:
    return next(kind for kind in DIAGNOSTICS if name.startswith(kind))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _find_user(folder: DataFolder, user: str) -> int:
    try:
        return folder.user_ids.index(user)
    except ValueError:
        raise FindRecError(
            f"no user {user!r} in {folder.path}{suggest(user, folder.user_ids)} ({folder.num_users:,} users, "
            f"the first is {folder.user_ids[0]!r}). --user takes an id of the raw data"
        ) from None


@torch.no_grad()
def _score(scorer: ModelScorer, out: Out, batch: Batch, missing: list[str]) -> tuple[Tensor, Tensor]:
    """Rank and log-probability `[T]` of the items that followed, among all items 1..V."""
    items_Vd = scorer.items_Vd
    if missing and scorer.model.content_scores:
        features = withhold(scorer.catalogue.all_features(items_Vd.device), missing)
        items_Vd = scorer.model.item_transform(scorer.rows_Vd, features).float()
    queries = make_queries(out, batch)
    case_T = torch.arange(len(batch.target), device=items_Vd.device)
    greater, equal = target_rank(
        queries.users_Bd,
        items_Vd,
        case_T,
        batch.target,
        own_ids_BN=queries.own_ids_BN,
        own_bonus_BN=queries.own_bonus_BN,
    )
    parts = []
    tile = max(1, _TILE_BYTES // (8 * len(items_Vd)))
    for lo in range(0, len(case_T), tile):
        scores_tV = (queries.users_Bd[lo : lo + tile] @ items_Vd.T).double()
        if queries.own_ids_BN is not None and queries.own_bonus_BN is not None:
            own = queries.own_ids_BN[lo : lo + tile], queries.own_bonus_BN[lo : lo + tile].double()
            scores_tV.scatter_add_(1, *own)
        scores_tV[:, 0] = -torch.inf  # padding, and what bonuses landed there
        target_t = batch.target[lo : lo + tile, None]
        parts.append((scores_tV.gather(1, target_t) - scores_tV.logsumexp(1, keepdim=True)).squeeze(1))
    return 1 + greater + equal / 2, torch.cat(parts)


def _steps(folder: DataFolder, row: int, first: int, length: int) -> list[Step]:
    """The positions before the events `[first, length)` of a user."""
    events = folder.histories([row], np.array([first - 1]), np.array([length]))
    titles = Titles(folder)
    names = [titles.of(int(item)) for item in events.item]
    cuts = {"test": int(folder.test_start[row]), "validation": int(folder.valid_start[row])}
    return [
        Step(
            place=place,
            time=_moment(int(events.timestamp[place - first])),
            item=names[place - first],
            followed=names[place - first + 1],
            part=next((part for part, cut in cuts.items() if place >= cut), "training"),
        )
        for place in range(first, length)
    ]


def _moment(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return str(seconds)  # not every log counts from 1970


def _array(values: Tensor) -> Floats:
    return values.detach().cpu().double().numpy()
