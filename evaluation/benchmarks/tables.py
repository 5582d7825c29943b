"""Measures step time and memory of workers with a sharded item table against a single worker.

python evaluation/benchmarks/tables.py [--json FILE] [--only exact sampled] [--workers W] [--steps N]
    [--items V]

Prints one JSON object per line (placement, workers, step_s, peak_bytes, peak_of_one, ...); see
evaluation/benchmarks/bench/tables.py. The sampled case, 20 million items, needs 16 GB.
"""

from dataclasses import replace

from bench.rows import make_parser, publish_figures
from bench.tables import CASES, bench_tables

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="LOSS")
    parser.add_argument("--workers", type=int, default=2, metavar="W")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of each (default 5)")
    parser.add_argument("--items", type=int, metavar="V", help="size of the catalogue")
    given = parser.parse_args()
    cases = [replace(CASES[name], items=given.items or CASES[name].items) for name in given.only]
    publish_figures(bench_tables(cases, workers=given.workers, steps=given.steps), given.json)
