"""The documentation of configuration keys: the comments beside the fields of their classes."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from findrec.schema import Part


@cache
def key_docs(section: type[BaseModel]) -> dict[str, str]:
    """The comment of each key of a section; keys without one are left out.

    It is the comment at the end of the field's line, or else the lines of comments directly above it.
    """
    docs: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Part) and base is not Part:
            docs |= dict(_own_docs(base))
    return docs


def _own_docs(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    try:
        source = inspect.getsource(section)
    except OSError:  # a class made at run time
        return
    comments: dict[int, str] = {}  # by line
    alone: set[int] = set()  # lines that hold a comment only
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        beside = [comments[line] for line in range(first, last + 1) if line in comments and line not in alone]
        above: list[str] = []
        while first - 1 - len(above) in alone:
            above.insert(0, comments[first - 1 - len(above)])
        if text := " ".join(beside or above):
            yield node.target.id, text


def with_descriptions(schema: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """A JSON schema of a section with the comments of its keys as descriptions."""
    docs = key_docs(section)
    properties = {
        name: {**entry, "description": docs[name]} if name in docs else entry
        for name, entry in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties}
