"""Users a second that are ranked against a whole catalogue: ours, a matrix product, FAISS, torch, RecBole.

python evaluation/benchmarks/ranking.py [--json FILE] [--items N ...] [--file-items N]

Prints a JSON object a line (impl, targets, users, items, dim, dtype, users_per_s, peak_bytes, exact, ...);
what they mean: findrec/bench/ranking.py.
"""

import argparse
from pathlib import Path

import torch

from findrec.bench.ranking import SIZES, bench_file, bench_ranking, print_figures
from findrec.bench.rows import add_json_argument, write_json_lines

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--items", type=int, nargs="*", default=SIZES, metavar="N")
    parser.add_argument("--file-items", type=int, metavar="N", help="a row of so many, read from a file")
    parser.add_argument("--users", type=int, default=1024, metavar="N")
    parser.add_argument("--dim", type=int, default=128, metavar="N")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of all of them (default 2)")
    parser.add_argument("--peers", type=Path, help="RecBole's environment (default: .venv-peers)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = bench_ranking(
        given.items, num_users=given.users, width=given.dim, runs=given.runs, peers=given.peers
    )
    if given.file_items:
        rows.append(bench_file(given.file_items, num_users=given.users, width=given.dim))
    print_figures(rows)
    if given.json:
        write_json_lines(rows, given.json)
