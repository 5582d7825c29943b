"""Runs RecBole's full-sort evaluation of given vectors in the peers' environment.

    .venv-peers/bin/python ranking.py FOLDER USERS THREADS

FOLDER has `users.npy`, `items.npy` (row 0 is padding) and `half.npy` (targets). For each line on standard
input, the first USERS users are scored against all items in one batch, as by a model's `full_sort_predict`,
and evaluated by RecBole's collector and metrics; the peak memory in bytes is printed.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from recbole.evaluator import Collector, Evaluator

vars(np)["float"] = float  # RecBole 1.2.1 uses this name, which numpy has removed
METRICS = {
    "metrics": ["Recall", "MRR", "NDCG"],
    "topk": [100],
    "metric_decimal_place": 4,
    "device": torch.device("cpu"),
    "eval_args": {"mode": "full"},
}


def peak():
    """The largest resident set since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(folder, num_users, threads):
    """Rank the users' targets once for each line on standard input."""
    torch.set_num_threads(int(threads))
    users, items, target = (
        torch.from_numpy(np.load(Path(folder) / f"{n}.npy")) for n in ("users", "items", "half")
    )
    users, target = users[: int(num_users)], target[: int(num_users)]
    row = torch.arange(len(users))
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        collector, evaluator = Collector(METRICS), Evaluator(METRICS)
        scores = users @ items.T
        scores[:, 0] = -np.inf
        collector.eval_batch_collect(scores, None, row, target)
        evaluator.evaluate(collector.get_data_struct())
        del scores
        print(peak() - before, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
