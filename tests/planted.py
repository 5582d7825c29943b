"""Small data with a known answer, and a configuration that learns it in seconds."""

import numpy as np
import torch

from findrec.config import dump_config, parse_config
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.validation import validate
from findrec.training.build import build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

NUM_ITEMS = 60


def planted_folder(path, num_users=150, seed=0):
    """The next item is a fixed permutation of the last one, from a random start: popularity knows nothing."""
    rng = np.random.default_rng(seed)
    follows = rng.permutation(NUM_ITEMS)
    histories = []
    for _ in range(num_users):
        items = [int(rng.integers(NUM_ITEMS))]
        for _ in range(int(rng.integers(8, 25))):
            items.append(int(follows[items[-1]]))
        histories.append(np.array(items) + 1)
    text = rng.normal(size=(NUM_ITEMS, 12)).astype(np.float32)
    image = rng.normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    image[::7] = np.nan  # missing
    return write_data_folder(path, histories, features={"text": text, "image": image})


def make_config(**training):
    tree = {
        "data": {"max_length": 16, "overlap": 0.5},
        "model": {"dim": 32, "dropout": 0.0, "stream": {"layers": 1}},
        "training": {"epochs": 12, "microbatches": 4, "tokens": 128, "optim": {"lr": 0.01}} | training,
        "evaluation": {"users_per_block": 64},
    }
    return parse_config(tree)


def planted_run(path, folder, model=None, training=None, log=None, **evaluation):
    """A run folder with checkpoints of a short training on a data folder, as a job leaves it."""
    tree = make_config(**{"epochs": 3} | (training or {})).model_dump(mode="json")
    tree["name"], tree["data"]["folder"] = path.name, str(folder.path)
    tree["model"] = model if model and "name" in model else tree["model"] | (model or {})
    tree["evaluation"] |= {"baselines": [], "samples": 2} | evaluation
    tree["tracking"]["enabled"] = False
    config = parse_config(tree)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    torch.manual_seed(0)
    tower = PlainTower(build_tower_model(config, folder), config.training.optim)
    run_training(
        config,
        folder,
        path / "checkpoints",
        tower,
        build_tables(config, folder),
        worker=Worker(),
        validate=validate,
        log=log or Silent(),
    )
    return path


# The slowest of the models: tests disturb a run, which must still be under way then.
SLOW = {"name": "findrec-2025", "label": "findrec", "dim": 32, "dropout": 0.0} | {
    "routing": {"heads": 2, "experts": 2},
    "stream": {"layers": 1},
}


def planted_home(home, *overrides, **training):
    """A FINDREC_HOME with such data and, in `run.yaml`, a run of two workers that learns it."""
    planted_folder(home / "data" / "planted", num_users=80)
    tree = make_config(**{"epochs": 6, "microbatches": 2} | training).model_dump(mode="json")
    tree["model"] = SLOW
    tree["data"] |= {"folder": "data/planted", "recipe": "planted"}
    tree["cluster"] |= {"workers": 2, "threads": 1}
    tree["evaluation"]["baselines"] = ["popularity"]
    (home / "run.yaml").write_text(dump_config(parse_config(tree, overrides)))
    return home


class Silent:
    """A log that keeps nothing."""

    def log(self, step, epoch, values):
        pass
