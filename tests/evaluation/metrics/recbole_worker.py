"""RecBole's own full-sort evaluation of given scores; runs in the peers' environment, without FindRec.

    .venv-peers/bin/python recbole_worker.py FOLDER

FOLDER holds `events.csv` (user, item, position: every event, a user's last one is the test target) and
`scores.npy` (float64, a row for each user, a column for each item from 1). RecBole reads the events, cuts
them and calls its trainer's `evaluate`; the model's one method is replaced by a look-up. Results go to
`result.json`: of a sequential model, which ranks met items, and of a general one, which leaves them out.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

KS = [1, 5, 10, 20, 50]


def evaluate(name, folder, scores, extra):
    settings = {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
        "metrics": ["Hit", "Recall", "NDCG", "MRR"],
        "topk": KS,
        "metric_decimal_place": 12,
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder / "saved"),
        "reproducibility": False,
    } | extra
    config = Config(model=name, dataset="peer", config_dict=settings)
    init_seed(0, False)
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    model = get_model(name)(config, train.dataset)
    user = [int(token) if token != "[PAD]" else 0 for token in dataset.field2id_token["user_id"]]
    item = [int(token) if token != "[PAD]" else 1 for token in dataset.field2id_token["item_id"]]
    known = torch.from_numpy(scores)[user][:, [i - 1 for i in item]]
    model.full_sort_predict = lambda cases: known[cases["user_id"]].clone()
    actual = Trainer(config, model).evaluate(test, load_best_model=False)
    return {"items": dataset.item_num - 1} | {key: float(value) for key, value in actual.items()}


def main():
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)  # RecBole leaves logs where it runs
    torch.set_num_threads(1)
    (folder / "peer").mkdir()
    names = ["user_id:token", "item_id:token", "timestamp:float"]
    pd.read_csv("events.csv").to_csv(folder / "peer" / "peer.inter", sep="\t", index=False, header=names)
    scores = np.load("scores.npy")
    sequential = {"loss_type": "CE", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 20}
    results = {
        "kept": evaluate("SASRec", folder, scores, sequential),
        "removed": evaluate("BPR", folder, scores, {}),
    }
    (folder / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
