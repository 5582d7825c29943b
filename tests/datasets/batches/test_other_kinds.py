"""Other example sources than windows: edges with negatives, single items, histories with a candidate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from findrec.config import RunConfig, parse_config
from findrec.datasets.batches.edges import EdgeExamples
from findrec.datasets.batches.examples import ExampleLoader, ExampleSource
from findrec.datasets.batches.history_candidates import CandidateExamples
from findrec.datasets.batches.plan import plan_examples
from findrec.datasets.batches.single_items import ItemExamples
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError

NUM_ITEMS = 30
MICROBATCHES, TOKENS = 4, 20
KINDS = ["edges", "items", "candidates"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """40 users over items 1..25; 26..30 have no events. Members of 7 users, so that there are many blocks."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 26, int(rng.integers(4, 20))).tolist() for _ in range(40)]
    path: Path = tmp_path_factory.mktemp("kinds") / "data"
    return write_data_folder(path, histories, num_items=NUM_ITEMS, users_per_member=7)


def config(**training: Any) -> RunConfig:
    tree = {"microbatches": MICROBATCHES, "tokens": TOKENS, "seed": 3} | training
    return parse_config({"data": {"max_length": 6}, "training": tree, "cluster": {"workers": 1}})


def source(kind: str, folder: DataFolder, **training: Any) -> ExampleSource[Any]:
    if kind == "edges":
        return EdgeExamples(config(**training), folder, negatives=3)
    if kind == "items":
        return ItemExamples(config(**training), folder)
    return CandidateExamples(config(**training), folder, negatives=2)


def tensors(examples: Any) -> dict[str, torch.Tensor]:
    """All tensors of a microbatch, by name."""
    found = {}
    for name, value in vars(examples).items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif value is not None:
            found |= {f"{name}.{inner}": each for inner, each in tensors(value).items()}
    return found


def epoch_of(kind: str, folder: DataFolder, *, world: int = 1, first_step: int = 0, epoch: int = 1) -> Any:
    """`{(step, microbatch): tensors}` of an epoch, from one loader for each of `world` workers."""
    found = {}
    for rank in range(world):
        made = source(kind, folder)
        loader = ExampleLoader(
            made, made.plan(epoch), epoch=epoch, rank=rank, world=world, first_step=first_step
        )
        with loader:
            for step, microbatches in loader:
                found |= {(step, m): tensors(examples) for m, examples in microbatches}
    return found


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert found[key].keys() == want.keys()
        assert all(torch.equal(found[key][name], value) for name, value in want.items()), key


def training_items(folder: DataFolder) -> list[list[int]]:
    everyone = np.arange(folder.num_users)
    events = folder.histories(everyone, np.zeros_like(everyone), folder.valid_start)
    return [events.item[a:b].tolist() for a, b in zip(events.offset[:-1], events.offset[1:], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_depends_only_on_seed_and_epoch(folder: DataFolder, kind: str) -> None:
    first = epoch_of(kind, folder)
    assert len(first) > MICROBATCHES or kind == "items"
    assert_same(epoch_of(kind, folder), first)
    plan = source(kind, folder).plan(1)
    assert source(kind, folder).plan(1).digest == plan.digest
    assert source(kind, folder).plan(2).digest != plan.digest
    assert source(kind, folder, seed=4).plan(1).digest != plan.digest
    other = source(kind, folder)
    chosen = [part for step in plan.steps for part in step]
    again = [tensors(x) for x in other.read(2, chosen)]
    if kind != "items":  # the same examples in another epoch have other negatives
        name = {"edges": "negative", "candidates": "candidate"}[kind]
        pairs = zip(again, first.values(), strict=True)
        assert any(not torch.equal(mine[name], theirs[name]) for mine, theirs in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_workers_reads_the_same_microbatches(folder: DataFolder, kind: str, world: int) -> None:
    assert_same(epoch_of(kind, folder, world=world), epoch_of(kind, folder))


@pytest.mark.parametrize("kind", ["edges", "candidates"])
def test_reading_resumes_inside_an_epoch(folder: DataFolder, kind: str) -> None:
    whole = epoch_of(kind, folder)
    last = max(step for step, _ in whole)
    assert last >= 2
    rest = epoch_of(kind, folder, first_step=2)
    assert_same(rest, {key: value for key, value in whole.items() if key[0] >= 2})


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_once_in_steps_of_k_microbatches(folder: DataFolder, kind: str) -> None:
    made = source(kind, folder)
    plan = made.plan(0)
    assert {len(step) for step in plan.steps} == {MICROBATCHES}
    chosen = np.concatenate([part for step in plan.steps for part in step])
    assert sorted(chosen.tolist()) == list(range(made.num_examples))
    assert int(plan.targets.sum()) == made.num_targets == made.num_examples
    assert all(made.size(part) <= TOKENS for step in plan.steps for part in step)
    assert made.describe(chosen[:5]).startswith("items " if kind == "items" else "users ")
    assert tensors(made.dummy_examples(chosen[:3])).keys() == tensors(made.read(0, [chosen[:3]])[0]).keys()
    assert made.num_shards(chosen) == (0 if kind == "items" else 1)


def test_edges_are_the_distinct_training_pairs_and_negatives_are_unknown_to_the_user(
    folder: DataFolder,
) -> None:
    own = training_items(folder)
    trained = {item for items in own for item in items}
    pairs: Counter[tuple[int, int]] = Counter()
    for found in epoch_of("edges", folder).values():
        pairs.update(zip((found["user"] - 1).tolist(), found["item"].tolist(), strict=True))
        for user, negatives in zip((found["user"] - 1).tolist(), found["negative"].tolist(), strict=True):
            assert len(negatives) == 3
            assert not set(negatives) & set(own[user])
            assert set(negatives) <= trained
    assert pairs == Counter({(user, item): 1 for user, items in enumerate(own) for item in set(items)})


def test_negatives_are_uniform_over_other_users_items(folder: DataFolder) -> None:
    made = EdgeExamples(config(), folder, negatives=4000)
    own = training_items(folder)
    (edges,) = made.read(0, [np.array([0])])
    user = int(edges.user[0]) - 1
    unknown = {item for items in own for item in items} - set(own[user])
    counts = Counter(edges.negative[0].tolist())
    assert counts.keys() == unknown
    expected = 4000 / len(unknown)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_single_items_cover_the_catalogue(folder: DataFolder) -> None:
    items = torch.cat([found["item"] for found in epoch_of("items", folder).values()])
    assert sorted(items.tolist()) == list(range(1, NUM_ITEMS + 1))


def test_positives_are_the_events_that_follow_their_histories(folder: DataFolder) -> None:
    own = training_items(folder)
    positives: Counter[tuple[int, tuple[int, ...], int]] = Counter()
    labels: list[float] = []
    for found in epoch_of("candidates", folder).values():
        item, length = found["history.item"], found["history.length"]
        rows = torch.arange(len(length))
        assert torch.equal(found["history.position"], rows * item.shape[1] + length - 1)
        assert len(found["history.target"]) == 0
        for row in rows.tolist():
            user = int(found["history.user"][row])
            candidate = int(found["candidate"][row])
            labels.append(float(found["label"][row]))
            if labels[-1]:
                positives[user, tuple(item[row, : length[row]].tolist()), candidate] += 1
            else:
                assert candidate not in own[user]
    expected: Counter[tuple[int, tuple[int, ...], int]] = Counter()
    for user, items in enumerate(own):
        for place in range(1, len(items)):
            expected[user, tuple(items[max(0, place - 6) : place]), items[place]] += 1
    # No two events have the same time, so histories are in the order of the data.
    assert positives == expected
    assert labels.count(0.0) == 2 * labels.count(1.0)


@pytest.mark.parametrize("kind", ["edges", "candidates"])
def test_a_user_of_every_trained_item_is_omitted(tmp_path: Path, kind: str) -> None:
    histories = [[1, 2, 3, 1, 2], [1, 2, 1, 4, 4], [2, 1, 1, 2, 1]]  # the last two events are held out
    made = source(kind, write_data_folder(tmp_path / "data", histories), microbatches=1)
    chosen = np.arange(made.num_examples)
    found = tensors(made.read(0, [chosen])[0])
    users = found["user"] - 1 if kind == "edges" else found["history.user"]
    assert set(users.tolist()) == {1, 2}


def test_microbatches_differ_by_one_example_at_most() -> None:
    plan = plan_examples(103, seed=0, epoch=0, microbatches=4, size=7)
    sizes = {len(part) for step in plan.steps for part in step}
    assert len(plan.steps) == 4
    assert sizes == {6, 7}
    assert plan.targets.tolist() == [sum(len(part) for part in step) for step in plan.steps]


@pytest.mark.parametrize(("count", "size"), [(3, 10), (0, 10), (5, 1)])
def test_too_few_examples_are_rejected(count: int, size: int) -> None:
    with pytest.raises(FindRecError, match=r"lower training\.microbatches"):
        plan_examples(count, seed=0, epoch=0, microbatches=4, size=size)
