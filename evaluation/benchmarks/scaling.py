"""Two workers against two runs of one; memory, traffic and saving by ZeRO stage; the model on paper.

python evaluation/benchmarks/scaling.py [--json FILE] [--only throughput memory paper]

What the figures mean: findrec/bench/scaling.py; the formulae: findrec/bench/scaling_model.py.
"""

import argparse
import json

from findrec.bench.rows import add_json_argument, write_json_lines
from findrec.bench.scaling import bench_memory, bench_throughput
from findrec.bench.scaling_model import paper_table

PARTS = ("throughput", "memory", "paper")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts (default all)")
    given = parser.parse_args()
    rows = bench_throughput() if "throughput" in given.only else []
    rows += bench_memory() if "memory" in given.only else []
    for row in rows:
        print(json.dumps(row))
    if "paper" in given.only:
        print(paper_table())
    if given.json:
        write_json_lines(rows, given.json)
