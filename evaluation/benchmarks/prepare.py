"""Seconds and memory from a raw log to a data folder, and of planning an epoch: one JSON object a line.

python evaluation/benchmarks/prepare.py [--events N] [--profile NAME] [--items V] [--log FILE] [--json FILE]
    [--recipe KEYS] [--folder DIR] [--memory-gib G] [--threads T] [--plan-users U]
"""

import argparse
import json
from pathlib import Path

from findrec.bench.prepare import PrepareBench, bench_plan, bench_prepare
from findrec.bench.rows import add_json_argument, write_json_lines
from findrec.datasets.engine import Limits

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--events", type=int, nargs="*", default=[1_000_000], help="about so many each")
    parser.add_argument("--profile", default="complete-journey", help="what the made-up log resembles")
    parser.add_argument("--items", type=int, help="default: in the profile's proportion")
    parser.add_argument("--log", type=Path, help="a log of user, item, timestamp instead (.parquet, .csv)")
    parser.add_argument("--recipe", type=json.loads, default={}, help='such as {"k_core": {"users": 5}}')
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary one)")
    parser.add_argument("--memory-gib", type=float, help="for DuckDB")
    parser.add_argument("--threads", type=int, help="for DuckDB")
    parser.add_argument("--plan-users", type=int, default=10_000_000, help="0: no planning")
    given = parser.parse_args()
    limits, place = Limits.of(given.memory_gib, given.threads), given.folder
    rows = []
    for events in given.events:
        bench = PrepareBench(events, given.profile, given.items, given.log, given.recipe, place, limits)
        rows.append(bench_prepare(bench))
        print(json.dumps(rows[-1]), flush=True)
    if given.plan_users:
        rows.append(bench_plan(given.plan_users))
        print(json.dumps(rows[-1]), flush=True)
    if given.json:
        write_json_lines(rows, given.json)
