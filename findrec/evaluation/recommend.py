"""Lists for users of a run's data, made as a shop would: from all that they did up to the moment of asking.

By default all items are scored exactly; a saved index (`findrec index`) spares that. The seen filter is the
run's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from findrec.datasets.batches import Cases, asking_batch
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError, suggest
from findrec.evaluation.allow import FILE
from findrec.evaluation.candidates import Candidates, Rule, conditions_of, goes_by_time
from findrec.evaluation.faiss_library import choose_gpus
from findrec.evaluation.index import ItemIndex
from findrec.evaluation.index_store import load_index
from findrec.evaluation.load import load_scorer
from findrec.evaluation.metrics import seen_filter
from findrec.evaluation.report import Titles
from findrec.evaluation.scorers import IntArray, ModelScorer, UserBlock
from findrec.evaluation.topk import Top, TopItems
from findrec.training.runs import TrainingJob, checkpoint_folder, read_run_config, training_jobs
from findrec.training.validations import best_checkpoint_path


@dataclass(frozen=True)
class Recommended:
    """One user's list, best item first; shorter than asked for where there are no more items to show."""

    user: str
    time: int  # s, when it was asked for
    items: list[str]  # raw ids
    titles: list[str]
    scores: list[float]


def recommend(
    run_folder: Path,
    users: Sequence[str],
    *,
    k: int = 10,
    only: Sequence[str] = (),
    items: str | Path | None = None,
    at: str | None = None,
    index: str | None = None,
) -> list[Recommended]:
    """The first `k` items for each of `users` (raw ids) with a run's best checkpoint.

    `only` (`column=value`) and `items` (a file of raw ids) are the allow-list (`findrec.evaluation.allow`),
    by default the run's. `at` (s, or ISO 8601 as UTC) is when users ask: what came later is not known,
    and items that are available only later are not shown. By default each user asks at the time of the last
    event. `index` is the factory string of a saved index. Raises `FindRecError` for unknown users, those
    without an event by then, an allow-list that cannot be made, and an index that is not there or is of
    another checkpoint.
    """
    if k < 1:
        raise FindRecError(f"k={k}: a list has one place or more")
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data, verify=False)
    rows = _user_rows(folder, users)
    time = None if at is None else parse_time(at)
    offer = Candidates.of(folder, _rule(config.evaluation.candidates, only, items, time is not None))
    stop_B, time_B = _moments(folder, rows, time)
    job = training_jobs(config, run_folder)[0]
    scorer = load_scorer(job, folder)
    saved = None if index is None else _open_index(run_folder, index, job, scorer, folder)
    mask_seen = seen_filter(config.evaluation.mask_seen, folder)
    titles, raw = Titles(folder), folder.items.column("raw")
    found = []
    for lo in range(0, len(rows), config.evaluation.users_per_block):
        part = slice(lo, lo + config.evaluation.users_per_block)
        block = asking_block(folder, rows[part], stop_B[part], time_B[part], config.data.max_length)
        ids_Bk, scores_Bk = _lists(scorer, saved, offer, block, k, mask_seen)
        for b, row in enumerate(rows[part].tolist()):
            best = [(v, s) for v, s in zip(ids_Bk[b].tolist(), scores_Bk[b].tolist(), strict=True) if v]
            found.append(
                Recommended(
                    user=folder.user_ids[row],
                    time=int(time_B[lo + b]),
                    items=[str(raw[v - 1].as_py()) for v, _ in best],
                    titles=[titles.of(v) for v, _ in best],
                    scores=[score for _, score in best],
                )
            )
    return found


def asking_block(
    folder: DataFolder, users: IntArray, stop_B: IntArray, time_B: IntArray, max_length: int
) -> UserBlock:
    """Users (rows) who ask at `time_B` (s) after the first `stop_B` events of theirs; targets are 0."""
    past = folder.histories(users, np.zeros_like(stop_B), stop_B)
    batch = asking_batch(folder, users, stop_B, time_B, max_length)
    row = torch.arange(len(users))
    cases = Cases(row, torch.from_numpy(users), torch.zeros_like(row), torch.from_numpy(time_B))
    return UserBlock(users, batch, cases, past.item, past.offset)


def parse_time(text: str) -> int:
    """Seconds since 1970 from a number of them or an ISO 8601 date or time (UTC where it says nothing)."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise FindRecError(
            f"{text!r} is no time: give seconds since 1970 or e.g. 2024-05-01 or 2024-05-01T12:00:00"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


def _rule(run: Rule, only: Sequence[str], items: str | Path | None, timed: bool) -> Rule:
    given = [*only, *([] if items is None else [f"{FILE}{items}"])]
    by_time = ["available"] if timed or goes_by_time(run) else []
    return [*by_time, *(given or conditions_of(run))]


def _user_rows(folder: DataFolder, users: Sequence[str]) -> IntArray:
    place = {name: row for row, name in enumerate(folder.user_ids)}
    for user in users:
        if user not in place:
            raise FindRecError(
                f"no user {user!r} in {folder.path}{suggest(user, place)} ({folder.num_users:,} users, the "
                f"first is {folder.user_ids[0]!r}). --user takes an id of the raw data"
            )
    return np.array([place[user] for user in users], dtype=np.int64)


def _moments(folder: DataFolder, rows: IntArray, time: int | None) -> tuple[IntArray, IntArray]:
    """How many events of each user are known, and when the user asks."""
    past = folder.histories(rows)
    stop, asked = [], []
    for row, begin, end in zip(rows.tolist(), past.offset[:-1], past.offset[1:], strict=True):
        times = past.timestamp[begin:end]
        stop.append(len(times) if time is None else int(np.searchsorted(times, time, side="right")))
        asked.append(int(times[-1]) if time is None else time)
        if not stop[-1]:
            raise FindRecError(
                f"user {folder.user_ids[row]!r} has no event by the time asked for ({asked[-1]} s; the first "
                f"is at {int(times[0])} s): there is nothing to recommend from. Give a later --at"
            )
    return np.array(stop, dtype=np.int64), np.array(asked, dtype=np.int64)


def _open_index(
    run_folder: Path, index: str, job: TrainingJob, scorer: ModelScorer, folder: DataFolder
) -> ItemIndex:
    checkpoint = best_checkpoint_path(checkpoint_folder(job.folder))
    assert checkpoint is not None, "load_scorer has found one"
    held_V = Candidates.of(folder, "all").since_V
    return load_index(run_folder, index, scorer.items_Vd, checkpoint, held_V, gpus=choose_gpus())


def _lists(
    scorer: ModelScorer,
    index: ItemIndex | None,
    offer: Candidates,
    block: UserBlock,
    k: int,
    mask_seen: bool,
) -> Top:
    if index is None:
        return TopItems(scorer, offer).of(block, k, mask_seen=mask_seen)
    seen_BN = block.padded_items() if mask_seen else None
    late = offer.late(block.cases, len(block.user))
    return index.top(scorer.queries(block), k, seen_BN=seen_BN, late=late)
