"""Ray Train's `TorchTrainer` without the Ray Data actor, and with a store that only the workers can reach.

Only the driver imports this module, which imports Ray Train and torch.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer

from findrec.cluster.rendezvous import bind_store_to_loopback


class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray Train is not typed
    """A `TorchTrainer` whose workers read their data themselves.

    Ray Train starts an actor for Ray Data's data sets even if there are none, and starts no worker before
    that actor runs, which adds a process and some seconds to every start and restart. In a version of Ray
    without this hook the actor is started as usual and does nothing.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ != "DatasetsCallback"]


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(bind_store_to_loopback)
        super().on_start(worker_group, backend_config)


class WorkerConfig(TorchConfig):  # type: ignore[misc]
    """A `TorchConfig` whose workers cannot be reached from other machines if all run on one machine."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """The class that connects the workers."""
        return _Backend
