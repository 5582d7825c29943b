"""A training step against the published shape and by length, and trainings against other libraries.

python evaluation/benchmarks/model.py [--json FILE] [--runs N] [--only published lengths peers]
    [--set dotted.key=value ...] [--setup-peers] [--peers PATH] [--data FOLDER] [--limit-s SECONDS]
"""

import argparse
from pathlib import Path

from findrec.bench.model import bench_lengths, bench_published
from findrec.bench.peers import Settings, bench_peers, default_peers, setup_peers
from findrec.bench.rows import add_json_argument, make_rate_table, publish
from findrec.config import DataConfig
from findrec.datasets.prepare import open_or_prepare

PARTS = ("published", "lengths", "peers")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_json_argument(parser)
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts (default all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration of ours")
    parser.add_argument("--setup-peers", action="store_true", help="make the peers' environment and stop")
    parser.add_argument("--peers", type=Path, default=default_peers(), help="the peers' environment")
    parser.add_argument("--data", help="data folder for the peers (default: ml-100k, made where missing)")
    parser.add_argument("--limit-s", type=float, default=300, help="training seconds a system gets at most")
    given = parser.parse_args()
    if given.setup_peers:
        raise SystemExit(setup_peers(given.peers, Path(__file__).with_name("peers.txt")))
    if "peers" in given.only:  # before anything is measured, as it may fail
        data = open_or_prepare(DataConfig(recipe="ml-100k", folder=given.data))
    rows = bench_published(given.runs, given.set) if "published" in given.only else []
    rows += bench_lengths(given.runs, given.set) if "lengths" in given.only else []
    if "peers" in given.only:
        worker, settings = Path(__file__).parent / "peers" / "worker.py", Settings(limit_s=given.limit_s)
        rows += bench_peers(given.peers, worker, data, settings, given.set)
    publish(rows, given.json, make_rate_table)
