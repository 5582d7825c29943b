"""Runs one microbatch of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from findrec.models.base import Microbatch, StepLoss
from findrec.tables.base import Table
from findrec.tables.view import Tables
from findrec.training.tower import Tower


def run_microbatch(tower: Tower, tables: Mapping[str, Table], microbatch: Microbatch[Any]) -> StepLoss:
    """Forward and backward of one microbatch; gradients stay in the tower and the tables.

    Returns the values for the log, detached (`total` is what was differentiated).
    """
    torch.manual_seed(microbatch.seed)
    views = Tables(tables, microbatch.num_targets, microbatch.seed)
    loss = tower.loss(microbatch, views)
    tower.backward(loss.total)
    views.push_gradients(tower.backward_factor)
    return replace(loss, total=loss.total.detach())
