"""Profiles: parameters of a synthetic event log, and statistics of the real data to which they were fitted.

A profile is one YAML file in `datasets/profiles/`. Its parameters control the generator; `targets` are
statistics of the real data set under the names of `findrec.datasets.stats.statistics.Stats`, so that `findrec
stats FOLDER --profile NAME` shows both side by side.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import Field, model_validator

from findrec.paths import find_asset
from findrec.schema import Part, read_mapping, validate

GENERATOR_VERSION = 1  # increased when the same profile and seed generate other events


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
    """Weight of the item of rank r: `r^-head` up to rank `break_share * V`, then `r^-tail`."""

    head: float = Field(ge=0, le=4)
    tail: float = Field(ge=0, le=4)
    break_share: float = Field(gt=0, le=1)


class Repeats(Part):
    """A share `rate` of the events repeats an item of the user.

    Most repeats copy an event of an earlier session, at a lognormal distance in sessions. With `rate` 0 no
    user has an item twice.
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
    """Users are active for a lognormal time within a common time span."""

    span_days: float = Field(gt=0)
    active_days: float = Field(gt=0)  # median
    active_sigma: float = Field(0, ge=0)


class Drift(Part):
    """Changes of the catalogue over time.

    A share `new` of the items appears on a random day and is never drawn before; the others always exist. A
    share `lasting` keeps its popularity; the others have it during `life` (a share of the span; from the
    first day of new items) and are drawn `outside` times as often otherwise.
    """

    new: float = Field(ge=0, le=1)
    lasting: float = Field(ge=0, le=1)
    life: float = Field(gt=0, le=1)
    outside: float = Field(gt=0, le=1)


class Taste(Part):
    """Transitions between categories, which a sequential model can learn besides the repeats.

    A session keeps its category from one new item to the next with probability `persistence`; a newly chosen
    one is among the user's own `favourites` with probability `loyalty`.
    """

    categories: int = Field(ge=1)
    skew: float = Field(ge=0, le=3)  # category c has weight c^-skew
    favourites: int = Field(5, ge=1)
    loyalty: float = Field(ge=0, le=1)
    persistence: float = Field(ge=0, lt=1)


class Modality(Part):
    """Item features of norm 1: `signal` times the category's direction plus item noise."""

    dim: int = Field(ge=2)
    signal: float = Field(ge=0, le=1)  # the expected cosine of two items of a category is its square
    missing: float = Field(0, ge=0, le=1)  # share of items without this modality


class Profile(Part):
    """A kind of data set; `users` and `items` are its default size, other sizes keep their ratio."""

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
        """Number of items for `users` users, in the profile's ratio."""
        return max(2, round(users * self.items / self.users))

    def sha256(self, users: int, items: int, seed: int) -> str:
        """Hash of everything that determines the generated data."""
        tree = {
            "profile": self.model_dump(mode="json", exclude={"title", "targets", "users", "items"}),
            "version": GENERATOR_VERSION,
            "size": [users, items, seed],
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load_profile(name_or_path: str) -> Profile:
    """Load a built-in profile by name, or a YAML file."""
    path = find_asset(str(name_or_path), "datasets/profiles")
    return validate(Profile, read_mapping(path), str(path))
