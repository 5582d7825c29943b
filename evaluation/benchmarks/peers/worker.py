"""Trains a peer's SASRec in the peers' environment and writes the measurements as JSON.

    .venv-peers/bin/python worker.py {rectools,recbole} FOLDER RESULT --settings JSON

FOLDER has `events.csv` (user, item, position; a user's last two events are the validation and the test
target). Nothing of FindRec is imported. Only training is timed, not the evaluation after each epoch:
full-catalogue ranks of the validation targets, ties at their expected rank.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch


class Stopwatch:
    """Seconds and targets of each epoch, and the validation NDCG@10 after it."""

    def __init__(self, level, limit_s):
        self.level, self.limit_s = level, limit_s
        self.epochs = []
        self._start, self._targets = 0.0, 0

    def begin(self):
        """Start the clock of an epoch."""
        self._start, self._targets = time.perf_counter(), 0

    def count(self, targets):
        """Add the targets of one batch to the running epoch."""
        self._targets += targets

    def seconds(self):
        """Training time so far, including the running epoch."""
        return sum(e["seconds"] for e in self.epochs) + time.perf_counter() - self._start

    def late(self):
        """Whether the time limit is over."""
        return self.seconds() > self.limit_s

    def end(self, evaluate):
        """Close an epoch; returns whether training is over."""
        epoch = {"seconds": time.perf_counter() - self._start, "targets": self._targets}
        epoch["ndcg"] = evaluate()
        self.epochs.append(epoch)
        self._start = time.perf_counter()
        print(f"epoch {len(self.epochs)}: {epoch}", file=sys.stderr, flush=True)
        return epoch["ndcg"] >= self.level or sum(e["seconds"] for e in self.epochs) > self.limit_s


def ndcg_at_10(scores_UV, target_U):
    """Mean over users; `target_U` is the target's column, -1 for an item that cannot be recommended."""
    known = target_U >= 0
    own = scores_UV[np.arange(len(target_U)), np.maximum(target_U, 0)][:, None]
    rank = 1 + (scores_UV > own).sum(1) + ((scores_UV == own).sum(1) - 1) / 2
    return float(np.where(known & (rank <= 10), 1 / np.log2(1 + rank), 0.0).mean())


def read_events(folder):
    """Events by user and place, with their distance from the user's last one (1) as `from_end`."""
    events = pd.read_csv(folder / "events.csv")
    events["from_end"] = events.groupby("user")["position"].rank(ascending=False, method="first").astype(int)
    return events


def rectools(folder, settings, watch):
    """RecTools' SASRecModel: every position of a user's last L + 1 training events is a target."""
    import pytorch_lightning as lightning
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    events = read_events(folder)
    train = events[events.from_end > 2]
    valid = events[events.from_end == 2].sort_values("user")
    length = settings["length"]

    class Watch(lightning.Callback):
        def __deepcopy__(self, memo):  # the model copies its trainer; the watch is shared
            return self

        def on_train_epoch_start(self, trainer, module):
            watch.begin()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            watch.count(int((batch["y"] != 0).sum()))

        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = watch.end(lambda: evaluate(module))

    @torch.no_grad()
    def evaluate(module):
        ids = module.data_preparator.item_id_map.to_internal  # raw item -> column
        sessions = train.groupby("user", sort=True)["item"].agg(list)
        module.torch_model.eval()
        items = module.torch_model.item_model.get_all_embeddings()
        scores = []
        for begin in range(0, len(sessions), 128):
            some = sessions.iloc[begin : begin + 128]
            x = np.zeros((len(some), length), dtype=np.int64)
            for row, history in enumerate(some):
                inputs = ids[history[-length:]].to_numpy()
                x[row, -len(inputs) :] = inputs
            users = module.torch_model.encode_sessions({"x": torch.from_numpy(x)}, items)[:, -1]
            scores.append((users @ items.T)[:, 1:].numpy())  # column 0 is padding
        module.torch_model.train()
        target = valid.item.map(ids).fillna(0).astype(int).to_numpy() - 1
        return ndcg_at_10(np.concatenate(scores), target)

    def trainer():
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return lightning.Trainer(
            max_epochs=10_000,
            min_epochs=1,
            accelerator="cpu",
            devices=1,
            enable_checkpointing=False,
            callbacks=[Watch()],
            **quiet,
        )

    model = SASRecModel(
        n_blocks=settings["blocks"],
        n_heads=settings["heads"],
        n_factors=settings["width"],
        dropout_rate=settings["dropout"],
        session_max_len=length,
        loss="softmax",
        lr=settings["lr"],
        batch_size=max(1, settings["tokens"] // length),
        get_trainer_func=trainer,
    )
    frame = pd.DataFrame(
        {
            Columns.User: train.user,
            Columns.Item: train.item,
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(train.position, unit="s"),
        }
    )
    lightning.seed_everything(0, verbose=False)
    model.fit(Dataset.construct(frame))


def recbole(folder, settings, watch):
    """RecBole's SASRec with cross-entropy: each prefix of a history is a sample with one target."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    events = read_events(folder)
    (folder / "peer").mkdir(exist_ok=True)
    events[["user", "item", "position"]].to_csv(
        folder / "peer" / "peer.inter",
        sep="\t",
        index=False,
        header=["user_id:token", "item_id:token", "timestamp:float"],
    )
    tuned = {
        "n_layers": settings["blocks"],
        "n_heads": settings["heads"],
        "hidden_size": settings["width"],
        "inner_size": 4 * settings["width"],
        "hidden_dropout_prob": settings["dropout"],
        "attn_dropout_prob": settings["dropout"],
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "learning_rate": settings["lr"],
        "train_batch_size": settings["prefix_batch"],
        "MAX_ITEM_LIST_LENGTH": settings["length"],
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
        "repeatable": True,
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder / "saved"),
        "reproducibility": False,
    }
    config = Config(model="SASRec", dataset="peer", config_dict=tuned)
    init_seed(0, False)
    train_data, valid_data, _ = data_preparation(config, create_dataset(config))
    model = SASRec(config, train_data.dataset)
    trainer = Trainer(config, model)

    class Counted:
        """The loader, stopped at the time limit, as an epoch may take longer."""

        def __getattr__(self, name):
            return getattr(train_data, name)

        def __iter__(self):
            for batch in train_data:
                if watch.late():
                    return
                yield batch
                watch.count(len(batch))

    @torch.no_grad()
    def evaluate():
        model.eval()
        cases = valid_data.dataset.inter_feat
        scores = [
            model.full_sort_predict(cases[begin : begin + 256])[:, 1:].numpy()
            for begin in range(0, len(cases), 256)
        ]
        return ndcg_at_10(np.concatenate(scores), cases["item_id"].numpy() - 1)

    over, epoch = False, 0
    while not over:
        watch.begin()
        trainer._train_epoch(Counted(), epoch)
        over, epoch = watch.end(evaluate), epoch + 1


def peak_rss_bytes():
    """The most memory this process has held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def main():
    """Train the peer that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["rectools", "recbole"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--settings", type=json.loads, required=True)
    given = parser.parse_args()
    os.chdir(given.folder)  # both libraries write logs to the working directory
    torch.set_num_threads(given.settings["threads"])
    watch = Stopwatch(given.settings["level"], given.settings["limit_s"])
    {"rectools": rectools, "recbole": recbole}[given.peer](given.folder, given.settings, watch)
    given.result.write_text(json.dumps({"epochs": watch.epochs, "peak_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
