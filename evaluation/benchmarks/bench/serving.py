"""Load on `findrec serve`, which runs in a process of its own, from clients of this process.

Each client sends one request after the other over one connection, without a pause (a closed loop), so latency
times throughput is the number of clients. Kinds of requests:

* `user`: the first 10 items for a random user of the data, without the items of the history;
* `visitor`: the same for a given history of 20 random items;
* `append`: one event of a random user, which is on disk when the response arrives.

The clients share the machine's cores with the service: figures are lower bounds of what the service does. The
default run has random weights, as the time of an answer does not depend on them; its users have 20 to 100
events.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from findrec.config import dump_config, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.serving.stored import open_stored
from findrec.tables.base import ITEMS
from findrec.training.build import build_tower_model, table_shapes
from findrec.training.checkpoints.checkpoint import TrainState, checkpoint_folder, save_checkpoint

Figures = dict[str, Any]
K = 10  # length of the lists
USERS = 1000
_WARM_S = 1.0  # of requests before each measurement


def make_run(scratch: Path, *, num_items: int, dim: int = 64, num_users: int = USERS) -> Path:
    """A run of the default model with random weights on random histories; returns its folder."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(20, 101, size=num_users)
    histories = [draw.integers(1, num_items + 1, size=length) for length in lengths]
    data = write_data_folder(scratch / "data", histories, num_items=num_items)
    config = parse_config(
        {
            "name": f"random-{num_items}",
            "data": {"folder": str(data.path)},
            "model": {"dim": dim},
            "evaluation": {"baselines": [], "mask_seen": True},
        }
    )
    folder = scratch / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    torch.manual_seed(0)
    rows = torch.randn(num_items + 1, table_shapes(config, data)[ITEMS].dim)
    rows[0] = 0
    save_checkpoint(
        checkpoint_folder(folder),
        TrainState(epoch=1, step=1, plan="", best=0.0, best_step=1, stale=0),
        tower=build_tower_model(config, data).state_dict(),
        optimizer_state={},
        tables={ITEMS: {"weight": rows}},
    )
    return folder


def bench_serving(run: Path, scratch: Path, clients: Sequence[int], seconds: float) -> list[Figures]:
    """Measure each kind of request with each number of clients.

    Raises `FindRecError` for a run without users.
    """
    data = open_stored(run).data
    if not data.num_users:
        raise FindRecError(f"{run} has no users: export it with --users, or name the run itself")
    rows = []
    with service(run, scratch / "events.sqlite") as address:
        for name, request in requests(data).items():
            for number in clients:
                figures = asyncio.run(_load(address, request, number, seconds))
                rows.append({"request": name, "items": data.num_items, "clients": number, "k": K} | figures)
    return rows


def requests(data: DataFolder) -> dict[str, Callable[[], tuple[str, Any]]]:
    """Functions that draw a request, path and body, by kind."""
    draw = random.Random(0)
    users, items = data.user_ids, [str(raw) for raw in data.items.column("raw").to_pylist()]
    common = {"k": K, "exclude_seen": True}

    def visitor() -> tuple[str, Any]:
        return "/recommend", {"histories": [{"items": draw.choices(items, k=20)}], **common}

    return {
        "user": lambda: ("/recommend", {"users": [draw.choice(users)], **common}),
        "visitor": visitor,
        "append": lambda: ("/append", {"user": draw.choice(users), "events": [{"item": draw.choice(items)}]}),
    }


@contextmanager
def service(run: Path, state: Path) -> Iterator[str]:
    """Run `findrec serve` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "findrec.cli", "serve", str(run), "--port", "0", "--state", str(state)]
    process = subprocess.Popen(
        [*command, "--no-page"], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stdout is not None, "it is a pipe"
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise FindRecError("findrec serve did not start: its message is above")
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


async def _load(
    address: str, request: Callable[[], tuple[str, Any]], clients: int, seconds: float
) -> Figures:
    began = time.perf_counter() + _WARM_S
    latencies: list[float] = []
    refused = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal refused
        while (sent := time.perf_counter()) < began + seconds:
            path, body = request()
            async with session.post(address + path, json=body) as response:
                await response.read()
                if response.status == 429:
                    refused += sent >= began
                    continue
                response.raise_for_status()
            if sent >= began:
                latencies.append(time.perf_counter() - sent)

    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    passed = time.perf_counter() - began
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {
        "requests_per_s": round(len(latencies) / passed, 1),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "refused": refused,
    }
