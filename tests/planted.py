"""Small data with a known answer, and a configuration that learns it in seconds."""

import numpy as np

from findrec.config import parse_config
from findrec.datasets.memory import write_data_folder

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
        "model": {"dim": 32, "dropout": 0.0, "routing": {"heads": 2, "experts": 2}, "stream": {"layers": 1}},
        "training": {"epochs": 12, "microbatches": 4, "tokens": 128, "optim": {"lr": 0.01}} | training,
        "evaluation": {"users_per_block": 64},
    }
    return parse_config(tree)
