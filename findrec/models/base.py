"""The interface of models: how the rest of the system builds, trains and evaluates them.

A model is a folder in `findrec/models/`, or a user's class (see `findrec.models.configs`). Training only
calls `Model.loss`, whatever the examples and the objective are. `SequenceModel` is the base class of models
that map histories to user vectors; its loss is next-item prediction over the catalogue.

Shape letters: B users, L padded length, T target positions, U distinct items, d width of the item table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.batches.examples import ExampleSource
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.batches.windows import WindowExamples
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows
from findrec.devices import is_cpu
from findrec.models.config import ModelConfig
from findrec.models.parts.activation_checkpointing import CheckpointedModule
from findrec.models.parts.interaction_graph import InteractionGraph
from findrec.models.parts.repeat import repeat_candidates
from findrec.tables.base import ITEMS, Transform
from findrec.tables.view import Tables, attach_gradients

_FEATURE_BYTES = 2 << 30  # of features in float32 that are transformed at a time
Examples = TypeVar("Examples")
Built = TypeVar("Built", bound="Model[Any]")


@dataclass(frozen=True)
class TableShape:
    """The size of an embedding table of a model; `num_rows` does not count the padding row 0."""

    num_rows: int
    dim: int


@dataclass(frozen=True)
class DataFacts:
    """The properties of the data that a model is built for."""

    num_items: int
    num_users: int = 0
    feature_dims: Mapping[str, int] = field(default_factory=dict)  # width of each modality that is an input
    num_event_types: int = 0  # 0: event types are not an input
    max_length: int = 200  # events of the longest history
    # Folders of the best checkpoints of the stages that this one needs, by stage name. Empty if the model is
    # only built to be measured or checked before those stages are trained.
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    # Reads the distinct user-item pairs of the training events, for models of the interaction graph.
    training_pairs: Callable[[], TrainingPairs] | None = None

    def interaction_graph(self) -> InteractionGraph:
        """The user-item graph of the training events (reads the data)."""
        assert self.training_pairs is not None, "built without data"
        return InteractionGraph(self.training_pairs(), self.num_users, self.num_items)


@dataclass(frozen=True)
class Microbatch(Generic[Examples]):
    """The examples of one microbatch, with the counts that normalise its loss.

    Losses of targets are divided by `num_targets`, the number of targets of the step on all workers; terms
    that compare examples of a microbatch are divided by `num_microbatches`. So a step does not depend on the
    number of workers.
    """

    examples: Examples
    features: ItemFeatures  # of all items
    num_targets: int
    num_microbatches: int
    seed: int


@dataclass(frozen=True)
class Term:
    """An auxiliary loss of one microbatch, to be averaged over the microbatches of the step."""

    value: Tensor  # [] float32, weighted: added to the loss
    reported: Tensor  # [] float32, the unweighted value for the log, detached


@dataclass(frozen=True)
class StepLoss:
    """The contribution of a microbatch to the loss of a step, summed over all microbatches and workers."""

    total: Tensor  # [] the sum to differentiate
    loss: Tensor  # [] the main loss for the log, detached
    aux: Mapping[str, Tensor] = field(default_factory=dict)  # [] each, unweighted, for the log
    # Averaged, not summed. Numbers of a GPU stay there as tensors [], which are read once a step.
    diagnostics: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Out:
    """The output of a sequence model for a batch."""

    # [T, d] user vectors; a score is h . e_item, plus the repeat-consumption bonus. A model with its own loss
    # may return [T, K, d], which is ranked by the maximum over K vectors.
    h: Tensor
    repeat: Tensor | None = None  # [T, R] weights of the repeat features (findrec/models/parts/repeat.py)
    aux: dict[str, Term] = field(default_factory=dict)  # only in training mode
    diagnostics: dict[str, float | Tensor] = field(default_factory=dict)  # only in training mode, cheap

    def float(self) -> Out:
        """The same in float32."""
        aux = {name: Term(term.value.float(), term.reported.float()) for name, term in self.aux.items()}
        repeat = None if self.repeat is None else self.repeat.float()
        return Out(self.h.float(), repeat, aux, self.diagnostics)


class Model(CheckpointedModule, ABC, Generic[Examples]):
    """Base class of all models. Embedding tables are not part of a model, which reads rows of them.

    All randomness comes from torch's global generator, which is seeded for each microbatch.
    """

    Config: ClassVar[type[ModelConfig]]  # its configuration class

    config: Any  # an instance of `Config`
    low_precision = False  # whether training uses bfloat16 products (autocast); losses are float32

    @classmethod
    def build(cls: type[Built], config: Any, facts: DataFacts) -> Built:
        """A new model, initialised from torch's global generator; `config` is a `Config`."""
        return cls(config, facts)  # type: ignore[call-arg,unused-ignore]

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> ExampleSource[Any]:
        """The training examples; by default windows of histories."""
        return WindowExamples(config, folder)

    @classmethod
    def tables(cls, config: Any, facts: DataFacts) -> dict[str, TableShape]:
        """The embedding tables of the model; by default the item table."""
        return {ITEMS: TableShape(facts.num_items, config.dim)}

    @abstractmethod
    def loss(self, microbatch: Microbatch[Examples], tables: Tables) -> StepLoss:
        """The loss of one microbatch.

        It is one call of the training engine, which gathers the sharded weights of the modules called in it.
        """

    def start_step(self, step: int) -> None:
        """Called before each training step (from 0), for measurements that are made at some steps only."""

    def describe(self, device: torch.device) -> str:
        """A description of the model for the training log, besides its size; may be empty."""
        return ""

    def warnings(self, values: Mapping[str, float]) -> Sequence[tuple[str, str]]:
        """Problems visible in the logged values of one step.

        Returns:
            Pairs `(key, message)`; each key is reported once, and the message says what to change.
        """
        return ()


class SequenceModel(Model[Batch]):
    """A model that maps histories to user vectors and scores items by the inner product with them.

    Contract, tested for every registered model: it is causal, and in evaluation mode the output does not
    depend on right padding or on the other users of a batch (1e-5).
    """

    content_scores = False  # whether `item_transform` is not the identity
    reads_targets = False  # whether `loss` gives `forward` the rows of the targets too (`Batch.target_index`)

    def __call__(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """`forward`, in bfloat16 products if `low_precision` is set and the model is in training mode."""
        if not (self.low_precision and self.training):
            plain: Out = super().__call__(batch, x_items, features)
            return plain
        with torch.autocast(x_items.device.type, torch.bfloat16):
            out: Out = super().__call__(batch, x_items, features)
        return out.float()

    @abstractmethod
    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """User vectors at `batch.position`.

        Args:
            batch: histories of users.
            x_items: `[U, d]`, the item-table rows of `batch.ids` (row 0, the padding item, is zero).
            features: one `ModalRows` for each modality the model was built with, for the same items.
        """

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """The vectors `[n, d]` that n items are scored by, from their table rows and features.

        By default the rows themselves. Must treat items independently of each other.
        """
        return rows

    @torch.no_grad()
    def item_vectors(self, rows_nd: Tensor, catalogue: ItemFeatures, part: range | None = None) -> Tensor:
        """`item_transform` of all items 0..V, or of a range (`part`), in float32.

        Features of more than 2 GiB are read and transformed in parts: they need not fit into memory together.
        """
        if not self.content_scores:
            return rows_nd
        ids, device = range(len(rows_nd)) if part is None else part, rows_nd.device
        probe = catalogue.features(torch.zeros(1, dtype=torch.int64, device=device))
        width = sum(rows.values.shape[1] for rows in probe.values())
        step = max(1, _FEATURE_BYTES // (4 * max(1, width)))
        if len(ids) <= step:
            return self.item_transform(rows_nd, catalogue.all_features(device, part)).float()
        vectors: Tensor | None = None
        for lo in range(0, len(ids), step):
            some = ids[lo : lo + step]
            features = catalogue.features(torch.arange(some.start, some.stop, device=device))
            found = self.item_transform(rows_nd[lo : lo + step], features).float()
            if vectors is None:
                vectors = found.new_empty(len(ids), found.shape[1])
            vectors[lo : lo + step] = found
        assert vectors is not None
        return vectors

    def loss(self, microbatch: Microbatch[Batch], tables: Tables) -> StepLoss:
        """Next-item prediction: the catalogue loss at every target, plus the auxiliary terms of `Out`."""
        batch, items = microbatch.examples, tables[ITEMS]
        if self.reads_targets:
            batch = batch.with_targets()
        out = self(batch, items.rows(batch.ids), microbatch.features.features(batch.ids))
        bonus = weights_TR = None
        if out.repeat is not None:
            weights_TR = out.repeat.detach().requires_grad_()
            bonus = repeat_candidates(batch).bonus(weights_TR)
        transform = self._content(microbatch.features) if self.content_scores else None
        catalogue = items.catalogue_loss(out.h, batch.target, repeat=bonus, transform=transform)
        tensors, gradients = [out.h], [catalogue.dh]
        if bonus is not None and out.repeat is not None and weights_TR is not None:
            assert catalogue.dbonus is not None
            # Differentiated here, so that no graph stores tensors of the size of the bonuses.
            (dweights_TR,) = torch.autograd.grad(bonus.bonus_TN, weights_TR, catalogue.dbonus)
            tensors.append(out.repeat)
            gradients.append(dweights_TR)
        if catalogue.scored is not None:
            tensors.append(catalogue.scored.vectors)
            gradients.append(catalogue.scored.gradient)
        total = attach_gradients(catalogue.loss, tensors, gradients)
        total, aux = _add_terms(total, out.aux, microbatch.num_microbatches)
        return StepLoss(total, catalogue.loss, aux, out.diagnostics)

    def _content(self, features: ItemFeatures) -> Transform:
        """`item_transform` as a function of ids and rows."""

        def transform(ids: Tensor | range, rows: Tensor) -> Tensor:
            if isinstance(ids, range):
                return self.item_transform(rows, features.all_features(rows.device, ids))
            return self.item_transform(rows, features.features(ids))

        return transform


def _add_terms(total: Tensor, terms: Mapping[str, Term], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`total` plus the values of the terms, and their reported values, all divided by `count`."""
    if not terms or is_cpu(total.device):
        for term in terms.values():
            total = total + term.value / count
        return total, {name: term.reported / count for name, term in terms.items()}
    # On a GPU one kernel for all terms, where each by itself would take as long.
    values = torch.stack([term.value for term in terms.values()])
    reported = torch.stack([term.reported for term in terms.values()]) / count
    return total + values.sum() / count, dict(zip(terms, reported.unbind(), strict=True))
