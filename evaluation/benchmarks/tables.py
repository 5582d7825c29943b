"""Step time and memory of workers with a sharded item table against one worker that holds all rows.

python evaluation/benchmarks/tables.py [--json FILE] [--only exact sampled] [--workers W] [--steps N]
    [--items V]

Prints a JSON object a line (placement, workers, step_s, peak_bytes, peak_of_one, ...); what they mean:
findrec/bench/tables.py. The sampled case, 20 million items, takes 16 GB.
"""

import argparse
from dataclasses import replace

from findrec.bench.rows import add_json_argument, write_json_lines
from findrec.bench.tables import CASES, bench_tables, print_figures

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="LOSS")
    parser.add_argument("--workers", type=int, default=2, metavar="W")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of each (default 5)")
    parser.add_argument("--items", type=int, metavar="V", help="another size of the catalogue")
    given = parser.parse_args()
    cases = [replace(case, items=given.items or case.items) for case in map(CASES.__getitem__, given.only)]
    rows = bench_tables(cases, workers=given.workers, steps=given.steps)
    print_figures(rows)
    if given.json:
        write_json_lines(rows, given.json)
