"""Synthetic data: similar to its profile, determined by its seed, with learnable patterns."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest
from small_recipe import small_recipe

from findrec.cli.app import main
from findrec.datasets.batches.plan import cut_windows
from findrec.datasets.batches.windows import train_batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.stats.statistics import measure
from findrec.datasets.synthetic.events import USERS_PER_BLOCK, EventMaker, fit_lengths
from findrec.datasets.synthetic.items import make_catalogue, make_feature
from findrec.datasets.synthetic.profile import Lengths, Profile, load_profile
from findrec.datasets.synthetic.synthesize import Synthesis, synthesize, write_log
from findrec.errors import FindRecError

# Tolerated differences from the real data. Long lags are the least accurate, as popular items also repeat by
# chance after a long time, which is less frequent in the real log.
TOLERANCE = {
    "length_mu": 0.1,
    "length_sigma": 0.06,
    "users_1000": 0.035,
    "slope_head": 0.08,
    "slope_middle": 0.1,
    "share_top_1": 0.04,
    "share_top_20": 0.03,
    "items_below_5": 0.08,
    "repeat_rate": 0.03,
    "repeat_lag_p25": 1,
    "repeat_lag_p50": 2,
    "repeat_lag_p75": 4,
    "repeat_lag_p95": 35,
    "distinct_after_100": 6,
    "distinct_after_500": 30,
    "distinct_after_1000": 60,
    "distinct_after_2000": 120,
    "session_mean": 1.5,
    "session_p95": 8,
    "gap_days_p50": 3,
    "gap_days_p95": 50,
    "tie_rate": 0.05,
    "jaccard_neighbours": 0.1,
    "jaccard_first_last": 0.1,
    "cold_share": 0.06,
}


def small(name: str = "complete-journey", **parts: object) -> Profile:
    """A profile with short histories, for tests of all but its figures."""
    lengths = Lengths(mu=3.0, sigma=0.8, minimum=3, maximum=200)
    return load_profile(name).model_copy(update={"lengths": lengths, **parts})


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_QUIET", "1")


@pytest.mark.parametrize(
    ("name", "users"), [("complete-journey", 1500), ("ml-latest-small", 800), ("amazon-grocery", 15_000)]
)
def test_statistics_match_the_profile(name: str, users: int, tmp_path: Path) -> None:
    profile = load_profile(name)
    stats = measure(synthesize(tmp_path / "data", profile, users=users, seed=1)).model_dump()
    off = {
        key: (stats[key], target)
        for key, target in profile.targets.items()
        if not abs(stats[key] - target) <= TOLERANCE[key]
    }
    assert off == {}


def test_data_depend_only_on_the_seed(tmp_path: Path) -> None:
    made = [
        synthesize(tmp_path / str(k), small(), users=1200, items=900, seed=seed, shard_bytes=size).manifest
        for k, (seed, size) in enumerate([(5, 1 << 26), (5, 1 << 14), (6, 1 << 26)])
    ]
    assert len(made[0].shards) < len(made[1].shards)
    assert made[0].events_sha256 == made[1].events_sha256 != made[2].events_sha256
    assert made[0].files == made[1].files | {"users.parquet": made[0].files["users.parquet"]}
    names = ["features/text.safetensors", "features/image.safetensors"]
    assert all(made[0].files[name] != made[2].files[name] for name in names)


def test_a_block_needs_no_other_block() -> None:
    profile = small()
    catalogue = make_catalogue(profile, 500, seed=3)
    few = EventMaker(profile, catalogue, 2 * USERS_PER_BLOCK, seed=3).block(1)
    many = EventMaker(profile, catalogue, 9 * USERS_PER_BLOCK + 1, seed=3)
    np.testing.assert_array_equal(few.columns["item"], many.block(1).columns["item"])
    np.testing.assert_array_equal(few.columns["timestamp"], many.block(1).columns["timestamp"])
    assert many.num_blocks == 10
    assert len(many.block(9).length) == 1  # the last user, alone


@pytest.mark.parametrize(("users", "items"), [(1, 2), (1, 1000), (17, 50), (USERS_PER_BLOCK, 40)])
@pytest.mark.parametrize("name", ["complete-journey", "ml-latest-small", "amazon-grocery"])
def test_unusual_sizes_give_valid_folders(name: str, users: int, items: int, tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "data", small(name), users=users, items=items)
    assert DataFolder.open(folder.path, verify=True).num_users == users
    assert folder.num_items == items
    assert (folder.length > 0).all()
    assert (measure(folder).repeat_rate > 0) == (name == "complete-journey")


def test_sessions_do_not_merge(tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "data", small("ml-latest-small"), users=300)  # the writer checks the order
    pauses = np.concatenate([np.diff(h.timestamp) for h in folder.blocks()])
    assert (pauses == 0).any()
    stats = measure(folder)
    assert 4 < stats.session_mean < 14.1  # cut off by the short histories


@pytest.mark.parametrize(
    "lengths",
    [
        Lengths(mu=4.0, sigma=1.0),
        Lengths(mu=3.5, sigma=1.0, minimum=20, maximum=2000),
        Lengths(mu=5.0, sigma=1.5, maximum=1500),
    ],
)
def test_lengths_have_the_moments_of_the_profile_after_clipping(lengths: Lengths) -> None:
    mu, sigma = fit_lengths(lengths)
    drawn = np.exp(mu + sigma * np.random.default_rng(0).standard_normal(200_000))
    log = np.log(np.clip(np.rint(drawn), lengths.minimum, lengths.maximum))
    assert log.mean() == pytest.approx(lengths.mu, abs=0.02)
    assert log.std() == pytest.approx(lengths.sigma, abs=0.02)


def test_features_depend_on_the_category() -> None:
    profile = small()
    catalogue = make_catalogue(profile, 2000, seed=0)
    modality = profile.features["image"]
    made = make_feature(catalogue, "image", modality, seed=0)
    assert made.present[1:].mean() == pytest.approx(1 - modality.missing, abs=0.03)
    assert not made.values[~made.present].any()
    ids = np.flatnonzero(made.present)
    values, category = made.values[ids].astype(np.float64), catalogue.category[ids - 1]
    cosine = values @ values.T
    np.testing.assert_allclose(np.diag(cosine), 1, atol=2e-3)
    same = (category[:, None] == category[None, :]) & ~np.eye(len(ids), dtype=bool)
    assert cosine[same].mean() == pytest.approx(modality.signal**2, abs=0.03)
    assert abs(cosine[category[:, None] != category[None, :]].mean()) < 0.03


def next_in_category(folder: DataFolder) -> tuple[float, float]:
    """How often the next item has the same category, and how often by chance."""
    category = np.array(folder.items["category"].to_pylist())
    whole = next(iter(folder.blocks()))
    last = np.zeros(len(whole.item), dtype=bool)
    last[whole.offset[1:] - 1] = True
    now = category[whole.item - 1]
    follows = (now[:-1] == now[1:])[~last[:-1]].mean()
    share = np.unique(now, return_counts=True)[1] / len(now)
    return float(follows), float(share @ share)


def test_categories_persist_inside_sessions(tmp_path: Path) -> None:
    profile = small("ml-latest-small")
    follows, chance = next_in_category(synthesize(tmp_path / "with", profile, users=400))
    assert follows > chance + 0.15
    blind = profile.taste.model_copy(update={"persistence": 0.0, "loyalty": 0.0})
    plain = profile.model_copy(update={"taste": blind})
    follows, chance = next_in_category(synthesize(tmp_path / "without", plain, users=400))
    assert follows == pytest.approx(chance, abs=0.03)


def test_a_batch_trains(tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "data", small(), users=40)
    windows = cut_windows(folder, 16, overlap=0.5)
    batch = train_batch(folder, windows, np.arange(4))
    assert batch.target.numel() > 0
    assert folder.feature("text").rows(batch.target).values.abs().sum() > 0


def test_an_equal_folder_is_reused_and_another_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "data"
    synthesize(path, small(), users=30)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert synthesize(path, small(), users=30).num_users == 30
    assert (path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FindRecError, match="--force"):
        synthesize(path, small(), users=31)
    assert synthesize(path, small(), users=31, force=True).num_users == 31
    (path / "mine.txt").write_text("precious")
    with pytest.raises(FindRecError, match=r"mine\.txt"):
        synthesize(path, small(), users=30, force=True)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_raw_log_has_the_same_events_and_can_be_prepared(kind: str, tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "data", small(), users=600, items=700)
    file = tmp_path / f"log.{kind}"
    assert write_log(file, small(), users=600, items=700) == folder.manifest.num_events
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    log = duckdb.sql(f"SELECT * FROM '{file}'").fetchnumpy()
    whole = list(folder.blocks())
    np.testing.assert_array_equal(log["item"], np.concatenate([h.item for h in whole]))
    np.testing.assert_array_equal(log["timestamp"], np.concatenate([h.timestamp for h in whole]))
    recipe = small_recipe(
        tmp_path,
        files={"log": {"member": file.name}},
        events=f'SELECT "user", item, timestamp FROM read_{kind}({{log}})',
        split={"unit": "timestamp"},
    )
    prepared = prepare(recipe, tmp_path / "prepared")
    np.testing.assert_array_equal(prepared.length, folder.length)
    np.testing.assert_array_equal(prepared.test_start, folder.test_start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "0"], "at least one user"),
        (["--items", "1"], "from 2 to"),
        (["--items", str(2**31)], "from 2 to"),
        (["--seed", "-1"], "seed"),
        (["--profile", "amazon-grocer"], "amazon-grocery"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synthesize", str(tmp_path / "data"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_profiles_with_mistakes_are_rejected(tmp_path: Path) -> None:
    text = Path(__file__).parents[3].joinpath("datasets/profiles/amazon-grocery.yaml").read_text()
    file = tmp_path / "mine.yaml"
    for old, new, message in [
        ("lasting: 0.0", "lasting: 1.5", "drift.lasting"),
        ("minimum: 2", "minimum: 2000", "minimum must not exceed maximum"),
        ("sessions:", "sesions:", "sesions"),
    ]:
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(FindRecError, match=message):
            load_profile(str(file))


def test_a_raw_log_has_a_known_suffix(tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match=r"\.csv or \.parquet"):
        write_log(tmp_path / "log.tsv", small(), users=3)


def test_commands_make_a_folder_and_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--profile", "amazon-grocery", "--users", "50", "--seed", "2"]
    assert main(["synthesize", str(tmp_path / "data"), *common]) == 0
    assert main(["synthesize", str(tmp_path / "log.csv"), *common]) == 0
    shown = capsys.readouterr().out
    num_events = DataFolder.open(tmp_path / "data").manifest.num_events
    assert shown.count(f"({num_events:,} events)") == 2
    assert (tmp_path / "log.csv").read_text().startswith('"user","item","timestamp"')


def test_items_follow_the_users_in_the_profiles_proportion() -> None:
    profile = small()
    made = Synthesis(profile, users=profile.users // 10, items=None, seed=0)
    assert made.items == pytest.approx(profile.items / 10, rel=0.01)


@pytest.mark.parametrize("items", [20_000, 60_000, 200_000])
def test_the_repeat_rate_holds_for_any_catalogue(items: int, tmp_path: Path) -> None:
    profile = load_profile("complete-journey")
    stats = measure(synthesize(tmp_path / "data", profile, users=400, items=items))
    assert stats.repeat_rate == pytest.approx(profile.repeats.rate, abs=0.03)
