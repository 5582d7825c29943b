"""How much memory a microbatch takes while it is trained, from its shape and the configuration.

Counted is what the backward pass needs of each layer, tensor by tensor as the modules of `findrec.models`
keep them, plus the loss over the catalogue. All of it is there when the loss is computed, just before the
backward pass begins to free it; the gradients that pass makes first are a few per cent more. Attention, the
scan and the losses keep nothing quadratic, except the bonuses of own items, which every target has for each
item of its history (at most `OWN_WINDOW` and a fourth of them). Everything is float32 and integers int64.

Shape letters: n padded positions, T targets, U distinct items, d width of the tower, E = expand d, N states,
R rank of the time steps, M width of a modality, m number of modalities, V items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from findrec.config import ModelConfig, RunConfig
from findrec.models.repeat import OWN_WINDOW
from findrec.ops.linear_cross_entropy import CPU_ROWS
from findrec.ops.own_bonus import NUM_REPEAT_FEATURES

FLOAT = 4
_INTEGERS = 6 * 8  # bytes a position: item, its place among the distinct ones, gap, position, target, wait
# The C++ kernels keep no features of own items; elsewhere (GPUs) they are there twice, with dense counts.
_BONUS = FLOAT + FLOAT + 1  # bytes a target and own item: the bonus, its gradient, whether it was seen


@dataclass(frozen=True)
class MicrobatchShape:
    """What of a microbatch decides its memory."""

    rows: int
    length: int  # of the longest row: all are padded to it
    targets: int
    distinct: int  # items, padding included

    @property
    def positions(self) -> int:
        """n, padding included."""
        return self.rows * self.length


def activation_bytes(config: RunConfig, feature_dims: Mapping[str, int], shape: MicrobatchShape) -> int:
    """Bytes that the tower keeps of one microbatch for its backward pass; `feature_dims`: width by modality.

    Within a factor of 2 of the measured growth of the resident set, which a test checks.
    """
    model = config.model
    d, n, targets = model.dim, shape.positions, shape.targets
    floats = 2 * shape.distinct * d  # rows of the table and their gradient
    floats += 3 * n * d  # inputs, their dropout mask, the stream's output
    again = config.training.checkpoint_activations
    if model.name == "sasrec":
        floats += _layers(n * _block(d), n * d, model.layers, again=again)
    else:
        stream = _layers(n * _stream_layer(model), n * d, model.stream.layers, again=again)
        if feature_dims:
            floats += shape.distinct * sum(_encoder(width, d) for width in feature_dims.values())
            control = _control(model, len(feature_dims), shape)
            # Both are run again one after the other, so that the larger one counts.
            stream = max(stream, control + model.stream.layers * n * d) if again else stream + control
        floats += stream
    floats += targets * 8 * d  # asked rows, moment, norm, and the gradients of the user vectors
    return FLOAT * floats + _INTEGERS * n


def own_items_bytes(config: RunConfig, shape: MicrobatchShape, *, on_gpu: bool = False) -> int:
    """Bytes of the bonuses of own items: of every target for each distinct item of its history."""
    if not config.model.repeat:
        return 0
    own = min(shape.length, OWN_WINDOW + OWN_WINDOW // 4, shape.distinct)
    features = 2 * NUM_REPEAT_FEATURES * FLOAT if on_gpu else 0
    return shape.targets * own * (_BONUS + features)


def loss_bytes(
    config: RunConfig,
    feature_dims: Mapping[str, int],
    shape: MicrobatchShape,
    rows: int,
    *,
    on_gpu: bool = False,
) -> int:
    """Bytes of the catalogue loss while it runs: a tile of logits, and the gradients of what it scores.

    `rows` of the table are on this worker.
    """
    loss, d = config.training.loss, config.model.dim
    if loss.kind == "exact":
        tile_rows = max((loss.tile_mib << 20) // (rows * FLOAT), d // 4, 1)
        tile = min(tile_rows, shape.targets if on_gpu else min(shape.targets, CPU_ROWS)) * rows
        scored = rows
    else:
        scored = min(loss.negatives + shape.targets + shape.distinct, rows)
        tile = shape.targets * loss.negatives * 4 if loss.kind == "gbce" else (2 << 20) // FLOAT
    floats = tile + scored * d + 2 * shape.targets * d
    if loss.kind != "exact":
        floats += 2 * (scored + shape.targets + shape.distinct) * d  # rows taken out, and taken again by role
    if config.model.items.features in ("score", "both") and feature_dims:
        # Content is added to all that is scored: values, normalised values, vectors.
        floats += scored * (sum(2 * width + 2 * d for width in feature_dims.values()) + 2 * d)
    return FLOAT * floats


def _layers(kept: int, inputs: int, layers: int, *, again: bool) -> int:
    """What `layers` keep; run `again` in the backward pass, their inputs and what one of them keeps."""
    return layers * inputs + kept if again else layers * kept


def _stream_layer(model: ModelConfig) -> int:
    d = model.dim
    if model.stream.kind == "transformer":
        return _block(d)
    if model.stream.kind == "gru":
        # Step by step: gates of input and state (3 d each, kept twice), state, and the residual branch's 4 d.
        return 18 * d
    inner, rank = model.stream.expand * d, math.ceil(d / 16)
    # Input, normalised, mask, scaled; halves of the projection (2 E), convolved, silu, time steps before and
    # after softplus, the scan's output (5 E); what B, C and the time steps come from.
    return 4 * d + 7 * inner + rank + 2 * model.stream.d_state


def _block(d: int) -> int:
    """Two inputs, both normalised, q, k, v, what was read (twice), two masks, the wide layer twice."""
    return 2 * d + 2 * d + 3 * d + 2 * d + 2 * d + 8 * d


def _encoder(width: int, d: int) -> int:
    """An item's features (all, those there, normalised), five hidden vectors (2 d) and eight latent ones."""
    return 3 * width + 10 * d + 8 * d


def _control(model: ModelConfig, num_modal: int, shape: MicrobatchShape) -> int:
    d, routing = model.dim, model.routing
    window = routing.window
    streams = 2 * num_modal  # attention runs in both directions for each modality
    # Queries, keys, values; with a window shorter than the history each key and value is there three times.
    copies = 7 if 0 < window < shape.length else 3
    positions = 4 * d + num_modal * 3 * d + streams * (copies + 1) * d
    chosen = routing.top_k or routing.experts
    experts = chosen if 4 * chosen <= routing.experts else routing.experts
    # What is routed (2 m d), before and after its norm; the router's hidden layer (twice as wide) four times.
    targets = streams * d * (2 + 1) + streams * d * 2 * (4 if routing.kind == "learned" else 0)
    targets += experts * 2 * d * 2 + 2 * d + 3 * d + 2 * d
    items = num_modal * 5 * d
    return shape.positions * positions + shape.targets * targets + shape.distinct * items
