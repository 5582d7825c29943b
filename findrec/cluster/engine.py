"""The tower under DeepSpeed, ZeRO stages 0 to 3.

DeepSpeed averages gradients over workers; the loop's losses are already shares of the whole step, so each
microbatch is multiplied by the number of workers before the backward pass (a power of two or not, the
division that follows undoes it; for 1, 2, 4 workers exactly). Weights go into the module before
`deepspeed.initialize`; those of a checkpoint, and the moments, by `findrec.cluster.zero_state`.

Stage 3 gathers a module's weights when that module is called and gives them up after it. So every verb of the
model goes through the engine, and where a module uses the weights of modules inside it without calling them
DeepSpeed is told (`_BORROWERS`). Results of modules are tensors or tuples of them, as nothing else is looked
through for where the backward pass will begin.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from findrec.cluster.deepspeed_config import deepspeed_config
from findrec.cluster.zero_state import ZeroState
from findrec.config import OptimConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.base import Out, SequenceModel
from findrec.models.item_side import ItemSide
from findrec.models.latents import ModalEncoder
from findrec.training.tower import make_optimizer, set_lr

_BORROWERS = (ModalEncoder, ItemSide)  # both take norm and projection as one (`project_normed`)


def _import_deepspeed() -> Any:
    """DeepSpeed, told about the accelerator before its import and kept from compiling what is not needed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with _not_imported("mlflow"):
        import deepspeed
    with _no_compiler():
        import deepspeed.runtime.zero.muon.muon_optimizer
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # Of DeepSpeed's calls of torch, at every start: nobody who runs FindRec can change them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Stage 3 warns of batches and of `Out`, which it does not look through: none of them needs it.
    zero_utils.warned = True
    # Without this, DeepSpeed compiles a shared-memory collective (a minute, once) that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _not_imported(name: str) -> Iterator[None]:
    """Who imports this module meanwhile is told it is not there: DeepSpeed's autotuner takes MLflow if it is,
    two seconds of every start.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _no_compiler() -> Iterator[None]:
    """`torch.compile` does nothing meanwhile: for an optimizer of DeepSpeed's that is not used here it would
    import Inductor, another second or two of every start.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class _Verbs(nn.Module):
    """What a model is asked for, as calls of one module: DeepSpeed gathers weights for nothing else."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, verb: str, *arguments: Any) -> object:
        """`forward` or `item_transform` of the model."""
        return self.model(*arguments) if verb == "forward" else getattr(self.model, verb)(*arguments)


class DeepSpeedTower:
    """`Tower` under ZeRO; needs an initialised process group, of any size."""

    def __init__(
        self,
        model: SequenceModel,
        optim: OptimConfig,
        *,
        stage: int,
        accumulation: int,
        device: torch.device,
        offload_optimizer: bool = False,
    ) -> None:
        """`accumulation` is the number of microbatches this worker runs in a step (K / W)."""
        deepspeed = _import_deepspeed()
        self._stage = stage
        # Of weights that are split, a whole copy is made to evaluate with.
        self._empty = copy.deepcopy(model).to("meta") if stage == 3 else None
        self.model = model.to(device)
        self._device = device
        self.backward_factor = float(dist.get_world_size())
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=_Verbs(self.model),
            optimizer=make_optimizer(self.model, optim),
            config=deepspeed_config(
                optim, stage=stage, accumulation=accumulation, offload_optimizer=offload_optimizer
            ),
            dist_init_required=False,
        )
        if stage == 3:
            for module in self.model.modules():
                if isinstance(module, _BORROWERS):
                    for parameter in module.parameters():
                        deepspeed.zero.register_external_parameter(module, parameter)
        self._state = ZeroState(self.model, self._optimizer, stage)

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `Tower`."""
        out: Out = self.engine("forward", batch, x_items, features)
        return out

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `Tower`."""
        vectors: Tensor = self.engine("item_transform", rows, features)
        return vectors

    def backward(self, loss: Tensor) -> None:
        """See `Tower`. The engine reduces gradients itself at each accumulation boundary."""
        self.engine.backward(loss * self.backward_factor, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the microbatch; the last one is stepped with its learning rate

    def step(self, lr: float) -> float:
        """See `Tower`."""
        set_lr(self._optimizer.param_groups, lr)
        norm = None
        if self._stage == 0:  # DeepSpeed clips by it, but does not tell
            norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0 if norm is None else norm)

    def weights(self) -> dict[str, Tensor]:
        """See `Tower`."""
        return self._state.weights()

    def whole_model(self) -> SequenceModel:
        """See `Tower`."""
        if self._empty is None:
            return self.model
        whole = copy.deepcopy(self._empty).to_empty(device=self._device)
        whole.load_state_dict(self.weights())
        return whole

    def moments(self) -> dict[str, Tensor]:
        """See `Tower`."""
        return self._state.moments()

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Tower`."""
        self._state.load(weights, moments, steps)
