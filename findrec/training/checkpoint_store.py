"""Checkpoints kept a second time, at an address: an object store, or any file system fsspec knows.

Training saves to its own disk and goes on; a thread copies what was committed there, the manifest last, so a
checkpoint there counts under the same rule as on disk and nothing needs to be renamed. A machine that
starts without checkpoints, or with older ones, fetches the newest that verifies. An address that does not
answer costs a warning, never a step.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

import fsspec.core
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.paths import resolve
from findrec.progress import say
from findrec.training.checkpoint import MANIFEST, latest_checkpoint, read_state, verify_checkpoint

_COPIES = ".sending"  # links to what is being sent: the disk's own retention may delete it meanwhile
_LEFT_S = 600.0  # how long the end of a training waits for the last checkpoint to be sent


class CheckpointStore:
    """The checkpoints of one training below an address."""

    def __init__(self, address: str) -> None:
        """Raises `FindRecError` for an address of no known kind, or whose driver is not installed."""
        self.address = address.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise FindRecError(
                f"training.checkpoint_store={address!r} cannot be used: {error}. s3:// needs the package "
                "s3fs, gs:// needs gcsfs."
            ) from None

    @staticmethod
    def of(config: RunConfig, checkpoints: Path) -> CheckpointStore | None:
        """That of the training whose checkpoints lie below `checkpoints`; None unless one is configured."""
        place = config.training.checkpoint_store
        if place is None:
            return None
        runs, training = resolve(config.runs), checkpoints.parent
        inside = training.relative_to(runs).as_posix() if training.is_relative_to(runs) else config.name
        return CheckpointStore(f"{place.rstrip('/')}/{inside}")

    def names(self) -> list[str]:
        """Committed checkpoints, oldest first."""
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._root)
        except FileNotFoundError:
            return []
        parts = [str(path).rsplit("/", 2)[-2:] for path in found]
        return sorted(folder for folder, name in parts if name == MANIFEST and folder.startswith("step-"))

    def push(self, path: Path) -> None:
        """Copy a committed checkpoint from disk; what was at its place before counts no longer."""
        target = f"{self._root}/{path.name}"
        self._drop(path.name)
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name != MANIFEST)
        if isinstance(self._files, LocalFileSystem):  # a mounted disk; an object store has no folders
            self._files.makedirs(target, exist_ok=True)
        for file in [*files, path / MANIFEST]:
            self._files.put_file(str(file), f"{target}/{file.name}")

    def fetch(self, name: str, root: Path) -> Path | None:
        """Copy a checkpoint to disk below `root`; None, said aloud, when it does not verify."""
        part, path = root / f".fetching-{name}", root / name
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        manifest = self._files.cat_file(f"{self._root}/{name}/{MANIFEST}")
        (part / MANIFEST).write_bytes(manifest)
        try:
            wanted = list(json.loads(manifest)["files"])
        except (ValueError, KeyError, TypeError):
            wanted = []
        problem = None
        for file in wanted:
            try:
                self._files.get_file(f"{self._root}/{name}/{file}", str(part / Path(file).name))
            except FileNotFoundError:
                problem = f"{file} is missing"
        problem = problem or verify_checkpoint(part)
        if problem is not None:
            shutil.rmtree(part)
            say(f"WARNING: checkpoint {self.address}/{name} is not used: {problem}")
            return None
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        return path

    def fetch_newest(self, root: Path) -> None:
        """Bring the newest checkpoint that verifies to disk, unless the disk has one as new."""
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):  # workers of one machine share its disk
            own = latest_checkpoint(root)
            for name in reversed(self.names()):
                if own is not None and name <= own.name:
                    return
                say(f"fetching checkpoint {self.address}/{name}")
                if self.fetch(name, root) is not None:
                    return

    def fetch_best(self, root: Path) -> None:
        """Bring the checkpoint of the best validation to disk, and the newest, which names it."""
        self.fetch_newest(root)
        newest = latest_checkpoint(root)
        if newest is not None:
            self.fetch_missing(f"step-{read_state(newest).best_step:08d}", root)

    def fetch_missing(self, name: str, root: Path) -> None:
        """Bring a checkpoint to disk that is not there, if it is here."""
        with FileLock(root / ".fetching.lock"):
            if not (root / name).is_dir() and name in self.names():
                self.fetch(name, root)

    def prune(self, *, keep: int, spare: Collection[str]) -> None:
        """Delete all but the newest `keep` checkpoints and those named in `spare`."""
        for name in self.names()[:-keep]:
            if name not in spare:
                self._drop(name)

    def _drop(self, name: str) -> None:
        path = f"{self._root}/{name}"
        if self._files.exists(f"{path}/{MANIFEST}"):
            self._files.rm_file(f"{path}/{MANIFEST}")  # first, so that a folder half deleted is not trusted
        if self._files.exists(path):
            self._files.rm(path, recursive=True)


class Sender:
    """Sends committed checkpoints from a thread of its own; when it is slower than they come, the newest."""

    def __init__(self, store: CheckpointStore, *, keep: int) -> None:
        self._store, self._keep = store, keep
        self._turn = threading.Condition()
        self._next: tuple[Path, Collection[str]] | None = None
        self._closed = False
        self.problem = ""  # of the newest attempt
        self._thread = threading.Thread(target=self._work, name="checkpoint-sender", daemon=True)
        self._thread.start()

    def send(self, path: Path, spare: Collection[str]) -> None:
        """Have a committed checkpoint sent, and older ones deleted but for `spare`; returns at once."""
        copy = path.parent / _COPIES / f"{time.monotonic_ns()}" / path.name
        copy.mkdir(parents=True)
        for file in path.iterdir():
            _link(file, copy / file.name)
        with self._turn:
            skipped, self._next = self._next, (copy, spare)
            self._turn.notify_all()
        if skipped is not None:
            shutil.rmtree(skipped[0].parent, ignore_errors=True)

    def close(self) -> None:
        """Wait for what is left to be sent."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._thread.join(_LEFT_S)

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._next or self._closed)
                if self._next is None:
                    return
                (copy, spare), self._next = self._next, None
            try:
                self._store.push(copy)
                self._store.prune(keep=self._keep, spare=spare)
                self.problem = ""
            except Exception as error:  # whatever the driver of the address may raise
                self.problem = f"{type(error).__name__}: {error}"
                say(
                    f"WARNING: checkpoint {copy.name} is on disk but could not be sent to "
                    f"{self._store.address}: {self.problem.splitlines()[0][:300]}. Training goes on."
                )
            shutil.rmtree(copy.parent, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
