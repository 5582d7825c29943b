"""FindRec from Python: prepare data, train a run, load it to recommend.

    import findrec

    data = findrec.prepare(events, items=products, name="my-shop")     # tables of pandas, polars or pyarrow
    run = findrec.train("shop", name="my-shop", data=data)
    shop = findrec.load("my-shop")
    shop.recommend(["customer-17"], k=5)
    shop.recommend(histories=[["SKU-1", "SKU-2"]])                     # a visitor nobody knows
    shop.similar_items("SKU-1")

Importing it loads neither Ray, DeepSpeed nor MLflow; `train` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from findrec.errors import FindRecError

if TYPE_CHECKING:
    from findrec.config import RunConfig
    from findrec.datasets.folder.data_folder import DataFolder
    from findrec.serving.recommender import Recommender


@dataclass(frozen=True)
class Run:
    """A trained and evaluated run.

    Attributes:
        folder: the run folder, with `config.yaml`, `metrics.json`, `report.html` and checkpoints.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        from findrec.training.runs import read_run_config

        return read_run_config(self.folder)

    @property
    def report(self) -> Path:
        """The report, an HTML page."""
        return self.folder / "report.html"

    def metrics(self, split: str = "test") -> list[dict[str, Any]]:
        """One row of metrics for each model and baseline, with the protocol they were measured by.

        Raises `FindRecError` if the run has no metrics of the split.
        """
        path = self.folder / "metrics.json"
        try:
            rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[split]
        except (OSError, KeyError, ValueError) as error:
            raise FindRecError(
                f"{path} has no metrics of the split {split!r} ({type(error).__name__}): findrec evaluate "
                f"{self.name} writes those of test and valid"
            ) from None
        return rows

    def export(self, folder: str | Path | None = None, *, users: bool = False, force: bool = False) -> Path:
        """Write a folder that `load` takes on any machine, without the run and its data; returns its path.

        Args:
            folder: where to write; default: `export` in the run folder.
            users: also export the histories of the users.
            force: replace an earlier export.

        Raises:
            FindRecError: for a run without a usable checkpoint, a folder that exists, or a model that needs
                its users.
        """
        from findrec.serving.export.export import export_run

        target = None if folder is None else Path(folder).expanduser().resolve()
        return export_run(self.folder, target, users=users, force=force)

    def recommender(self, index: str | None = None) -> Recommender:
        """See `load`."""
        from findrec.serving.recommender import Recommender

        return Recommender.load(self.folder, index)


def prepare(
    source: object,
    items: object = None,
    *,
    name: str | None = None,
    folder: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> DataFolder:
    """Make a data folder from a recipe or from tables; returns at once if it exists.

    Args:
        source: name or path of a recipe, or the events as a table of pandas, polars or pyarrow with the
            columns user, item, timestamp (seconds or times) and optionally event and value.
        items: with events, a table with the column item and optionally title, text, category, image,
            available_from and others. Texts are encoded as features.
        name: with events, the name of the data set.
        folder: where to write; default: `data/<name>` in FindRec's home.
        force: prepare it again even if it exists.
        keys: with events, other keys of a recipe (datasets/README.md), such as
            `split={"kind": "global_temporal"}`, `ties="shuffle"` or `features={}`.

    Returns:
        The data folder, which `train` takes as `data`.

    Raises:
        FindRecError: for an unknown recipe, tables without the needed columns, or a folder made from other
            data (pass `force=True` to replace it).
    """
    from findrec.config import DataConfig
    from findrec.datasets.folder.configured import data_folder_of
    from findrec.datasets.prepare.pipeline import prepare as make
    from findrec.datasets.sources.recipe import load_recipe
    from findrec.datasets.sources.tables import table_recipe

    if isinstance(source, str | Path):
        if items is not None or name is not None or keys:
            raise FindRecError("prepare: a recipe is complete; items, name and other keys go with a table")
        recipe, file = load_recipe(str(source)), str(source)
    elif name is None:
        raise FindRecError("prepare: give the data set a name, e.g. name='my-shop'")
    else:
        recipe, file = table_recipe(name, source, items, **keys), name
    target = data_folder_of(DataConfig(recipe=file, folder=None if folder is None else str(folder)))
    return make(recipe, target, force=force)


def train(
    config: str | Path | Mapping[str, Any] = "shop",
    *,
    data: DataFolder | str | Path | Mapping[str, Any] | None = None,
    fresh: bool = False,
    **overrides: Any,
) -> Run:
    """Train and evaluate a run on the workers of its configuration; resumes a run of the same name.

    Args:
        config: name or path of a run configuration, or its keys.
        data: a data folder (as returned by `prepare`, or its path), or the section `data` of the
            configuration.
        fresh: delete a run of the same name first.
        overrides: keys of the configuration, as sections (`training={"epochs": 3}`, `model={"dim": 32}`) or
            dotted (`**{"training.epochs": 3}`).

    Raises:
        FindRecError: for an invalid configuration, or data or a run that does not fit it.
    """
    from findrec.config import parse_config
    from findrec.evaluation.leaderboard.trees import expand, merge
    from findrec.paths import checkout_hidden, find_asset
    from findrec.schema import read_mapping
    from findrec.train_dist import train_run

    where = "findrec.train"
    if isinstance(config, Mapping):
        base = expand(config, where)
    else:
        path = find_asset(str(config), "configs")
        base, where = expand(read_mapping(path), str(path)), str(path)
    if data is not None:
        overrides["data"] = _data_section(data)
    with checkout_hidden():
        return Run(train_run(parse_config(merge(base, expand(overrides, where)), source=where), fresh=fresh))


def load(run: str | Path, index: str | None = None) -> Recommender:
    """Load a run, by name or folder, or an export, to recommend, list similar items, or get vectors.

    Lists come from the saved index with the factory string `index` (`findrec index`), if given.

    Raises:
        FindRecError: for an unknown run or one without a usable checkpoint, or a missing index.
    """
    from findrec.paths import find_run
    from findrec.serving.recommender import Recommender

    return Recommender.load(find_run(str(run)), index)


def _data_section(data: object) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, str | Path):
        from findrec.datasets.folder.remote import is_remote
        from findrec.paths import find_data_folder

        return {"folder": str(data) if is_remote(data) else str(find_data_folder(str(data)))}
    return {"folder": getattr(data, "location", str(data))}
