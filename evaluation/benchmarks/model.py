"""A training step against the published shape and by length, and trainings against other libraries.

python evaluation/benchmarks/model.py [--json FILE] [--runs N] [--only published lengths peers]
    [--set dotted.key=value ...] [--setup-peers] [--peers PATH] [--data FOLDER] [--limit-s SECONDS]
"""

import argparse
from pathlib import Path

from findrec.bench.model import bench_lengths, bench_published, print_rates
from findrec.bench.peers import Settings, bench_peers, default_peers, setup_peers
from findrec.bench.rows import write_json
from findrec.paths import resolve

HERE = Path(__file__).resolve().parent
PARTS = ("published", "lengths", "peers")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts (default all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration of ours")
    parser.add_argument("--setup-peers", action="store_true", help="make the peers' environment and stop")
    parser.add_argument("--peers", type=Path, default=default_peers(), help="the peers' environment")
    parser.add_argument("--data", default="data/ml-100k", help="prepared data set for the peers")
    parser.add_argument("--limit-s", type=float, default=300, help="training seconds a system gets at most")
    given = parser.parse_args()
    if given.setup_peers:
        raise SystemExit(setup_peers(given.peers, HERE / "peers.txt"))
    rows = bench_published(given.runs, given.set) if "published" in given.only else []
    rows += bench_lengths(given.runs, given.set) if "lengths" in given.only else []
    if "peers" in given.only:
        settings, worker = Settings(limit_s=given.limit_s), HERE / "peers" / "worker.py"
        rows += bench_peers(given.peers, worker, resolve(given.data), settings, given.set)
    print_rates(rows)
    if given.json:
        write_json(rows, given.json)
