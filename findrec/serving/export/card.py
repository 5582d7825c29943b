"""The model card of an export: data, protocol, metrics, contents, licence and privacy, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from findrec import __version__
from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.sources.recipe import Recipe, load_recipe
from findrec.errors import FindRecError
from findrec.evaluation.display.wording import COLUMNS, format_number, protocol_lines
from findrec.evaluation.protocol import split_title
from findrec.files import read_json

_CARD = """# {name}

A sequential recommender, `{model}`, trained with FindRec {version}. `config.yaml` has all settings.

## Use

```python
import findrec

recommender = findrec.load("PATH/OF/THIS/FOLDER")
recommender.recommend(histories=[{history}], k=10)
```

`findrec recommend FOLDER --history ITEM,ITEM` makes lists on the command line, `findrec serve FOLDER`
over HTTP.
{users}

## Data

{data}

## Evaluation

{metrics}

## Files

| file | holds |
|---|---|
| `export.json` | sizes and sha256 of all files but this one, which are checked when the folder is loaded |
| `config.yaml` | the configuration of the run |
| `checkpoints/`, `stages/` | weights in safetensors files, without optimizer state |
| `data/items.parquet` | raw ids, titles and other columns of the items; row n is item n, from 1 |
| `data/features/` | features of the items that the model reads |
| `vectors/` | for other stores: `items.parquet` with raw ids, `items.npy` in the same order |
| `index/` | FAISS indexes: {indexes} |

The score of an item is the inner product of its vector with that of the user (`Recommender.user_vectors`),
plus, in models with `model.repeat`, a bonus of the items of the user's history. Models that do not rank by
vectors have no `vectors/`.

## Licence and privacy

{licence}
{privacy}
"""


def model_card(
    run_folder: Path, config: RunConfig, data: DataFolder, *, users: bool, indexes: Sequence[str]
) -> str:
    """The text of the card; metrics are those of the run's `metrics.json`, if it was evaluated."""
    recipe, manifest = _recipe(config, data), data.manifest
    title = (
        manifest.recipe if recipe is None else f"{recipe.title} (`{recipe.name}`): {recipe.source.strip()}"
    )
    example = data.items.column("raw").slice(0, 2).to_pylist()
    facts = (
        f"{title}\n\n{manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.num_events:,} "
        "events; "
        f"split {split_title(data)}. The model was "
        "trained on the training events of the split only. sha256 of the events: "
        f"`{manifest.events_sha256}`."
    )
    return _CARD.format(
        name=config.name,
        model=config.model.title,
        version=__version__,
        history=[str(raw) for raw in example],
        users=(
            "Users of the training data may be named by their raw ids."
            if users
            else "The export has no users: it answers for given histories."
        ),
        data=facts,
        metrics=_metrics(run_folder),
        indexes=", ".join(f"`{one}`" for one in indexes) or "none exported",
        licence=_licence(recipe, manifest.recipe),
        privacy=(
            "The folder contains the complete histories of the users under their raw ids: treat it as "
            "personal data."
            if users
            else "The folder contains no histories and no ids of users. The weights were trained on "
            "histories of "
            "users, and `items.parquet` has the number of training events of each item."
        ),
    )


def _recipe(config: RunConfig, data: DataFolder) -> Recipe | None:
    """The recipe that the data was made of, if it still exists."""
    for name in (config.data.recipe, data.manifest.recipe):
        try:
            recipe = load_recipe(name)
        except FindRecError:
            continue
        if recipe.name == data.manifest.recipe:
            return recipe
    return None


def _licence(recipe: Recipe | None, name: str) -> str:
    known = (
        f"The licence of the data `{name}` is not known to FindRec; add it here before passing this folder "
        "on."
        if recipe is None
        else f"The data: {recipe.licence.strip()}"
    )
    return (
        f"{known}\n\nTitles, texts, columns and features of the items are parts of the data; whether the "
        "weights "
        "may be passed on depends on its licence too. FindRec itself is under the Apache License 2.0.\n"
    )


def _metrics(run_folder: Path) -> str:
    try:
        rows: list[Mapping[str, Any]] = read_json(run_folder / "metrics.json")["test"]
        shown = ["model", *(name for name in COLUMNS if any(name in row for row in rows))]
        lines = [shown, ["---"] * len(shown)]
        lines += [[str(row["model"]), *(format_number(row.get(name)) for name in shown[1:])] for row in rows]
        protocol = "\n".join(f"Test protocol: {line}." for line in protocol_lines(rows))
    except (OSError, ValueError, KeyError, TypeError):
        return "The run was not evaluated (`findrec evaluate RUN` writes its metrics)."
    return "\n".join([protocol, "", *(f"| {' | '.join(line)} |" for line in lines)])
