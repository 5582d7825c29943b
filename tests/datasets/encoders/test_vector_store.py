"""Stored vectors survive the process, and damaged parts are ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.encoders.vector_store import VectorStore, key_of


def vectors(num: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float16)


def keys(*names: str) -> np.ndarray:
    return np.array([key_of(name) for name in names], dtype=np.uint64)


@pytest.mark.parametrize("on_disk", [True, False])
def test_vectors_are_found_by_key(on_disk: bool, tmp_path: Path) -> None:
    store = VectorStore(tmp_path / "store" if on_disk else None)
    given = vectors(3, 5)
    store.add(keys("a", "b"), given[:2])
    store.flush()
    store.add(keys("c"), given[2:])
    requested = np.concatenate([keys("c", "x", "a", "c"), np.zeros(1, np.uint64)])
    values, present = store.take(requested)
    assert present.tolist() == [True, False, True, True, False]
    assert (values[[0, 2, 3]] == given[[2, 0, 2]]).all()
    assert (values[~present] == 0).all()
    assert sorted(store.known()) == sorted(keys("a", "b", "c"))


def test_nothing_known_gives_an_empty_width(tmp_path: Path) -> None:
    values, present = VectorStore(tmp_path / "none").take(keys("a", "b"))
    assert values.shape == (2, 0)
    assert not present.any()


def test_another_process_finds_only_flushed_vectors(tmp_path: Path) -> None:
    first = VectorStore(tmp_path)
    first.add(keys("a", "b"), vectors(2, 4))
    first.flush()
    first.add(keys("c"), vectors(1, 4, seed=1))
    values, present = VectorStore(tmp_path).take(keys("a", "b", "c"))
    assert present.tolist() == [True, True, False]
    assert (values[:2] == vectors(2, 4)).all()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "renamed"])
def test_a_damaged_part_is_not_trusted(damage: str, tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    for name in ("a", "b"):
        store.add(keys(name), vectors(1, 64))
        store.flush()
    path = next(path for path in tmp_path.iterdir() if key_of("a").to_bytes(8, "little") in path.read_bytes())
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    path.write_bytes({"cut": bytes(data[:-10]), "empty": b""}.get(damage, bytes(data)))
    if damage == "renamed":
        path.rename(path.with_name("0" * 64 + ".vectors"))
    again = VectorStore(tmp_path)
    assert again.take(keys("a", "b"))[1].tolist() == [False, True]
    assert len(list(tmp_path.glob("*.vectors"))) == 1


def test_parts_of_another_width_are_left_alone(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    store.add(keys("wide"), vectors(1, 8))
    store.flush()
    store.add(keys("small"), vectors(1, 3))
    values, present = store.take(keys("other", "small"))
    assert values.shape == (2, 3)
    assert present.tolist() == [False, True]


def test_parts_are_written_incrementally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("findrec.datasets.encoders.vector_store.PART_ROWS", 4)
    store = VectorStore(tmp_path)
    for n in range(10):
        store.add(keys(str(n)), vectors(1, 2, seed=n))
    assert len(list(tmp_path.glob("*.vectors"))) == 2


def test_keys_depend_on_the_boundaries_of_strings() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("\udcff") != key_of("\udcfe")  # bytes of a file name that are no UTF-8
