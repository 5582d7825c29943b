"""Explains a trained model's predictions for one user by its experts, modalities and alignment.

At each position the model predicts the event that followed. The contribution of a modality is measured by
leaving it out (`findrec.models.capabilities.Explains`): `change` is how far the user vector moves, relative
to its length, and `gain` is the increase in log-probability (nats, softmax over the whole catalogue) of the
event that followed. If items are scored by content, they are scored without the modality too. Contributions
do not add up, because modalities are redundant.

Shape letters: T positions, V items, H heads, E experts, C modalities and, if several, all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.plan import Windows
from findrec.datasets.batches.windows import train_batch
from findrec.datasets.folder.configured import open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.display.wording import Titles, is_finite
from findrec.evaluation.scoring.inner_product import ModelScorer, make_queries
from findrec.evaluation.scoring.load import load_scorer
from findrec.evaluation.scoring.users import user_rows
from findrec.models.base import Out
from findrec.models.capabilities import Explains, withhold
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import target_rank
from findrec.progress import format_utc
from findrec.training.logs.metrics_log import read_lines
from findrec.training.runs import main_job, read_run_config

ALL_MODALITIES = "all modalities"  # the column without any modality
_TILE_BYTES = 64 << 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One position of a user's history."""

    position: int  # of its event in the whole history, from 1
    time: str  # of its event, UTC
    item: str  # title of its item
    followed: str  # title of the next item, which is predicted
    part: str  # training, validation or test: the part of the next event


@dataclass(frozen=True)
class Curve:
    """One alignment diagnostic over training."""

    name: str  # e.g. ksd_text
    meaning: str  # what its kind measures, in the model's words
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Inspection:
    """Explanations of the predictions at one user's last positions."""

    user: str
    steps: list[Step]  # T
    gates_THE: Floats
    experts: tuple[str, ...]  # E names
    rank_T: Floats  # of the event that followed: 1 + greater + half of the ties
    log_probability_T: Floats
    modalities: list[str]
    columns: list[str]  # C: the modalities and, if several, `ALL_MODALITIES`
    change_TC: Floats
    gain_TC: Floats
    # The same for gates exchanged between positions: means over positions and draws; None: no router, or one
    # position only.
    shuffled_change: float | None
    shuffled_gain: float | None
    alignment: list[Curve]

    @property
    def mean_gates(self) -> Floats:
        """Gates `[T, E]`, mean over heads (each head has its own experts)."""
        return np.asarray(self.gates_THE.mean(1))

    @property
    def entropy(self) -> Floats:
        """Gate entropy `[T]` in nats, mean over heads, from 0 to ln E."""
        gates = self.gates_THE
        return np.asarray(-(gates * np.log(np.maximum(gates, 1e-300))).sum(2).mean(1))


def inspect_run(run_folder: Path, user: str, last: int = 30) -> Inspection:
    """Explain the last positions of a user (raw id) with the best checkpoint of a run.

    Raises `FindRecError` for a run without experts or usable checkpoint, an unknown user, or a user with a
    single event.
    """
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data, verify=False)
    scorer = load_scorer(main_job(config, run_folder), folder)
    _check_explains(scorer)
    if not scorer.catalogue.modalities:
        raise FindRecError(
            f"{run_folder} was trained without modalities, so there is no routing to inspect. Train a model "
            f"that reads modalities on data with features ({folder.path} has "
            f"{', '.join(folder.modalities) or 'none'})"
        )
    row = int(user_rows(folder, [user])[0])
    return inspect_user(scorer, folder, row, last, alignment_curves(run_folder, scorer.model))


def inspect_user(
    scorer: ModelScorer, folder: DataFolder, row: int, last: int, alignment: Sequence[Curve] = ()
) -> Inspection:
    """Explain the last positions of a user row with a loaded model.

    The model sees the user's last `scorer.max_length` events except the final one, and explains the latest
    `last` of these positions. As in training, earlier events of the target's own timestamp (basket) are
    visible. Raises `FindRecError` for a model that does not support explanations.
    """
    model = _check_explains(scorer)
    length = int(folder.length[row])
    if length < 2:
        raise FindRecError(
            f"user {folder.user_ids[row]!r} has a single event, so there is no prediction to explain; choose "
            "a user with at least two"
        )
    start = max(0, length - 1 - scorer.max_length)
    first = max(start + 1, length - last)
    windows = Windows(*(np.array([value]) for value in (row, start, first, length)))
    batch = train_batch(folder, windows, np.array([0])).to(scorer.rows_Vd.device)
    features = scorer.catalogue.features(batch.ids)
    outputs = model.explain(batch, scorer.rows_Vd[batch.ids], features)

    rank_T, whole_T = _score(scorer, outputs.whole, batch, [])
    ablations = {name: (out, [name]) for name, out in outputs.without.items()}
    if len(ablations) > 1:
        ablations[ALL_MODALITIES] = (outputs.bare, list(outputs.without))
    change, gain = [], []
    for out, missing in ablations.values():
        change.append(relative_change(outputs.whole, out))
        gain.append(whole_T - _score(scorer, out, batch, missing)[1])
    shuffled_change = [relative_change(outputs.whole, out).mean() for out in outputs.shuffled]
    shuffled_gain = [(whole_T - _score(scorer, out, batch, [])[1]).mean() for out in outputs.shuffled]
    return Inspection(
        user=folder.user_ids[row],
        steps=_steps(folder, row, first, length),
        gates_THE=_array(outputs.gates_THE),
        experts=outputs.experts,
        rank_T=_array(rank_T),
        log_probability_T=_array(whole_T),
        modalities=list(outputs.without),
        columns=list(ablations),
        change_TC=_array(torch.stack(change, dim=1)),
        gain_TC=_array(torch.stack(gain, dim=1)),
        shuffled_change=float(torch.stack(shuffled_change).mean()) if shuffled_change else None,
        shuffled_gain=float(torch.stack(shuffled_gain).mean()) if shuffled_gain else None,
        alignment=list(alignment),
    )


def _check_explains(scorer: ModelScorer) -> Explains:
    if not isinstance(scorer.model, Explains):
        raise FindRecError(
            f"{scorer.name!r} has no experts and no modalities to inspect; choose a run of a multimodal "
            "model that supports explanations"
        )
    return scorer.model


def alignment_curves(run_folder: Path, model: object) -> list[Curve]:
    """Alignment diagnostics logged in training; empty for a model without explanations."""
    kinds = model.alignment_diagnostics if isinstance(model, Explains) else {}
    curves: dict[str, Curve] = {}
    for line in read_lines(run_folder / "metrics.jsonl"):
        if "step" not in line:
            continue
        for key, value in line.items():
            name = key.removeprefix("diagnostics/")
            kind = next((kind for kind in kinds if name.startswith(kind)), None)
            if name != key and kind is not None and is_finite(value):
                curve = curves.setdefault(name, Curve(name, kinds[kind], [], []))
                curve.steps.append(int(line["step"]))
                curve.values.append(float(value))

    def order(curve: Curve) -> tuple[int, str]:
        return next(n for n, kind in enumerate(kinds) if curve.name.startswith(kind)), curve.name

    return sorted(curves.values(), key=order)


def relative_change(whole: Out, other: Out) -> Tensor:
    """Relative change `[T]` of each user vector: `|h - h'| / |h|`."""
    moved_T = torch.linalg.vector_norm(whole.h - other.h, dim=1)
    share_T: Tensor = moved_T / torch.linalg.vector_norm(whole.h, dim=1).clamp(min=1e-12)
    return share_T


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
        rules=Rules(own_ids_BN=queries.own_ids_BN, own_bonus_BN=queries.own_bonus_BN),
    )
    parts = []
    tile = max(1, _TILE_BYTES // (8 * len(items_Vd)))
    for lo in range(0, len(case_T), tile):
        scores_tV = (queries.users_Bd[lo : lo + tile] @ items_Vd.T).double()
        if queries.own_ids_BN is not None and queries.own_bonus_BN is not None:
            own = queries.own_ids_BN[lo : lo + tile], queries.own_bonus_BN[lo : lo + tile].double()
            scores_tV.scatter_add_(1, *own)
        scores_tV[:, 0] = -torch.inf  # padding, with the bonuses of padded ids
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
            position=position,
            time=format_utc(int(events.timestamp[position - first]), "%Y-%m-%d %H:%M"),
            item=names[position - first],
            followed=names[position - first + 1],
            part=next((part for part, cut in cuts.items() if position >= cut), "training"),
        )
        for position in range(first, length)
    ]


def _array(values: Tensor) -> Floats:
    return values.detach().cpu().double().numpy()
