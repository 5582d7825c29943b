"""The configuration of a run: a typed tree, read from YAML, then changed by `dotted.key=value`.

Unknown keys are refused with the nearest known one. The resolved tree is printed and saved with the run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from findrec.errors import FindRecError, suggest
from findrec.paths import find_asset
from findrec.schema import Part, read_mapping, validate


class DataConfig(Part):
    """What is trained on."""

    recipe: str = "ml-100k"  # name or path of a recipe; prepared on first use
    folder: str | None = None  # a prepared folder or its address (http://, s3://, ...); default data/<recipe>
    cache_bytes: int | None = Field(None, ge=0)  # of an address's shards, kept here at most
    max_length: int = Field(200, ge=2, le=65536)  # events a window or an evaluated history holds
    overlap: float = Field(0.5, ge=0.0, lt=1.0)  # part of a window that repeats earlier events as context
    feature_noise: float = Field(0.0, ge=0, le=1)  # share of items that swap features: an ablation
    shuffle_ties: bool = True  # events of one timestamp get a new order every epoch (training only)


class StreamConfig(Part):
    """The layers that mix a sequence over time."""

    kind: Literal["mamba", "gru", "transformer"] = "mamba"
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)  # transformer only
    d_state: int = Field(16, ge=1)
    d_conv: int = Field(4, ge=2)
    expand: int = Field(2, ge=1)
    scan: Literal["auto", "reference", "torch", "cpp", "mamba_ssm"] = "auto"


class AlignConfig(Part):
    """Alignment of each modality's latents to the ID stream (specs: IICM)."""

    # mmd: the control. legacy: the wrong term of the public code, to show what it does.
    kind: Literal["stein", "mmd", "legacy", "none"] = "stein"
    score: Literal["gaussian", "kde"] = "gaussian"
    kernel: Literal["rbf", "imq"] = "rbf"
    weight: float = Field(0.1, ge=0)
    paired_weight: float = Field(0.0, ge=0)  # InfoNCE between an item's latent and its own ID vector
    paired_temperature: float = Field(0.1, gt=0)
    kl_weight: float = Field(0.01, ge=0)
    free_bits: float = Field(0.05, ge=0)
    rows: int = Field(512, ge=8)  # latents of one microbatch the terms are estimated from
    diagnose_every: int = Field(20, ge=0)  # steps between measurements of the alignment; 0: never


class RoutingConfig(Part):
    """Cross-modal expert routing."""

    kind: Literal["learned", "mean"] = "learned"  # mean: all experts weigh the same, no router
    heads: int = Field(4, ge=1)
    window: int = Field(256, ge=0)  # latest events that attention sees, keeping its cost linear; 0: all
    experts: int = Field(4, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = None  # None: dense
    balance_weight: float = Field(1e-2, ge=0)
    z_weight: float = Field(1e-3, ge=0)


class ItemsConfig(Part):
    """Item vectors: the id row alone, or with projected modal features added."""

    features: Literal["none", "input", "score", "both"] = "none"  # where features are added
    id_dropout: float = Field(0.0, ge=0, lt=1)  # share of items that train on their features alone


class ModelConfig(Part):
    """Which system, and its sizes. Sections that a system does not use are ignored by it."""

    name: Literal["findrec", "sasrec"] = "findrec"
    dim: int = Field(64, ge=4)
    dropout: float = Field(0.2, ge=0, lt=1)
    modalities: list[str] | Literal["all"] = "all"
    gaps: bool = False  # log-bucketed time gaps as an input
    events: bool = False  # types of events (view, purchase, ...) as an input, where the data has them
    wait: bool = False  # knows the time of asking: log-bucketed seconds since the last event
    repeat: bool = True  # own-item head: learns if met items come again (groceries) or never do (films)
    layers: int = Field(2, ge=1)  # SASRec blocks
    heads: int = Field(2, ge=1)  # SASRec attention heads
    items: ItemsConfig = ItemsConfig()
    stream: StreamConfig = StreamConfig()
    align: AlignConfig = AlignConfig()
    routing: RoutingConfig = RoutingConfig()


class LossConfig(Part):
    """The catalogue loss."""

    kind: Literal["exact", "sampled", "gbce"] = "exact"
    # What the softmax runs over. Items without training events can be ranked by content alone, and only if
    # they are not trained against: auto is `trained` where content is scored (model.items), else `all`.
    classes: Literal["auto", "trained", "all"] = "auto"
    negatives: int = Field(2048, ge=1)  # sampled, gbce: shared by a microbatch
    calibration: float = Field(0.75, ge=0, le=1)  # gbce: 0 is plain binary cross-entropy
    tile_mib: int = Field(32, ge=1)  # exact: largest logit tile held at once


class OptimConfig(Part):
    """AdamW for the tower (DeepSpeed) and for the item table (ours), one schedule for both.

    With a loss by sampling, a step updates (and decays) the rows of the table alone that it looked up.
    """

    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = Field(0.05, ge=0, le=1)  # part of all steps
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: float = Field(0.05, ge=0, le=1)  # last learning rate over the first
    clip_tower: float = Field(2.0, ge=0)  # 0: no clipping
    clip_table: float = Field(0.0, ge=0)


class TrainingConfig(Part):
    """The loop."""

    epochs: int = Field(20, ge=1)
    microbatches: int = Field(12, ge=1)  # K of the epoch plan; the number of workers divides it
    tokens: int = Field(3200, ge=1)  # padded positions of one microbatch, at most
    eval_every: int = Field(1, ge=1)  # epochs between validations
    patience: int = Field(0, ge=0)  # validations without a better NDCG@10 before stopping; 0: never stop
    save_every: int = Field(1, ge=1)  # epochs between checkpoints
    save_steps: int = Field(0, ge=0)  # steps between checkpoints inside an epoch; 0: none
    keep: int = Field(2, ge=1)  # newest checkpoints kept beside the best
    keep_every: int = Field(0, ge=0)  # epochs whose checkpoints are kept for good: every so many; 0: none
    checkpoint_store: str | None = None  # an address (s3://, gs://, ...) where checkpoints are kept as well
    # Products of a training pass; weights, losses and evaluation are float32. bfloat16 is for GPUs, where it
    # also lets the catalogue loss use TF32; on a CPU it saves memory of activations and seldom time.
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: bool = False  # layers are run again in the backward pass: slower, less memory
    profile_steps: int = Field(0, ge=0)  # steps of which rank 0 writes a trace into the run folder; 0: none
    seed: int = 0
    # Rows of the item table on the workers: all on each, or a range on each. auto: sharded where a whole
    # table with its optimizer takes more than 1 GiB (findrec/tables/placement.py). Results do not depend on
    # it.
    table: Literal["auto", "replicated", "sharded"] = "auto"
    # A run (folder, or name below runs/) on the data that this data was grown from: weights and rows of known
    # items are taken over, the optimizer and its schedule start anew.
    warm_start: str | None = None
    objective: Literal["all", "last"] = "all"  # every position a target, or one sample for each prefix
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()


class ClusterConfig(Part):
    """Where it runs."""

    address: str | None = None  # a Ray cluster to join; default: RAY_ADDRESS, else one is started here
    workers: int = Field(2, ge=1)
    min_workers: int | None = Field(None, ge=1)  # go on with so few when machines are lost; null: all of them
    wait_s: float = Field(0, ge=0)  # for machines that are still to come, before the first worker is placed
    threads: int = Field(0, ge=0)  # CPU threads of a worker; 0: cores divided by workers
    cpus_per_worker: float = Field(1, gt=0)
    # What workers split of the tower: nothing, the optimizer, gradients too, weights too. Stages 2 and 3 talk
    # after every microbatch, which costs more time than a small tower's gradients are worth in memory.
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # the tower's optimizer in the machine's memory instead of the GPU's
    gpu: bool | Literal["auto"] = "auto"
    max_failures: int = Field(3, ge=0)  # restarts after lost workers without a new checkpoint in between
    hang_s: float = Field(60, gt=0)  # a worker that stands still so long inside a step is killed
    timeout_s: float = Field(300, gt=0)  # a collective that takes longer is a hang


class EvaluationConfig(Part):
    """Full-catalogue ranking."""

    # Who ranks: the workers, between their steps, and in the end this process; or (async) an actor beside
    # them, from committed checkpoints, so that training never waits; on a GPU where one is left over.
    evaluator: Literal["inline", "async"] = "inline"
    valid_users: int | None = Field(None, ge=1)  # validation in training: so many, always the same; null: all
    ks: list[int] = Field([5, 10, 20, 50])
    users_per_block: int = Field(256, ge=1)
    mask_seen: bool | None = None  # take met items out of the ranking; null: where hardly any comes again
    # What competes for a target: all items, those available at its time (available_from of items.parquet),
    # those of column=value there or in file:PATH (raw ids); or several. Targets off such a list are left out.
    candidates: str | list[str] = "all"
    # Beside the full ranking, what N sampled candidates would have shown: not comparable with anything else.
    sampled: int | None = Field(None, ge=1)
    # Ray workers that the catalogue's rows are spread over while it is ranked; 0: none, all in one process.
    shards: int = Field(0, ge=0)
    baselines: list[str] = Field(["popularity", "cooccurrence", "own_frequent", "sasrec"])
    samples: int = Field(6, ge=0)  # users whose recommendations the report shows
    pictures: str | None = None  # folder or tar of item pictures for it; default: where the recipe has them

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, given: str | list[str]) -> str | list[str]:
        for one in [given] if isinstance(given, str) else given:
            if not re.fullmatch(r"all|available|file:.+|[^=]+=.+", one):
                raise ValueError(
                    f"{one!r} is neither all, available, column=value (of items.parquet) nor file:PATH (raw "
                    "item ids)"
                )
        return given


class TrackingConfig(Part):
    """MLflow, a mirror of `metrics.jsonl`."""

    uri: str | None = None  # default: sqlite file below FINDREC_HOME
    experiment: str = "findrec"
    enabled: bool = True


class RunConfig(Part):
    """The whole tree."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs: str = "runs"  # the folder that holds run folders
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        k, w = self.training.microbatches, self.cluster.workers
        if (self.cluster.min_workers or 1) > w:
            raise ValueError(
                f"cluster.min_workers={self.cluster.min_workers} is more than cluster.workers={w}"
            )
        if k % w:
            raise ValueError(
                f"cluster.workers={w} must divide training.microbatches={k}: each worker runs the same "
                "number of a step's microbatches"
            )
        if self.cluster.offload_optimizer and self.cluster.zero_stage == 0:
            raise ValueError(
                "cluster.offload_optimizer=true needs cluster.zero_stage=1, 2 or 3: without ZeRO DeepSpeed "
                "leaves the optimizer where the weights are"
            )
        if self.evaluation.evaluator == "async":
            self._check_async()
        return self

    def _check_async(self) -> None:
        if self.training.patience:
            raise ValueError(
                "training.patience needs evaluation.evaluator=inline: with async the epoch training ends "
                "at would depend on how fast the evaluator is"
            )
        if self.training.checkpoint_store is not None:
            raise ValueError(
                "training.checkpoint_store needs evaluation.evaluator=inline: the evaluator of async reads "
                "the run folder, so all machines must share that anyway"
            )


def _known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel] | None]:
    keys: dict[str, type[BaseModel] | None] = {}
    for name, info in model.model_fields.items():
        annotation: Any = info.annotation
        nested = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        section = next((a for a in nested if issubclass(a, Part)), None)
        keys[prefix + name] = section
        if section is not None:
            keys |= _known_keys(section, f"{prefix}{name}.")
    return keys


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> RunConfig:
    """Validate a tree of plain values after applying `dotted.key=value` overrides (values are YAML)."""
    known = _known_keys(RunConfig)
    tree = yaml.safe_load(yaml.safe_dump(tree))  # a deep copy of plain values
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep:
            raise FindRecError(f"{override!r} is no override: write dotted.key=value, e.g. training.epochs=3")
        if key not in known:
            raise FindRecError(f"unknown key {key!r} in {override!r}{suggest(key, known)}")
        node = tree
        *parents, leaf = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = yaml.safe_load(value)
    return validate(RunConfig, tree, source, lambda place: suggest(".".join(map(str, place)), known))


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration by path or name (`demo` finds `configs/demo.yaml`)."""
    path = find_asset(str(name), "configs")
    return parse_config(read_mapping(path), overrides, source=str(path))


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML; `load_config` of it gives the same tree back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
