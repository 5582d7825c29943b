"""The file of a leaderboard: the runs it names, and mistakes in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.config import folder_name, load_leaderboard
from findrec.evaluation.leaderboard.sheets import rows_with_own_epochs
from findrec.training.runs import run_folder

Write = Callable[..., Path]
PUBLISHED = {"name": "GRU", "metrics": {"ndcg@10": 0.1}, "source": "A. Author (2020)", "comparable": True}


def test_runs_are_named_by_data_row_and_seed(write: Write, tmp_path: Path) -> None:
    data = {"films": {"data.folder": "films"}, "all shops": {"data": {"folder": "shops", "max_length": 20}}}
    loaded = load_leaderboard(write(data=data, baselines=["popularity"]))
    assert [(run.data, run.row, run.seed) for run in loaded.runs] == [
        (data, row, seed)
        for data in ("films", "all shops")
        for row in ("narrow", "twice as wide")
        for seed in (0, 1)
    ]
    last = loaded.runs[-1].config
    assert run_folder(last) == tmp_path / "runs" / "small" / "all-shops" / "twice-as-wide-s1"
    assert (last.model.dim, last.data.max_length, last.data.folder) == (16, 20, "shops")
    assert (last.training.seed, last.training.epochs, last.evaluation.baselines) == (1, 1, [])
    assert "workers" not in last.cluster.model_fields_set  # decided by the machine
    baselines = loaded.baselines["films"]
    assert run_folder(baselines) == tmp_path / "runs" / "small" / "films" / "baselines"
    assert [one.title for one in baselines.baselines] == ["popularity"]
    assert loaded.of("films", "narrow")[1] is loaded.runs[1]


def test_data_sets_do_not_share_stored_checkpoints(write: Write, tmp_path: Path) -> None:
    data = {"films": {"data.folder": "films"}, "all shops": {"data.folder": "shops"}}
    store = {"training.checkpoint_store": f"{tmp_path}/store/"}
    runs = load_leaderboard(write(data=data, rows={"narrow": {}, "other": store}, seeds=[0]), []).runs
    assert [run.config.training.checkpoint_store for run in runs] == [
        None,
        f"{tmp_path}/store/small/films",
        None,
        f"{tmp_path}/store/small/all-shops",
    ]
    assert runs[1].tree["training"]["checkpoint_store"] == f"{tmp_path}/store/small/films"


def test_later_changes_win(write: Write, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "name: other\nmodel: sasrec\ntraining: {epochs: 2, seed: 9, patience: 2}\n"
        "evaluation: {baselines: [popularity], ks: [7]}\n"
    )
    path = write(
        config="run.yaml",  # found beside the file
        base={"training.epochs": 3, "training.tokens": 100, "runs": "elsewhere"},
        data={"films": {"training.save_every": 4}},
        rows={"narrow": {"training.save_every": 5}},
    )
    loaded = load_leaderboard(path, ["training.tokens=200", "training.save_every=3", "seeds=[4]", "name=new"])
    (run,) = loaded.runs
    training = run.config.training
    assert (training.epochs, training.patience, training.seed) == (3, 2, 4)
    assert (training.tokens, training.save_every) == (200, 5)
    assert run.config.evaluation.ks == [7]
    assert run_folder(run.config) == tmp_path / "elsewhere" / "new" / "films" / "narrow-s4"
    assert loaded.shared["training"]["epochs"] == 3
    assert loaded.source == path.read_text()


@pytest.mark.parametrize(
    ("budget", "want"), [({"epochs": 4}, (4, None)), ({"seconds": 90}, (1, 90)), (None, (1, None))]
)
def test_all_rows_have_the_same_budget(
    budget: dict[str, int] | None, want: tuple[int, int | None], write: Write, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("training: {epochs: 1, max_seconds: 5}\n" if budget else "{}\n")
    base = {"model.name": "sasrec"} if budget else {"training.epochs": 1}
    path = write(config="run.yaml", base=base, **({"budget": budget} if budget else {}))
    for run in load_leaderboard(path).runs:
        training = run.config.training
        assert training.epochs == want[0]
        assert training.max_seconds == (want[1] or (5 if budget else None))
    if budget:
        key = next(iter(budget))
        (changed, *_) = load_leaderboard(path, [f"budget.{key}=7"]).runs
        assert 7 in (changed.config.training.epochs, changed.config.training.max_seconds)


def test_a_budget_is_not_set_twice(write: Write) -> None:
    path = write(budget={"epochs": 3}, base={})
    with pytest.raises(FindRecError, match=r"command line: training.epochs cannot be set here: `budget`"):
        load_leaderboard(path, ["training.epochs=4"])
    for keys in ({"rows": {"narrow": {"training.epochs": 3}}}, {"base": {"training": {"epochs": 3}}}):
        path = write(**{"budget": {"epochs": 3}, "base": {}} | keys)
        with pytest.raises(FindRecError, match=r"training.epochs cannot be set here: `budget` sets it"):
            load_leaderboard(path)
    for budget in ({}, {"epochs": 2, "seconds": 3}, {"seconds": 0}):
        path = write(budget=budget)
        with pytest.raises(FindRecError, match=r"budget: set one of|greater than 0"):
            load_leaderboard(path)


def test_rows_with_epochs_beside_the_budget_are_named(write: Write) -> None:
    stages = {"model": {"name": "toy_models:TwoStages"}}
    rows = {"narrow": {}, "longer": stages, "equal": stages | {"model.stage_epochs": 3}}
    assert rows_with_own_epochs(load_leaderboard(write(rows=rows, budget={"epochs": 3}, base={}))) == [
        "longer"
    ]


def test_only_keeps_the_reference(write: Write) -> None:
    path = write(rows={"a": {}, "b": {}, "c": {}}, reference="b")
    assert load_leaderboard(path).rows == ["a", "b", "c"]
    assert load_leaderboard(path, only=["a"]).rows == ["a", "b"]
    with pytest.raises(FindRecError, match=r"--only 'A1': .*no such row"):
        load_leaderboard(path, only=["A1"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": ["mrr"]}, "unknown key 'metric'; did you mean 'metrics'"),
        ({"reference": "narow"}, "no row is labelled 'narow'; did you mean 'narrow'"),
        ({"rows": {"narrow": {"model.dimm": 8}}}, r"row 'narrow': unknown key 'model.dimm'; did you mean"),
        ({"rows": {"narrow": {"model.dim": 1}}}, "row 'narrow': model.dim: .*greater than or equal to 4"),
        ({"rows": {"narrow": {"model": "sasrek"}}}, "row 'narrow': .*did you mean 'sasrec'"),
        ({"rows": {"narrow": {"training": 3}}}, "row 'narrow': training is 3, not a section"),
        ({"rows": {"narrow": {"training.seed": 3}}}, "row 'narrow': training.seed cannot be set here"),
        ({"rows": {"narrow": {"runs": "x"}}}, "row 'narrow': runs cannot be set here"),
        ({"base": {"evaluation": {"baselines": ["popularity"]}}}, "base: evaluation.baselines cannot be set"),
        ({"base": {"training.epoch": 3}}, "what all rows share: unknown key 'training.epoch'"),
        ({"data": {}}, "data: .*at least 1 item"),
        ({"data": {"films": {"data": {"folders": "x"}}}}, r"data 'films': .*did you mean 'data.folder'"),
        ({"rows": {"narrow": {}, "a b": {}, "A-b": {}}}, "'a b' and 'A-b' would share a folder"),
        ({"rows": {"narrow": {}, "?": {}}}, "'[?]' has no letter"),
        ({"seeds": [1, 1]}, "values must be distinct"),
        ({"seeds": [True]}, "a number is needed"),
        ({"published": [PUBLISHED | {"metrics": {"HR@5": 0.1}}]}, "did you mean 'recall@5'"),
        ({"published": [PUBLISHED | {"comparable": False}]}, "GRU: say in `note`"),
        ({"published": [PUBLISHED | {"data": "shops"}]}, "GRU: no data set is labelled 'shops'"),
        ({"published": [PUBLISHED, PUBLISHED]}, "two results on films are named 'GRU'"),
        (
            {"published": [PUBLISHED], "data": {"films": {}, "shops": {}}},
            "GRU: set `data` to one of films, shops",
        ),
        ({"metrics": ["ndgc@10"]}, "did you mean 'ndcg@10'"),
        ({"metrics": ["HR@50"]}, "did you mean 'recall@50'"),
        ({"suites": {"noisy": [1]}}, "did you mean 'noise'"),
        ({"suites": {"noise": [101]}}, "0 to 100, not 101"),
        ({"suites": {"noise": []}}, "suite noise has no levels"),
        ({"baselines": ["popularty"]}, "did you mean 'popularity'"),
        ({"baselines": ["sasrec"]}, "sasrec is trained; make it a row"),
        ({"baselines": ["popularity", "popularity"]}, "two lines of the table are named 'popularity'"),
        ({"config": "nothing"}, "no configs file called 'nothing'"),
    ],
)
def test_mistakes_are_named(keys: dict[str, Any], message: str, write: Write) -> None:
    path = write(**keys)
    with pytest.raises(FindRecError, match=message):
        load_leaderboard(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds", "write key=value"),
        ("seeds=[", "not valid YAML"),
        ("training.epoch=3", "unknown key 'training.epoch'; did you mean 'training.epochs'"),
        ("training.seed=3", "the command line: training.seed cannot be set here: list seeds"),
    ],
)
def test_mistakes_of_the_command_line_are_named(override: str, message: str, write: Write) -> None:
    path = write()
    with pytest.raises(FindRecError, match=message):
        load_leaderboard(path, [override])


def test_a_label_is_used_once(write: Write) -> None:
    path = write()
    text = yaml.safe_dump({"rows": {"narrow": {}}}) + "  narrow: {}\n"
    path.write_text(path.read_text().partition("rows:")[0] + text + "reference: narrow\n")
    with pytest.raises(FindRecError, match=r"table.yaml, line \d+: 'narrow' is already in line \d+"):
        load_leaderboard(path)


def test_labels_become_folders() -> None:
    assert folder_name("no alignment (α = 0)") == "no-alignment-0"
    assert folder_name("../x") == "x"


def test_the_example_of_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "evaluation" / "README.md").read_text(encoding="utf-8")
    (example,) = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    path = tmp_path / "table.yaml"
    path.write_text(example)
    loaded = load_leaderboard(path)
    assert len(loaded.runs) == len(loaded.rows) * len(loaded.config.seeds)
    assert loaded.of("shop", "sasrec")[0].config.model.title == "sasrec"
