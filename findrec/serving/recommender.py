"""A trained run, loaded once to answer many queries from Python: lists, similar items, vectors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import NEVER, DataFolder, further_columns
from findrec.errors import FindRecError, suggest
from findrec.evaluation.display.wording import Titles
from findrec.evaluation.index.index import IndexedScorer
from findrec.evaluation.index.store import load_index
from findrec.evaluation.inspect.inspect import Inspection, inspect_user
from findrec.evaluation.protocol import seen_filter
from findrec.evaluation.scoring.allow_list import FILE
from findrec.evaluation.scoring.base import Query, Scorer, Times
from findrec.evaluation.scoring.baselines import Popularity
from findrec.evaluation.scoring.candidates import Candidates, allow_list_conditions, uses_availability
from findrec.evaluation.scoring.inner_product import InnerProductScorer, ModelScorer
from findrec.evaluation.scoring.load import load_ranker
from findrec.evaluation.scoring.user_vectors import UserVectors, top_items
from findrec.evaluation.scoring.users import user_rows
from findrec.evaluation.search.faiss_library import choose_gpus
from findrec.serving.lists import POPULARITY, Lists, Recommended, SimilarItems
from findrec.serving.query_blocks import Asked
from findrec.serving.stored import open_stored
from findrec.serving.users import parse_time, read_users
from findrec.serving.visitors import raw_ids, read_visitors
from findrec.training.checkpoints.checkpoint import checkpoint_folder
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.runs import main_job

Floats = NDArray[np.float32]
_VECTORS = "findrec.evaluation.scoring.inner_product:InnerProductScorer"


class Recommender:
    """The model of a run at its best checkpoint, with the data it was trained on; all ids are raw ids.

    Made by `findrec.load`. Its methods may be called from several threads, which take turns.
    """

    def __init__(
        self, config: RunConfig, folder: DataFolder, scorer: Scorer, latest: int | None = None
    ) -> None:
        self.config, self.folder, self._scorer = config, folder, scorer
        self._ranker: Scorer = scorer
        self._given_latest = latest
        self._lock = threading.RLock()

    @staticmethod
    def load(run_folder: Path, index: str | None = None) -> Recommender:
        """Load a run or an export. Lists come from its saved index with the factory string `index`, if given.

        Raises `FindRecError` without a usable checkpoint, or if the index is missing or of another one.
        """
        stored = open_stored(run_folder)
        config, folder = stored.config, stored.data
        job = main_job(config, run_folder)
        recommender = Recommender(config, folder, load_ranker(job, folder), stored.latest)
        if index is not None:
            scorer = recommender._with_vectors("an index needs")
            checkpoint = best_checkpoint_path(checkpoint_folder(job.folder))
            assert checkpoint is not None, "load_ranker has loaded it"
            held_V = Candidates.of(folder, "all").since_V
            found = load_index(run_folder, index, scorer.items_Vd, checkpoint, held_V, gpus=choose_gpus())
            recommender._ranker = IndexedScorer(scorer, found)
        return recommender

    def recommend(
        self,
        users: object = None,
        *,
        histories: object = None,
        times: Sequence[Sequence[int]] | None = None,
        events: Sequence[Sequence[str | None]] | None = None,
        k: int = 10,
        only: Sequence[str] = (),
        items: object = None,
        items_column: str | None = None,
        at: str | int | None = None,
        exclude_seen: bool | None = None,
        lenient: bool = False,
    ) -> Lists[Recommended]:
        """Recommend items to users of the data, or to visitors with the given histories.

        Args:
            users: raw user ids: one, a list, or a column of a table.
            histories: instead of `users`: lists of raw item ids, oldest first, or a table of pandas, polars
                or pyarrow with the columns `item` and optionally `user`, `timestamp`, `event`. A history
                without a known item gets the most popular items.
            times: seconds of the events of each history; by default all have the latest time of the data.
            events: types of the events of each history, if the data has types.
            k: length of the lists, or less if the model's scorer gives shorter ones.
            only: allow-list conditions such as `category=Comedy` or `price<20`
                (`findrec.evaluation.scoring.allow_list`).
            items: raw item ids to restrict the lists to, or the path of a file of them. Without `only` and
                `items`, the allow-list of the run is used.
            items_column: the column of the ids in a file `items`; default: `item`, or the only one.
            at: query time (seconds, or ISO 8601 in UTC): later events are ignored, and items that become
                available later are not listed. Default: the time of the last event.
            exclude_seen: leave out the items of the history; default: the rule of the run's evaluation.
            lenient: leave out unknown users, and users without events at the query time, with a warning.

        Raises:
            FindRecError: for unknown users, users without events at the query time, malformed histories or
                an invalid allow-list.
        """
        time = None if at is None else parse_time(str(at))
        asked = self._asked(users, histories, times, events, time, lenient=lenient)
        candidates = self.candidates(only, items, items_column, timed=time is not None)
        return self.answer(asked, candidates, k, exclude_seen=exclude_seen)

    def answer(
        self, asked: Asked, candidates: Candidates, k: int, *, exclude_seen: bool | None = None
    ) -> Lists[Recommended]:
        """The lists of `recommend` for histories that were read before."""
        _check_k(k)
        if exclude_seen is None:
            exclude_seen = seen_filter(self.config.evaluation.mask_seen, self.folder)
        limit = k if self._ranker.list_limit is None else min(k, self._ranker.list_limit)
        users_per_block = self._ranker.block_size(
            self.config.evaluation.users_per_block, self.folder.num_items
        )
        lists: dict[int, Recommended] = {}
        for rows, block in asked.blocks(self.config.data.max_length, self.folder.num_items, users_per_block):
            with self._lock:
                query = Query.of(block, candidates, mask_seen=exclude_seen)
                best, scores = self._ranker.rank(query).top(limit)
            for row, ids, found in zip(rows.tolist(), best.tolist(), scores.tolist(), strict=True):
                lists[row] = self._recommended(asked, row, ids, found, self._scorer.name)
        popular: dict[int, tuple[list[int], list[float]]] = {}  # by query time
        for row in np.flatnonzero(asked.length_B == 0).tolist():
            time = int(asked.time_B[row])
            if time not in popular:
                popular[time] = self._popular(candidates, time, k)
            lists[row] = self._recommended(asked, row, *popular[time], POPULARITY)
        return Lists([lists[row] for row in range(len(asked.labels))])

    def candidates(
        self,
        only: Sequence[str] = (),
        items: object = None,
        items_column: str | None = None,
        *,
        timed: bool = False,
    ) -> Candidates:
        """The items that may be listed; arguments as in `recommend`.

        With `timed` they are those that are available at the time of the query.

        Raises `FindRecError` for an invalid allow-list.
        """
        run, conditions = self.config.evaluation.candidates, list(only)
        if isinstance(items, str | Path):
            conditions.append(f"{FILE}{items}{f'#{items_column}' if items_column else ''}")
            items = None
        if not conditions and items is None:
            conditions = allow_list_conditions(run)
        available = ["available"] if timed or uses_availability(run) else []
        candidates = Candidates.of(self.folder, [*available, *conditions])
        if items is None:
            return candidates
        listed_V = torch.zeros(self.folder.num_items + 1, dtype=torch.bool)
        listed_V[[self._item(raw) for raw in raw_ids(items)]] = True
        return candidates.restricted(listed_V)

    def similar_items(
        self, items: object, k: int = 10, *, only: Sequence[str] = (), among: object = None
    ) -> Lists[SimilarItems]:
        """The items whose vectors have the largest cosine with the vector of each given item.

        Args:
            items: raw item ids: one, a list, or a column of a table.
            k: length of the lists.
            only: allow-list conditions, as in `recommend`.
            among: raw item ids to restrict the lists to, or the path of a file of them.

        Raises:
            FindRecError: for unknown items, an invalid allow-list, or a model without item vectors.
        """
        _check_k(k)
        raw = raw_ids(items)
        ids = torch.tensor([self._item(one) for one in raw], dtype=torch.int64)
        vectors = torch.nn.functional.normalize(self._with_vectors("similar items need").items_Vd, dim=1)
        since_V = self.candidates(only, among, None, timed=False).since_V
        always = torch.full((len(ids),), NEVER - 1, dtype=torch.int64)
        times = None if since_V is None else Times(since_V, always)
        best, scores = top_items(
            UserVectors(vectors[ids]), vectors, min(k, self.folder.num_items), ids[:, None], times
        )
        found = zip(raw, ids.tolist(), best.tolist(), scores.tolist(), strict=True)
        return Lists(
            [
                SimilarItems(item=one, title=self.titles.of(item), **self._listed(listed, cosines))
                for one, item, listed, cosines in found
            ]
        )

    def user_vectors(
        self,
        users: object = None,
        *,
        histories: object = None,
        times: Sequence[Sequence[int]] | None = None,
        at: str | int | None = None,
    ) -> Floats:
        """Vectors `[n, d]` (or `[n, K, d]`) of users or histories; arguments as in `recommend`.

        A score is the (largest) inner product with an item's vector, plus the bonus of items that users
        consume repeatedly if the model has one (`model.repeat`).

        Raises:
            FindRecError: as `recommend`, for a history without a known item, or a model without vectors.
        """
        scorer = self._with_vectors("user vectors need")
        asked = self._asked(users, histories, times, None, None if at is None else parse_time(str(at)))
        if not asked.length_B.all():
            label = asked.labels[int(np.flatnonzero(asked.length_B == 0)[0])]
            raise FindRecError(f"history {label} has no known item, so it has no vector")
        vectors: dict[int, Floats] = {}
        size = self.config.evaluation.users_per_block
        for rows, block in asked.blocks(self.config.data.max_length, self.folder.num_items, size):
            with self._lock:
                found = scorer.signed_queries(block).users_Bd.cpu().numpy()
            vectors |= dict(zip(rows.tolist(), found, strict=True))
        return np.stack([vectors[row] for row in range(len(asked.labels))])

    def item_vectors(self) -> Floats:
        """Vectors `[V, d]` of all items, in the order of `item_ids`; see `user_vectors`."""
        vectors: Floats = self._with_vectors("item vectors need").items_Vd[1:].cpu().numpy()
        return vectors

    @cached_property
    def item_ids(self) -> list[str]:
        """Raw ids of the V items."""
        return [str(raw) for raw in self.folder.items.column("raw").to_pylist()]

    @property
    def user_ids(self) -> list[str]:
        """Raw ids of the users of the data."""
        return self.folder.user_ids

    def explain(self, user: object, last: int = 30) -> Inspection:
        """What carried the predictions at the last positions of a user (`findrec inspect`).

        Raises `FindRecError` for a model without modalities or an unknown user.
        """
        scorer = self._scorer
        if not isinstance(scorer, ModelScorer):
            raise FindRecError(
                f"{scorer.name} is not ranked by a sequence model, so nothing can be explained"
            )
        self._check_users()
        (row,) = user_rows(self.folder, [str(user)]).tolist()
        with self._lock:
            return inspect_user(scorer, self.folder, row, last)

    @cached_property
    def id_of(self) -> dict[str, int]:
        """The number 1..V of each item by raw id."""
        return {raw: number for number, raw in enumerate(self.item_ids, start=1)}

    @cached_property
    def titles(self) -> Titles:
        """Display names of the items by number."""
        return Titles(self.folder)

    @cached_property
    def _more(self) -> dict[str, Any]:
        table = self.folder.items
        return {name: table.column(name) for name in further_columns(table.column_names)}

    @property
    def scorer(self) -> Scorer:
        """The scorer of the model, without an index."""
        return self._scorer

    @cached_property
    def latest(self) -> int:
        """Time of the last event of the data, seconds."""
        if self._given_latest is not None:
            return self._given_latest
        return max((int(block.timestamp.max(initial=0)) for block in self.folder.blocks()), default=0)

    @cached_property
    def _by_popularity(self) -> NDArray[np.int64]:
        """The items 1..V, the one with the most training events first."""
        return np.argsort(-Popularity(self.folder).popularity[1:], kind="stable") + 1

    def _item(self, raw: str) -> int:
        if raw not in self.id_of:
            raise FindRecError(f"no item {raw!r} in {self.folder.path}{suggest(raw, self.id_of)}")
        return self.id_of[raw]

    def _check_users(self) -> None:
        if not self.folder.num_users:
            raise FindRecError(
                f"{self.folder.path.parent} was exported without its users: give histories instead, or "
                "export the run with --users"
            )

    def _with_vectors(self, what: str) -> InnerProductScorer:
        if not isinstance(self._scorer, InnerProductScorer):
            raise FindRecError(
                f"{what} user and item vectors, but {self._scorer.name} is ranked by "
                f"{self.config.model.scorer}, which is not a subclass of {_VECTORS}"
            )
        return self._scorer

    def _asked(
        self,
        users: object,
        histories: object,
        times: Any,
        events: Any,
        at: int | None,
        *,
        lenient: bool = False,
    ) -> Asked:
        if (users is None) == (histories is None):
            raise FindRecError("give either users or histories")
        if histories is None:
            self._check_users()
            return read_users(self.folder, raw_ids(users), at, lenient=lenient)
        latest = self.latest if at is None else at
        return read_visitors(self.folder, self.id_of, histories, times, events, latest=latest, at=at)

    def _popular(self, candidates: Candidates, time: int, k: int) -> tuple[list[int], list[float]]:
        """The available items with the most training events, and their scores."""
        available_V = candidates.at(time, self.folder.num_items).numpy()
        best = self._by_popularity[available_V[self._by_popularity]][:k]
        return best.tolist(), self.folder.train_count[best].astype(float).tolist()

    def _recommended(
        self, asked: Asked, row: int, ids: list[int], scores: list[float], ranked_by: str
    ) -> Recommended:
        return Recommended(
            user=asked.labels[row],
            time=int(asked.time_B[row]),
            ranked_by=ranked_by,
            **self._listed(ids, scores),
        )

    def _listed(self, ids: list[int], scores: list[float]) -> dict[str, Any]:
        best = [(item, score) for item, score in zip(ids, scores, strict=True) if item]
        return {
            "items": [self.item_ids[item - 1] for item, _ in best],
            "titles": [self.titles.of(item) for item, _ in best],
            "scores": [score for _, score in best],
            "more": {
                name: [column[item - 1].as_py() for item, _ in best] for name, column in self._more.items()
            },
        }


def _check_k(k: int) -> None:
    if k < 1:
        raise FindRecError(f"k={k}: a list needs at least one item")
