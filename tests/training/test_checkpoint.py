"""A checkpoint counts only when its manifest, written last, verifies."""

import json

import pytest
import torch

from findrec.errors import FindRecError
from findrec.training import checkpoint as cp


def save(root, step, best_step=-1, value=0.0):
    state = cp.TrainState(epoch=step, step=step, plan="p", best=0.5, best_step=best_step, stale=0)
    tower = {"a.weight": torch.full((2, 3), value)}
    moments = {"a.weight.exp_avg": torch.rand(2, 3), "a.weight.exp_avg_sq": torch.rand(2, 3)}
    table = {k: torch.rand(5, 4) for k in ("weight", "exp_avg", "exp_avg_sq")}
    path = cp.save_checkpoint(root, state, tower=tower, moments=moments, table=table)
    return path, state, tower, moments, table


def test_round_trip(tmp_path):
    path, state, tower, moments, table = save(tmp_path, 7, value=1.5)
    back = cp.load_checkpoint(path)
    assert back.state == state
    for got, want in ((back.tower, tower), (back.moments, moments), (back.table, table)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_nothing_is_pickled(tmp_path):
    path, *_ = save(tmp_path, 1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest", "garbled"])
def test_damaged_newest_falls_back_loudly(tmp_path, damage, capsys):
    good, *_ = save(tmp_path, 1)
    bad, *_ = save(tmp_path, 2)
    tower = bad / "tower.safetensors"
    if damage == "cut":
        tower.write_bytes(tower.read_bytes()[:-1])
    elif damage == "flip":
        data = bytearray(tower.read_bytes())
        data[-1] ^= 1
        tower.write_bytes(bytes(data))
    elif damage == "missing":
        tower.unlink()
    elif damage == "manifest":
        (bad / "manifest.json").unlink()
    else:
        (bad / "manifest.json").write_text("{")
    assert cp.latest_checkpoint(tmp_path) == good
    assert str(bad) in capsys.readouterr().out
    with pytest.raises(FindRecError, match="cannot load checkpoint"):
        cp.load_checkpoint(bad)


def test_crash_before_the_manifest_leaves_the_old_one(tmp_path, monkeypatch):
    good, *_ = save(tmp_path, 1)
    real = cp._write_json

    def dies(path, value):
        if path.name == "manifest.json":
            raise OSError("disk full")
        real(path, value)

    monkeypatch.setattr(cp, "_write_json", dies)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2)
    assert cp.latest_checkpoint(tmp_path) == good
    monkeypatch.undo()
    newer, *_ = save(tmp_path, 2)  # the half-written folder is in nobody's way
    assert cp.latest_checkpoint(tmp_path) == newer


def test_unknown_format_is_refused(tmp_path):
    path, *_ = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "format is 99" in cp.verify_checkpoint(path)


def test_a_table_saved_in_parts_is_read_by_rows(tmp_path, monkeypatch):
    """Parts of two holders, the second in files of two rows each."""
    state = cp.TrainState(epoch=1, step=1, plan="p", best=0.5, best_step=1, stale=0)
    table = {k: torch.rand(9, 4) for k in ("weight", "exp_avg", "exp_avg_sq")}
    path = cp.begin_checkpoint(tmp_path, state)
    files = cp.save_rows(path, 0, {k: v[:4] for k, v in table.items()})
    monkeypatch.setattr(cp, "TABLE_FILE_BYTES", 2 * 3 * 16)
    files |= cp.save_rows(path, 4, {k: v[4:] for k, v in table.items()})
    cp.save_checkpoint(tmp_path, state, tower={}, moments={}, table_files=files)
    assert len(list(path.glob("table-*"))) == 4
    assert cp.latest_checkpoint(tmp_path) == path
    saved = cp.load_checkpoint(path).table
    assert (saved.num_rows, saved.width) == (9, 4)
    assert all(torch.equal(saved[k], table[k]) for k in table)
    for first, end in ((0, 9), (3, 5), (4, 4), (8, 9)):
        assert torch.equal(saved.rows("weight", first, end), table["weight"][first:end])
    (path / "table-4-5.safetensors").unlink()
    with pytest.raises(FindRecError, match="not all rows"):
        cp.load_checkpoint(path, verify=False)
