"""The tower under DeepSpeed ZeRO, and the one place that touches DeepSpeed's optimizer state.

DeepSpeed averages gradients over workers; the loop's losses are already shares of the whole step, so each
microbatch is multiplied by the number of workers before the backward pass (a power of two or not, the
division that follows undoes it; for 1, 2, 4 workers exactly). Weights go into the module before
`deepspeed.initialize`; moments are filled in by parameter name, for stages 1 and 2. Tested with
DeepSpeed 0.19.8 (pinned in constraints.txt).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import OptimConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.base import Out, SequenceModel
from findrec.training.tower import MOMENTS, make_optimizer, set_lr

# Gradients that are reduced together. The default reserves 2 GB; a tower has a few million weights at most.
BUCKET_ELEMENTS = 5_000_000


def _import_deepspeed() -> Any:
    """DeepSpeed, told about the accelerator before its import and kept from compiling what is not needed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # Without this, DeepSpeed compiles a shared-memory collective (a minute, once) that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(optim: OptimConfig, *, stage: int, accumulation: int) -> dict[str, Any]:
    """What DeepSpeed is told; `accumulation` is the number of microbatches a worker runs in a step (K / W).

    `cluster/zero*.json` show it for an operator to read, and are compared with it in a test.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_tower,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "steps_per_print": 1 << 40,
    }


class DeepSpeedTower:
    """`Tower` under ZeRO stage 1 or 2; needs an initialised process group, of any size."""

    def __init__(
        self, model: SequenceModel, optim: OptimConfig, *, stage: int, accumulation: int, device: torch.device
    ) -> None:
        """`accumulation` is the number of microbatches this worker runs in a step (K / W)."""
        deepspeed = _import_deepspeed()
        self.model = model.to(device)
        self.backward_factor = float(dist.get_world_size())
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=make_optimizer(self.model, optim),
            config=deepspeed_config(optim, stage=stage, accumulation=accumulation),
            dist_init_required=False,
        )

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `Tower`."""
        out: Out = self.engine(batch, x_items, features)
        return out

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `Tower`. Weights are whole on every worker in stages 1 and 2, so the engine need not know."""
        return self.model.item_transform(rows, features)

    def backward(self, loss: Tensor) -> None:
        """See `Tower`. The engine reduces gradients itself at each accumulation boundary."""
        self.engine.backward(loss * self.backward_factor, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the microbatch; the last one is stepped with its learning rate

    def step(self, lr: float) -> float:
        """See `Tower`."""
        set_lr(self._optimizer.param_groups, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def moments(self) -> dict[str, Tensor]:
        """See `Tower`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        # DeepSpeed links parameters to their moments after its first step, but while only the first
        # parameter group has any; link anew so that every group is reachable.
        self._link()
        found = {}
        for name, p in self.model.named_parameters():
            for moment in MOMENTS:
                found[f"{name}.{moment}"] = safe_get_full_optimizer_state(p, moment)
        return found

    def _link(self) -> None:
        if self._optimizer.optimizer.state:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Tower`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero = self._optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        self._link()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                value = weights[name].to(p.device)
                p.copy_(value)
                safe_set_full_fp32_param(p, value)
                for moment in MOMENTS:
                    safe_set_full_optimizer_state(p, moments[f"{name}.{moment}"].to(p.device), moment)
            for name, buffer in self.model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
