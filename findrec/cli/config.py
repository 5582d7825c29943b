"""Defines the command `findrec config`: all keys of a run configuration, with their values and meanings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel

from findrec.cli.key_docs import key_docs, with_descriptions
from findrec.config import RunConfig, load_config, parse_config
from findrec.models.config import ModelConfig
from findrec.models.configs import CONFIGS, config_class
from findrec.paths import find_asset
from findrec.schema import Part, flatten, read_mapping

_WIDTH = 110


def config(
    config: Annotated[
        str | None, typer.Argument(help="Name or path of a run configuration; default: all defaults.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[dotted.key=value]...", help="e.g. model.dim=32")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema instead, for completion in editors.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Show the keys of this model; the same as model.name=MODEL.")
    ] = None,
) -> None:
    """Print all keys of a configuration: values, what they mean, and which are not defaults.

    findrec config demo training.epochs=5 model.dim=32

    The output is a configuration: findrec config demo > mine.yaml
    """
    if schema:
        typer.echo(json.dumps(run_schema(), indent=2))
        return
    given = [*(overrides or []), *([] if model is None else [f"model.name={model}"])]
    if config is not None and "=" in config:
        given, config = [config, *given], None
    for line in documented(config, given):
        typer.echo(line)


def documented(name: str | None, overrides: Sequence[str] = ()) -> Iterator[str]:
    """The lines of a configuration as YAML, with the meaning and origin of its keys as comments."""
    if name is None:
        origins, resolved = {}, parse_config({}, overrides)
    else:
        path = find_asset(name, "configs")
        origins = dict.fromkeys(flatten(read_mapping(path)), path.name)
        resolved = load_config(name, overrides)
    origins |= {override.partition("=")[0]: "the command line" for override in overrides}
    if resolved.model.name in CONFIGS:
        yield f"# Models: {', '.join(CONFIGS)}; `--model NAME` shows the keys of another one."
    yield from _section(type(resolved), resolved.model_dump(mode="json"), resolved, origins, "", 0)


def _section(
    section: type[BaseModel],
    tree: dict[str, Any],
    node: BaseModel,
    origins: dict[str, str],
    prefix: str,
    depth: int,
) -> Iterator[str]:
    docs, indent = key_docs(section), "  " * depth
    for key, value in tree.items():
        inner = getattr(node, key, None)
        if depth == 0 and isinstance(inner, Part):
            yield ""
        if key in docs:
            for line in wrap(docs[key], _WIDTH - len(indent)):
                yield f"{indent}# {line}"
        if isinstance(inner, Part) and isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _section(type(inner), value, inner, origins, f"{prefix}{key}.", depth + 1)
            continue
        origin = origins.get(f"{prefix}{key}")
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
        text = text.removesuffix("...\n").strip()
        yield f"{indent}{key}: {text}{f'  # {origin}' if origin else ''}"


def run_schema() -> dict[str, Any]:
    """A JSON schema of run configurations, in which `model` is that of the registered models."""
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    sections = {cls.__name__: cls for cls in _parts(RunConfig)}
    choices: list[dict[str, Any]] = [{"type": "string", "enum": list(CONFIGS)}]
    for name in CONFIGS:
        cls = config_class(name)
        sections |= {part.__name__: part for part in _parts(cls)}
        own = cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        definitions[cls.__name__] = own
        choices.append({"$ref": f"#/$defs/{cls.__name__}"})
    for name, entry in definitions.items():
        if name in sections:
            definitions[name] = with_descriptions(entry, sections[name])
    schema = with_descriptions(schema, RunConfig)
    schema["properties"]["model"] = {"anyOf": choices, "description": "the model and its keys"}
    return schema


def _parts(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The section and all sections in it."""
    yield section
    for info in section.model_fields.values():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Part) and inner is not ModelConfig:
            yield from _parts(inner)
