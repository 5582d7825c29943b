"""Features of recipes: made with the folder, and added once optional files exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_recipe import contents

from findrec.config import DataConfig
from findrec.datasets.encoders.add_features import add_features
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.recipe import Features, ImageFeature, ReadyFeature, Recipe
from findrec.errors import FindRecError

pytestmark = pytest.mark.usefixtures("toy_encoders")


def posters_of(recipe: Recipe, names: Sequence[str]) -> Path:
    root = recipe.folder / "posters"
    root.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        Image.new("RGB", (8, 8), (40 * n, 90, 255 - 40 * n)).save(root / f"{name}.jpg")
    return root


def with_features(recipe: Recipe, folder: Path, **features: object) -> Recipe:
    return recipe.model_copy(update={"features": Features.model_validate(features), "folder": folder})


def test_a_recipe_encodes_images_and_reads_vectors(publisher_ml: Recipe, tmp_path: Path) -> None:
    recipe = with_features(
        publisher_ml,
        tmp_path,
        image={"path": "posters", "encoder": "toy:1"},
        ready={"audio": {"path": "audio.npy"}},
    )
    posters_of(recipe, ["1", "2", "4"])
    np.save(tmp_path / "audio.npy", np.eye(5))
    for name in ("one", "two"):
        folder = prepare(recipe, tmp_path / name)
        assert folder.modalities == ["image", "audio"]
        assert folder.feature("image").present.tolist() == [False, True, True, False, True, False]
        assert folder.manifest.features[1].normalised
        assert {e.source for e in folder.manifest.sources} >= {"features.image", "features.audio"}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert prepare(recipe, tmp_path / "one").modalities == ["image", "audio"]
    posters_of(recipe, ["5"])
    with pytest.raises(FindRecError, match="posters has changed"):
        prepare(recipe, tmp_path / "one")
    (tmp_path / "posters").rename(tmp_path / "gone")
    assert prepare(recipe, tmp_path / "one").modalities == ["image", "audio"]  # nothing has changed then
    with pytest.raises(FindRecError, match="another version"):
        prepare(with_features(recipe, tmp_path), tmp_path / "one")
    with pytest.raises(FindRecError, match="does not exist"):
        prepare(with_features(recipe, tmp_path, image={"path": "elsewhere"}), tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_optional_images_are_encoded_once_they_exist(
    publisher_ml: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path / "home"))
    plain = with_features(publisher_ml, tmp_path)
    recipe = with_features(
        publisher_ml, tmp_path, image={"path": "data/posters", "encoder": "toy:1", "optional": True}
    )
    assert recipe.sha256() == plain.sha256()  # so that folders made before stay valid
    assert prepare(recipe, tmp_path / "out").modalities == []
    home_data = tmp_path / "home/data"
    home_data.mkdir(parents=True)
    posters_of(recipe, ["1", "2"]).rename(home_data / "posters")
    assert prepare(recipe, tmp_path / "out").modalities == ["image"]
    stamp = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    assert prepare(recipe, tmp_path / "out").modalities == ["image"]
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == stamp


def test_removed_features_are_reported_when_a_folder_is_replaced(
    publisher_ml: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(publisher_ml, tmp_path / "out")
    posters = posters_of(with_features(publisher_ml, tmp_path), ["1"])
    spec = ImageFeature(path=str(posters), encoder="toy:1")
    add_features(folder.path, "image", spec)
    assert prepare(publisher_ml, tmp_path / "out").modalities == ["image"]
    assert prepare(publisher_ml, tmp_path / "out", force=True).modalities == []
    assert "image: not in the recipe" in capsys.readouterr().out


def test_a_modality_has_one_source() -> None:
    with pytest.raises(ValueError, match="'image' is both encoded and ready"):
        Features(image=ImageFeature(path="x"), ready={"image": ReadyFeature(path="y")})
    with pytest.raises(ValueError, match="should match pattern"):
        Features(ready={"../image": ReadyFeature(path="y")})


def test_the_ml_latest_recipe_runs_without_posters() -> None:
    from findrec.datasets.sources.recipe import load_recipe

    recipe = load_recipe(DataConfig(recipe="ml-latest-small").recipe)
    assert recipe.features.image is not None
    assert recipe.features.image.optional
