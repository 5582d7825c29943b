"""Item-item models in closed form: nearest neighbours of the user-item matrix, and EASE.

Both are fitted on the distinct user-item pairs of the training events, X of zeros and ones, and score an item
by the sum of its similarities to the distinct items of the user's complete history.

Shape letters: U users, V items, P items with training events, B users of a block.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray

from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.scoring.blocks import BlockScorer, popularity_rank
from findrec.evaluation.scoring.users import IntArray, UserBlock

_PAIRS_PER_CHUNK = 1 << 22
_DENSE_ROWS = 1024  # of a dense matrix, at a time

Matrix = NDArray[np.float64]


class _SumOfSimilarities(BlockScorer):
    """Scores `W S`: the weights of the items in a history times their similarities to all items."""

    def __init__(self, folder: DataFolder) -> None:
        self.popularity = popularity_rank(folder)
        self._cache: tuple[UserBlock, Matrix] | None = None

    def score_block(self, block: UserBlock, lo: int, hi: int) -> Matrix:
        """See `BlockScorer`; the similarities of a user are summed in the order of item ids.

        The scores of a block are computed together: `block_size` limits their number.
        """
        if self._cache is None or self._cache[0] is not block:  # ranges of a block are scored in turn
            self._cache = block, self._scores(self._weights(block))
        return self._cache[1][:, lo:hi]

    @abstractmethod
    def _scores(self, weights: scipy.sparse.csr_array) -> Matrix:
        """Scores `[B, V + 1]` for weights `[B, V + 1]` of the items of the histories."""

    def _weights(self, block: UserBlock) -> scipy.sparse.csr_array:
        """`[B, V + 1]`: the weight of each distinct item of the histories, 0 for all others."""
        row, stride = block.row(), len(self.popularity)
        # Reversed, so that of the events of an item the newest is found.
        key, newest = np.unique((row * stride + block.item)[::-1], return_index=True)
        event = len(row) - 1 - newest
        age = block.offset[1:][row[event]] - 1 - event
        return scipy.sparse.csr_array(
            (self._weight_of(age), (key // stride, key % stride)), shape=(len(block.user), stride)
        )

    def _weight_of(self, age: IntArray) -> NDArray[np.float64]:
        """Weights of items whose newest event has `age` later events in the history."""
        return np.ones(len(age))


class ItemKNN(_SumOfSimilarities):
    """Cosine similarities of the users of items, shrunk: `|a and b| / (sqrt(|a| |b|) + shrink)`.

    |a| is the number of users of item a, and |a and b| of those of both (Sarwar et al. 2001). Shrinking
    reduces the similarity of rare items. Each item keeps its `neighbours` most similar other items. The
    weight of an item in a history is `decay ** age` with age 0, 1, ... of its newest event, from the end.
    """

    name = "item_knn"

    def __init__(
        self, folder: DataFolder, *, neighbours: int = 100, shrink: float = 10.0, decay: float = 1.0
    ) -> None:
        super().__init__(folder)
        self._decay = decay
        users = _user_item_matrix(TrainingPairs.read(folder), folder).tocsc()
        degree = np.diff(users.indptr).astype(np.float64)
        rows = users.tocsr()
        parts = [
            _nearest(users[:, lo:hi], rows, degree, lo, neighbours=neighbours, shrink=shrink)
            for lo, hi in _item_ranges(rows)
        ]
        self.similarity = scipy.sparse.vstack(parts, format="csr")  # [V + 1, V + 1], row: item of a history

    def _weight_of(self, age: IntArray) -> NDArray[np.float64]:
        return np.power(self._decay, age, dtype=np.float64)

    def _scores(self, weights: scipy.sparse.csr_array) -> Matrix:
        scores: Matrix = (weights @ self.similarity).toarray()
        return scores


class EASE(_SumOfSimilarities):
    """The linear autoencoder with zero diagonal that reconstructs X best (Steck 2019, arXiv 1905.03375).

    `min |X - X S|^2 + l2 |S|^2` with `diag(S) = 0` has the solution `S_ij = -T_ij / T_jj` for i != j with
    `T = inv(X^T X + l2 I)` (equation 8), computed in float64. Memory grows with the square of the number of
    items with training events, and time with its cube; other items have the score 0.
    """

    name = "ease"

    def __init__(self, folder: DataFolder, *, l2: float = 250.0, max_items: int = 20_000) -> None:
        """Raises `FindRecError` if more than `max_items` items have training events."""
        check_most_items(folder, max_items, self.name)
        super().__init__(folder)
        pairs = TrainingPairs.read(folder)
        self._trained = pairs.trained
        inverse = _inverse(_gram_matrix(_user_item_matrix(pairs, folder)[:, self._trained], l2))
        inverse /= -np.diag(inverse)
        np.fill_diagonal(inverse, 0.0)
        self.similarity = inverse  # [P, P], row: item of a history

    def _scores(self, weights: scipy.sparse.csr_array) -> Matrix:
        scores = np.zeros(weights.shape)
        scores[:, self._trained] = weights[:, self._trained] @ self.similarity
        return scores


def check_most_items(folder: DataFolder, max_items: int, name: str) -> None:
    """Raise `FindRecError` if more than `max_items` items of the data have training events."""
    size = int((folder.train_count > 0).sum())
    if size > max_items:
        raise FindRecError(
            f"{name} inverts a matrix of all items with training events: the {size:,} of {folder.path} take "
            f"{8 * size**2 / 2**30:,.1f} GiB in float64, and more than max_items={max_items:,} are not "
            f"accepted. Set max_items={size} in evaluation.baselines if there is memory for it, or leave it "
            "out (item_knn needs no such matrix)"
        )


def _user_item_matrix(pairs: TrainingPairs, folder: DataFolder) -> scipy.sparse.csr_array:
    """X `[U, V + 1]` with a 1 for each pair."""
    shape = folder.num_users, folder.num_items + 1
    return scipy.sparse.csr_array((np.ones(len(pairs.item)), pairs.item, pairs.offset), shape=shape)


def _item_ranges(users: scipy.sparse.csr_array) -> list[tuple[int, int]]:
    """Cut the items into ranges that have about `_PAIRS_PER_CHUNK` pairs with others, or one item each."""
    num_items = users.shape[1]
    # An item has at most as many neighbours as its users have items, and as there are items.
    neighbours = np.minimum(users.T @ np.diff(users.indptr).astype(np.float64), num_items)
    part = np.cumsum(neighbours) // _PAIRS_PER_CHUNK
    edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), num_items]
    return list(itertools.pairwise(edges))


def _nearest(
    some: scipy.sparse.csc_array,
    users: scipy.sparse.csr_array,
    degree: NDArray[np.float64],
    first: int,
    *,
    neighbours: int,
    shrink: float,
) -> scipy.sparse.csr_array:
    """Rows of the similarities of the items `first`, ..., whose columns of X are `some`."""
    both = (some.T @ users).tocoo()  # exact: the numbers are integers
    item, other = both.row + first, both.col
    similarity = both.data / (np.sqrt(degree[item] * degree[other]) + shrink)
    similarity[item == other] = 0.0
    order = np.lexsort((other, -similarity, item))
    item, other, similarity = item[order], other[order], similarity[order]
    kept = (np.arange(len(item)) - np.searchsorted(item, item) < neighbours) & (similarity > 0)
    return scipy.sparse.csr_array(
        (similarity[kept], (item[kept] - first, other[kept])), shape=(some.shape[1], len(degree))
    )


def _gram_matrix(users: scipy.sparse.csr_array, l2: float) -> Matrix:
    """`X^T X + l2 I`, `[P, P]`."""
    columns, size = users.tocsc(), users.shape[1]
    gram = np.empty((size, size))
    for lo in range(0, size, _DENSE_ROWS):
        gram[lo : lo + _DENSE_ROWS] = (columns[:, lo : lo + _DENSE_ROWS].T @ users).toarray()
    gram[np.diag_indices(size)] += l2
    return gram


def _inverse(matrix: Matrix) -> Matrix:
    """The inverse of a positive definite matrix, computed in its memory."""
    factor, failed = scipy.linalg.lapack.dpotrf(matrix.T, overwrite_a=True)
    assert not failed, "a Gram matrix with a positive number added to its diagonal is positive definite"
    inverse, failed = scipy.linalg.lapack.dpotri(factor, overwrite_c=True)
    assert not failed
    for lo in range(0, len(inverse), _DENSE_ROWS):  # only the upper triangle is computed
        hi = lo + _DENSE_ROWS
        inverse[hi:, lo:hi] = inverse[lo:hi, hi:].T
        square = inverse[lo:hi, lo:hi]
        inverse[lo:hi, lo:hi] = np.triu(square) + np.triu(square, 1).T
    result: Matrix = inverse.T  # it is symmetric: in the order of memory
    return result
