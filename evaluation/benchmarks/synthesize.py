"""Measures events per second of drawing, writing and summarising synthetic data, by profile.

python evaluation/benchmarks/synthesize.py [--json FILE] [--events N] [--items V] [--seed S]
"""

from bench.rows import make_parser, write_json_lines
from bench.synthesize import bench_synthesize, print_figures

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="approximate (default 1,000,000)")
    parser.add_argument("--items", type=int, help="default: in each profile's proportion")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    figures = bench_synthesize(given.events, given.items, given.seed)
    print_figures(figures)
    if given.json:
        write_json_lines(figures, given.json)
