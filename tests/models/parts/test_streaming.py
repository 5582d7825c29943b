"""One event after the other gives what the full forward pass over the whole history gives."""

from functools import partial

import numpy as np
import pytest
import torch
from planted import make_config

from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.scoring import inner_product
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.scoring.users import UserBlock
from findrec.models.parts.repeat import repeat_candidates
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tables, build_tower_model

NUM_ITEMS, LONGEST = 40, 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    lengths = [2, 3, 9, 40, LONGEST]
    histories = [rng.integers(1, NUM_ITEMS + 1, n) for n in lengths]
    times = [np.cumsum(10 ** rng.integers(0, 6, n)) for n in lengths]
    events = [[f"type {i}" for i in rng.integers(0, 3, n)] for n in lengths]
    text, image = rng.normal(size=(NUM_ITEMS, 12)), rng.normal(size=(NUM_ITEMS, 7))
    image[::3] = np.nan
    features = {"text": text, "image": image}
    path = tmp_path_factory.mktemp("streaming") / "data"
    return write_data_folder(path, histories, times, features=features, events=events, num_items=NUM_ITEMS)


OLD = {"name": "findrec-2025", "routing": {"heads": 2, "experts": 2}}
VARIANTS = {
    "plain": {"repeat": False},
    "everything": {"gaps": True, "events": True, "wait": True},
    "ids alone": {"modalities": [], "gaps": True},
    "2025": OLD | {"repeat": False},
    "2025 everything": OLD | {"gaps": True, "events": True, "wait": True, "items": {"features": "both"}},
    "2025 window": OLD | {"routing": {"window": 7, "heads": 2}},
    "mamba4rec": {"name": "mamba4rec", "gaps": True, "events": True, "wait": True, "repeat": True},
    "mamba4rec deep": {"name": "mamba4rec", "stream": {"layers": 2}},
    "gru4rec": {"name": "gru4rec", "layers": 2, "hidden": 20}
    | {"gaps": True, "events": True, "wait": True, "repeat": True},
}


def build(folder, change):
    tree = make_config().model_dump()
    tree["model"] = {"dim": 32, "dropout": 0.0} | change
    if tree["model"].get("name", "findrec") in ("findrec", "findrec-2025"):
        tree["model"].setdefault("stream", {"layers": 1})
    tree["data"]["max_length"] = LONGEST
    config = type(make_config()).model_validate(tree)
    torch.manual_seed(0)
    model, table = build_tower_model(config, folder), build_tables(config, folder)[ITEMS]
    for p in model.parameters():  # away from zeros and ones, so that every path matters
        p.data += 0.05 * torch.randn_like(p)
    return model.eval(), table, build_catalogue(config, folder)


def open_with_window(model, rows, catalogue, window):
    return type(model.open_stream(rows, catalogue))(model, rows, catalogue, repeat_window=window)


@pytest.mark.parametrize("name", VARIANTS)
def test_ranking_after_each_history_equals_the_full_forward_pass(folder, name):
    model, table, catalogue = build(folder, VARIANTS[name])
    streaming = model.open_stream(table.weight, catalogue)
    scorer = ModelScorer(model, table.weight, catalogue, LONGEST, "cpu", name="model")
    users = np.flatnonzero(folder.test_start > 0)
    whole = folder.histories(users)
    queries = scorer.queries(UserBlock.read(folder, "test", users, LONGEST))
    want = queries.users_Bd @ scorer.items_Vd.t()
    if queries.own_ids_BN is not None:
        want.scatter_add_(1, queries.own_ids_BN, queries.own_bonus_BN)
    for b in range(len(users)):
        shown = slice(whole.offset[b], whole.offset[b + 1] - 1)  # the test target comes last
        state = streaming.start(
            whole.item[shown].tolist(), whole.timestamp[shown].tolist(), whole.event[shown].tolist()
        )
        now = int(whole.timestamp[whole.offset[b + 1] - 1])
        got = streaming.scores(state, now)
        torch.testing.assert_close(got[1:], want[b, 1:], rtol=1e-4, atol=1e-4)
        appended = streaming.start()
        for item, when, event in zip(
            *(x[shown].tolist() for x in (whole.item, whole.timestamp, whole.event)), strict=True
        ):
            streaming.append(appended, item, when, event)
        torch.testing.assert_close(streaming.scores(appended, now), got, rtol=1e-4, atol=1e-4)
        first = streaming.recommend(state, 5, now)
        assert [item for item, _ in first] == want[b, 1:].topk(5).indices.add(1).tolist()


@pytest.mark.parametrize("window", [1, 30, 110])  # of 149 events
def test_repeat_candidates_of_a_window_are_those_of_the_full_forward_pass(folder, window, monkeypatch):
    model, table, catalogue = build(folder, {"repeat": True})
    monkeypatch.setattr(inner_product, "repeat_candidates", partial(repeat_candidates, window=window))
    users = np.array([len(folder.test_start) - 1])
    block = UserBlock.read(folder, "test", users, LONGEST)
    assert block.batch.item.shape[1] == LONGEST - 1
    queries = ModelScorer(model, table.weight, catalogue, LONGEST, "cpu", name="model").queries(block)
    want = queries.users_Bd @ model.item_vectors(table.weight, catalogue).t()
    want.scatter_add_(1, queries.own_ids_BN, queries.own_bonus_BN)
    assert int((queries.own_ids_BN > 0).sum()) == len(set(block.batch.item[0, -window:].tolist()))
    streaming = open_with_window(model, table.weight, catalogue, window)
    history = folder.histories(users)
    state = streaming.start(history.item[:-1].tolist(), history.timestamp[:-1].tolist())
    got = streaming.scores(state, int(history.timestamp[-1]))
    torch.testing.assert_close(got[1:], want[0, 1:], rtol=1e-4, atol=1e-4)


def test_the_state_does_not_grow_with_the_history(folder):
    model, table, catalogue = build(folder, OLD | {"routing": {"window": 20, "heads": 2}})
    streaming = open_with_window(model, table.weight, catalogue, 20)
    sizes = []
    for num_events in (30, 120):
        state = streaming.start([1 + i % NUM_ITEMS for i in range(num_events)])
        tensors = [state.cache, state.vector_d, *(x for s in state.stream for x in vars(s).values())]
        own = [state.recent_items, state.event_counts, state.last_event]
        sizes.append((sum(x.numel() for x in tensors), [len(x) for x in own]))
    assert sizes[0] == sizes[1]


def test_only_allowed_items_are_recommended(folder):
    model, table, catalogue = build(folder, {"repeat": True})
    streaming = model.open_stream(table.weight, catalogue)
    state = streaming.start([3, 9, 3, 11])
    scores = streaming.scores(state).tolist()
    allowed = [3, 8, 21, 40]
    mask = torch.zeros(NUM_ITEMS + 1, dtype=torch.bool)
    mask[[0, *allowed]] = True  # padding is never shown
    for how in (torch.tensor(allowed), mask):
        for k in (2, 4, 100):
            shown = streaming.recommend(state, k, allowed=how)
            assert [item for item, _ in shown] == sorted(allowed, key=lambda v: -scores[v])[:k]
            assert all(score == scores[item] for item, score in shown)
    assert streaming.recommend(state, 5, allowed=torch.zeros(0, dtype=torch.int64)) == []
    assert len(streaming.recommend(state, 100)) == NUM_ITEMS
    for wrong in ([0], [NUM_ITEMS + 1], [-1], [1.5]):
        with pytest.raises(ValueError, match=r"outside of the catalogue, which are 1\.\.40"):
            streaming.recommend(state, 5, allowed=torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"mask of shape \(40,\), but must be \[41\]"):
        streaming.recommend(state, 5, allowed=mask[1:])
    streaming.items_Vd[8] = torch.nan
    assert [item for item, _ in streaming.recommend(state, 9, allowed=mask)].count(8) == 0


def test_what_cannot_be_is_refused(folder):
    model, table, catalogue = build(folder, {})
    streaming = model.open_stream(table.weight, catalogue)
    with pytest.raises(ValueError, match="append an event first"):
        streaming.scores(streaming.start())
    with pytest.raises(ValueError, match="not in the catalogue"):
        streaming.start([NUM_ITEMS + 1])
    with pytest.raises(ValueError, match="in order of time"):
        streaming.start([1, 2], [100, 50])
    gru, table, catalogue = build(folder, {"stream": {"kind": "gru"}})
    with pytest.raises(FindRecError, match=r"stream\.kind=mamba"):
        gru.open_stream(table.weight, catalogue)
