"""Measures time and memory of the kernels against straightforward implementations.

python evaluation/benchmarks/ops.py [--json FILE] [--runs N]
"""

from bench.attention import bench_attention
from bench.cross_entropy import bench_cross_entropy
from bench.repeat_bonus import bench_repeat_bonus
from bench.routing import bench_routing
from bench.rows import make_parser, publish
from bench.scan import bench_scan
from bench.sparse_attention import bench_sparse_attention
from bench.stein import bench_stein

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=11, metavar="N", help="timed runs of each (default 11)")
    given = parser.parse_args()
    rows = bench_scan(runs=given.runs)
    rows += bench_cross_entropy(runs=given.runs)
    rows += bench_stein(runs=given.runs)
    rows += bench_attention(runs=given.runs)
    rows += bench_sparse_attention(runs=given.runs)
    rows += bench_routing(runs=given.runs)
    rows += bench_repeat_bonus(runs=given.runs)
    publish(rows, given.json)
