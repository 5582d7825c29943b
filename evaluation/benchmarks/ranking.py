"""Measures full-catalogue ranking in users per second: FindRec, a matrix product, FAISS, torch, RecBole.

python evaluation/benchmarks/ranking.py [--json FILE] [--items N ...] [--file-items N]

Prints one JSON object per line (impl, targets, users, items, users_per_s, peak_bytes, exact, ...); see
evaluation/benchmarks/bench/ranking.py.
"""

from pathlib import Path

import torch
from bench.ranking import SIZES, bench_file, bench_ranking
from bench.rows import make_parser, publish_figures

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--items", type=int, nargs="*", default=SIZES, metavar="N")
    parser.add_argument(
        "--file-items", type=int, metavar="N", help="also rank a catalogue of this size from a file"
    )
    parser.add_argument("--users", type=int, default=1024, metavar="N")
    parser.add_argument("--dim", type=int, default=128, metavar="N")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each (default 2)")
    parser.add_argument("--peers", type=Path, help="RecBole's environment (default: .venv-peers)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = bench_ranking(
        given.items, num_users=given.users, width=given.dim, runs=given.runs, peers=given.peers
    )
    if given.file_items:
        rows.append(bench_file(given.file_items, num_users=given.users, width=given.dim))
    publish_figures(rows, given.json)
