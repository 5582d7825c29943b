"""The user-item graph against dense matrices of the training events."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.models.parts.interaction_graph import InteractionGraph

NUM_ITEMS = 12  # items 11 and 12 never occur
HISTORIES = [[1, 2, 2, 3, 9, 8], [4], [2, 5, 4, 2, 1], [7, 7, 7, 6, 10, 3, 1, 5], [10, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return write_data_folder(tmp_path_factory.mktemp("graph") / "data", HISTORIES, num_items=NUM_ITEMS)


def made(folder: DataFolder) -> InteractionGraph:
    return InteractionGraph(TrainingPairs.read(folder), folder.num_users, folder.num_items)


def dense() -> NDArray[np.float64]:
    """`[U, V]` with padding; all but the last two events of a user with at least three are for training."""
    matrix = np.zeros((len(HISTORIES) + 1, NUM_ITEMS + 1))
    for user, history in enumerate(HISTORIES, start=1):
        matrix[user, history[:-2] if len(history) >= 3 else history[:1]] = 1
    return matrix


def test_degrees_and_sums_are_those_of_the_dense_matrix(folder: DataFolder) -> None:
    graph, matrix = made(folder), dense()
    assert graph.num_edges == matrix.sum()
    assert graph.user_degree.tolist() == matrix.sum(1).tolist()
    assert graph.item_degree.tolist() == matrix.sum(0).tolist()
    assert graph.state_dict() == {}
    users = torch.randn(len(HISTORIES) + 1, 3, dtype=torch.float64, requires_grad=True)
    items = torch.randn(NUM_ITEMS + 1, 3, dtype=torch.float64, requires_grad=True)
    adjacency = torch.from_numpy(matrix)
    of_users, of_items = graph.neighbour_sums(users, items)
    torch.testing.assert_close(of_users, adjacency @ items)
    torch.testing.assert_close(of_items, adjacency.T @ users)
    assert torch.autograd.gradcheck(graph.neighbour_sums, (users, items))


def test_a_copy_is_the_same_graph_and_other_events_are_another(folder: DataFolder, tmp_path: Path) -> None:
    graph = made(folder)
    twin = copy.deepcopy(graph)
    items = torch.randn(NUM_ITEMS + 1, 4)
    assert torch.equal(graph.sums_of_items(items), twin.sums_of_items(items))
    later = [[*h[:-2], 12, 11] if len(h) >= 3 else h for h in HISTORIES]
    assert made(write_data_folder(tmp_path / "later", later, num_items=NUM_ITEMS)).digest == graph.digest
    other = [[3, *HISTORIES[0][1:]], *HISTORIES[1:]]
    assert made(write_data_folder(tmp_path / "other", other, num_items=NUM_ITEMS)).digest != graph.digest


def test_tables_of_other_users_are_refused(folder: DataFolder) -> None:
    graph = made(folder)
    graph.check_users(len(HISTORIES) + 1, "a model")
    with pytest.raises(FindRecError, match=r"a model was trained with 8 users, but the data has 5"):
        graph.check_users(9, "a model")
