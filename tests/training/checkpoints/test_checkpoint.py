"""A checkpoint counts only when its manifest, written last, verifies."""

import json
import shutil

import pytest
import torch

from findrec.errors import FindRecError
from findrec.tables.base import ITEMS
from findrec.training.checkpoints import checkpoint as cp


def save(root, step, best_step=-1, value=0.0):
    state = cp.TrainState(epoch=step, step=step, plan="p", best=0.5, best_step=best_step, stale=0)
    tower = {"a.weight": torch.full((2, 3), value)}
    moments = {"a.weight.exp_avg": torch.rand(2, 3), "a.weight.exp_avg_sq": torch.rand(2, 3)}
    table = {k: torch.rand(5, 4) for k in ("weight", "exp_avg", "exp_avg_sq")}
    path = cp.save_checkpoint(root, state, tower=tower, optimizer_state=moments, tables={ITEMS: table})
    return path, state, tower, moments, table


def test_round_trip(tmp_path):
    path, state, tower, moments, table = save(tmp_path, 7, value=1.5)
    back = cp.load_checkpoint(path)
    assert back.state == state
    for got, want in ((back.tower, tower), (back.optimizer_state, moments), (back.table, table)):
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
    newer, *_ = save(tmp_path, 2)  # replaces the incomplete folder
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
    cp.save_checkpoint(tmp_path, state, tower={}, optimizer_state={}, tables={}, table_files=files)
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


def rewrite(path, **changes):
    """Change keys of a checkpoint's manifest."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_state(path, **changes):
    """Change keys of `state.json`, and its entry in the manifest."""
    tree = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps(tree))
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files=files | cp._entries([path / "state.json"]))


@pytest.mark.parametrize("newer", ["format", "manifest key", "entry key", "state key", "older one"])
def test_a_newer_version_is_refused_and_not_taken_for_damage(tmp_path, newer):
    save(tmp_path, 1)
    path, *_ = save(tmp_path, 2)
    if newer == "format":
        rewrite(path, format=cp.FORMAT + 1)
    elif newer == "manifest key":
        rewrite(path, compression="zstd")
    elif newer == "entry key":
        files = json.loads((path / "manifest.json").read_text())["files"]
        files["tower.safetensors"]["compression"] = "zstd"
        rewrite(path, files=files)
    elif newer == "state key":
        with_state(path, momentum=0.5)
    else:
        rewrite(tmp_path / "step-00000001", format=cp.FORMAT + 1)
    before = contents(tmp_path)
    for act in (cp.latest_checkpoint, cp.refuse_newer):
        with pytest.raises(FindRecError, match=r"written by a newer version .*Nothing was changed"):
            act(tmp_path)
    if newer != "older one":
        with pytest.raises(FindRecError, match="cannot load checkpoint"):
            cp.load_checkpoint(path)
    assert contents(tmp_path) == before


def test_every_flipped_bit_is_damage_and_the_older_checkpoint_is_taken(tmp_path):
    good, *_ = save(tmp_path, 1)
    bad, *_ = save(tmp_path, 2)
    for name in ("manifest.json", "state.json"):
        original = (bad / name).read_bytes()
        for bit in range(8 * len(original)):
            damaged = bytearray(original)
            damaged[bit // 8] ^= 1 << bit % 8
            (bad / name).write_bytes(bytes(damaged))
            assert cp.latest_checkpoint(tmp_path) == good, (name, bit)
        (bad / name).write_bytes(original)
    assert cp.latest_checkpoint(tmp_path) == bad
    for path in (good, bad):
        rewrite(path, format=9)  # one bit from 1: with no other checkpoint it is refused, not trained over
    with pytest.raises(FindRecError, match="newer version"):
        cp.latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        '{"format": 1}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": {"state.json": 7}}',
        '{"format": 1, "files": {"../state.json": {"bytes": 1, "sha256": ""}}}',
        '{"format": "1", "files": {}}',
        "[" * 100_000,
        "\ud800",
        "\0",
    ],
)
def test_a_manifest_of_another_form_is_damaged(tmp_path, text):
    good, *_ = save(tmp_path, 1)
    bad, *_ = save(tmp_path, 2)
    (bad / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert cp.verify_checkpoint(bad)
    assert cp.latest_checkpoint(tmp_path) == good
    with pytest.raises(FindRecError, match="cannot load checkpoint"):
        cp.load_checkpoint(bad, verify=False)


@pytest.mark.parametrize("left_out", ["state.json", "tower.safetensors", "tower_moments.safetensors"])
def test_every_file_that_is_read_must_be_listed(tmp_path, left_out):
    path, *_ = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files={name: entry for name, entry in files.items() if name != left_out})
    assert f"does not list {left_out}" in cp.verify_checkpoint(path)
    with pytest.raises(FindRecError, match=f"does not list {left_out}"):
        cp.load_checkpoint(path, verify=False)


def test_table_files_that_are_not_listed_are_not_read(tmp_path):
    path, *_, table = save(tmp_path, 1)
    for stray in ("table-0-4-copy", "table-x-y", "table-5-9", "table_users-0-4", "table-0-4 (1)"):
        shutil.copy(path / "table-0-4.safetensors", path / f"{stray}.safetensors")
    saved = cp.load_checkpoint(path)
    assert saved.tables.keys() == {ITEMS}
    assert torch.equal(saved.table["weight"], table["weight"])


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    for stray in ("step-00000005-copy", "step-99999999.bak", "step-999999999x", "step-9", "step-0000000200"):
        shutil.copytree(tmp_path / "step-100000000", tmp_path / stray)
    assert [cp.step_of(path.name) for path in cp.list_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert cp.latest_checkpoint(tmp_path).name == "step-100000000"
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-200000000")
    assert cp.verify_checkpoint(tmp_path / "step-200000000") == "it is a copy of the checkpoint of step 5"
    assert cp.latest_checkpoint(tmp_path).name == "step-100000000"


@pytest.mark.parametrize(
    "change", [{"step": "2"}, {"epoch": None}, {"catalogue": {"items": 5}}, {"best": []}]
)
def test_a_state_of_other_types_is_damage(tmp_path, change):
    good, *_ = save(tmp_path, 1)
    bad, *_ = save(tmp_path, 2)
    with_state(bad, **change)
    assert cp.latest_checkpoint(tmp_path) == good
    with pytest.raises(FindRecError, match=r"state\.json"):
        cp.read_state(bad)


@pytest.mark.parametrize("name", ["tower.safetensors", "tower_moments.safetensors", "table-0-4.safetensors"])
def test_tensors_that_cannot_be_read_are_reported(tmp_path, name):
    """Even with the right sha256 in the manifest."""
    path, *_ = save(tmp_path, 1)
    (path / name).write_bytes(b"no tensors")
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite(path, files=files | cp._entries([path / name]))
    with pytest.raises(FindRecError, match=r"step-00000001.* (cannot be read|cannot load)|cannot load"):
        cp.load_checkpoint(path)
