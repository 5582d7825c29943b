"""Imports DeepSpeed without the parts of its import that cost seconds and are not used here.

Tested with DeepSpeed 0.19.8 (pinned in constraints.txt).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_deepspeed(device: torch.device | None = None) -> Any:
    """Import and return DeepSpeed, with the accelerator, the log level and the patches below set.

    `device` is that of the worker, by default a GPU if there is one. DeepSpeed itself would put a worker that
    trains on the CPU of a machine with a GPU (`cluster.gpu=false`) on the GPU.
    """
    uses_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if uses_gpu else "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with _hidden_module("mlflow"):
        import deepspeed
    with _compiler_disabled():
        import deepspeed.runtime.zero.muon.muon_optimizer
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed's own calls of torch raise this warning at every start; FindRec's users cannot act on it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Stage 3 warns that it does not look inside batches and `Out` for tensors. None of them needs that.
    zero_utils.warned = True
    # No op is compatible. At the first look at this table DeepSpeed would ask of each op whether it could be
    # built, which runs nvcc and the C++ compiler for seconds. It looks for one op only: a shared-memory
    # collective, which it would compile (a minute, once) and which gloo already provides. Ops that are loaded
    # by name, as the optimizer in host memory is, do not need the table.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


@contextmanager
def _hidden_module(name: str) -> Iterator[None]:
    """Make `import name` fail inside the context, unless the module is already imported.

    DeepSpeed's autotuner imports MLflow where it is installed, which takes two seconds of every start.
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
def _compiler_disabled() -> Iterator[None]:
    """Turn `torch.compile` off inside the context.

    An optimizer of DeepSpeed that is not used here is compiled at import and would load Inductor, another
    one to two seconds of every start.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
