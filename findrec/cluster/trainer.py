"""Ray Train's trainer of torch workers, without the part of it that nothing here uses.

Not imported by workers; it imports Ray Train and torch.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray Train is not typed
    """A `TorchTrainer` whose workers read their data themselves.

    Ray Train starts an actor for Ray Data's data sets even when none are given, and no worker runs before it
    is there: a Python process and some seconds of every start and restart of a group. Where a version of Ray
    has no such hook, the actor is started and does nothing, as it would.
    """

    def _create_default_callbacks(self) -> list[Any]:
        every: list[Any] = super()._create_default_callbacks()
        return [callback for callback in every if type(callback).__name__ != "DatasetsCallback"]
