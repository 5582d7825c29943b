"""Encode inputs in batches with any encoder; skips duplicates and cached inputs, reports broken ones.

A few threads prepare (read, decode, scale) the next batch while the encoder processes the current one.
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

from findrec.datasets.encoders.vector_store import VectorStore, key_of
from findrec.errors import FindRecError
from findrec.progress import progress

THREADS = min(4, os.cpu_count() or 1)
Input = TypeVar("Input")
Contra = TypeVar("Contra", contravariant=True)


class BrokenInputError(Exception):
    """An input cannot be encoded; the other inputs are not affected."""


class Encoder(Protocol[Contra]):
    """Turns inputs into vectors, independent of the batch up to rounding."""

    name: str  # as given by the user
    revision: str  # release of the model; empty if unknown
    weights_sha256: str
    batch: int  # inputs per batch
    unit: str  # plural noun for the inputs, for messages

    def fingerprint(self, value: Contra) -> str:
        """String that identifies the input."""

    def length(self, value: Contra) -> int:
        """Cost of the input: inputs are sorted by it, longest first, so that batches are uniform."""

    def prepare(self, value: Contra) -> Any:
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
    broken: list[tuple[int, str]]  # rows whose input could not be read, with the reason


@dataclass(frozen=True)
class _Batch(Generic[Input]):
    rows: list[int]  # of the inputs
    futures: list[Future[Any]]


def _batches(
    encoder: Encoder[Input], inputs: Sequence[Input | None], rows: list[int], pool: ThreadPoolExecutor
) -> Iterator[_Batch[Input]]:
    """Batches of futures of prepared inputs; prefetches one batch."""
    pieces = [rows[begin : begin + encoder.batch] for begin in range(0, len(rows), encoder.batch)]
    ahead: _Batch[Input] | None = None
    for piece in [*pieces, None]:
        current = ahead
        if piece is not None:
            batch_inputs = [cast(Input, inputs[row]) for row in piece]
            ahead = _Batch(piece, [pool.submit(encoder.prepare, value) for value in batch_inputs])
        if current is not None:
            yield current


def encode_inputs(
    encoder: Encoder[Input],
    inputs: Sequence[Input | None],
    *,
    store: VectorStore | None = None,
    show: bool = True,
) -> Encoded:
    """Encode `inputs` `[N]`, in which None is a missing one; equal inputs are encoded once.

    Vectors in `store` are reused, and new ones are added to it.

    Raises:
        FindRecError: If the encoder returns a vector that fp16 cannot represent.
    """
    store = store or VectorStore()
    model = (encoder.name, encoder.revision, encoder.weights_sha256)
    keys = np.array(
        [0 if value is None else key_of(*model, encoder.fingerprint(value)) for value in inputs],
        dtype=np.uint64,
    )
    distinct, first = np.unique(keys, return_index=True)
    ready = np.isin(distinct, store.known())
    rows = sorted(int(row) for row in first[(distinct != 0) & ~ready])
    rows.sort(key=lambda row: -encoder.length(cast(Input, inputs[row])))
    broken: dict[int, str] = {}
    total = int((distinct != 0).sum())
    with progress(
        f"encode {encoder.unit}", total=len(rows), unit=encoder.unit, show=show and bool(rows)
    ) as bar:
        if total > len(rows):
            bar.note(ready_before=total - len(rows))
        pool = ThreadPoolExecutor(THREADS)
        try:
            for batch in _batches(encoder, inputs, rows, pool):
                readable, prepared = [], []
                for row, future in zip(batch.rows, batch.futures, strict=True):
                    try:
                        prepared.append(future.result())
                        readable.append(row)
                    except BrokenInputError as reason:
                        broken[int(keys[row])] = str(reason)
                if readable:
                    store.add(keys[readable], _checked(encoder, encoder.encode(prepared)))
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
        raise FindRecError(f"encoder {encoder.name!r} returns numbers that are not finite or do not fit fp16")
    return small


def first_few(names: Sequence[str], limit: int = 3) -> str:
    """`a, b, c, ...` for messages."""
    return ", ".join(itertools.islice(names, limit)) + (", ..." if len(names) > limit else "")
