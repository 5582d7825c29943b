"""Time and memory of the hot kernels against what one would write without them.

python evaluation/benchmarks/ops.py [--json FILE] [--runs N]
"""

from findrec.bench.cross_entropy import bench_cross_entropy
from findrec.bench.rows import parse_arguments, publish
from findrec.bench.scan import bench_scan

if __name__ == "__main__":
    runs = parse_arguments().runs
    publish(bench_scan(runs=runs) + bench_cross_entropy(runs=runs))
