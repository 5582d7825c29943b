"""What DeepSpeed is told, made from the run's configuration.

`cluster/zero*.json` show it for an operator to read, and are compared with it in a test. Keys:
https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

from typing import Any

from findrec.config import OptimConfig

# Gradients that are reduced together, and weights that are gathered together (stage 3). The defaults reserve
# 2 GB; a tower has a few million weights at most.
BUCKET_ELEMENTS = 5_000_000
LIVE_ELEMENTS = 2 * BUCKET_ELEMENTS  # gathered weights at once in stage 3: those in use and the next
PERSISTENT_ELEMENTS = 10_000  # smaller tensors stay whole: to gather them costs more than they take


def deepspeed_config(
    optim: OptimConfig, *, stage: int, accumulation: int, offload_optimizer: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration; `accumulation` is the number of microbatches a worker runs a step (K / W).

    With `offload_optimizer` the optimizer's shard lies, and is updated, in the machine's own memory.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero |= {
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_tower,
        "zero_optimization": zero,
        "steps_per_print": 1 << 40,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        # Ours is torch's fused AdamW, as without offload; DeepSpeed's own would be compiled first.
        found["zero_force_ds_cpu_optimizer"] = False
    return found
