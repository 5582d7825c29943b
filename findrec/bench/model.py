"""A whole training step, forward to optimizer, in seconds per 1,000 targets.

Two questions. `bench_published`: how much faster is a step than one of the published shape, which trains one
position of every sample? It has two baselines, that shape with a generic parallel scan and with our scan: the
first ratio is what a user gains, the second what the shape alone costs. `bench_lengths`: does the cost of an
event stay flat as histories grow, the tokens of a microbatch held equal? Every trained target counts once: a
prefix sample of the published shape has one, a history of L events shown has L. `Row.median_s` and `p10_s`
are seconds per 1,000 targets, so that rows of different batches compare; `peak_bytes` is that of one step.

Items are drawn from a Zipf law, as catalogues are used: an item that occurs twice in a microbatch is encoded
once, and that is part of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from findrec.bench.memory import peak_bytes
from findrec.bench.published import Published, PublishedConfig
from findrec.bench.rows import UNIT, Row
from findrec.bench.timer import Timing, time_alternating
from findrec.config import parse_config
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.registry import build_model
from findrec.ops.selective_scan import scan_backend
from findrec.progress import progress
from findrec.tables.item_table import ItemTable
from findrec.tables.parts import TableSpec
from findrec.training.allocator import keep_freed_memory
from findrec.training.objectives import microbatch_loss
from findrec.training.tower import PlainTower

FEATURES = {"image": 2048, "text": 1024}
OP = f"train step, {UNIT}"
LENGTH_OP = f"train step by length, {UNIT}"
BASELINE = "published shape"
OUR_SCAN = "published shape, our scan"
LENGTHS = (50, 200, 1024, 4096, 16384)
FLAT_FROM = 200  # the length whose cost the others are held against
NEGATIVES = 1024
SAMPLED = ("training.loss.kind=sampled", f"training.loss.negatives={NEGATIVES}")
ZIPF = 1.0


@dataclass(frozen=True)
class Shape:
    """One measured step: `rows` histories (or prefix samples) of `length` events."""

    rows: int
    length: int
    dim: int
    items: int
    features: tuple[tuple[str, int], ...] = tuple(FEATURES.items())

    def __str__(self) -> str:
        return f"B{self.rows} L{self.length} d{self.dim} V{self.items}"


# The published widths. Fewer samples where they are longer: a step of 128 takes 5 GB at L = 200.
PUBLISHED_SHAPES = (Shape(128, 50, 128, 20_000), Shape(32, 200, 128, 20_000))

# What `measure` is given for an implementation: its shape, the maker of a step, and the maker's arguments.
Maker = tuple[str, Callable[..., Callable[[], int]], tuple[object, ...]]


def draw_items(num: int, num_items: int, generator: torch.Generator) -> Tensor:
    """`[num]` item ids 1..V, the k-th most frequent with probability proportional to 1 / k."""
    weight_V = torch.arange(1, num_items + 1, dtype=torch.float64) ** -ZIPF
    return 1 + torch.multinomial(weight_V, num, replacement=True, generator=generator)


def feature_tables(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """`[V + 1, M]` random features of each modality; row 0 (padding) is zero."""
    tables = {name: torch.randn(shape.items + 1, m, generator=generator) for name, m in shape.features}
    for table in tables.values():
        table[0] = 0.0
    return tables


def published_step(shape: Shape, scan: Literal["parallel", "ours"] = "parallel") -> Callable[[], int]:
    """A function that makes one step of the published shape and returns its number of targets.

    `scan` is a generic parallel one or ours (see findrec/bench/published.py). Prefix samples of all lengths
    up to `shape.length`, padded to it as RecBole does.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = PublishedConfig(dim=shape.dim, scan=scan)
    model = Published(shape.items, feature_tables(shape, generator), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    item_BL = draw_items(shape.rows * shape.length, shape.items, generator).view(shape.rows, shape.length)
    length_B = torch.randint(1, shape.length + 1, (shape.rows,), generator=generator)
    item_BL[torch.arange(shape.length) >= length_B[:, None]] = 0
    target_B = draw_items(shape.rows, shape.items, generator)

    def step() -> int:
        model.loss(item_BL, length_B, target_B).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        return len(target_B)

    return step


def findrec_step(shape: Shape, overrides: Sequence[str] = ()) -> Callable[[], int]:
    """A function that makes one step of FindRec, tower and item table, and returns its number of targets.

    `overrides` are `dotted.key=value` of the run configuration (`training.loss.kind=sampled`).
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = parse_config({}, [f"model.dim={shape.dim}", *overrides])
    features = feature_tables(shape, generator)
    asked = config.model.modalities
    used = {name: table for name, table in features.items() if asked == "all" or name in asked}
    model = build_model(
        config.model,
        feature_dims={name: table.shape[1] for name, table in used.items()},
        repeat=config.model.repeat,
        max_length=shape.length,
    )
    item_BX = draw_items(shape.rows * (shape.length + 1), shape.items, generator).view(shape.rows, -1)
    table = ItemTable(
        TableSpec(
            shape.items,
            shape.dim,
            seed=0,
            loss=config.training.loss,
            optim=config.training.optim,
            train_count=torch.bincount(item_BX.flatten(), minlength=shape.items + 1),
        )
    )
    tower = PlainTower(model.train(), config.training.optim)
    catalogue = TablesInMemory(used)

    def step() -> int:
        batch = shown_batch(item_BX)
        microbatch_loss(
            tower,
            table,
            batch,
            catalogue,
            num_targets=len(batch.target),
            num_microbatches=1,
            seed=0,
        )
        tower.step(1e-3)
        table.step(1e-3)
        return len(batch.target)

    return step


def shown_batch(item_BX: Tensor) -> Batch:
    """Histories `[B, L + 1]` as a batch that shows all events but the last and asks for all but the first."""
    num, length = item_BX.shape[0], item_BX.shape[1] - 1
    return Batch.build(
        item=item_BX[:, :-1].contiguous(),
        length=torch.full((num,), length),
        user=torch.arange(num),
        position=torch.arange(num * length),
        target=item_BX[:, 1:].flatten(),
    )


class TablesInMemory:
    """Features of items from tables `[V + 1, M]`; see `findrec.datasets.catalogue.ItemFeatures`."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self._tables = dict(tables)

    def features(self, ids_n: Tensor) -> dict[str, ModalRows]:
        """Rows of the items `ids_n`."""
        return {name: ModalRows(table[ids_n], ids_n > 0) for name, table in self._tables.items()}

    def all_features(self, device: torch.device | str, part: range | None = None) -> dict[str, ModalRows]:
        """Rows of all items, or of a `part` of them."""
        size = len(next(iter(self._tables.values()), ()))
        part = range(size) if part is None else part
        return self.features(torch.arange(part.start, part.stop, device=device))


def bench_published(
    runs: int = 3, overrides: Sequence[str] = (), shapes: Sequence[Shape] = PUBLISHED_SHAPES
) -> list[Row]:
    """Rows of the published shape and of FindRec with the exact and the sampled loss, at L = 50 and 200.

    Widths, heads and experts are the published ones; other settings of ours are the defaults. Rows of ours
    come twice: against the published shape with a generic parallel scan, and against it with our scan.
    """
    scan_backend("cpu")  # outside the clock: it may build the kernel
    heads = f"model.routing.heads={PublishedConfig().heads}"
    kinds = {
        "findrec exact": [heads],
        f"findrec sampled {NEGATIVES}": [heads, *SAMPLED],
    }
    rows = []
    with progress("step against the published shape", total=len(shapes), unit="shapes") as bar:
        for shape in shapes:
            makers: dict[str, Maker] = {
                BASELINE: (str(shape), published_step, (shape, "parallel")),
                OUR_SCAN: (str(shape), published_step, (shape, "ours")),
            }
            for name, keys in kinds.items():
                makers[name] = (str(shape), findrec_step, (shape, [*keys, *overrides]))
            found = measure(OP, makers, BASELINE, runs)
            rows += found + [against(row, found[1]) for row in found[2:]]
            bar.advance()
    return rows


def bench_lengths(
    runs: int = 3,
    overrides: Sequence[str] = (),
    *,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = 16_384,
    items: int = 20_000,
    features: tuple[tuple[str, int], ...] = (("text", 384),),
) -> list[Row]:
    """Rows of FindRec (d = 64) at each length, about `tokens` events a microbatch, against those at L = 200.

    The sampled loss, so that the catalogue costs the same everywhere. Three variants: the ID stream alone;
    with the modality and its causal attention; and with the own-item head, whose work grows with the number
    of distinct items of a history. `lengths` must hold 200.
    """
    scan_backend("cpu")
    variants = {
        "id stream": ["model.modalities=[]", "model.repeat=false"],
        "findrec": ["model.repeat=false"],
        "findrec, own items": ["model.repeat=true"],
    }
    rows = []
    with progress("step by length", total=len(variants), unit="variants") as bar:
        for variant, keys in variants.items():
            makers: dict[str, Maker] = {}
            for length in lengths:
                shape = Shape(max(1, tokens // length), length, 64, items, features)
                makers[f"{variant} L{length}"] = (
                    str(shape),
                    findrec_step,
                    (shape, [*keys, *SAMPLED, *overrides]),
                )
            rows += measure(LENGTH_OP, makers, f"{variant} L{FLAT_FROM}", runs)
            bar.advance()
    return rows


def measure(
    op: str,
    makers: Mapping[str, Maker],
    baseline: str,
    runs: int,
) -> list[Row]:
    """Rows of alternating steps: `makers` maps an implementation to its shape, its maker and the arguments.

    Times are divided by the targets a step reports. `baseline` is one of `makers`.
    """
    keep_freed_memory()  # as training does; it serves the baselines too
    steps = {name: make(*arguments) for name, (_, make, arguments) in makers.items()}
    targets = {name: step() for name, step in steps.items()}  # also the warm-up
    timings = {
        name: per_thousand(timing, targets[name])
        for name, timing in time_alternating(steps, runs=runs, warmup=0).items()
    }
    steps.clear()  # their memory is needed by the processes that measure peaks
    return [
        Row(
            op=op,
            shape=shape,
            dtype="float32",
            impl=name,
            baseline=baseline,
            median_s=timings[name].median_s,
            p10_s=timings[name].p10_s,
            peak_bytes=peak_bytes(make, *arguments),
            ratio=timings[baseline].median_s / timings[name].median_s,
        )
        for name, (shape, make, arguments) in makers.items()
    ]


def against(row: Row, baseline: Row) -> Row:
    """The same measurement set against another of the same turn."""
    return replace(row, baseline=baseline.impl, ratio=baseline.median_s / row.median_s)


def per_thousand(timing: Timing, targets: int) -> Timing:
    """The same runs in seconds per 1,000 targets."""
    return Timing(tuple(seconds * 1000 / targets for seconds in timing.seconds))
