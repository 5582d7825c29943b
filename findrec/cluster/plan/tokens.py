"""Chooses the tokens of a microbatch for `training.tokens=auto`, once, before a run is planned.

On CPUs they are a fixed number: larger microbatches are no faster there. A GPU is faster with large ones, up
to what its memory holds. But an epoch of few large steps trains worse than one of many small steps
(evaluation/findings.md, "Small steps"), so that an epoch keeps a number of steps. The bounds for GPUs follow
from sizes; they have not been tuned on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from findrec.cluster.plan.machines import Machine, use_gpus
from findrec.cluster.plan.plan import Plan, make_plan
from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.progress import say
from findrec.training.runs import training_jobs, with_tokens

CPU_TOKENS = 3200
# The last is for models of which an item takes much memory; the first fills a large GPU.
GPU_TOKENS = (51_200, 25_600, 12_800, 6400, 3200, 1600, 800, 400, 200)
MIN_STEPS = 100  # per epoch, for more tokens than CPU_TOKENS
# Of a GPU's memory: the plan meets measured peaks within a factor of 1.5.
MEMORY_SHARE = 0.6


def resolve_tokens(config: RunConfig, folder: DataFolder, machines: Sequence[Machine]) -> RunConfig:
    """Replace `training.tokens=auto` by a number for these machines, and tell the user why it is that.

    All trainings of a run have the same tokens, so that baselines are trained with the budget of the model:
    the number fits the one that needs most memory. Other values than `auto` are returned unchanged. Raises
    `FindRecError` if the workers cannot be placed on the machines.
    """
    if config.training.tokens != "auto":
        return config
    try:
        tokens, why = _choose(config, folder, machines)
    except FindRecError as error:
        raise FindRecError(
            f"training.tokens=auto cannot be chosen: {error} Or set training.tokens to a number."
        ) from None
    say(f"training.tokens=auto: {tokens:,} positions per microbatch ({why})")
    return with_tokens(config, tokens)


def _choose(config: RunConfig, folder: DataFolder, machines: Sequence[Machine]) -> tuple[int, str]:
    """The tokens, and why."""
    if not use_gpus(config, machines)[1]:
        return CPU_TOKENS, "the number for CPUs"
    plans = _plans(config, CPU_TOKENS, folder, machines)
    if any(plan.gpu_memory is None for plan in plans):
        return CPU_TOKENS, "as on CPUs, since the memory of the GPUs is unknown"
    num_steps = min(plan.num_steps for plan in plans)
    most = max(CPU_TOKENS, num_steps * CPU_TOKENS // MIN_STEPS)
    allowed = [tokens for tokens in GPU_TOKENS if tokens <= most]
    bound = (
        f"with more, an epoch has less than {MIN_STEPS} steps" if allowed[0] < GPU_TOKENS[0] else "the most"
    )
    for tokens in allowed:
        tried = plans if tokens == CPU_TOKENS else _plans(config, tokens, folder, machines)
        fullest = max(tried, key=_used_share)
        need = f"{fullest.memory.total('device') / 2**30:.1f} GiB of a GPU"
        if _used_share(fullest) <= MEMORY_SHARE:
            return tokens, f"{need}; {bound}"
        bound = f"twice as many take {need}"
    return allowed[-1], f"the fewest; {need}"


def _plans(config: RunConfig, tokens: int, folder: DataFolder, machines: Sequence[Machine]) -> list[Plan]:
    """The plans of all trainings of the run."""
    jobs = training_jobs(with_tokens(config, tokens), Path())
    return [make_plan(job.config, folder, machines) for job in jobs]


def _used_share(plan: Plan) -> float:
    """The share of its GPU's memory that a worker needs."""
    assert plan.gpu_memory is not None
    return plan.memory.total("device") / plan.gpu_memory
