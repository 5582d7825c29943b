"""Measures time and memory of preparing a data folder and planning an epoch: one JSON object per line.

python evaluation/benchmarks/prepare.py [--events N] [--profile NAME] [--items V] [--log FILE] [--json FILE]
    [--recipe KEYS] [--folder DIR] [--memory-gib G] [--threads T] [--plan-users U]
"""

import json
from pathlib import Path

from bench.prepare import PrepareBench, bench_plan, bench_prepare
from bench.rows import make_parser, write_json_lines

from findrec.datasets.sources.duckdb_engine import Limits

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--events", type=int, nargs="*", default=[1_000_000], help="approximate sizes")
    parser.add_argument("--profile", default="complete-journey", help="profile of the synthetic log")
    parser.add_argument("--items", type=int, help="default: in the profile's proportion")
    parser.add_argument("--log", type=Path, help="use this log of user, item, timestamp (.parquet, .csv)")
    parser.add_argument("--recipe", type=json.loads, default={}, help='such as {"k_core": {"users": 5}}')
    parser.add_argument("--folder", type=Path, help="working folder (default: the system's temporary one)")
    parser.add_argument("--memory-gib", type=float, help="for DuckDB")
    parser.add_argument("--threads", type=int, help="for DuckDB")
    parser.add_argument("--plan-users", type=int, default=10_000_000, help="0: no planning")
    given = parser.parse_args()
    limits = Limits.of(given.memory_gib, given.threads)
    rows = []
    for events in given.events:
        bench = PrepareBench(
            events, given.profile, given.items, given.log, given.recipe, given.folder, limits
        )
        rows.append(bench_prepare(bench))
        print(json.dumps(rows[-1]), flush=True)
    if given.plan_users:
        rows.append(bench_plan(given.plan_users))
        print(json.dumps(rows[-1]), flush=True)
    if given.json:
        write_json_lines(rows, given.json)
