"""Builds DeepSpeed's configuration from the run's configuration.

The files `cluster/zero*.json` show examples of it, and a test compares them with this code. Keys:
https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

from typing import Any

from findrec.config import OptimConfig

# Number of gradients reduced together, and of weights gathered together (stage 3). DeepSpeed's defaults
# reserve 2 GB, but a tower has a few million weights at most.
BUCKET_ELEMENTS = 5_000_000
LIVE_ELEMENTS = 2 * BUCKET_ELEMENTS  # weights gathered at once in stage 3: those in use and the next bucket
PERSISTENT_ELEMENTS = 10_000  # smaller tensors are not sharded: gathering costs more than the memory saved


def deepspeed_config(
    optim: OptimConfig, *, stage: int, accumulation: int, offload_optimizer: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration; `accumulation` is the number of microbatches per worker and step (K / W).

    With `offload_optimizer` the shard of the optimizer is kept and updated in host memory.
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
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_tower,
        "zero_optimization": zero,
        "steps_per_print": 1 << 40,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        # Keep torch's fused AdamW, as without offload; DeepSpeed's CPU optimizer would have to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
    return config
