"""`findrec inspect` shows what the model did, for any user ids and titles; errors are reported."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from findrec.cli.app import main
from findrec.config import RunConfig, dump_config, parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.inspect.display import file_name, format_inspection, write_inspection
from findrec.evaluation.inspect.inspect import ALL_MODALITIES, Inspection, inspect_run, inspect_user
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.scoring.load import load_scorer
from findrec.models.capabilities import withhold
from findrec.models.findrec_2025.explain import explain
from findrec.models.findrec_2025.model import FindRec2025
from findrec.training.build import build_tower_model
from findrec.training.checkpoints.checkpoint import TrainState, save_checkpoint
from findrec.training.runs import training_jobs

NUM_ITEMS, DIM, MAX_LENGTH = 50, 16, 12
LENGTHS = (30, 9, 2, 1)  # of the users' histories; their rows are their raw ids


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Two modalities, some items without; titles that mean something to HTML, to a terminal and to TeX."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, NUM_ITEMS, size=n).tolist() for n in LENGTHS]
    titles = [f"<script>alert({v})</script> [red]{v}[/red] $x_{v}$ \x1b[31m" for v in range(1, NUM_ITEMS + 1)]
    features = {name: rng.standard_normal((NUM_ITEMS, width)) for name, width in (("text", 6), ("image", 5))}
    features["image"][::5] = np.nan
    path = tmp_path_factory.mktemp("data") / "small"
    return write_data_folder(path, histories, texts=titles, features=features, num_items=NUM_ITEMS)


def make_run(path: Path, data: DataFolder, **model: Any) -> tuple[Path, RunConfig]:
    """A run folder with a checkpoint of weights far from where training starts, and measured alignment."""
    sizes = {
        "name": "findrec-2025",
        "dim": DIM,
        "stream": {"layers": 1},
        "routing": {"heads": 2, "experts": 3},
    }
    tree = {
        "name": "small",
        "data": {"folder": str(data.path), "max_length": MAX_LENGTH},
        "model": ({"dim": DIM} if "name" in model else sizes) | model,
    }
    config = parse_config(tree)
    folder = path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    torch.manual_seed(0)
    network = build_tower_model(config, data)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    state = TrainState(epoch=1, step=10, plan="", best=0.1, best_step=10, stale=0)
    table = 0.5 * torch.randn(NUM_ITEMS + 1, DIM)
    table[0] = 0
    save_checkpoint(
        folder / "checkpoints",
        state,
        tower=network.state_dict(),
        optimizer_state={},
        tables={"items": {"weight": table}},
    )
    lines = [
        {"step": 1, "diagnostics/ksd_text": 2.0, "diagnostics/latent_rank_text": 8.0},
        {"step": 2, "train/loss": 1.0, "diagnostics/gate_entropy": 1.0},
        {"step": 21, "diagnostics/ksd_text": None, "diagnostics/latent_rank_text": 7.0},
        {"step": 41, "diagnostics/ksd_text": 0.5, "diagnostics/latent_rank_text": 6.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6')
    return folder, config


@pytest.fixture(scope="module")
def run(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    return make_run(tmp_path_factory.mktemp("home"), data, wait=True, gaps=True)


@pytest.fixture(scope="module")
def scorer(data: DataFolder, run: tuple[Path, RunConfig]) -> ModelScorer:
    return load_scorer(training_jobs(run[1], run[0])[0], data)


@pytest.fixture(scope="module")
def inspection(run: tuple[Path, RunConfig]) -> Inspection:
    return inspect_run(run[0], "0", last=6)


class Given(nn.Module):
    """A router with given gates for any input."""

    def __init__(self, gates_THE: Tensor) -> None:
        super().__init__()
        self.logits_THE = gates_THE.log()

    def forward(self, _: Tensor) -> Tensor:
        return self.logits_THE


def some_batch() -> tuple[Batch, Tensor, dict[str, ModalRows]]:
    torch.manual_seed(1)
    batch = Batch.build(
        item=torch.randint(1, 20, (2, 9)),
        length=torch.tensor([9, 9]),
        user=torch.arange(2),
        position=torch.tensor([4, 6, 8, 12, 17]),
        target=torch.ones(5, dtype=torch.int64),
        gap=torch.zeros(2, 9, dtype=torch.int64),
        wait=torch.ones(5, dtype=torch.int64),
    )
    present = batch.ids > 0
    features = {
        "text": ModalRows(torch.randn(len(present), 6) * present[:, None], present),
        "image": ModalRows(torch.randn(len(present), 5) * present[:, None], present),
    }
    return batch, torch.randn(len(present), DIM), features


def test_gates_reproduce_the_output(scorer: ModelScorer) -> None:
    batch, rows, features = some_batch()
    model = scorer.model
    assert isinstance(model, FindRec2025)
    assert model.control is not None
    model.train()
    inspection = explain(model, batch, rows, features, draws=3)
    assert model.training, "the mode is left as it was"
    model.eval()
    assert inspection.gates_THE.shape == (5, 2, 3)
    assert inspection.gates_THE.std(0).min() > 1e-3, "positions differ, else shuffling shows nothing"
    router = model.control.experts.router
    try:
        with torch.no_grad():
            assert torch.equal(model(batch, rows, features).h, inspection.whole.h)
            model.control.experts.router = Given(inspection.gates_THE)  # type: ignore[assignment]
            torch.testing.assert_close(model(batch, rows, features).h, inspection.whole.h)
            model.control.experts.router = Given(inspection.gates_THE.roll(1, 0))  # type: ignore[assignment]
            assert not torch.allclose(model(batch, rows, features).h, inspection.whole.h, atol=1e-3)
    finally:
        model.control.experts.router = router
    for out in inspection.shuffled:
        moved = (out.h - inspection.whole.h).abs().amax(1)
        assert bool((moved > 1e-4).all()), "no position keeps its own gates"
    assert len(inspection.shuffled) == 3


def test_outputs_without_a_modality(scorer: ModelScorer) -> None:
    batch, rows, features = some_batch()
    assert isinstance(scorer.model, FindRec2025)
    inspection = explain(scorer.model, batch, rows, features)
    gone = {m: ModalRows(torch.full_like(r.values, 9.0), r.present & False) for m, r in features.items()}
    with torch.no_grad():
        for name in features:
            expected = scorer.model(batch, rows, features | {name: gone[name]}).h
            assert torch.equal(inspection.without[name].h, expected)
            assert not torch.allclose(expected, inspection.whole.h, atol=1e-2)
        assert torch.equal(inspection.bare.h, scorer.model(batch, rows, gone).h)
    kept = withhold(features, ["image"])
    assert kept["text"] is features["text"]
    assert not kept["image"].values.any()


def test_a_modality_the_model_ignores_contributes_nothing(data: DataFolder, tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, data)
    scorer = load_scorer(training_jobs(config, folder)[0], data)
    assert isinstance(scorer.model, FindRec2025)
    encoder: Any = scorer.model.encoders["image"]
    before = inspect_user(scorer, data, 0, last=6)
    encoder.mean.weight.data.zero_()
    encoder.mean.bias.data.copy_(encoder.missing.data)
    after = inspect_user(scorer, data, 0, last=6)
    image, text = after.columns.index("image"), after.columns.index("text")
    assert (before.change_TC[:, image] > 1e-3).all()
    assert not after.change_TC[:, image].any()
    assert not after.gain_TC[:, image].any()
    assert (after.change_TC[:, text] > 1e-3).all()
    everything = after.columns.index(ALL_MODALITIES)
    assert np.array_equal(after.change_TC[:, everything], after.change_TC[:, text])


@pytest.mark.parametrize("model", [{}, {"repeat": False}, {"items": {"features": "both"}, "wait": True}])
def test_ranks_and_log_probabilities(data: DataFolder, tmp_path: Path, model: dict[str, Any]) -> None:
    """The last position is the test case of evaluation; a softmax written out gives the same numbers."""
    folder, config = make_run(tmp_path, data, **model)
    scorer = load_scorer(training_jobs(config, folder)[0], data)
    inspection = inspect_user(scorer, data, 0, last=5)
    ranks = rank_split(
        scorer, data, "test", RankingProtocol(users_per_block=8, max_length=MAX_LENGTH, mask_seen=False)
    )
    assert inspection.rank_T[-1] == ranks.rank[ranks.user == 0][0]
    assert [step.part for step in inspection.steps] == ["training"] * 3 + ["validation", "test"]
    assert [step.position for step in inspection.steps] == list(range(LENGTHS[0] - 5, LENGTHS[0]))

    events = data.histories([0])
    shown = events.item[-MAX_LENGTH - 1 : -1]
    batch = Batch.build(
        item=torch.from_numpy(shown)[None],
        length=torch.tensor([MAX_LENGTH]),
        user=torch.zeros(1, dtype=torch.int64),
        position=torch.tensor([MAX_LENGTH - 1]),
        target=torch.zeros(0, dtype=torch.int64),
        wait=torch.tensor([1 + 5]),  # one event a minute: floor(log2(61)) = 5
    )
    with torch.no_grad():
        out = scorer.model(batch, scorer.rows_Vd[batch.ids], scorer.catalogue.features(batch.ids))
        scores = (out.h @ scorer.items_Vd.T)[0].double()
        for item in set(shown.tolist()) if out.repeat is not None else ():
            seen = [MAX_LENGTH - 1 - index for index, other in enumerate(shown) if other == item]
            count, lag = np.log1p(len(seen)), min(seen)
            phi = torch.tensor([1, count, np.log1p(lag) / 4, count, np.exp(-lag / 16)])
            scores[item] += phi @ out.repeat[0].double()
    expected = torch.log_softmax(scores[1:], 0)[int(events.item[-1]) - 1]
    assert inspection.log_probability_T[-1] == pytest.approx(float(expected), abs=1e-4)


def test_gain_includes_the_catalogue_without_the_modality(data: DataFolder, tmp_path: Path) -> None:
    """Where items are scored by content, they too go without the modality."""
    folder, config = make_run(tmp_path, data, items={"features": "score"}, repeat=False)
    scorer = load_scorer(training_jobs(config, folder)[0], data)
    inspection = inspect_user(scorer, data, 0, last=3)
    text = inspection.columns.index("text")
    with torch.no_grad():
        scorer.model.item_side.projections["text"].weight.zero_()  # type: ignore[index, operator, union-attr]
    batch_features = scorer.catalogue.features
    scorer.catalogue.features = lambda ids: withhold(batch_features(ids), ["text"])  # type: ignore[assignment]
    whole = scorer.catalogue.all_features("cpu")
    scorer.items_Vd = scorer.model.item_transform(scorer.rows_Vd, whole).detach()
    without = inspect_user(scorer, data, 0, last=3)
    lost = inspection.log_probability_T - without.log_probability_T
    np.testing.assert_allclose(inspection.gain_TC[:, text], lost, atol=1e-5)


def test_short_histories_and_models_without_a_router(data: DataFolder, tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, data, routing={"kind": "mean", "heads": 2, "experts": 3})
    scorer = load_scorer(training_jobs(config, folder)[0], data)
    even = inspect_user(scorer, data, 1, last=30)
    assert len(even.steps) == LENGTHS[1] - 1, "all events but the last"
    assert even.shuffled_gain is None
    np.testing.assert_allclose(even.gates_THE, 1 / 3, atol=1e-6)
    np.testing.assert_allclose(even.entropy, np.log(3), atol=1e-5)
    single = inspect_user(scorer, data, 2, last=30)
    assert [step.position for step in single.steps] == [1]
    with pytest.raises(FindRecError, match="has a single event"):
        inspect_user(scorer, data, 3, last=30)
    assert "not measured" in text_of(single)


def text_of(inspection: Inspection) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_inspection(inspection))
    return console.export_text()


def test_text_shows_numbers_and_alignment(inspection: Inspection) -> None:
    text = text_of(inspection)
    assert [(c.name, c.steps) for c in inspection.alignment] == [
        ("ksd_text", [1, 41]),
        ("latent_rank_text", [1, 21, 41]),
    ]
    (row,) = [line for line in text.splitlines() if "ksd_text" in line]
    assert re.findall(r"[\d.]+", row.replace("ksd_text", "")) == ["1", "2.0000", "41", "0.5000"]
    last = next(line for line in text.splitlines() if line.split()[:1] == [str(LENGTHS[0] - 1)])
    for column in range(len(inspection.columns)):
        assert f"{inspection.change_TC[-1, column]:.2f} {inspection.gain_TC[-1, column]:+.2f}" in last
    heads = " ".join(str(expert + 1) for expert in inspection.gates_THE[-1].argmax(1))
    assert f" {heads} " in last
    assert text.count("[red]") == 2 * len(inspection.steps), "what the data says is no markup"
    assert "\x1b[31m" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 160, 200])
def test_the_tables_fit_the_terminal(inspection: Inspection, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(format_inspection(inspection, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    left_out = re.search(r"in the page: ([^.]+)\.", " ".join(text.split()))
    assert (left_out is None) == (width >= 160)
    head = next(line for line in text.splitlines() if line.split()[:1] == ["#"])
    for name in ("time", "part", "rank", "heads", "expert"):
        assert (name in head) != (left_out is not None and name in left_out[1])
    for position, step in enumerate(inspection.steps):
        (row,) = [line for line in text.splitlines() if line.split()[:1] == [str(step.position)]]
        assert f"{inspection.change_TC[position, 0]:.2f}" in row, "numbers are never cut"


def test_page_and_picture(inspection: Inspection, tmp_path: Path) -> None:
    page, picture = write_inspection(tmp_path, inspection)
    assert (page, picture) == (tmp_path / "inspect" / "0.html", tmp_path / "inspect" / "0.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert not re.search(r"@import|url\(", html)
    assert html.count('alt="ksd_text"') == html.count('alt="latent_rank_text"') == 1
    assert "ksd_text, the Stein discrepancy from the ID vectors" in html
    assert "2.0000 → 0.5000" in html
    for gate in inspection.gates_THE[-1].ravel():
        assert f">{gate:.2f}</td>" in html
    assert html.count("rgba(") == len(inspection.steps) * (2 * 3 + 2 * 3)
    assert write_inspection(tmp_path, inspection)[0].read_text() == html
    assert len(list((tmp_path / "inspect").iterdir())) == 2


def test_any_user_id_is_one_file(inspection: Inspection, tmp_path: Path) -> None:
    ids = ["a/b", "../../x", "..", ".", "a b", "é", "x" * 300, "x" * 301, "<i>", ""]
    names = [file_name(user) for user in ids]
    assert len(set(names)) == len(ids)
    assert all(0 < len(name) <= 120 and "/" not in name and not name.startswith(".") for name in names)
    page, _ = write_inspection(tmp_path, replace(inspection, user="../<i>"))
    assert page.parent == tmp_path / "inspect"
    assert "<i>" not in page.read_text()


@pytest.fixture
def _home(run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(run[0].parent.parent))
    monkeypatch.setattr(sys, "path", list(sys.path))  # main() takes the checkout off it


@pytest.mark.usefixtures("_home")
def test_command(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "small", "--user", "1", "--last", "4"]) == 0
    text = capsys.readouterr().out
    assert "user 1" in text
    assert "gates shuffled" in text
    for name in ("1.html", "1.png"):
        assert str(run[0] / "inspect" / name) in text.replace("\n", "")
        assert (run[0] / "inspect" / name).is_file()


@pytest.mark.usefixtures("_home")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["small", "--user", "00"], "no user '00' in .*did you mean '0'.*4 users"),
        (["small", "--user", "3"], "has a single event"),
        (["smal", "--user", "1"], "no run called 'smal'.*did you mean 'small'"),
        (["small"], "--user"),
        (["small", "--user", "1", "--last", "0"], "--last"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(says, captured.err, re.DOTALL)
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("model", "says"),
    [({"name": "sasrec"}, "'sasrec' has no experts"), ({"modalities": []}, "without modalities")],
)
def test_models_without_experts(data: DataFolder, tmp_path: Path, model: dict[str, Any], says: str) -> None:
    folder, _ = make_run(tmp_path, data, **model)
    with pytest.raises(FindRecError, match=says):
        inspect_run(folder, "0")


def test_a_run_without_checkpoint(data: DataFolder, tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path, data)
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(FindRecError, match="no usable checkpoint"):
        inspect_run(folder, "0")
