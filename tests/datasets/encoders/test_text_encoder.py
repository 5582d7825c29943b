"""The text encoder, with a tiny random sentence-transformers model; the real weights need a network."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.encoders.text_encoder import encode_text
from findrec.errors import FindRecError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a one-layer random BERT of width 16 and mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    with warnings.catch_warnings():  # version 6 has moved them, version 5 has them only here
        warnings.simplefilter("ignore", DeprecationWarning)
        from sentence_transformers.models import Pooling, Transformer
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    bert = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[bert, Pooling(16)], device="cpu").save(str(folder / "model"))
    return str(folder / "model")


def test_equal_texts_get_equal_rows_and_missing_ones_zeros(tiny: str) -> None:
    texts = ["milk", None, "bread and butter", "milk", "   ", " milk ", "a much longer text of many words"]
    encoded = encode_text(texts, tiny)
    assert encoded.values.shape == (7, 16)
    assert encoded.values.dtype == np.float16
    assert encoded.present.tolist() == [True, False, True, True, False, True, True]
    assert (encoded.values[[1, 4]] == 0).all()
    assert (encoded.values[0] == encoded.values[[3, 5]]).all()
    assert not (encoded.values[0] == encoded.values[2]).all()
    assert len(encoded.weights_sha256) == 64


def test_rows_follow_their_texts_not_the_order_of_encoding(tiny: str) -> None:
    texts = ["milk", "bread and butter", "cheese of the mountains", "tea"]
    forwards, backwards = encode_text(texts, tiny), encode_text(texts[::-1], tiny)
    assert (forwards.values == backwards.values[::-1]).all()
    for row, text in enumerate(texts):
        alone = encode_text([text], tiny).values[0]
        np.testing.assert_allclose(alone, forwards.values[row], atol=2e-3)
    assert forwards.weights_sha256 == backwards.weights_sha256


def test_no_text_at_all() -> None:
    with pytest.raises(FindRecError, match="no item has a text"):
        encode_text([None, " "], "all-MiniLM-L6-v2")


def test_unknown_encoder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FindRecError, match=r"'no/such-encoder' cannot be loaded.*features\.text\.encoder"):
        encode_text(["milk"], "no/such-encoder")


@pytest.mark.network
@pytest.mark.slow
def test_packaged_weights_embed_similar_texts_nearby() -> None:
    encoded = encode_text(["a romantic comedy", "a funny love story", "diesel engine"], "all-MiniLM-L6-v2")
    values = encoded.values.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=2e-3)
    likeness = values @ values.T
    assert likeness[0, 1] > 0.4 > likeness[0, 2]
