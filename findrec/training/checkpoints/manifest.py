"""The manifest of a checkpoint: `manifest.json` with the format, and size and sha256 of every other file.

Only files that the manifest lists are read. A checkpoint whose manifest cannot be read is damaged; one of a
newer format is not, and must not be used, replaced or deleted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from findrec.errors import FindRecError
from findrec.files import read_json, sha256_file

FORMAT = 1  # the next are 2 and 4: numbers one bit apart could be damage of each other (`newer_version`)
MANIFEST = "manifest.json"
STATE = "state.json"
TOWER = "tower.safetensors"
MOMENTS = "tower_moments.safetensors"
FileEntries = dict[str, dict[str, Any]]  # bytes and sha256 by file name, as in the manifest

_KEYS = {"format", "files"}
_ENTRY_KEYS = {"bytes", "sha256"}
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a plain name: no folders, no hidden files
_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for any other name, such as that of a copy."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match is not None and folder_name(int(match[1])) == name else None


def outdated(names: Iterable[str], step: int, *, keep: int, protected: Collection[str]) -> list[str]:
    """The checkpoints to delete at `step` of a training: all but the newest `keep` and those in `protected`.

    Checkpoints of later steps are neither counted nor deleted: a training that resumed before them found them
    damaged, and to count them would delete valid ones.
    """
    steps = {name: number for name in names if (number := step_of(name)) is not None and number <= step}
    return [name for name in sorted(steps, key=lambda name: steps[name])[:-keep] if name not in protected]


def read_entries(path: Path) -> FileEntries:
    """The files of a checkpoint, from its manifest; `ValueError`, with the reason, if it is not valid."""
    try:
        tree = read_json(path / MANIFEST)
    except FileNotFoundError:
        raise ValueError("it has no manifest.json: saving it was cut short") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"its manifest.json cannot be read ({error})") from None
    files = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(files, dict):
        raise ValueError("its manifest.json has no mapping `files`")
    if type(tree.get("format")) is not int or tree["format"] != FORMAT:
        raise ValueError(f"its format is {tree.get('format')!r}, this version reads {FORMAT}")
    if unknown := sorted(tree.keys() - _KEYS):
        raise ValueError(f"its manifest.json has the unknown key {unknown[0]!r}")
    for name, entry in files.items():
        if _FILE.fullmatch(name) is None:
            raise ValueError(f"its manifest.json lists {name!r}, which is not the name of a file in it")
        if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
            raise ValueError(f"its manifest.json does not state just size and sha256 of {name}")
    if missing := sorted({STATE, TOWER, MOMENTS} - files.keys()):
        raise ValueError(f"its manifest.json does not list {missing[0]}")
    return files


def check_files(path: Path, entries: FileEntries) -> str | None:
    """The first difference between the files of a checkpoint and its manifest; None if there is none."""
    for name, entry in entries.items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
                return f"{name} differs from what was saved"
        except PermissionError:
            raise FindRecError(f"{file} cannot be read: its permissions do not allow it") from None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def newer_version(path: Path, known_state: set[str], *, certain: bool = True) -> str | None:
    """Why a checkpoint was written by a newer version, or None if it was not.

    Damage must not be taken for a newer version: keys of `state.json` outside `known_state` count only if
    the file is as saved, and with `certain` a format that one flipped bit makes of ours does not count.
    """
    try:
        tree = read_json(path / MANIFEST)
    except (OSError, ValueError):
        return None
    if not isinstance(tree, dict) or type(tree.get("format")) is not int or "files" not in tree:
        return None
    if tree["format"] > FORMAT:
        if certain and _one_bit_apart(str(tree["format"]), str(FORMAT)):
            return None
        return f"its format is {tree['format']}, this version reads {FORMAT}"
    if unknown := sorted(tree.keys() - _KEYS):
        return f"its manifest.json has the unknown key {unknown[0]!r}"
    files = tree["files"] if isinstance(tree["files"], dict) else {}
    for name, entry in files.items():
        if isinstance(entry, dict) and entry.keys() > _ENTRY_KEYS:
            return f"its manifest.json states {sorted(entry.keys() - _ENTRY_KEYS)[0]!r} of {name}"
    entry = files.get(STATE)
    try:
        if isinstance(entry, dict) and entry.get("sha256") == sha256_file(path / STATE):
            state = read_json(path / STATE)
            unknown = sorted(state.keys() - known_state) if isinstance(state, dict) else []
            return f"its {STATE} has the unknown key {unknown[0]!r}" if unknown else None
    except (OSError, ValueError):
        return None
    return None


def _one_bit_apart(a: str, b: str) -> bool:
    difference = [ord(x) ^ ord(y) for x, y in zip(a, b, strict=False) if x != y]
    return len(a) == len(b) and len(difference) == 1 and difference[0].bit_count() == 1
