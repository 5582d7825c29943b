"""Time and memory of the hot kernels against what one would write without them.

python evaluation/benchmarks/ops.py [--json FILE] [--runs N]
"""

import argparse

from findrec.bench.attention import bench_attention
from findrec.bench.cross_entropy import bench_cross_entropy
from findrec.bench.own_items import bench_own_items
from findrec.bench.routing import bench_routing
from findrec.bench.rows import add_json_argument, publish
from findrec.bench.scan import bench_scan
from findrec.bench.stein import bench_stein

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--runs", type=int, default=11, metavar="N", help="timed runs of each (default 11)")
    given = parser.parse_args()
    rows = bench_scan(runs=given.runs)
    rows += bench_cross_entropy(runs=given.runs)
    rows += bench_stein(runs=given.runs)
    rows += bench_attention(runs=given.runs)
    rows += bench_routing(runs=given.runs)
    rows += bench_own_items(runs=given.runs)
    publish(rows, given.json)
