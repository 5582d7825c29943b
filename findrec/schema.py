"""What every YAML file of the project has in common: a strict tree, and all its mistakes told at once."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from findrec.errors import FindRecError, suggest


class Part(BaseModel):
    """A node of a tree: unknown keys are errors, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Tree = TypeVar("Tree", bound=Part)
Place = tuple[int | str, ...]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds (an empty file: none). Raises `FindRecError` for anything else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FindRecError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise FindRecError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    return tree or {}


def validate(
    model: type[Tree], tree: dict[str, Any], source: str, nearest: Callable[[Place], str] | None = None
) -> Tree:
    """`tree` as `model`; `FindRecError` lists every problem with its place in the tree.

    `nearest` finds a suggestion for the place of an unknown key; by default a key of any part of the tree.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        known = key_names(model)
        nearest = nearest or (lambda place: suggest(str(place[-1]), known))
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {key!r}{nearest(problem['loc'])}")
            else:
                given = f" (given: {reprlib.repr(problem['input'])})" if key else ""
                lines.append(f"{key}: {problem['msg']}{given}" if key else problem["msg"])
        raise FindRecError(f"{source}: " + "; ".join(lines)) from None


def key_names(model: type[BaseModel]) -> set[str]:
    """The names of the keys of a tree, at any depth."""
    keys = set(model.model_fields)
    for info in model.model_fields.values():
        for annotation in (info.annotation, *get_args(info.annotation)):
            for inner in (annotation, *get_args(annotation)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    keys |= key_names(inner)
    return keys
