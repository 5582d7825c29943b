"""Measures a training step against the published model, by length and against SASRec, and other libraries.

python evaluation/benchmarks/model.py [--json FILE] [--runs N] [--only published lengths cost peers]
    [--set dotted.key=value ...] [--setup-peers] [--peers PATH] [--data FOLDER] [--limit-s SECONDS]
"""

from pathlib import Path

from bench.model import bench_cost, bench_lengths, bench_published
from bench.peers import Settings, bench_peers, default_peers, setup_peers
from bench.rows import make_parser, make_rate_table, publish

from findrec.config import DataConfig
from findrec.datasets.prepare.pipeline import open_or_prepare

PARTS = ("published", "lengths", "cost", "peers")

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts (default all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="FindRec's configuration")
    parser.add_argument("--setup-peers", action="store_true", help="create the peers' environment and exit")
    parser.add_argument("--peers", type=Path, default=default_peers(), help="the peers' environment")
    parser.add_argument("--data", help="data folder for the peers (default: ml-100k, prepared if missing)")
    parser.add_argument("--limit-s", type=float, default=300, help="maximum training seconds of a system")
    given = parser.parse_args()
    if given.setup_peers:
        raise SystemExit(setup_peers(given.peers, Path(__file__).with_name("peers.txt")))
    if "peers" in given.only:  # first, as it may fail
        data = open_or_prepare(DataConfig(recipe="ml-100k", folder=given.data))
    rows = bench_published(given.runs, given.set) if "published" in given.only else []
    rows += bench_lengths(given.runs, given.set) if "lengths" in given.only else []
    rows += bench_cost(given.runs, given.set) if "cost" in given.only else []
    if "peers" in given.only:
        worker, settings = Path(__file__).parent / "peers" / "worker.py", Settings(limit_s=given.limit_s)
        rows += bench_peers(given.peers, worker, data, settings, given.set)
    publish(rows, given.json, make_rate_table)
