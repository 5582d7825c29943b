"""Time and memory of the hot kernels against what one would write without them.

python evaluation/benchmarks/ops.py [--json FILE] [--runs N]
"""

from findrec.bench.rows import parse_arguments, publish
from findrec.bench.scan import bench_scan

if __name__ == "__main__":
    publish(bench_scan(runs=parse_arguments().runs))
