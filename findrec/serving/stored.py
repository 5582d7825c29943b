"""What a `Recommender` is loaded from: a run folder, or an export of one.

An export has the layout of a run folder (`config.yaml`, `checkpoints/`, `index/`), and `data/`, a data folder
with the items and, only if they were exported too, the users. `export.json`, written last, has the sha256 of
every other file but the model card, which may be edited; without it a folder is not an export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from findrec.config import RunConfig
from findrec.datasets.folder.configured import open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.scoring.allow_list import FILE
from findrec.files import read_json, sha256_file
from findrec.training.runs import read_run_config

FORMAT = 1
EXPORT = "export.json"
DATA = "data"  # the data folder of an export
CARD = "README.md"  # the model card: people complete it, e.g. with a licence, so it is not hashed
_LISTED = ("checkpoints", "stages", DATA, "index")  # read by what is in them, so nothing else may be there


class FileEntry(BaseModel):
    """Size and hash of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class ExportManifest(BaseModel):
    """The content of `export.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    findrec: str  # version that wrote it
    run: str
    model: str
    num_items: int
    num_users: int  # with histories in the export
    latest: int  # time of the last event of the run's data, seconds
    files: dict[str, FileEntry]  # every other file of the export but the card


@dataclass(frozen=True)
class Stored:
    """A trained run with its data.

    Attributes:
        folder: the run folder or export.
        config: the run's configuration; paths of allow-lists inside an export are absolute.
        data: the data it was trained on, of an export without users only the items.
        latest: time of the last event of the data, seconds; None: it has to be read from the events.
    """

    folder: Path
    config: RunConfig
    data: DataFolder
    latest: int | None = None


def open_stored(folder: Path) -> Stored:
    """Open a run folder or an export.

    Raises `FindRecError` if it is incomplete or, for an export, if a file differs from `export.json`.
    """
    if not (folder / EXPORT).is_file():
        config = read_run_config(folder)
        return Stored(folder, config, open_data_folder(config.data, verify=False))
    manifest = read_export(folder)
    check_export(folder, manifest)
    config = _with_own_lists(read_run_config(folder), folder)
    data = DataFolder.open(folder / DATA, verify=False)  # just verified
    return Stored(folder, config, data, manifest.latest)


def read_export(folder: Path) -> ExportManifest:
    """The manifest of an export; raises `FindRecError` if it cannot be read or is of a newer version."""
    path = folder / EXPORT
    try:
        tree = read_json(path)
        if isinstance(tree, dict) and isinstance(tree.get("format"), int) and tree["format"] > FORMAT:
            raise FindRecError(
                f"{path} has format {tree['format']}, this version reads {FORMAT}: update FindRec"
            )
        return ExportManifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        if isinstance(error, FindRecError):
            raise
        problem = str(error)
    raise FindRecError(f"{path} is damaged ({problem}). Export the run again: findrec export RUN --force")


def check_export(folder: Path, manifest: ExportManifest) -> None:
    """Raise `FindRecError` if a file of an export is missing, differs from its manifest or is not listed.

    A file that is not listed is often of another export, e.g. weights of a later step.
    """
    for name, entry in manifest.files.items():
        if name == CARD:  # exports of earlier versions list it
            continue
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise FindRecError(f"{folder / EXPORT} names a file outside the export: {name!r}")
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != entry.bytes or sha256_file(file) != entry.sha256:
            problem = f"differs from what was exported (its sha256 is not that of {EXPORT})"
        else:
            continue
        raise FindRecError(
            f"{file} {problem}. Copy the export again, or make it again: findrec export {manifest.run} "
            "--force"
        )
    for name in ("config.yaml", f"{DATA}/manifest.json"):
        if name not in manifest.files:
            raise FindRecError(f"{folder / EXPORT} does not list {name}, so that file is not trusted")
    for file in (file for name in _LISTED for file in sorted((folder / name).rglob("*"))):
        path = file.relative_to(folder)
        # Names with a dot are never read: file managers leave such files.
        hidden = any(part.startswith(".") for part in path.parts)
        if file.is_file() and not hidden and path.as_posix() not in manifest.files:
            raise FindRecError(
                f"{file} is not in {EXPORT}: it may be of another export. Copy the export to an empty folder"
            )


def _with_own_lists(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the paths of allow-lists, relative to the export, made absolute."""
    rule = config.evaluation.candidates
    entries = [rule] if isinstance(rule, str) else rule
    found = [
        f"{FILE}{folder.resolve() / one.removeprefix(FILE)}" if one.startswith(FILE) else one
        for one in entries
    ]
    evaluation = config.evaluation.model_copy(update={"candidates": found})
    return config.model_copy(update={"evaluation": evaluation})
