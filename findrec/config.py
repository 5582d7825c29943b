"""The configuration of a run: a typed tree, read from YAML and changed by `dotted.key=value` overrides.

Unknown keys are errors that suggest the most similar key. The resolved tree is saved with the run.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, field_serializer, field_validator, model_validator

from findrec.baseline_configs import BASELINES, AnyBaseline, BaselineConfig
from findrec.errors import FindRecError, suggest
from findrec.models.config import ModelConfig, SequenceConfig
from findrec.models.configs import CONFIGS, DEFAULT, TRAINED_BASELINE, AnyModel, choose_model, config_class
from findrec.paths import find_asset
from findrec.schema import Part, may_change, parse_yaml, read_mapping, validate

# A condition on a column of items.parquet (findrec/evaluation/scoring/allow_list.py).
CONDITION = r"(?P<column>[^=<>!]+?)\s*(?P<operator><=|>=|!=|=|<|>)\s*(?P<value>.+)"


class DataConfig(Part):
    """The data set and the windows of histories."""

    recipe: str = "ml-100k"  # name or path of a recipe; prepared on first use
    folder: str | None = None  # a prepared folder or its address (http://, s3://, ...); default data/<recipe>
    cache_bytes: int | None = Field(None, ge=0)  # size limit of the local cache of remote shards
    max_length: int = Field(200, ge=2, le=65536)  # events of a window or of an evaluated history
    overlap: float = Field(0.5, ge=0.0, lt=1.0)  # share of a window that repeats earlier events as context
    feature_noise: float = Field(0.0, ge=0, le=1)  # share of items whose features are swapped (an ablation)
    shuffle_ties: bool = True  # reorder events of equal time in every epoch (training only)


class LossConfig(Part):
    """The loss over the catalogue."""

    kind: Literal["exact", "sampled", "gbce"] = "exact"
    # Items in the softmax. Items without training events can be ranked by content only if they are not used
    # as negatives: auto is `trained` if content is scored, else `all`.
    classes: Literal["auto", "trained", "all"] = "auto"
    negatives: int = Field(2048, ge=1)  # sampled, gbce: per microbatch
    # sampled: items are drawn by (training events + 1) to this power; 0 is uniform.
    popularity_power: float = Field(0.75, ge=0, le=1)
    # sampled: weight the negatives so that the loss estimates that of the full softmax (logQ correction).
    # Without it the loss is a softmax over the target and the negatives only.
    correct_sampling: bool = True
    calibration: float = Field(0.75, ge=0, le=1)  # gbce: 0 is plain binary cross-entropy
    tile_mib: int = Field(32, ge=1)  # exact: size of a tile of logits; on a GPU at least 256


class OptimConfig(Part):
    """AdamW for the tower (by DeepSpeed) and for the tables, with one schedule.

    With a sampled loss, a step updates and decays only the table rows that it looked up.
    """

    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = Field(0.05, ge=0, le=1)  # share of all steps
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: float = Field(0.05, ge=0, le=1)  # last learning rate relative to `lr`
    clip_tower: float = Field(2.0, ge=0)  # 0: no clipping
    clip_table: float = Field(0.0, ge=0)


class TrainingConfig(Part):
    """The training loop."""

    epochs: int = Field(20, ge=1)
    microbatches: int = Field(12, ge=1)  # per step; a multiple of the number of workers
    # largest number of padded positions of a microbatch; auto: 3,200 on CPUs; on GPUs what their memory
    # holds, up to 51,200, while an epoch has 100 steps or more (findrec/cluster/plan/tokens.py). It is chosen
    # once, at the first start of a run, and saved with it.
    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = 3200
    eval_every: int = Field(1, ge=1)  # epochs between validations
    patience: int = Field(0, ge=0)  # validations without improvement before stopping; 0: never stop
    # Stop at the end of the first epoch that completes this time in training steps, with a validation; time
    # of validations and checkpoints does not count. `epochs` remains the upper limit and determines the
    # schedule of the learning rate. Each stage and each trained baseline has this time. null: no limit.
    max_seconds: float | None = Field(None, gt=0)
    save_every: int = may_change("resume", 1, ge=1)  # epochs between checkpoints
    save_steps: int = may_change("resume", 0, ge=0)  # steps between checkpoints inside an epoch; 0: none
    keep: int = may_change("resume", 2, ge=1)  # newest checkpoints kept besides the best
    keep_every: int = may_change("resume", 0, ge=0)  # keep the checkpoints of every n-th epoch; 0: none
    checkpoint_store: str | None = may_change("resume", None)  # copy checkpoints to s3://, gs://, ...
    # Precision of matrix products in training; weights, losses and evaluation are float32. bfloat16 is for
    # GPUs, where the catalogue loss then also uses TF32; on a CPU it saves memory but rarely time.
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: bool = may_change("resume", False)  # recompute layers in the backward pass
    profile_steps: int = may_change("resume", 0, ge=0)  # steps that rank 0 profiles; 0: none
    seed: int = 0
    # Rows of tables: all on each worker, or a range on each. auto: sharded if a table with its optimizer
    # takes more than 1 GiB (findrec/tables/placement.py). Results do not depend on it.
    table: Literal["auto", "replicated", "sharded"] = may_change("resume", "auto")
    # A run (folder, or name below runs/) on data that this data was grown from: its weights and item rows are
    # loaded, the optimizer and its schedule start from scratch.
    warm_start: str | None = None
    objective: Literal["all", "last"] = "all"  # every position is a target, or one sample per prefix
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()

    @field_validator("tokens", mode="before")
    @classmethod
    def _check_tokens(cls, given: object) -> object:
        if (isinstance(given, str) and given != "auto") or (isinstance(given, int) and given < 1):
            raise ValueError("must be a number of at least 1, or auto")
        return given

    @property
    def num_tokens(self) -> int:
        """`tokens` as a number; raises `FindRecError` for `auto`, which is replaced at the start of a run."""
        if self.tokens == "auto":
            raise FindRecError(
                "training.tokens=auto has no number before a run is started with it (`train_run` or "
                "`resolve_tokens`); set a number to use this configuration without a run"
            )
        return self.tokens


class ClusterConfig(Part):
    """The workers and the machines they run on."""

    address: str | None = None  # of a Ray cluster; default: RAY_ADDRESS, else a local one
    workers: int = Field(2, ge=1)  # if not set, fewer where there are fewer GPUs: one for each worker
    min_workers: int | None = Field(None, ge=1)  # continue with fewer if machines are lost; null: workers
    wait_s: float = Field(0, ge=0)  # time to wait for machines before the first start
    threads: int = Field(0, ge=0)  # CPU threads per worker; 0: cores divided by workers
    cpus_per_worker: float = Field(1, gt=0)
    # What is sharded of the tower: nothing, the optimizer, also gradients, also weights. Stages 2 and 3
    # communicate after every microbatch, which is slow and saves little memory for a small tower.
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # keep the tower's optimizer in host memory
    gpu: bool | Literal["auto"] = "auto"
    max_failures: int = Field(3, ge=0)  # restarts without a new checkpoint in between
    hang_s: float = Field(60, gt=0)  # a worker without progress inside a step for so long is killed
    timeout_s: float = Field(300, gt=0)  # time limit of a collective call


DEFAULT_BASELINES: Any = ["popularity", "cooccurrence", "own_frequent", TRAINED_BASELINE]


class EvaluationConfig(Part):
    """Full-catalogue ranking."""

    # inline: the workers validate between steps, and the driver evaluates at the end. async: an actor
    # validates committed checkpoints, so that training never waits; it uses a GPU if one is free.
    evaluator: Literal["inline", "async"] = "inline"
    valid_users: int | None = Field(None, ge=1)  # users of validations in training; null: all
    ks: list[Annotated[int, Field(ge=1)]] = Field([5, 10, 20, 50], min_length=1)
    users_per_block: int = Field(256, ge=1)
    mask_seen: bool | None = None  # exclude items of the history; null: if they rarely recur
    # Items that are ranked: all, those available at the target's time (available_from of items.parquet),
    # those with column=value or column<value there or in file:PATH (raw ids); or several. Other targets are
    # left out.
    candidates: str | list[str] = "all"
    # Also report metrics over N sampled candidates, which are not comparable with other metrics.
    sampled: int | None = Field(None, ge=1)
    # Ray workers over which the item vectors are sharded for ranking; 0: rank in one process.
    shards: int = Field(0, ge=0)
    # By name or with their keys (findrec/baseline_configs.py). Models are trained with the data, loss and
    # budget of the run, and inherit keys of `SequenceConfig` that are not set from `model`.
    baselines: list[AnyBaseline] = DEFAULT_BASELINES
    samples: int = Field(6, ge=0)  # users whose recommendations are in the report
    pictures: str | None = None  # folder or tar of item pictures; default: that of the recipe

    @field_validator("ks")
    @classmethod
    def _check_ks(cls, given: list[int]) -> list[int]:
        if len(set(given)) < len(given):
            raise ValueError("values must be distinct")
        return given

    @field_serializer("baselines")
    def _only_set_keys(self, baselines: list[BaselineConfig | ModelConfig]) -> list[Any]:
        # Keys that are not set are inherited from `model`, so they are not saved.
        trees = [{"name": b.name, **b.model_dump(mode="json", exclude_unset=True)} for b in baselines]
        return [tree["name"] if len(tree) == 1 else tree for tree in trees]

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, given: str | list[str]) -> str | list[str]:
        for one in [given] if isinstance(given, str) else given:
            if not re.fullmatch(rf"all|available|file:.+|{CONDITION}", one):
                raise ValueError(
                    f"{one!r} is not one of all, available, column=value or column<value (of items.parquet; "
                    "also <=, >, >=, !=) and file:PATH (raw item ids)"
                )
        return given


class TrackingConfig(Part):
    """The MLflow mirror of `metrics.jsonl`."""

    uri: str | None = None  # default: sqlite file below FINDREC_HOME
    experiment: str = "findrec"
    enabled: bool = True


class RunConfig(Part):
    """The configuration of a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    runs: str = may_change("resume", "runs")  # the folder of all run folders
    data: DataConfig = DataConfig()
    model: AnyModel = choose_model(DEFAULT)
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = may_change("resume", ClusterConfig())
    evaluation: EvaluationConfig = may_change("resume", EvaluationConfig())
    tracking: TrackingConfig = may_change("resume", TrackingConfig())

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
                "number of microbatches per step"
            )
        if self.cluster.offload_optimizer and self.cluster.zero_stage == 0:
            raise ValueError(
                "cluster.offload_optimizer=true needs cluster.zero_stage=1, 2 or 3: without ZeRO DeepSpeed "
                "leaves the optimizer where the weights are"
            )
        if self.evaluation.evaluator == "async":
            self._check_async()
        return self

    @property
    def baselines(self) -> list[BaselineConfig | ModelConfig]:
        """`evaluation.baselines` with inherited keys, without the model of the run itself."""
        baselines = [
            _inherit_keys(b, self.model) if isinstance(b, ModelConfig) else b
            for b in self.evaluation.baselines
        ]
        return [baseline for baseline in baselines if baseline.title != self.model.title]

    @model_validator(mode="after")
    def _check_titles(self) -> RunConfig:
        titles = [baseline.title for baseline in self.baselines]
        if duplicate := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"evaluation.baselines: two are named {duplicate!r}; set the `label` of one")
        return self

    def _check_async(self) -> None:
        if self.training.patience:
            raise ValueError(
                "training.patience needs evaluation.evaluator=inline: with async, the last epoch would "
                "depend on the speed of the evaluator"
            )
        if self.training.checkpoint_store is not None:
            raise ValueError(
                "training.checkpoint_store needs evaluation.evaluator=inline: the async evaluator reads the "
                "run folder, which all machines must share anyway"
            )


def _inherit_keys(baseline: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The baseline, with keys common to sequence models that are not set taken from `model`."""
    shared = SequenceConfig.model_fields.keys() & type(model).model_fields.keys()
    shared &= type(baseline).model_fields.keys() - baseline.model_fields_set - {"name", "label"}
    tree = baseline.model_dump(exclude_unset=True) | {key: getattr(model, key) for key in shared}
    return choose_model({"name": baseline.name, **tree})


def _known_keys(
    section: type[BaseModel], model: type[ModelConfig], prefix: str = ""
) -> dict[str, type[BaseModel] | None]:
    """The dotted keys of a section with their sections; `model` is the class of the key `model`."""
    keys: dict[str, type[BaseModel] | None] = {}
    for name, info in section.model_fields.items():
        annotation: Any = model if info.annotation is ModelConfig else info.annotation
        nested = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        inner = next((a for a in nested if issubclass(a, Part)), None)
        keys[prefix + name] = inner
        if inner is not None:
            keys |= _known_keys(inner, model, f"{prefix}{name}.")
    return keys


def _check_key(
    key: str, known: Collection[str], model: type[ModelConfig], name: object, override: str
) -> None:
    if key in known:
        return
    if owner := _key_of_another_model(key, model):
        raise FindRecError(
            f"{override!r}: {key} is a key of model.name={owner}, but the model is {name}; leave it out"
        )
    raise FindRecError(f"unknown key {key!r} in {override!r}{suggest(key, known)}")


def _key_of_another_model(key: str, model: type[ModelConfig]) -> str | None:
    """The name of the first registered model other than `model` that has the dotted `key`."""
    classes = ((name, other) for name, other in CONFIGS.items() if other is not model)
    return next((name for name, other in classes if key in _known_keys(RunConfig, other)), None)


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> RunConfig:
    """Validate a tree of plain values after applying `dotted.key=value` overrides (values are YAML)."""
    tree = yaml.safe_load(yaml.safe_dump(tree))  # a deep copy of plain values
    values = {}
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep:
            raise FindRecError(
                f"{override!r} is not an override: write dotted.key=value, e.g. training.epochs=3"
            )
        values[key] = (override, parse_yaml(value, f"the value of {reprlib.repr(override)}"))
    section = tree.get("model")
    name = section.get("name", DEFAULT) if isinstance(section, dict) else DEFAULT
    name = values["model.name"][1] if "model.name" in values else name
    try:
        model = config_class(name)
    except ValueError as error:
        raise FindRecError(f"{source}: {error}") from None
    known = _known_keys(RunConfig, model)
    for key, (override, value) in values.items():
        _check_key(key, known, model, name, override)
        node = tree
        *parents, leaf = key.split(".")
        for depth, part in enumerate(parents, start=1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise FindRecError(
                    f"{override!r} cannot be set: {'.'.join(parents[:depth])} is {node!r} in {source}, not a "
                    "section of keys. Give it keys or leave it out"
                )
        node[leaf] = value

    def nearest(path: tuple[int | str, ...]) -> str:
        if "baselines" in path:
            classes = [*BASELINES.values(), *CONFIGS.values()]
            return suggest(str(path[-1]), {key for each in classes for key in each.model_fields})
        key = ".".join(map(str, path))
        if owner := _key_of_another_model(key, model):
            return f" (a key of model.name={owner}, but the model is {name}; leave it out)"
        return suggest(key, known)

    return validate(RunConfig, tree, source, nearest)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration by path or name (`demo` is `configs/demo.yaml`)."""
    path = find_asset(str(name), "configs")
    return parse_config(read_mapping(path), overrides, source=str(path))


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML, which `load_config` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
