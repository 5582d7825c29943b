"""Recommendation lists for users of a run's data, from all their events up to the query time.

By default all items are scored exactly; a saved index (`findrec index`) is faster. The seen filter is that of
the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from findrec.datasets.batches.evaluation import Cases, query_batch
from findrec.datasets.encoders.ready_vectors import read_ids
from findrec.datasets.folder.data_folder import DataFolder, further_columns
from findrec.datasets.prepare.pipeline import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.display.wording import Titles
from findrec.evaluation.index.index import IndexedScorer, ItemIndex
from findrec.evaluation.index.store import load_index
from findrec.evaluation.protocol import seen_filter
from findrec.evaluation.scoring.allow_list import FILE
from findrec.evaluation.scoring.base import Query
from findrec.evaluation.scoring.candidates import Candidates, Rule, allow_list_conditions, uses_availability
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.scoring.load import load_ranker, load_scorer
from findrec.evaluation.scoring.users import IntArray, UserBlock, user_rows
from findrec.evaluation.search.faiss_library import choose_gpus
from findrec.progress import warn
from findrec.training.checkpoints.checkpoint import checkpoint_folder
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.runs import TrainingJob, main_job, read_run_config

_FEWEST = 32  # rows of a block that is cut to save padding


@dataclass(frozen=True)
class Recommended:
    """One user's list, best item first; shorter than k if no other item may be listed."""

    user: str
    time: int  # query time, seconds
    items: list[str]  # raw ids
    titles: list[str]
    scores: list[float]
    more: dict[str, list[Any]] = field(default_factory=dict)  # further columns of the items SQL


def recommend(
    run_folder: Path,
    users: Sequence[str],
    *,
    k: int = 10,
    only: Sequence[str] = (),
    items: str | Path | None = None,
    items_column: str | None = None,
    at: str | None = None,
    index: str | None = None,
    lenient: bool = False,
) -> list[Recommended]:
    """Recommend items to users with a run's best checkpoint.

    Args:
        run_folder: the run.
        users: raw user ids.
        k: length of the lists, or less if the model's scorer gives shorter ones.
        only: allow-list conditions such as `category=Comedy` or `price<20`
            (`findrec.evaluation.scoring.allow_list`).
        items: a file of raw item ids to restrict the lists to. Without `only` and `items`, the run's
            allow-list is used.
        items_column: the column of the ids in `items`; default: `item`, or the only one.
        at: query time (seconds, or ISO 8601 in UTC): later events are ignored, and items that become
            available later are not listed. Default: the time of each user's last event.
        index: factory string of a saved index to search.
        lenient: leave out unknown users, and users without events at the query time, with a warning.

    Raises:
        FindRecError: for unknown users, users without events at the query time, an invalid allow-list, or a
            missing index or one of another checkpoint.
    """
    if k < 1:
        raise FindRecError(f"k={k}: a list needs at least one item")
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data, verify=False)
    rows = user_rows(folder, _known_users(folder, users) if lenient else users)
    time = None if at is None else parse_time(at)
    listed = None if items is None else f"{FILE}{items}{f'#{items_column}' if items_column else ''}"
    rule = _rule(config.evaluation.candidates, only, listed, time is not None)
    candidates = Candidates.of(folder, rule)
    if lenient and time is not None:
        rows = _started(folder, rows, time)
    stop_B, time_B = _query_times(folder, rows, time)
    job = main_job(config, run_folder)
    if index is None:
        ranker = load_ranker(job, folder)
    else:
        scorer = load_scorer(job, folder)
        ranker = IndexedScorer(scorer, _open_index(run_folder, index, job, scorer, folder))
    limit = k if ranker.list_limit is None else min(k, ranker.list_limit)
    users_per_block = ranker.block_size(config.evaluation.users_per_block, folder.num_items)
    mask_seen = seen_filter(config.evaluation.mask_seen, folder)
    titles, raw = Titles(folder), folder.items.column("raw")
    more = {name: folder.items.column(name) for name in further_columns(folder.items.column_names)}
    lists: dict[int, Recommended] = {}
    for part in _blocks(np.minimum(stop_B, config.data.max_length), users_per_block):
        block = query_block(folder, rows[part], stop_B[part], time_B[part], config.data.max_length)
        ids_Bk, scores_Bk = ranker.rank(Query.of(block, candidates, mask_seen=mask_seen)).top(limit)
        for b, number in enumerate(part.tolist()):
            best = [(v, s) for v, s in zip(ids_Bk[b].tolist(), scores_Bk[b].tolist(), strict=True) if v]
            lists[number] = Recommended(
                user=folder.user_ids[rows[number]],
                time=int(time_B[number]),
                items=[str(raw[v - 1].as_py()) for v, _ in best],
                titles=[titles.of(v) for v, _ in best],
                scores=[score for _, score in best],
                more={name: [column[v - 1].as_py() for v, _ in best] for name, column in more.items()},
            )
    return [lists[number] for number in range(len(rows))]


def _blocks(length_B: IntArray, users_per_block: int) -> Iterator[IntArray]:
    """Blocks of rows with similar lengths: at most `users_per_block`, and padding of at most a quarter.

    Blocks of fewer than `_FEWEST` rows are not worth what each costs.
    """
    order = np.argsort(length_B, kind="stable")
    begin, events = 0, 0
    for end, length in enumerate(length_B[order].tolist()):
        rows = end - begin
        padded = (rows + 1) * length > 4 / 3 * (events + length)
        if rows == users_per_block or (rows >= _FEWEST and padded):
            yield order[begin:end]
            begin, events = end, 0
        events += length
    if begin < len(order):
        yield order[begin:]


def users_of(
    run_folder: Path, named: Sequence[str], file: Path | None, column: str | None = None
) -> list[str]:
    """Raw ids of the users named and listed in a file, in their order and without duplicates.

    The file `all` stands for all users of the run's data.
    """
    if not named and file is None:
        raise FindRecError("no users: name them with --user ID, --users FILE or --users all")
    listed: list[str] = []
    if file is not None and str(file) == "all" and not file.is_file():
        listed = open_data_folder(read_run_config(run_folder).data, verify=False).user_ids
    elif file is not None:
        ids = read_ids(file.expanduser().resolve(), column, default="user", report=True)
        listed = [stripped for one in ids if (stripped := one.strip())]
    return list(dict.fromkeys([*named, *listed]))


def query_block(
    folder: DataFolder, users: IntArray, stop_B: IntArray, time_B: IntArray, max_length: int
) -> UserBlock:
    """A block of user rows with the first `stop_B` events of each, at query times `time_B`; targets are 0."""
    past = folder.histories(users, np.zeros_like(stop_B), stop_B)
    batch = query_batch(folder, users, stop_B, time_B, max_length)
    row = torch.arange(len(users))
    cases = Cases(row, torch.from_numpy(users), torch.zeros_like(row), torch.from_numpy(time_B))
    return UserBlock(users, batch, cases, past.item, past.offset)


def parse_time(text: str) -> int:
    """Parse seconds since 1970, or an ISO 8601 date or time (UTC unless it has a time zone)."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        time = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise FindRecError(
            f"{text!r} is not a time: give seconds since 1970 or e.g. 2024-05-01 or 2024-05-01T12:00:00"
        ) from None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


def _rule(run: Rule, only: Sequence[str], listed: str | None, timed: bool) -> Rule:
    conditions = [*only, *([] if listed is None else [listed])]
    available = ["available"] if timed or uses_availability(run) else []
    return [*available, *(conditions or allow_list_conditions(run))]


def _known_users(folder: DataFolder, users: Sequence[str]) -> list[str]:
    known = set(folder.user_ids)
    found = [user for user in users if user in known]
    if found and len(found) < len(users):
        missing = next(user for user in users if user not in known)
        warn(f"{len(users) - len(found):,} of {len(users):,} users are not in the data, e.g. {missing!r}")
    return found or list(users)  # none known: an error


def _started(folder: DataFolder, rows: IntArray, time: int) -> IntArray:
    """The users with an event at the query time or before; all if there is none."""
    past = folder.histories(rows, np.zeros_like(rows), np.ones_like(rows))
    started = past.timestamp <= time
    if started.any() and not started.all():
        warn(f"{int((~started).sum()):,} of {len(rows):,} users have no event before the query time")
    return rows[started] if started.any() else rows


def _query_times(folder: DataFolder, rows: IntArray, time: int | None) -> tuple[IntArray, IntArray]:
    """Number of known events and query time of each user, `[B]` each."""
    past = folder.histories(rows)
    stop, query_time = [], []
    for row, begin, end in zip(rows.tolist(), past.offset[:-1], past.offset[1:], strict=True):
        times = past.timestamp[begin:end]
        stop.append(len(times) if time is None else int(np.searchsorted(times, time, side="right")))
        query_time.append(int(times[-1]) if time is None else time)
        if not stop[-1]:
            raise FindRecError(
                f"user {folder.user_ids[row]!r} has no event before the query time ({query_time[-1]} s; the "
                f"first is at {int(times[0])} s). Give a later --at"
            )
    return np.array(stop, dtype=np.int64), np.array(query_time, dtype=np.int64)


def _open_index(
    run_folder: Path, index: str, job: TrainingJob, scorer: ModelScorer, folder: DataFolder
) -> ItemIndex:
    checkpoint = best_checkpoint_path(checkpoint_folder(job.folder))
    assert checkpoint is not None, "load_scorer has loaded it"
    held_V = Candidates.of(folder, "all").since_V
    return load_index(run_folder, index, scorer.items_Vd, checkpoint, held_V, gpus=choose_gpus())
