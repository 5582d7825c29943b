"""The ranking protocol: length of the histories, candidate items, filters, and its one-line description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from findrec.config import RunConfig
from findrec.datasets.batches.evaluation import Part
from findrec.datasets.folder.data_folder import NEVER, DataFolder
from findrec.evaluation.scoring.base import Query
from findrec.evaluation.scoring.candidates import Candidates, Rule, allow_list_conditions, uses_availability
from findrec.evaluation.scoring.users import IntArray, UserBlock
from findrec.progress import format_utc

_ISO = "%Y-%m-%dT%H:%M:%SZ"
TIE_RULE = "expected rank"
MIN_REPEAT_RATE = 0.01  # with a lower repeat rate, seen items are removed by default


@dataclass(frozen=True)
class RankingProtocol:
    """How a split is ranked; equal protocols on the same data give comparable results."""

    max_length: int = 200  # events of a history that a model sees; filters and baselines use all events
    mask_seen: bool = False  # remove the items of a user's history, except targets, from the ranking
    candidates: Rule = "all"
    ks: Sequence[int] = (5, 10, 20, 50)  # cutoffs of the metrics
    users_per_block: int = 256  # does not affect results
    sampled: int | None = None  # also compute metrics among this number of sampled candidates
    sample: int | None = None  # rank this number of sampled users, the same in every run; None: all users

    @staticmethod
    def of(config: RunConfig, folder: DataFolder) -> RankingProtocol:
        """The protocol of a run's final evaluation."""
        return RankingProtocol(
            max_length=config.data.max_length,
            mask_seen=seen_filter(config.evaluation.mask_seen, folder),
            candidates=config.evaluation.candidates,
            ks=tuple(config.evaluation.ks),
            users_per_block=config.evaluation.users_per_block,
            sampled=config.evaluation.sampled,
        )

    @staticmethod
    def of_validation(config: RunConfig, folder: DataFolder) -> RankingProtocol:
        """The protocol of validation during training."""
        final = RankingProtocol.of(config, folder)
        return replace(final, ks=(10,), sampled=None, sample=config.evaluation.valid_users)

    def query(self, folder: DataFolder, split: Part, users: IntArray, candidates: Candidates) -> Query:
        """The query of some user rows for their targets in a split."""
        block = UserBlock.read(folder, split, users, self.max_length)
        return Query.of(block, candidates, mask_seen=self.mask_seen)

    def describe(self, folder: DataFolder) -> str:
        """Describe the protocol in one line, for metrics rows."""
        seen = "removed" if self.mask_seen else "kept"
        removed = int(folder.gone.sum())
        size = f"{folder.num_items - removed:,} items"
        if removed:
            size += f"; {removed:,} gone ones left out"
        among = f"full catalogue ({size})"
        if conditions := allow_list_conditions(self.candidates):
            listed = int(Candidates.of(folder, conditions).at(NEVER, folder.num_items).sum())
            names = " and ".join(conditions)
            among = f"the {listed:,} items of {names} (other targets left out), out of the {among}"
        if uses_availability(self.candidates):
            among = f"the items available at the target's time, out of the {among}"
        return (
            f"{split_title(folder)}{_split_details(folder)}, {among}, seen items {seen}, ties at {TIE_RULE}"
        )


def split_title(folder: DataFolder) -> str:
    """The name of the folder's split in evaluation/protocols/<name>.md."""
    split = folder.manifest.split
    kind = str(split.get("kind", "leave_one_out"))
    if kind == "leave_one_out" and split.get("unit") == "timestamp":
        return "leave-one-basket-out"
    return kind.replace("_", "-")


def _split_details(folder: DataFolder) -> str:
    """Parameters of the split: its cuts, and the history that each target is ranked from."""
    split = folder.manifest.split
    if "valid_from" in split:
        valid_from, test_from = (format_utc(split[key], _ISO) for key in ("valid_from", "test_from"))
        cuts = f"validation from {valid_from}, test from {test_from}"
    elif "last" in split:
        units = "baskets" if split.get("unit") == "timestamp" else "events"
        one = units.removesuffix("s")
        return (
            f" (the last {split['last'][1]} {units} of each user, the {split['last'][0]} before them for "
            f"validation; each {one} ranked from all events before it)"
        )
    elif "ratio" in split:
        units = "baskets" if split.get("unit") == "timestamp" else "events"
        cuts = f"{':'.join(str(part) for part in split['ratio'])} of each user's {units}"
    else:
        return ""
    return f" ({cuts}; all events of a part ranked from the history before its first)"


def seen_filter(configured: bool | None, folder: DataFolder) -> bool:
    """Whether to remove seen items from the ranking.

    By default they are removed if less than 1 % of the training events repeat an item of the user's history;
    with more repeats, seen items are likely targets.
    """
    return folder.manifest.repeat_rate < MIN_REPEAT_RATE if configured is None else configured
