"""Trees of configuration keys: dotted keys become sections, and changes are merged over what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from findrec.errors import FindRecError
from findrec.models.config import SequenceConfig
from findrec.models.configs import DEFAULT, config_class

Tree = dict[str, Any]
_MODEL = "model"


def expand(tree: Mapping[str, Any], where: str) -> Tree:
    """A tree whose dotted keys are sections, and whose model is a section even if only its name is given.

    Raises `FindRecError`, with `where` the tree is from, if a key is both a value and a section.
    """
    result: Tree = {}
    for key, value in tree.items():
        try:
            put(result, key, value)
        except FindRecError as error:
            raise FindRecError(f"{where}: {error}") from None
    return result


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key of a tree in place; sections are merged."""
    *parents, leaf = key.split(".")
    if not parents and leaf == _MODEL and isinstance(value, str):
        value = {"name": value}
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise _both(key, part, node)
    if isinstance(value, Mapping):
        inner: Tree = node.setdefault(leaf, {})
        if not isinstance(inner, dict):
            raise _both(key, leaf, inner)
        for name, one in value.items():
            put(inner, str(name), one)
    elif isinstance(node.get(leaf), dict):
        raise _both(key, leaf, value)
    else:
        node[leaf] = value


def _both(key: str, part: str, value: object) -> FindRecError:
    return FindRecError(f"{key}: {part} is both {value!r} and a section of keys. Leave out one of them")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """The base with changes; sections are merged, lists and other values replaced.

    If the changes select another model, it keeps those of the base's model keys that models of sequences
    share (`SequenceConfig`), as trained baselines do, and has defaults for its own.
    """
    given = changes.get(_MODEL)
    model = base.get(_MODEL, {})
    if isinstance(given, Mapping) and isinstance(model, Mapping) and "name" in given:
        name = given["name"]
        if name != model.get("name", DEFAULT):
            base = {**base, _MODEL: _shared_keys(model, name)}
    return _merge(base, changes)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merge(before, value)
        result[key] = value
    return result


def _shared_keys(model: Mapping[str, Any], name: object) -> Tree:
    """The keys of a model section that the model `name` has too."""
    try:
        own = config_class(name).model_fields.keys()
    except ValueError:  # reported with the configuration
        return {}
    shared = own & SequenceConfig.model_fields.keys() - {"name", "label"}
    return {key: value for key, value in model.items() if key in shared}
