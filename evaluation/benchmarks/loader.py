"""Users, events and bytes a second that one core reads from packed shards into the trainer's batches.

python evaluation/benchmarks/loader.py [--json FILE] [--runs N] [--only short ...]

Prints a JSON object a line (impl, profile, users_per_s, events_per_s, bytes_per_s, ...); what they mean:
findrec/bench/loader.py.
"""

import argparse

from findrec.bench.loader import PROFILES, bench_loader, print_figures
from findrec.bench.rows import add_json_argument, write_json_lines

if __name__ == "__main__":
    names = [profile.name for profile in PROFILES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each (default 5)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PROFILE")
    given = parser.parse_args()
    rows = bench_loader([profile for profile in PROFILES if profile.name in given.only], runs=given.runs)
    print_figures(rows)
    if given.json:
        write_json_lines(rows, given.json)
