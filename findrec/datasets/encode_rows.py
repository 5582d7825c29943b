"""Encoding in batches, whatever the encoder: equal inputs once, ready ones not again, broken ones told.

Inputs are prepared (read, decoded, scaled) by a few threads while the encoder works on the batch before.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.vector_store import VectorStore, key_of
from findrec.errors import FindRecError
from findrec.progress import progress

THREADS = min(4, os.cpu_count() or 1)
Input = TypeVar("Input")
Contra = TypeVar("Contra", contravariant=True)


class BrokenInputError(Exception):
    """Why one input cannot be encoded; the others are."""


class Encoder(Protocol[Contra]):
    """Turns inputs into vectors, the same ones in whatever batch (to rounding)."""

    name: str  # what a user calls it
    revision: str  # which release of it; empty where nobody says
    weights_sha256: str
    batch: int  # inputs encoded together
    unit: str  # what the inputs are, in the plural

    def fingerprint(self, given: Contra) -> str:
        """What tells this input from any other."""

    def length(self, given: Contra) -> int:
        """What the work grows with: longer inputs come first, so that a batch's are alike."""

    def prepare(self, given: Contra) -> Any:
        """Read and scale one input, in a thread; raises `BrokenInputError`."""

    def encode(self, prepared: list[Any]) -> NDArray[np.float32]:
        """Vectors `[n, D]` of prepared inputs."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of N inputs; whether they are normalised is the encoder's choice."""

    values: NDArray[np.float16]  # [N, D]; zero where missing
    present: NDArray[np.bool_]  # [N]
    encoder: str
    revision: str
    weights_sha256: str
    broken: list[tuple[int, str]]  # rows whose input was there but could not be read, and why


@dataclass(frozen=True)
class _Batch(Generic[Input]):
    rows: list[int]  # of the inputs
    waiting: list[Future[Any]]


def _batches(
    encoder: Encoder[Input], inputs: Sequence[Input | None], rows: list[int], pool: ThreadPoolExecutor
) -> Iterator[_Batch[Input]]:
    """The rows' inputs in preparation, one batch ahead of what the caller works on."""
    pieces = [rows[begin : begin + encoder.batch] for begin in range(0, len(rows), encoder.batch)]
    ahead: _Batch[Input] | None = None
    for piece in [*pieces, None]:
        this = ahead
        if piece is not None:
            given = [cast(Input, inputs[row]) for row in piece]
            ahead = _Batch(piece, [pool.submit(encoder.prepare, one) for one in given])
        if this is not None:
            yield this


def encode_rows(
    encoder: Encoder[Input],
    inputs: Sequence[Input | None],
    *,
    store: VectorStore | None = None,
    show: bool = True,
) -> Encoded:
    """Encode `inputs` `[N]`; None is a missing one. Equal inputs are encoded once.

    Vectors that `store` has are not made again, and new ones are put into it. Raises `FindRecError` where the
    encoder gives a vector that fp16 cannot hold.
    """
    store = store or VectorStore()
    about = (encoder.name, encoder.revision, encoder.weights_sha256)
    keys = np.array(
        [0 if given is None else key_of(*about, encoder.fingerprint(given)) for given in inputs],
        dtype=np.uint64,
    )
    distinct, first = np.unique(keys, return_index=True)
    ready = np.isin(distinct, store.known())
    rows = sorted(int(row) for row in first[(distinct != 0) & ~ready])
    rows.sort(key=lambda row: -encoder.length(cast(Input, inputs[row])))
    broken: dict[int, str] = {}
    what = f"encode {encoder.unit}"
    total = int((distinct != 0).sum())
    with progress(what, total=len(rows), unit=encoder.unit, show=show and bool(rows)) as bar:
        if total > len(rows):
            bar.note(ready_before=total - len(rows))
        pool = ThreadPoolExecutor(THREADS)
        try:
            for batch in _batches(encoder, inputs, rows, pool):
                whole, prepared = [], []
                for row, waiting in zip(batch.rows, batch.waiting, strict=True):
                    try:
                        prepared.append(waiting.result())
                        whole.append(row)
                    except BrokenInputError as reason:
                        broken[int(keys[row])] = str(reason)
                if whole:
                    store.add(keys[whole], _checked(encoder, encoder.encode(prepared)))
                bar.advance(len(batch.rows))
                if broken:
                    bar.note(broken=len(broken))
        finally:
            pool.shutdown(cancel_futures=True)
            store.flush()  # an error or Ctrl-C loses nothing
    values, present = store.take(keys)
    return Encoded(
        values=values,
        present=present,
        encoder=encoder.name,
        revision=encoder.revision,
        weights_sha256=encoder.weights_sha256,
        broken=[(row, broken[int(key)]) for row, key in enumerate(keys) if int(key) in broken],
    )


def _checked(encoder: Encoder[Any], values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        small = values.astype(np.float16)
    if not np.isfinite(small).all():
        raise FindRecError(f"encoder {encoder.name!r} gives numbers that are not finite or do not fit fp16")
    return small


def first_few(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c, ...` for messages."""
    return ", ".join(itertools.islice(names, most)) + (", ..." if len(names) > most else "")
