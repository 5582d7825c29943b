"""Thumbnails of item images as `data:` URIs, for HTML pages."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from findrec.config import RunConfig
from findrec.datasets.encoders.encoder import BrokenInputError
from findrec.datasets.encoders.image_files import ImageFiles, decode
from findrec.datasets.encoders.make_features import resolve_path
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.sources.recipe import load_recipe
from findrec.errors import FindRecError
from findrec.evaluation.display.plots import data_uri
from findrec.paths import resolve
from findrec.progress import warn

_SIDE = 96  # pixels of the longer side


def thumbnails(config: RunConfig, folder: DataFolder, items: Iterable[int]) -> dict[int, str]:
    """Thumbnails by item (ids 1..V); items whose image is missing or damaged are left out.

    Images are read from `evaluation.pictures`, or else from the source of the recipe's image features, by the
    path in the recipe's column, or else by the raw id. Nothing is downloaded.
    """
    source = _picture_source(config)
    if source is None:
        return {}
    path, column = source
    try:
        pictures = ImageFiles(path)
    except FindRecError as error:
        warn(f"report without item pictures: {error}")
        return {}
    names = folder.item_column(column or "raw")
    if names is None:
        return {}
    images = {}
    for item in sorted({int(item) for item in items if item > 0}):
        name = names[item - 1].as_py()
        picture = None if name is None else pictures.at(name) if column else pictures.named(str(name))
        if picture is None:
            continue
        try:
            images[item] = data_uri(_shrink(decode(picture.read())), "image/jpeg")
        except BrokenInputError as error:
            warn(f"report without the picture of item {item} ({picture.name}): {error}")
    return images


def _picture_source(config: RunConfig) -> tuple[Path, str | None] | None:
    """The folder or tar file of pictures, and the item column with the paths inside it."""
    try:
        recipe = load_recipe(config.data.recipe)
    except FindRecError:  # a data folder given by its path does not need a recipe
        recipe = None
    spec = recipe.features.image if recipe is not None else None
    column = spec.column if spec is not None else None
    if config.evaluation.pictures is not None:
        return resolve(config.evaluation.pictures), column
    if recipe is None or spec is None:
        return None
    path = resolve_path(spec.path, recipe.folder)
    return (path, column) if path.exists() else None


def _shrink(image: Image.Image) -> bytes:
    image.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=80)
    return out.getvalue()
