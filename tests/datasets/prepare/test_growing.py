"""Growing a data folder: ids are only appended, and only new items are encoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_recipe import small_recipe

from findrec.cli.app import main
from findrec.datasets.encoders import make_features
from findrec.datasets.encoders.encoder import Encoded
from findrec.datasets.folder.data_folder import ALWAYS, DataFolder
from findrec.datasets.folder.manifest import write_manifest
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.recipe import Recipe
from findrec.errors import FindRecError
from findrec.files import sha256_file

Event = tuple[int, str, int]  # user, item, seconds


def recipe_in(folder: Path, **changes: object) -> Recipe:
    """A recipe over sales.csv and products.csv in `folder`."""
    keys: dict[str, object] = {
        "name": "shop",
        "files": {"sales": {"member": "sales.csv"}, "products": {"member": "p.csv"}},
        "events": "SELECT * FROM read_csv({sales}, header=true, types={'item': 'VARCHAR'})",
        "items": "SELECT * FROM read_csv({products}, header=true, types={'item': 'VARCHAR', "
        "'text': 'VARCHAR', 'title': 'VARCHAR'})",
    }
    return small_recipe(folder, **keys | changes)


def write_source(
    folder: Path, events: Sequence[Event], products: dict[str, str | None], more: str = "", values: str = ""
) -> None:
    folder.mkdir(exist_ok=True)
    lines = [f"{user},{item},{time}" for user, item, time in events]
    (folder / "sales.csv").write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")
    lines = [f"{item},{text or ''},{text or ''}{values}" for item, text in products.items()]
    (folder / "p.csv").write_text(f"item,title,text{more}\n" + "\n".join(lines) + "\n")


def raws(folder: DataFolder) -> list[str]:
    return list(folder.items["raw"].to_pylist())


class FakeEncoder:
    """Vectors that depend on the text; records its inputs."""

    def __init__(self) -> None:
        self.inputs: list[str | None] = []
        self.weights = "w" * 64

    def __call__(self, texts: Sequence[str | None], encoder: str, *, store: object = None) -> Encoded:
        self.inputs += texts
        present = np.array([bool(text) for text in texts])
        rows = [[len(text), sum(map(ord, text)) % 97] if text else [0, 0] for text in texts]
        return Encoded(np.array(rows, dtype=np.float16), present, encoder, "", self.weights, [])


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    fake = FakeEncoder()
    monkeypatch.setattr(make_features, "encode_text", fake)
    return fake


DAY1: list[Event] = [(1, "m", 10), (1, "c", 20), (1, "x", 30), (2, "c", 15), (2, "m", 40), (2, "c", 50)]
DAY2: list[Event] = [(1, "m", 10), (1, "a", 60), (1, "b", 70), (3, "c", 15), (3, "m", 80), (3, "z", 90)]
TEXTS: dict[str, str | None] = {"m": "milk", "c": "corn", "x": "old thing"}


def test_old_items_keep_their_ids_and_new_ones_follow(tmp_path: Path) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    old = prepare(recipe_in(tmp_path / "s"), tmp_path / "old")
    assert raws(old) == ["c", "m", "x"]
    write_source(tmp_path / "s", DAY2, {"m": "milk!", "a": "apple"})
    new = prepare(recipe_in(tmp_path / "s"), tmp_path / "new", grow=tmp_path / "old")
    assert raws(new) == ["c", "m", "x", "a", "b", "z"]
    history = new.histories([0, 1])
    assert history.item.tolist() == [2, 4, 5, 1, 2, 6]
    assert new.user_ids == ["1", "3"]  # users are numbered anew
    assert new.gone.tolist() == [False, False, False, True, False, False, False]  # x: no event, no product
    # What is no longer described keeps its words; what is described has today's.
    assert new.items["text"].to_pylist() == ["corn", "milk!", "old thing", "apple", None, None]
    assert new.manifest.parent is not None
    assert new.manifest.parent.manifest_sha256 == sha256_file(tmp_path / "old/manifest.json")
    assert new.manifest.parent.num_items == 3


def test_listed_items_without_events_stay_and_gone_ones_return(tmp_path: Path) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    recipe = recipe_in(tmp_path / "s")
    prepare(recipe, tmp_path / "one")
    write_source(tmp_path / "s", DAY2, TEXTS)  # x is not sold, but still listed
    two = prepare(recipe, tmp_path / "two", grow=tmp_path / "one")
    assert not two.gone.any()
    assert two.train_count[3] == 0
    write_source(tmp_path / "s", DAY2, {})
    three = prepare(recipe, tmp_path / "three", grow=tmp_path / "two")
    assert three.gone.nonzero()[0].tolist() == [3]
    write_source(tmp_path / "s", DAY1 + DAY2, {})
    four = prepare(recipe, tmp_path / "four", grow=tmp_path / "three")
    assert not four.gone.any()
    assert raws(four) == raws(three) == raws(two)


def test_growing_without_changes_keeps_ids(tmp_path: Path) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    recipe = recipe_in(tmp_path / "s")
    old = prepare(recipe, tmp_path / "old")
    same = prepare(recipe, tmp_path / "same", grow=tmp_path / "old")
    assert same.manifest.events_sha256 == old.manifest.events_sha256
    assert same.items.drop_columns(["gone"]).equals(old.items)
    again = prepare(recipe, tmp_path / "same", grow=tmp_path / "old")
    assert again.manifest == same.manifest


def test_growing_in_place(tmp_path: Path) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    recipe, path = recipe_in(tmp_path / "s"), tmp_path / "data"
    before = prepare(recipe, path).manifest
    assert prepare(recipe, path, grow=path).manifest == before  # nothing to grow by
    write_source(tmp_path / "s", DAY2, TEXTS)
    with pytest.raises(FindRecError, match="--grow"):
        prepare(recipe, path)
    assert raws(prepare(recipe, path, grow=path)) == ["c", "m", "x", "a", "b", "z"]
    assert prepare(recipe, path).manifest.parent is not None  # a run opens it by the recipe


def test_items_without_events_can_be_kept(tmp_path: Path, encoder: FakeEncoder) -> None:
    recipe = recipe_in(tmp_path / "s", unmet_items="keep", features={"text": {"encoder": "fake"}})
    write_source(tmp_path / "s", DAY1, TEXTS | {"b": "bread", "10": "ten", "9": "nine"})
    old = prepare(recipe, tmp_path / "old")
    assert raws(old) == ["c", "m", "x", "9", "10", "b"]  # those with events come first
    assert old.train_count.tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert old.available_from[4:].tolist() == [ALWAYS] * 3
    assert old.feature("text").values[6].tolist() == [5, sum(map(ord, "bread")) % 97]
    write_source(tmp_path / "s", DAY2, {"a": "apple", "9": "nine", "q": "quince"})
    new = prepare(recipe, tmp_path / "new", grow=tmp_path / "old")
    assert raws(new) == ["c", "m", "x", "9", "10", "b", "a", "z", "q"]
    assert [raw for raw, gone in zip(raws(new), new.gone[1:], strict=True) if gone] == ["x", "10"]
    assert raws(prepare(recipe_in(tmp_path / "s"), tmp_path / "met")) == ["a", "b", "c", "m", "z"]


day = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from("abcdefgh"), st.integers(0, 50)), min_size=1, max_size=12
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(day, min_size=2, max_size=4))
def test_ids_of_every_earlier_folder_are_a_prefix(tmp_path: Path, days: list[list[Event]]) -> None:
    """Whatever comes and goes; item `k`, sold every day, makes each folder a continuation of the last."""
    shutil.rmtree(tmp_path / "grown", ignore_errors=True)
    recipe, parent = recipe_in(tmp_path / "s"), None
    known: list[str] = []
    first_seen: dict[str, int] = {}
    for number, events in enumerate(days):
        sold = [*events, (9, "k", 7)]
        write_source(tmp_path / "s", sold, {"k": "kiwi"})
        folder = prepare(recipe, tmp_path / "grown" / str(number), grow=parent)
        names = raws(folder)
        assert names[: len(known)] == known
        assert sorted(names[len(known) :]) == names[len(known) :]
        assert set(names) == set(known) | {item for _, item, _ in sold}
        assert [names[v - 1] for v in folder.gone.nonzero()[0]] == [
            n for n in names if n not in dict.fromkeys(i for _, i, _ in sold)
        ]
        for _, item, time in sold:
            first_seen[item] = min(first_seen.get(item, time), time)
        assert dict(zip(names, folder.available_from[1:].tolist(), strict=True)) == first_seen
        assert sum(folder.length) == len(sold)
        for row, user in enumerate(folder.user_ids):
            mine = folder.histories([row])
            got = sorted(zip((names[i - 1] for i in mine.item), mine.timestamp.tolist(), strict=True))
            assert got == sorted((i, t) for u, i, t in sold if str(u) == user)
        known, parent = names, folder.path


def test_only_new_texts_are_encoded(tmp_path: Path, encoder: FakeEncoder) -> None:
    with_text = {"features": {"text": {"encoder": "fake"}}}
    write_source(tmp_path / "s", DAY1, TEXTS)
    recipe = recipe_in(tmp_path / "s", **with_text)
    old = prepare(recipe, tmp_path / "old")
    encoder.inputs.clear()
    grown = {"m": "milk", "c": "sweet corn", "a": "apple", "b": None}
    write_source(tmp_path / "s", DAY2, grown)
    new = prepare(recipe, tmp_path / "new", grow=tmp_path / "old")
    assert sorted(text for text in encoder.inputs if text) == ["apple", "sweet corn"]
    write_source(tmp_path / "fresh", DAY2, {**grown, "x": "old thing"})
    # Whatever was taken over is what encoding everything would have given.
    encoded_again = encoder(new.items["text"].to_pylist(), "fake")
    assert np.array_equal(new.feature("text").values[1:], encoded_again.values)
    assert np.array_equal(new.feature("text").present[1:], encoded_again.present)
    assert new.manifest.features[0].weights_sha256 == old.manifest.features[0].weights_sha256
    encoder.inputs.clear()
    prepare(recipe, tmp_path / "same", grow=tmp_path / "new")
    assert encoder.inputs == []  # nothing new: the encoder is not even loaded
    encoder.weights = "v" * 64
    write_source(tmp_path / "s", [*DAY2, (1, "q", 99)], {**grown, "q": "quince"})
    with pytest.raises(FindRecError, match="with other weights"):
        prepare(recipe, tmp_path / "newer", grow=tmp_path / "new")


def test_features_that_are_not_in_the_recipe_are_inherited(
    tmp_path: Path, encoder: FakeEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    old = prepare(recipe_in(tmp_path / "s", features={"text": {"encoder": "fake"}}), tmp_path / "old")
    write_source(tmp_path / "s", DAY2, TEXTS)
    new = prepare(recipe_in(tmp_path / "s"), tmp_path / "new", grow=tmp_path / "old")
    assert np.array_equal(new.feature("text").values[:4], old.feature("text").values)
    assert new.feature("text").present.tolist() == [False, True, True, True, False, False, False]
    assert "the 3 new items have no features yet" in capsys.readouterr().out


def test_event_types_keep_their_codes(tmp_path: Path) -> None:
    def recipe(types: list[str]) -> Recipe:
        rows = ", ".join(f"(1, '{n % 2}', {n}, '{kind}')" for n, kind in enumerate(types))
        return recipe_in(
            tmp_path / "s", events=f"SELECT * FROM (VALUES {rows}) t(user, item, timestamp, event)", items=""
        )

    write_source(tmp_path / "s", DAY1, {})
    old = prepare(recipe(["view", "buy"]), tmp_path / "old")
    assert old.manifest.event_types == ["buy", "view"]
    new = prepare(recipe(["view", "add", "return"]), tmp_path / "new", grow=tmp_path / "old")
    assert new.manifest.event_types == ["buy", "view", "add", "return"]
    event = new.histories([0]).event
    assert event is not None
    assert event.tolist() == [1, 2, 3]


def test_invalid_parents_are_rejected(tmp_path: Path, encoder: FakeEncoder) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    source = tmp_path / "s"
    recipe = recipe_in(source)
    prepare(recipe, tmp_path / "old")

    def rejected(message: str, recipe: Recipe = recipe, grow: Path = tmp_path / "old") -> None:
        with pytest.raises(FindRecError, match=message):
            prepare(recipe, tmp_path / "new", grow=grow)
        assert not (tmp_path / "new").exists()

    rejected("no data folder at", grow=tmp_path / "nowhere")
    rejected("made from the recipe 'shop'", recipe_in(source, name="stall"))
    rejected("has no text features", recipe_in(source, features={"text": {"encoder": "fake"}}))
    prepare(recipe_in(source, features={"text": {"encoder": "fake"}}), tmp_path / "fake")
    other = recipe_in(source, features={"text": {"encoder": "another"}})
    rejected("has text features of 'fake'", other, tmp_path / "fake")
    shutil.copytree(tmp_path / "old", tmp_path / "bent")
    table = pq.read_table(tmp_path / "bent/items.parquet")
    twice = pa.array(["c", "c", "x"])
    pq.write_table(table.set_column(1, "raw", twice), tmp_path / "bent/items.parquet")
    rejected("was altered", grow=tmp_path / "bent")
    manifest = DataFolder.open(tmp_path / "old").manifest
    files = manifest.files | {"items.parquet": sha256_file(tmp_path / "bent/items.parquet")}
    write_manifest(tmp_path / "bent", manifest.model_copy(update={"files": files}))
    rejected("id map is damaged", grow=tmp_path / "bent")
    write_source(source, [(1, f"sku-{i}", t) for _, i, t in DAY1], {})
    rejected("ids are written differently")


def test_a_folder_grown_from_another_parent_is_rejected(tmp_path: Path) -> None:
    write_source(tmp_path / "s", DAY1, TEXTS)
    recipe = recipe_in(tmp_path / "s")
    prepare(recipe, tmp_path / "one")
    write_source(tmp_path / "s", DAY2, TEXTS)
    prepare(recipe, tmp_path / "two")
    prepare(recipe, tmp_path / "new", grow=tmp_path / "one")
    with pytest.raises(FindRecError, match="was not grown from"):
        prepare(recipe, tmp_path / "new", grow=tmp_path / "two")
    assert raws(prepare(recipe, tmp_path / "new", grow=tmp_path / "two", force=True))[:3] == ["a", "b", "c"]


def test_available_from_is_the_earlier_of_source_and_first_event(tmp_path: Path) -> None:
    listed = {"m": "milk", "c": "corn", "x": "old thing"}
    write_source(tmp_path / "s", DAY1, listed, more=",available_from", values=",12")
    folder = prepare(recipe_in(tmp_path / "s"), tmp_path / "data")
    assert folder.available_from.tolist() == [ALWAYS, 12, 10, 12]  # m was bought at 10
    dated = recipe_in(
        tmp_path / "s",
        items="SELECT 'c' AS item, '' AS title, '' AS text, "
        "TIMESTAMP '1970-01-01 00:00:05' AS available_from",
    )
    assert prepare(dated, tmp_path / "dated").available_from.tolist() == [ALWAYS, 5, 10, 30]
    bare = prepare(recipe_in(tmp_path / "s", items=""), tmp_path / "bare")
    assert bare.available_from.tolist() == [ALWAYS, 15, 10, 30]
    # Yesterday's first event counts where today's log begins later.
    write_source(tmp_path / "s", [(1, "m", 500), (1, "c", 600), (1, "n", 700)], {})
    later = prepare(recipe_in(tmp_path / "s", items=""), tmp_path / "later", grow=tmp_path / "bare")
    assert later.available_from.tolist() == [ALWAYS, 15, 10, 30, 700]


def test_available_from_of_older_folders_is_computed_from_events(tmp_path: Path) -> None:
    write_source(tmp_path / "s", DAY1, {})
    folder = prepare(recipe_in(tmp_path / "s"), tmp_path / "data")
    path = tmp_path / "data/items.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["available_from"]), path)
    older = DataFolder.open(tmp_path / "data", verify=False)
    assert older.available_from.tolist() == folder.available_from.tolist() == [ALWAYS, 15, 10, 30]


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    write_source(tmp_path / "s", DAY1, TEXTS)
    recipe = recipe_in(tmp_path / "s").model_dump(mode="json", exclude_none=True)
    (tmp_path / "s/shop.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    file = str(tmp_path / "s/shop.yaml")
    assert main(["prepare", file]) == 0
    write_source(tmp_path / "s", DAY2, TEXTS)
    assert main(["prepare", file, "--grow", "data/shop"]) == 0
    assert raws(DataFolder.open(tmp_path / "data/shop"))[:3] == ["c", "m", "x"]
    assert main(["prepare", file, "--grow", "data/nothing"]) == 2
    assert "no data folder called" in capsys.readouterr().err
