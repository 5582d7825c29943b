"""Measures `findrec serve` under load: latency percentiles and throughput at a number of concurrent clients.

python evaluation/benchmarks/serving.py [--json FILE] [--run RUN | --items N] [--clients N ...]

Prints one JSON object per line (request, items, clients, requests_per_s, p50_ms, p99_ms, refused, ...); see
evaluation/benchmarks/bench/serving.py.
"""

import tempfile
from pathlib import Path

from bench.rows import make_parser, publish_figures
from bench.serving import bench_serving, make_run

from findrec.paths import find_run

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--run", help="a run or export with users (default: random weights)")
    parser.add_argument("--items", type=int, default=100_000, metavar="N", help="of the random run")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default 10)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = find_run(given.run) if given.run else make_run(Path(scratch), num_items=given.items)
        publish_figures(bench_serving(run, Path(scratch), given.clients, given.seconds), given.json)
