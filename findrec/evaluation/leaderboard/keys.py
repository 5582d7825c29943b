"""Sections of the file of a leaderboard: the budget of its trainings, and published results."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from findrec.evaluation.compare.results import check_metric
from findrec.schema import Part

SUGGESTED = tuple(f"{name}@{k}" for name in ("ndcg", "recall", "mrr") for k in (5, 10, 20, 50))


class Budget(Part):
    """What every row of a leaderboard may use: exactly one of the keys."""

    epochs: int | None = Field(None, ge=1)  # `training.epochs` of all rows
    seconds: float | None = Field(None, gt=0)  # `training.max_seconds` of all rows
    trials: int | None = Field(None, ge=1)  # of `findrec tune` for each row, before it is trained

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if len(self.given) != 1:
            raise ValueError("budget: set one of epochs, seconds and trials")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The key that is set."""
        values = {"epochs": self.epochs, "seconds": self.seconds, "trials": self.trials}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def run_keys(self) -> dict[str, Any]:
        """The keys of the run configuration that it sets."""
        names = {"epochs": "training.epochs", "seconds": "training.max_seconds"}
        return {names[key]: value for key, value in self.given.items() if key in names}


class Published(Part):
    """A result of others, shown beside the rows and never part of a comparison."""

    name: str = Field(min_length=1, max_length=60)
    data: str | None = None  # label of the data set; may be left out if there is one only
    metrics: dict[str, float] = Field(min_length=1)  # by the names of the table's metrics
    source: str = Field(min_length=1)  # the publication or its address
    comparable: bool  # whether data, split, candidates and filter are those of the table
    note: str = ""  # what differs; needed if it is not comparable

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, given: dict[str, float]) -> dict[str, float]:
        for metric in given:
            check_metric(metric, SUGGESTED)
        return given

    @model_validator(mode="after")
    def _check(self) -> Published:
        if not self.comparable and not self.note:
            raise ValueError(f"{self.name}: say in `note` what makes it not comparable")
        return self


def published_on(results: list[Published], data: str, labels: list[str]) -> tuple[Published, ...]:
    """The published results of the data set `data`, one of `labels`."""
    return tuple(one for one in results if (one.data or labels[0]) == data)


def check_published(results: list[Published], labels: list[str]) -> None:
    """Raise `ValueError` if a result is of none of the data sets `labels`, or two have the same name."""
    seen = set()
    for one in results:
        if one.data is None and len(labels) > 1:
            raise ValueError(f"published: {one.name}: set `data` to one of {', '.join(labels)}")
        if one.data is not None and one.data not in labels:
            raise ValueError(f"published: {one.name}: no data set is labelled {one.data!r}")
        key = (one.data or labels[0], one.name)
        if key in seen:
            raise ValueError(f"published: two results on {key[0]} are named {one.name!r}")
        seen.add(key)
