"""Prints mean and spread over seeds: `python evaluation/benchmarks/seeds.py runs/demo runs/demo-s1 ...`.

The arguments are finished runs of one configuration with different `training.seed`; prints one row per model.
"""

import json
import statistics
import sys
from pathlib import Path

METRICS = ("ndcg@10", "recall@10", "recall@50", "mrr")


def main(runs: list[str]) -> None:
    """Print mean and standard deviation over `runs`, which differ in their seed only."""
    tables = [json.loads((Path(run) / "metrics.json").read_text())["test"] for run in runs]
    print(f"| model | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for row in tables[0]:
        same = [next(r for r in table if r["model"] == row["model"]) for table in tables]
        cells = []
        for metric in METRICS:
            values = [r[metric] for r in same]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}" if spread else f"{values[0]:.4f}")
        print(f"| {row['model']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
