"""Remote data folders give the same batches as local ones, whatever happens to the connection."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from window_loader import window_loader

from findrec.config import DataConfig, parse_config
from findrec.datasets import as_webdataset
from findrec.datasets.batches.plan import EpochPlan, Windows, cut_windows, plan_epoch
from findrec.datasets.folder import remote, transfer
from findrec.datasets.folder.configured import data_folder_of, open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.remote import is_remote
from findrec.datasets.folder.verify import check_folder
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.recipe import load_recipe
from findrec.errors import FindRecError


class Server:
    """Serves a folder over HTTP; `faults[name]` are the faults of the next requests for a file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client closed the connection
                    server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/data"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/data/")
        self.requests[name] += 1
        file = self.root / name
        waiting = self.faults.get(name) or self.faults.get("*") or [""]
        fault = waiting.pop(0) if len(waiting) > 1 or waiting[0] != "always 500" else "500"
        if fault.isdigit() or not file.is_file():
            request.send_error(int(fault or 404))
            return
        data = file.read_bytes()
        begin = 0
        wanted = request.headers.get("Range")
        if wanted and self.ranges:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        request.send_response(206 if begin else 200)
        body = data[begin:]
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault == "drop":
            body = body[: max(1, len(body) // 2)]
        for at in range(0, len(body), 4096):
            request.wfile.write(body[at : at + 4096])
            if fault == "slow":
                time.sleep(0.01)
            if fault == "silent":
                time.sleep(1.0)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def local(tmp_path: Path) -> DataFolder:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 50, n).tolist() for n in rng.integers(3, 60, 90)]
    features = {"text": rng.normal(size=(50, 4)).astype(np.float32)}
    folder = write_data_folder(
        tmp_path / "served" / "data",
        histories,
        num_items=50,
        users_per_member=4,
        shard_bytes=12_000,
        features=features,
    )
    assert len(folder.manifest.shards) >= 6
    return folder


@pytest.fixture
def server(local: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(transfer, "TIMEOUT_S", 0.3)
    served = Server(local.path)
    yield served
    served.close()


def planned(folder: DataFolder) -> tuple[Windows, EpochPlan]:
    windows = cut_windows(folder, 20, 0.5)
    return windows, plan_epoch(windows, seed=0, epoch=0, microbatches=2, tokens=200)


def same_epoch(one: DataFolder, two: DataFolder) -> None:
    """Both give the same batches through the loader, and the same features."""
    windows, plan = planned(one)
    read = []
    for folder in (one, two):
        with window_loader(folder, windows, plan, rank=0, world=1, shuffle_ties=True) as loader:
            read.append([batch for _, step in loader for _, batch in step])
    assert len(read[0]) == 2 * len(plan.steps)
    for ours, theirs in zip(*read, strict=True):
        for name in ("item", "gap", "target", "ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    ids = torch.arange(51)
    assert torch.equal(one.feature("text").rows(ids).values, two.feature("text").rows(ids).values)


def cached(home: Path) -> list[Path]:
    walk = os.walk(home / "data" / ".remote")  # ignores files that disappear
    return sorted(Path(folder) / name for folder, _, names in walk for name in names if name[-4:] == ".tar")


def test_a_remote_folder_gives_the_same_batches(local: DataFolder, server: Server, tmp_path: Path) -> None:
    folder = DataFolder.open(server.url + "/")
    assert folder.location == server.url
    assert not cached(tmp_path / "home")  # shards are fetched when needed
    same_epoch(local, folder)
    assert max(server.requests.values()) == 1  # every file once
    again = DataFolder.open(folder.location, verify=False)
    same_epoch(local, again)
    assert {name for name, times in server.requests.items() if times > 1} == {"manifest.json"}
    assert check_folder(server.url).num_users == local.num_users


def test_an_address_as_a_webdataset_pipeline(local: DataFolder, server: Server) -> None:
    samples = list(as_webdataset(server.url))
    assert len(samples) == local.num_users
    for user, sample in enumerate(samples):
        assert np.array_equal(sample["item"], local.histories([user]).item)


@pytest.mark.parametrize("ranges", [True, False])
def test_connection_faults_are_tolerated(
    local: DataFolder, server: Server, tmp_path: Path, ranges: bool
) -> None:
    server.ranges = ranges
    names = [shard.name for shard in local.manifest.shards]
    server.faults = {
        "manifest.json": ["drop", "503"],
        "users.parquet": ["wrong", "drop", "drop"],
        "features/text.safetensors": ["500", "silent"],
        names[0]: ["drop", "drop", "drop"],
        names[1]: ["wrong", "wrong"],
        names[2]: ["slow"],
        names[3]: ["429", "drop", "wrong"],
        names[4]: ["silent"],
    }
    same_epoch(local, DataFolder.open(server.url))
    assert all(not left for left in server.faults.values())
    assert not list((tmp_path / "home").rglob("*.part-*"))


@pytest.mark.parametrize(
    ("fault", "message", "tries"),
    [("wrong", "sha256 is not the one", 3), ("drop", "", 3), ("500", "HTTP 500", 3), ("403", "HTTP 403", 1)],
)
def test_permanent_faults_are_reported(
    local: DataFolder,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
    tries: int,
) -> None:
    monkeypatch.setattr(remote, "TRIES", 3)
    server.ranges = False
    name = local.manifest.shards[2].name
    folder = DataFolder.open(server.url)
    server.faults[name] = [fault] * 50
    with pytest.raises(
        FindRecError, match=rf"cannot fetch {server.url}/{name}: .*{message}.*tried {tries} time.*copy"
    ):
        folder.histories(np.arange(folder.num_users))
    assert server.requests[name] == tries
    windows, plan = planned(folder)
    loader = window_loader(folder, windows, plan, rank=0, world=1)
    with pytest.raises(FindRecError, match="cannot fetch"):
        list(loader)
    assert not [p for p in cached(tmp_path / "home") if p.name == Path(name).name]


def test_the_cache_size_is_bounded(local: DataFolder, server: Server, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in local.manifest.shards]
    bound = 2 * max(sizes) + 100
    most = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            total = 0
            for path in cached(tmp_path / "home"):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue
            most = max(most, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        folder = DataFolder.open(server.url, cache_bytes=bound)
        every = folder.histories(np.arange(folder.num_users))
        same_epoch(local, folder)
    finally:
        stop.set()
        watcher.join()
    assert np.array_equal(every.item, local.histories(np.arange(local.num_users)).item)
    assert sum(sizes) > 2 * bound
    assert max(sizes) <= most <= bound
    assert sum(server.requests[shard.name] for shard in local.manifest.shards) > len(sizes)


def test_a_cache_smaller_than_a_shard_holds_one(local: DataFolder, server: Server, tmp_path: Path) -> None:
    folder = DataFolder.open(server.url, cache_bytes=0)
    read = folder.histories(np.arange(folder.num_users))
    assert np.array_equal(read.item, local.histories(np.arange(local.num_users)).item)
    assert len(cached(tmp_path / "home")) == 1


def test_shards_are_prefetched_in_order(local: DataFolder, server: Server, tmp_path: Path) -> None:
    folder = DataFolder.open(server.url)
    last_first = np.arange(folder.num_users)[::-1]
    server.faults["*"] = ["slow"] * 100
    folder.read_ahead(last_first)
    deadline = time.monotonic() + 20
    while len(cached(tmp_path / "home")) < len(local.manifest.shards) and time.monotonic() < deadline:
        time.sleep(0.01)
    order = [name for name in server.requests if name.startswith("shards/")]
    assert set(order) == {shard.name for shard in local.manifest.shards}
    early = {shard.name for shard in local.manifest.shards[-remote.PREFETCH_THREADS :]}
    assert set(order[: remote.PREFETCH_THREADS]) == early
    before = server.requests.copy()
    same_epoch(local, folder)
    assert server.requests == before


def test_stale_partial_files_are_removed(server: Server, tmp_path: Path) -> None:
    folder = DataFolder.open(server.url)
    left, young = (folder.path / "shards" / f".events-00000.tar.part-{n}-0" for n in (1, 2))
    left.parent.mkdir(exist_ok=True)
    for file in (left, young):
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    folder.histories([0])
    assert not left.exists()
    assert young.exists()


def test_a_damaged_cache_is_fetched_again(local: DataFolder, server: Server, tmp_path: Path) -> None:
    same_epoch(local, DataFolder.open(server.url))
    for file in [*cached(tmp_path / "home"), *(tmp_path / "home").rglob("users.parquet")]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    same_epoch(local, DataFolder.open(server.url))


def test_a_replaced_remote_folder_is_fetched_again(local: DataFolder, server: Server) -> None:
    same_epoch(local, DataFolder.open(server.url))
    made = write_data_folder(
        local.path, [[3, 2, 1, 4]] * 40, num_items=50, features={"text": np.ones((50, 4))}, shard_bytes=1000
    )
    same_epoch(made, DataFolder.open(server.url))


def test_bad_manifests_name_the_url(local: DataFolder, server: Server) -> None:
    manifest = local.path / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["schema_version"] = 99
    manifest.write_text(json.dumps(tree))
    with pytest.raises(FindRecError, match=f"{server.url}/manifest.json has schema version 99"):
        DataFolder.open(server.url)
    manifest.unlink()
    with pytest.raises(FindRecError, match=f"cannot fetch {server.url}/manifest.json: HTTP 404"):
        DataFolder.open(server.url)


def test_object_stores(local: DataFolder, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store(MemoryFileSystem):
        protocol = "s3"
        store: dict[str, object] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("s3://").lstrip("/")

    monkeypatch.setitem(_registry, "s3", Store)
    store = fsspec.filesystem("s3")
    for file in local.path.rglob("*"):
        if file.is_file():
            with store.open(f"s3://bucket/data/{file.relative_to(local.path)}", "wb") as out:
                out.write(file.read_bytes())
    same_epoch(local, DataFolder.open("s3://bucket/data"))
    with pytest.raises(FindRecError, match=r"s3://bucket/nothing/manifest\.json: no such object"):
        DataFolder.open("s3://bucket/nothing")


def test_urls_and_paths() -> None:
    for place in ("http://h/d", "https://h/d?key=1", "s3://b/d", "gs://b/d"):
        assert is_remote(place)
        assert data_folder_of(DataConfig(folder=place)) == place
    for path in ("data/x", "/a/b", "~/d", Path("/a/b")):
        assert not is_remote(path)
    for place in ("pipe:cat x", "file:///etc", "ftp://h/d", "http:d"):
        with pytest.raises(FindRecError, match="never run"):
            is_remote(place)
    with pytest.raises(FindRecError, match="local path"):
        prepare(load_recipe("ml-100k"), "http://h/d")


def test_cache_size_settings(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({}, [f"data.folder={server.url}", "data.cache_bytes=12345"])
    opened = open_data_folder(config.data)
    assert opened._remote is not None
    assert opened._remote.cache_bytes == 12345
    monkeypatch.setenv("FINDREC_CACHE_BYTES", "777")
    again = DataFolder.open(server.url)
    assert again._remote is not None
    assert again._remote.cache_bytes == 777
    monkeypatch.setenv("FINDREC_CACHE_BYTES", "7 GB")
    with pytest.raises(FindRecError, match="whole number of bytes"):
        DataFolder.open(server.url)
