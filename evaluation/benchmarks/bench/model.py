"""Benchmark of a full training step, forward to optimizer, in seconds per 1,000 targets.

`bench_published` compares with a step of the published model, which trains one position per sample. It has
two baselines, with a generic parallel scan and with our scan: the first ratio is the total speed-up, the
second that of training every position. `bench_lengths` measures how the cost per event grows with the length
of histories at an equal number of tokens. Every trained target counts once: one per prefix sample of the
published model, L per history of L events. `Row.median_s` and `p10_s` are seconds per 1,000 targets, so that
batches of different sizes compare; `peak_bytes` is that of one step.

Items are drawn from a Zipf law, because repeated items of a microbatch are encoded only once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from bench.memory import peak_bytes
from bench.published import Published, PublishedConfig
from bench.rows import UNIT, Row
from torch import Tensor

from findrec.config import parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Microbatch
from findrec.models.registry import build_model, model_class
from findrec.ops.scan.selective_scan import scan_backend
from findrec.progress import progress
from findrec.tables.base import ITEMS
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec
from findrec.timer import Timing, time_alternating
from findrec.training.allocator import keep_freed_memory
from findrec.training.objectives import run_microbatch
from findrec.training.tower import PlainTower

FEATURES = {"image": 2048, "text": 1024}
OP = f"train step, {UNIT}"
LENGTH_OP = f"train step by length, {UNIT}"
COST_OP = f"train step, exact loss, {UNIT}"
BASELINE = "published shape"
OUR_SCAN = "published shape, our scan"
LENGTHS = (50, 200, 1024, 4096, 16384)
BASE_LENGTH = 200  # the baseline of the other lengths
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


# The published widths. Fewer samples at L = 200, where a step of 128 samples needs 5 GB.
PUBLISHED_SHAPES = (Shape(128, 50, 128, 20_000), Shape(32, 200, 128, 20_000))

# Microbatches of 3,200 tokens, a catalogue with texts.
COST_SHAPES = tuple(Shape(3200 // n, n, 64, 20_000, (("text", 384),)) for n in (50, 200))

# Shape, factory of a step function, and arguments of the factory.
Maker = tuple[str, Callable[..., Callable[[], int]], tuple[object, ...]]


def draw_items(num: int, num_items: int, generator: torch.Generator) -> Tensor:
    """Draw item ids `[num]` in 1..V, id k with probability proportional to 1 / k."""
    weight_V = torch.arange(1, num_items + 1, dtype=torch.float64) ** -ZIPF
    return 1 + torch.multinomial(weight_V, num, replacement=True, generator=generator)


def feature_tables(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Random features `[V + 1, M]` of each modality; row 0 (padding) is zero."""
    tables = {name: torch.randn(shape.items + 1, m, generator=generator) for name, m in shape.features}
    for table in tables.values():
        table[0] = 0.0
    return tables


def published_step(shape: Shape, scan: Literal["parallel", "ours"] = "parallel") -> Callable[[], int]:
    """Return a function that makes one step of the published model and returns its number of targets.

    `scan` is a generic parallel scan or ours (see evaluation/benchmarks/bench/published.py). Samples are
    prefixes of all lengths up to `shape.length`, padded to it as in RecBole.
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


def findrec_step(shape: Shape, overrides: Sequence[str] = (), device: str = "cpu") -> Callable[[], int]:
    """Return a function that makes one step of FindRec and returns its number of targets.

    `overrides` are `dotted.key=value` of the run configuration (`training.loss.kind=sampled`). On a GPU the
    batch lies there already, as in training the next one is prepared meanwhile.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = parse_config({}, [f"model.dim={shape.dim}", *overrides])
    features = feature_tables(shape, generator)
    content = config.model.content
    tables = {name: table for name, table in features.items() if content == "all" or name in content}
    facts = DataFacts(
        num_items=shape.items,
        feature_dims={name: table.shape[1] for name, table in tables.items()},
        max_length=shape.length,
    )
    model = build_model(config.model, facts).to(device)
    model.low_precision = config.training.precision == "bfloat16"
    item_BX = draw_items(shape.rows * (shape.length + 1), shape.items, generator).view(shape.rows, -1)
    table = ItemTable(
        TableSpec(
            shape.items,
            model_class(config.model).tables(config.model, facts)[ITEMS].dim,
            seed=0,
            loss=config.training.loss,
            optim=config.training.optim,
            train_count=torch.bincount(item_BX.flatten(), minlength=shape.items + 1),
            device=device,
        )
    )
    tower = PlainTower(model.train(), config.training.optim)
    catalogue = InMemoryFeatures({name: values.to(device) for name, values in tables.items()})
    ready = None if device == "cpu" else next_item_batch(item_BX).to(device)

    def step() -> int:
        batch = next_item_batch(item_BX) if ready is None else ready
        microbatch = Microbatch(batch, catalogue, len(batch.target), num_microbatches=1, seed=0)
        run_microbatch(tower, {ITEMS: table}, microbatch)
        tower.step(1e-3)
        table.step(1e-3)
        return len(batch.target)

    return step


def next_item_batch(item_BX: Tensor) -> Batch:
    """A batch of histories `[B, L + 1]`: inputs are all events but the last, targets all but the first."""
    num, length = item_BX.shape[0], item_BX.shape[1] - 1
    return Batch.build(
        item=item_BX[:, :-1].contiguous(),
        length=torch.full((num,), length),
        user=torch.arange(num),
        position=torch.arange(num * length),
        target=item_BX[:, 1:].flatten(),
    )


class InMemoryFeatures:
    """Item features from tables `[V + 1, M]`; see `findrec.datasets.batches.catalogue.ItemFeatures`."""

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
    """Measure the published model, and our form of it with the exact and the sampled loss, at L = 50 and 200.

    Widths, heads and experts are the published ones; other settings of `findrec-2025` are the defaults. Its
    rows come twice, against the published model with a generic parallel scan and with our scan.
    """
    scan_backend("cpu")  # before timing, as it may build the kernel
    same = ["model.name=findrec-2025", f"model.routing.heads={PublishedConfig().heads}"]
    kinds = {"findrec-2025 exact": same, f"findrec-2025 sampled {NEGATIVES}": [*same, *SAMPLED]}
    rows = []
    with progress("step against the published model", total=len(shapes), unit="shapes") as bar:
        for shape in shapes:
            makers: dict[str, Maker] = {
                BASELINE: (str(shape), published_step, (shape, "parallel")),
                OUR_SCAN: (str(shape), published_step, (shape, "ours")),
            }
            for name, keys in kinds.items():
                makers[name] = (str(shape), findrec_step, (shape, [*keys, *overrides]))
            measured = measure(OP, makers, BASELINE, runs)
            rows += measured + [against(row, measured[1]) for row in measured[2:]]
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
    """Measure FindRec (d = 64) at each length, with about `tokens` events per microbatch, against L = 200.

    Uses the sampled loss, whose cost does not depend on the length. Three variants: the ID stream alone; with
    the modality; with the repeat-consumption head, whose work grows with the number
    of distinct items of a history. `lengths` must include 200.
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
                arguments = (shape, [*keys, *SAMPLED, *overrides])
                makers[f"{variant} L{length}"] = (str(shape), findrec_step, arguments)
            rows += measure(LENGTH_OP, makers, f"{variant} L{BASE_LENGTH}", runs)
            bar.advance()
    return rows


def bench_cost(
    runs: int = 3, overrides: Sequence[str] = (), shapes: Sequence[Shape] = COST_SHAPES
) -> list[Row]:
    """Measure FindRec with texts, and without, against SASRec of equal width, with the exact loss."""
    scan_backend("cpu")
    kinds = {
        "sasrec": ["model.name=sasrec"],
        "findrec": [],
        "findrec, ids only": ["model.modalities=[]"],
        "findrec-2025": ["model.name=findrec-2025", "model.items.features=both"],
    }
    rows = []
    with progress("step against SASRec", total=len(shapes), unit="shapes") as bar:
        for shape in shapes:
            makers: dict[str, Maker] = {
                name: (str(shape), findrec_step, (shape, [*keys, *overrides])) for name, keys in kinds.items()
            }
            rows += measure(COST_OP, makers, "sasrec", runs)
            bar.advance()
    return rows


def measure(op: str, makers: Mapping[str, Maker], baseline: str, runs: int) -> list[Row]:
    """Measure alternating steps of several implementations, one of which is the `baseline`."""
    keep_freed_memory()  # as in training; also improves the baselines
    steps = {name: make(*arguments) for name, (_, make, arguments) in makers.items()}
    targets = {name: step() for name, step in steps.items()}  # also the warm-up
    timings = {
        name: per_thousand(timing, targets[name])
        for name, timing in time_alternating(steps, runs=runs, warmup=0).items()
    }
    steps.clear()  # frees memory for the processes that measure peaks
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
    """The same measurement relative to another baseline of the same runs."""
    return replace(row, baseline=baseline.impl, ratio=baseline.median_s / row.median_s)


def per_thousand(timing: Timing, targets: int) -> Timing:
    """The same runs in seconds per 1,000 targets."""
    return Timing(tuple(seconds * 1000 / targets for seconds in timing.seconds))
