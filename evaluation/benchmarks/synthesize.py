"""Events a second of making, writing and measuring made-up data, by profile.

python evaluation/benchmarks/synthesize.py [--json FILE] [--events N] [--items V] [--seed S]
"""

import argparse
import json
from pathlib import Path

from findrec.bench.rows import machine
from findrec.bench.synthesize import bench_synthesize, print_figures

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--events", type=int, default=1_000_000, help="about so many (default 1,000,000)")
    parser.add_argument("--items", type=int, help="default: in each profile's proportion")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    figures = bench_synthesize(given.events, given.items, given.seed)
    print_figures(figures)
    if given.json:
        tree = {"machine": machine(), "rows": figures}
        given.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
