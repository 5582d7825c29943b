"""Encoding in batches, with an encoder that records its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.encoders.encoder import BrokenInputError, encode_inputs, first_few
from findrec.datasets.encoders.vector_store import VectorStore
from findrec.errors import FindRecError


class Letters:
    """A word as counts of its letters; words with a ? are broken."""

    name, revision, weights_sha256, unit = "letters", "1", "w" * 64, "words"

    def __init__(self, batch: int = 2, scale: float = 1.0) -> None:
        self.batch = batch
        self.scale = scale
        self.seen: list[list[str]] = []

    def fingerprint(self, value: str) -> str:
        return value

    def length(self, value: str) -> int:
        return len(value)

    def prepare(self, value: str) -> str:
        if "?" in value:
            raise BrokenInputError("a question")
        return value.lower()

    def encode(self, prepared: Sequence[str]) -> np.ndarray:
        self.seen.append(list(prepared))
        counts = [[word.count(letter) for letter in "abcdefgh"] for word in prepared]
        return np.array(counts, dtype=np.float32).clip(0.1) * np.float32(self.scale)


WORDS = ["bad", None, "cabbage", "what?", "egg", "bad", "bee", "what?"]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_rows_follow_inputs_in_any_batch(batch: int) -> None:
    encoder = Letters(batch)
    encoded = encode_inputs(encoder, WORDS, show=False)
    assert encoded.present.tolist() == [True, False, True, False, True, True, True, False]
    assert encoded.values[2].round().tolist() == [2, 2, 1, 0, 1, 0, 1, 0]
    assert (encoded.values[0] == encoded.values[5]).all()
    assert (encoded.values[~encoded.present] == 0).all()
    assert encoded.broken == [(3, "a question"), (7, "a question")]
    assert sorted(word for words in encoder.seen for word in words) == ["bad", "bee", "cabbage", "egg"]
    assert encoder.seen[0][0] == "cabbage"  # the longest first
    assert all(len(words) <= batch for words in encoder.seen)


def test_stored_vectors_are_not_encoded_again(tmp_path: Path) -> None:
    whole = encode_inputs(Letters(), WORDS, show=False)
    encode_inputs(Letters(), WORDS[:3], store=VectorStore(tmp_path), show=False)
    second = Letters()
    encoded = encode_inputs(second, WORDS, store=VectorStore(tmp_path), show=False)
    assert sorted(word for words in second.seen for word in words) == ["bee", "egg"]
    assert (encoded.values == whole.values).all()
    assert encoded.broken == whole.broken  # tried again: the file may have been mended
    other = Letters()
    other.weights_sha256 = "v" * 64
    encode_inputs(other, WORDS, store=VectorStore(tmp_path), show=False)
    assert sum(map(len, other.seen)) == 4  # other weights find nothing


def test_batches_before_an_error_are_stored(tmp_path: Path) -> None:
    class Failing(Letters):
        def encode(self, prepared: Sequence[str]) -> np.ndarray:
            if self.seen:
                raise KeyboardInterrupt
            return super().encode(prepared)

    with pytest.raises(KeyboardInterrupt):
        encode_inputs(Failing(), WORDS, store=VectorStore(tmp_path), show=False)
    second = Letters()
    encode_inputs(second, WORDS, store=VectorStore(tmp_path), show=False)
    assert sorted(word for words in second.seen for word in words) == ["bad", "bee", "egg"]


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e6])
def test_numbers_too_large_for_fp16_are_rejected(scale: float) -> None:
    with pytest.raises(FindRecError, match="'letters' returns numbers"):
        encode_inputs(Letters(scale=scale), WORDS, show=False)


def test_nothing_to_encode() -> None:
    encoded = encode_inputs(Letters(), [None, "what?"], show=False)
    assert encoded.values.shape == (2, 0)
    assert not encoded.present.any()


def test_first_few() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(["a", "b", "c", "d"]) == "a, b, c, ..."
