"""Time and memory of the hot kernels against what one would write without them.

python evaluation/benchmarks/ops.py [--json FILE] [--runs N]
"""

from findrec.bench.attention import bench_attention
from findrec.bench.cross_entropy import bench_cross_entropy
from findrec.bench.own_items import bench_own_items
from findrec.bench.routing import bench_routing
from findrec.bench.rows import parse_arguments, publish
from findrec.bench.scan import bench_scan
from findrec.bench.stein import bench_stein

if __name__ == "__main__":
    runs = parse_arguments().runs
    rows = bench_scan(runs=runs)
    rows += bench_cross_entropy(runs=runs)
    rows += bench_stein(runs=runs)
    rows += bench_attention(runs=runs)
    rows += bench_routing(runs=runs)
    rows += bench_own_items(runs=runs)
    publish(rows)
