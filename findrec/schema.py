"""Reads and validates YAML files strictly: unknown keys are errors, and all errors are reported at once."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from findrec.errors import FindRecError, suggest


class Part(BaseModel):
    """Base class of configuration nodes: unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number: pydantic takes them as 1 and 0."""
        accepted = _types(cls.model_fields[str(info.field_name)].annotation)
        if bool not in accepted and accepted & {int, float}:
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, bool):
                    raise ValueError(f"a number is needed, not {str(one).lower()}")
        return value


def _types(annotation: Any) -> set[Any]:
    """The plain types in an annotation such as `list[int] | None`."""
    inner = get_args(annotation)
    return set().union(*map(_types, inner)) if inner else {annotation}


When = Literal["resume", "warm_start"]
_MAY_CHANGE = "may_change"


def may_change(when: When, default: Any, **limits: Any) -> Any:
    """A field that may change when a run is resumed or starts from another run's weights (`warm_start`).

    On a section it applies to all keys in it.
    """
    return Field(default, json_schema_extra={_MAY_CHANGE: when}, **limits)


def changes(old: Part, new: Part, when: When, prefix: str = "") -> list[tuple[str, object, object]]:
    """`(dotted key, old value, new value)` of the keys that differ but must not; a missing key is None."""
    differing: list[tuple[str, object, object]] = []
    names = dict.fromkeys([*type(old).model_fields, *type(new).model_fields])
    for name in names:
        info = type(new).model_fields.get(name) or type(old).model_fields[name]
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get(_MAY_CHANGE) == when:
            continue
        before, after = getattr(old, name, None), getattr(new, name, None)
        if isinstance(before, Part) and isinstance(after, Part):
            differing += changes(before, after, when, f"{prefix}{name}.")
        elif before != after:
            differing.append((prefix + name, before, after))
    return differing


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """A nested dictionary as one of dotted keys."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


Tree = TypeVar("Tree", bound=Part)
KeyPath = tuple[int | str, ...]


_LARGEST_FILE = 8 << 20  # bytes
_DEEPEST = 40  # levels of nesting


def parse_yaml(text: str, source: str) -> Any:
    """The plain values in a YAML text. Raises `FindRecError` for any text that does not hold some."""
    try:
        tree = yaml.safe_load(text)
    except Exception as error:  # besides YAMLError whatever int(), float() or the recursion limit raise
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 300, placeholder=" ...")
        raise FindRecError(f"{source} is not valid YAML: {reason}") from None
    level: list[Any] = [tree]
    for _ in range(_DEEPEST):  # by identity, so that aliases cost nothing
        inner = [one for node in level if isinstance(node, dict | list) for one in _children(node)]
        level = list({id(one): one for one in inner}.values())
    if level:
        raise FindRecError(f"{source} is nested more than {_DEEPEST} levels deep, or contains itself")
    return tree


def _children(node: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file. Raises `FindRecError` for anything else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise FindRecError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FindRecError(
            f"{path} is not valid YAML: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    if len(data) > _LARGEST_FILE:
        raise FindRecError(f"{path} is not valid YAML: larger than {_LARGEST_FILE >> 20} MiB")
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict | None):
        raise FindRecError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    if (odd := next((key for key in tree or {} if not isinstance(key, str)), None)) is not None:
        raise FindRecError(f"{path}: the key {odd!r} is not a word")
    return tree or {}


def validate(
    model: type[Tree], tree: dict[str, Any], source: str, nearest: Callable[[KeyPath], str] | None = None
) -> Tree:
    """Validate `tree` as `model`; the `FindRecError` lists every problem with its key.

    `nearest` returns a suggestion for an unknown key, given its path; by default the most similar key of the
    model at any depth.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        known = key_names(model)
        nearest = nearest or (lambda path: suggest(str(path[-1]), known))
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {key!r}{nearest(problem['loc'])}")
            else:
                message = problem["msg"].removeprefix("Value error, ") + _hint(key, problem)
                lines.append(
                    f"{key}: {message} (given: {reprlib.repr(problem['input'])})" if key else message
                )
        raise FindRecError(f"{source}: " + "; ".join(lines)) from None


def _hint(key: str, problem: Any) -> str:
    """A hint for a value of the wrong type."""
    given = problem["input"]
    if problem["type"] == "model_type" and given is None:
        return ": the section is empty; give it keys or leave it out"
    if problem["type"] == "string_type" and isinstance(given, bool | int | float | date):
        return (
            f'. Without quotes YAML reads it as a {type(given).__name__}: write {key}: "{given}" in a file, '
            f"'{key}=\"{given}\"' on the command line"
        )
    return ""


def key_names(model: type[BaseModel]) -> set[str]:
    """The names of all keys of a model, at any depth."""
    keys = set(model.model_fields)
    for info in model.model_fields.values():
        for annotation in (info.annotation, *get_args(info.annotation)):
            for inner in (annotation, *get_args(annotation)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    keys |= key_names(inner)
    return keys
