"""The loader's benchmark gives complete rows and a clear lead over the WebDataset pipeline."""

import json

import pytest
from bench.loader import Profile, bench_loader
from bench.rows import publish_figures


def test_rows_of_a_small_profile(capsys):
    profiles = [
        Profile("short", 4000, 10, 1000, 60, 60, 300),
        Profile("long", 60, 300, 1000, 1000, 200, 20, spread=0.5),
    ]
    rows = bench_loader(profiles, runs=1)
    assert [(row["impl"], row["profile"]) for row in rows] == [
        (impl, profile.name)
        for profile in profiles
        for impl in ("findrec", "webdataset", "webdataset, our batches")
    ]
    for row in rows:
        assert row["bytes_per_s"] == pytest.approx(12 * row["events_per_s"])
        assert row["events_per_s"] / row["users_per_s"] == pytest.approx(row["events"] / row["users"])
    short, stock = rows[:2]
    assert 8 < short["events"] / short["users"] < 12
    assert short["times_stock"] == pytest.approx(short["users_per_s"] / stock["users_per_s"])
    assert short["times_stock"] > 10  # 200 and more were measured
    publish_figures(rows, None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == rows


def test_lengths_have_the_requested_mean():
    for profile in (
        Profile("a", 20_000, 10, 50, 200, 200, 1),
        Profile("b", 20_000, 800, 50, 9000, 200, 1, 0.6),
    ):
        length = profile.lengths()
        assert abs(length.mean() / profile.mean - 1) < 0.03
        assert 2 <= length.min() <= length.max() <= profile.longest
