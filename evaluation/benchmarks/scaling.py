"""Measures two workers against two single-worker runs, and memory, traffic and saving by ZeRO stage.

python evaluation/benchmarks/scaling.py [--json FILE] [--only throughput memory paper]

See evaluation/benchmarks/bench/scaling.py, and evaluation/benchmarks/bench/scaling_model.py for the formulas.
"""

from bench.rows import make_parser, publish_figures
from bench.scaling import bench_memory, bench_throughput
from bench.scaling_model import paper_table

PARTS = ("throughput", "memory", "paper")

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts (default all)")
    given = parser.parse_args()
    rows = bench_throughput() if "throughput" in given.only else []
    rows += bench_memory() if "memory" in given.only else []
    publish_figures(rows, given.json)
    if "paper" in given.only:
        print(paper_table())
