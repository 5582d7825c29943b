"""Prints how well gates of FindRec tell true from wrong content: `evaluation/benchmarks/gates.py RUN ...`.

RUN is the folder of a trained FindRec. The features of all items are exchanged, and the log-odds of the gates
with true content are compared with those with wrong content: AUROC, the probability that true content gets
the larger one (.5: no knowledge), by the number of training events of the items. Items without training
events have no memory to compare with: their content is trusted.
"""

import sys
from pathlib import Path

import torch

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.prepare.pipeline import open_data_folder
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.scoring.load import load_scorer
from findrec.models.findrec.model import FindRec
from findrec.training.runs import main_job, read_run_config

GROUPS = ((1, 10**9), (1, 2), (3, 4), (5, 9), (10, 10**9))


def log_odds(scorer: ModelScorer, catalogue: Catalogue) -> dict[str, torch.Tensor]:
    """The log-odds `[V + 1]` of each modality's gates."""
    model = scorer.model
    assert isinstance(model, FindRec)
    assert model.items is not None
    features = catalogue.all_features(scorer.rows_Vd.device)
    with torch.no_grad():
        rows, latents = model.items.split(scorer.rows_Vd), model.items.encode(features)
        return dict(model.items(rows, latents, features)[1].logit_n)


def auroc(true: torch.Tensor, wrong: torch.Tensor) -> float:
    """P(true > wrong), ties counted half."""
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, true) + torch.searchsorted(ordered, true, right=True)
    return float(below.double().mean()) / (2 * max(1, len(wrong)))


def main(runs: list[str]) -> None:
    """Print a row for each run, modality and group of items."""
    print("| run | modality | training events | items | AUROC |\n|---|---|---|---|---|")
    for run in runs:
        config = read_run_config(Path(run))
        folder = open_data_folder(config.data, verify=False)
        scorer = load_scorer(main_job(config, Path(run)), folder)
        true, wrong = (
            log_odds(scorer, scorer.catalogue.altered(noise=share, seed=1)) for share in (0.0, 1.0)
        )
        count = torch.from_numpy(folder.train_count)
        for name in true:
            for least, most in GROUPS:
                use = (count >= least) & (count <= most)
                use[0] = False
                label = f"{least} or more" if most == GROUPS[0][1] else f"{least} to {most}"
                value = auroc(true[name][use], wrong[name][use])
                print(f"| {Path(run).name} | {name} | {label} | {int(use.sum())} | {value:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
