"""The search space of a configuration: which keys are tried, and which values.

    training.optim.lr: {low: 5.0e-4, high: 1.0e-2, log: true}
    training.tokens: {low: 400, high: 3200}     # integers if both are
    model.dim: [32, 64, 128]                    # one of these

`findrec/models/search_space.yaml` has keys that most models share; those that a model does not have are left
out. `search_space.yaml` beside the configuration class of a model, also of a user's own, adds keys or
replaces them; null leaves a shared key out. In both, the value of the configuration itself is tried too.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

import findrec.models
from findrec.config import RunConfig, parse_config
from findrec.errors import FindRecError, suggest
from findrec.evaluation.leaderboard.trees import Tree, expand, merge
from findrec.schema import Part, flatten, read_mapping, validate

FILE = "search_space.yaml"
Value = bool | int | float | str | None


class Range(Part):
    """All numbers from `low` to `high`, whole ones if both are; `log`: small ones as likely as large ones."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low: {self.low} is not below high: {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: {self.low} must be positive with log: true")
        return self

    @property
    def whole(self) -> bool:
        """Whether only integers are tried."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Space:
    """What is tried for each dotted key: a range or a list of values."""

    keys: Mapping[str, Range | tuple[Value, ...]]

    @property
    def tree(self) -> dict[str, Any]:
        """The space as plain values, in the form of its file."""
        return {
            key: one.model_dump(mode="json") if isinstance(one, Range) else list(one)
            for key, one in self.keys.items()
        }

    @property
    def size(self) -> int | None:
        """The number of combinations of values; None if a range has fractions."""
        sizes = [_size(tried) for tried in self.keys.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def combinations(self) -> Iterator[dict[str, Value]]:
        """All combinations of values, for a space that has a `size`."""
        values = [
            range(int(tried.low), int(tried.high) + 1) if isinstance(tried, Range) else dict.fromkeys(tried)
            for tried in self.keys.values()
        ]
        return (dict(zip(self.keys, chosen, strict=True)) for chosen in itertools.product(*values))

    def contains(self, key: str, value: object) -> bool:
        """Whether a value is among those tried for a key."""
        tried = self.keys[key]
        if not isinstance(tried, Range):
            return value in tried
        number = isinstance(value, int if tried.whole else int | float) and not isinstance(value, bool)
        return number and tried.low <= value <= tried.high  # type: ignore[operator]  # it is a number

    def at_edge(self, key: str, value: object) -> bool:
        """Whether a value is within 5 % of an end of its range, or the first or last number of a list."""
        tried = self.keys[key]
        if isinstance(tried, Range):
            ends: list[float] = [tried.low, tried.high, value]  # type: ignore[list-item]  # it is a number
            low, high, at = map(math.log, ends) if tried.log else ends
            return min(at - low, high - at) < 0.05 * (high - low)
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in tried)
        return numbers and value in (min(tried), max(tried))  # type: ignore[type-var]


def find_space(config: RunConfig, path: Path | None = None) -> Space:
    """The space in the file `path`, by default that of the configuration's model.

    Raises `FindRecError` if a file is malformed, has a key that the configuration does not have, or a value
    that the key does not allow; and for `training.tokens=auto`, which is a number only once a run is started.
    """
    if config.training.tokens == "auto":
        raise FindRecError("trials need a number of tokens: set training.tokens, e.g. training.tokens=3200")
    known = flatten(config.model_dump(mode="json"))
    if path is not None:
        entries, source = _entries(path, known), str(path)
    else:
        shared = Path(findrec.models.__file__).parent / FILE
        source = str(shared)
        entries = {key: entry for key, entry in read_mapping(shared).items() if key in known}
        own = _beside(config)
        if own is not None:
            entries, source = entries | _entries(own, known), str(own)
    keys = {key: _parse(key, entry, source) for key, entry in entries.items() if entry is not None}
    if path is None:
        keys = {key: _with_value(tried, known[key]) for key, tried in keys.items()}
    if not keys:
        raise FindRecError(f"{source}: the search space has no keys")
    space = Space(keys)
    _check_values(config, space, source)
    return space


def _size(tried: Range | tuple[Value, ...]) -> int | None:
    if not isinstance(tried, Range):
        return len(set(tried))
    return int(tried.high) - int(tried.low) + 1 if tried.whole else None


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Tree:
    """A configuration tree with other values of dotted keys."""
    return merge(tree, expand(values, "the search space"))


def _beside(config: RunConfig) -> Path | None:
    """The file beside the class of the model's configuration, if there is one."""
    path = Path(inspect.getfile(type(config.model))).parent / FILE
    return path if path.is_file() else None


def _entries(path: Path, known: Mapping[str, object]) -> dict[str, Any]:
    entries = read_mapping(path)
    for key in entries:
        if key not in known:
            raise FindRecError(f"{path}: the configuration has no key {key!r}{suggest(key, known)}")
    return entries


def _parse(key: str, entry: object, source: str) -> Range | tuple[Value, ...]:
    if isinstance(entry, Mapping):
        return validate(Range, dict(entry), f"{source}, {key}")
    values = tuple(entry) if isinstance(entry, list) else ()
    if len(values) < 2 or not all(isinstance(value, Value) for value in values):
        raise FindRecError(
            f"{source}: {key} is {entry!r}: write a range, {{low: 1, high: 4}}, or a list of several values"
        )
    return values


def _with_value(tried: Range | tuple[Value, ...], value: object) -> Range | tuple[Value, ...]:
    """A range or list that has the value too, if it is one that fits."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(tried, Range):
        numbers = number and all(isinstance(one, int | float) for one in tried)
        if value in tried or not isinstance(value, Value):
            return tried
        return tuple(sorted([*tried, value])) if numbers else (*tried, value)  # type: ignore[type-var]
    if not isinstance(value, int | float) or not number or (tried.log and value <= 0):
        return tried
    if tried.whole and not isinstance(value, int):
        return tried
    return Range(low=min(tried.low, value), high=max(tried.high, value), log=tried.log)


def _check_values(config: RunConfig, space: Space, source: str) -> None:
    tree = config.model_dump(mode="json")
    for key, tried in space.keys.items():
        for value in (tried.low, tried.high) if isinstance(tried, Range) else tried:
            try:
                parse_config(with_values(tree, {key: value}))
            except FindRecError as error:
                raise FindRecError(f"{source}: {key}={value!r} is not allowed: {error}") from None
