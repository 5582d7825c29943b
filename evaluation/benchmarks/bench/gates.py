"""How well gates of a trained FindRec tell true from wrong content.

The features of all items are exchanged, and the log-odds of the gates with true content are compared with
those with wrong content: AUROC, the probability that true content gets the larger one (.5: no knowledge), by
the number of training events of the items. Items without training events have no memory to compare with:
their content is trusted.
"""

from __future__ import annotations

from pathlib import Path

import torch

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.configured import open_data_folder
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.scoring.load import load_scorer
from findrec.models.findrec.model import FindRec
from findrec.training.runs import main_job, read_run_config

MANY = 10**9
GROUPS = ((1, MANY), (1, 2), (3, 4), (5, 9), (10, MANY))  # training events of items


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


def print_auroc(run: Path) -> None:
    """Print a row of a Markdown table for each modality and group of items of a run."""
    config = read_run_config(run)
    folder = open_data_folder(config.data, verify=False)
    scorer = load_scorer(main_job(config, run), folder)
    true, wrong = (log_odds(scorer, scorer.catalogue.altered(noise=share, seed=1)) for share in (0.0, 1.0))
    count_V = torch.from_numpy(folder.train_count)
    for name in true:
        for least, most in GROUPS:
            use_V = (count_V >= least) & (count_V <= most)
            use_V[0] = False
            label = f"{least} or more" if most == MANY else f"{least} to {most}"
            value = auroc(true[name][use_V], wrong[name][use_V])
            print(f"| {run.name} | {name} | {label} | {int(use_V.sum())} | {value:.3f} |")
