"""Measures users, events and bytes per second that one core reads from packed shards into training batches.

python evaluation/benchmarks/loader.py [--json FILE] [--runs N] [--only short ...]

Prints one JSON object per line (impl, profile, users_per_s, events_per_s, bytes_per_s, ...); see
evaluation/benchmarks/bench/loader.py.
"""

from bench.loader import PROFILES, bench_loader
from bench.rows import make_parser, publish_figures

if __name__ == "__main__":
    names = [profile.name for profile in PROFILES]
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each (default 5)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PROFILE")
    given = parser.parse_args()
    rows = bench_loader([profile for profile in PROFILES if profile.name in given.only], runs=given.runs)
    publish_figures(rows, given.json)
