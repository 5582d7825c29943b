"""Small pictures of items for a page: JPEG of a few kilobytes each, as `data:` addresses."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from findrec.config import RunConfig
from findrec.datasets.encode_rows import BrokenInputError
from findrec.datasets.folder import DataFolder
from findrec.datasets.images import Pictures, decode
from findrec.datasets.make_features import place_of
from findrec.datasets.recipe import load_recipe
from findrec.errors import FindRecError
from findrec.evaluation.plots import data_uri
from findrec.paths import resolve
from findrec.progress import say

_SIDE = 96  # pixels of the longer side


def thumbnails(config: RunConfig, folder: DataFolder, items: Iterable[int]) -> dict[int, str]:
    """Pictures of those of `items` (ids 1..V) that have one on disk, by item.

    They are looked for where `evaluation.pictures` says, else where the recipe's image features come from:
    by the path in the recipe's column, else by the raw id. Where some are missing or damaged fewer come back;
    nothing is fetched.
    """
    found = _place(config)
    if found is None:
        return {}
    place, column = found
    try:
        pictures = Pictures(place)
    except FindRecError as error:
        say(f"report without pictures of items: {error}")
        return {}
    names = folder.item_column(column or "raw")
    if names is None:
        return {}
    shown = {}
    for item in sorted({int(item) for item in items if item > 0}):
        name = names[item - 1].as_py()
        picture = None if name is None else pictures.at(name) if column else pictures.named(str(name))
        if picture is None:
            continue
        try:
            shown[item] = data_uri(_shrink(decode(picture.read())), "image/jpeg")
        except BrokenInputError as error:
            say(f"report without the picture of item {item} ({picture.name}): {error}")
    return shown


def _place(config: RunConfig) -> tuple[Path, str | None] | None:
    """The folder or tar of pictures, and the item column with paths inside it."""
    try:
        recipe = load_recipe(config.data.recipe)
    except FindRecError:  # a data folder given by its path needs none
        recipe = None
    spec = recipe.features.image if recipe is not None else None
    column = spec.column if spec is not None else None
    if config.evaluation.pictures is not None:
        return resolve(config.evaluation.pictures), column
    if recipe is None or spec is None:
        return None
    place = place_of(spec.path, recipe.folder)
    return (place, column) if place.exists() else None


def _shrink(image: Image.Image) -> bytes:
    image.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=80)
    return out.getvalue()
