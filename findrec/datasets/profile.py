"""Profiles: what a synthetic event log looks like, and the figures of the real data each was fitted to.

A profile is one YAML file in `datasets/profiles/`. Its parameters are what the generator draws with;
`targets` are statistics of the real data set under the names of `findrec.datasets.stats.Stats`, so that
`findrec stats FOLDER --profile NAME` shows both side by side.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import Field, model_validator

from findrec.paths import find_asset
from findrec.schema import Part, read_mapping, validate

GENERATOR_VERSION = 1  # raised when the same profile and seed give other events


class Lengths(Part):
    """Events of a user: the log of the length has mean `mu` and deviation `sigma`, after clipping."""

    mu: float = Field(ge=0, le=12)
    sigma: float = Field(ge=0, le=3)
    minimum: int = Field(1, ge=1)
    maximum: int = Field(100_000, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Lengths:
        if self.minimum > self.maximum:
            raise ValueError("minimum must not exceed maximum")
        return self


class Popularity(Part):
    """Weight of the item of rank r: `r^-head` up to the rank `break_share * V`, from there on `r^-tail`."""

    head: float = Field(ge=0, le=4)
    tail: float = Field(ge=0, le=4)
    break_share: float = Field(gt=0, le=1)


class Repeats(Part):
    """A share `rate` of the events has an item that the user had before: most copy an event of an earlier
    session, whose distance in sessions is lognormal. `rate` 0 means that nobody ever has an item twice.
    """

    rate: float = Field(0, ge=0, lt=1)
    lag_median: float = Field(7, gt=0)
    lag_sigma: float = Field(1.3, ge=0)


class Sessions(Part):
    """Sessions have geometric sizes of mean `short_mean` or, with probability `long_share`, `long_mean`."""

    short_mean: float = Field(ge=1)
    long_mean: float = Field(ge=1)
    long_share: float = Field(ge=0, le=1)
    within_seconds: float = Field(0, ge=0, le=600)  # mean time between two of its events; 0: all at once


class Activity(Part):
    """Users are active for a lognormal time, inside a span that is common to all."""

    span_days: float = Field(gt=0)
    active_days: float = Field(gt=0)  # median
    active_sigma: float = Field(0, ge=0)


class Drift(Part):
    """How the catalogue changes. A share `new` of the items appears on a random day and is never drawn before
    it; the others are there from the start. A share `lasting` keeps its popularity; the rest has it for
    `life` (of the span; new items from their first day on) and is drawn `outside` times as often otherwise.
    """

    new: float = Field(ge=0, le=1)
    lasting: float = Field(ge=0, le=1)
    life: float = Field(gt=0, le=1)
    outside: float = Field(gt=0, le=1)


class Taste(Part):
    """Which categories follow each other: what a sequential model can learn beside the repeats.

    A session keeps its category from one new item to the next with probability `persistence`; a newly
    chosen one is among the user's own `favourites` with probability `loyalty`.
    """

    categories: int = Field(ge=1)
    skew: float = Field(ge=0, le=3)  # category c has weight c^-skew
    favourites: int = Field(5, ge=1)
    loyalty: float = Field(ge=0, le=1)
    persistence: float = Field(ge=0, lt=1)


class Modality(Part):
    """Item features of norm 1: `signal` times the category's direction, the rest is the item's own noise."""

    dim: int = Field(ge=2)
    signal: float = Field(ge=0, le=1)  # expected cosine of two items of one category is its square
    missing: float = Field(0, ge=0, le=1)  # share of items without this modality


class Profile(Part):
    """A kind of data set. `users` and `items` are its natural size; other sizes keep their proportion."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    users: int = Field(ge=1)
    items: int = Field(ge=1)
    lengths: Lengths
    popularity: Popularity
    repeats: Repeats = Repeats()
    sessions: Sessions
    activity: Activity
    drift: Drift
    taste: Taste
    features: dict[str, Modality] = Field({})
    targets: dict[str, float] = Field({})

    def items_for(self, users: int) -> int:
        """Items that `users` users have in the profile's proportion."""
        return max(2, round(users * self.items / self.users))

    def sha256(self, users: int, items: int, seed: int) -> str:
        """Hash of everything that decides what the generator makes."""
        tree = {
            "profile": self.model_dump(mode="json", exclude={"title", "targets", "users", "items"}),
            "version": GENERATOR_VERSION,
            "size": [users, items, seed],
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load_profile(name_or_path: str) -> Profile:
    """A built-in profile by name (`complete-journey`, `ml-latest-small`, `amazon-grocery`) or a YAML file."""
    path = find_asset(str(name_or_path), "datasets/profiles")
    return validate(Profile, read_mapping(path), str(path))
