"""Events a second of making, writing and measuring made-up data, by profile.

python evaluation/benchmarks/synthesize.py [--json FILE] [--events N] [--items V] [--seed S]
"""

import argparse

from findrec.bench.rows import add_json_argument, write_json_lines
from findrec.bench.synthesize import bench_synthesize, print_figures

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--events", type=int, default=1_000_000, help="about so many (default 1,000,000)")
    parser.add_argument("--items", type=int, help="default: in each profile's proportion")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    figures = bench_synthesize(given.events, given.items, given.seed)
    print_figures(figures)
    if given.json:
        write_json_lines(figures, given.json)
