"""The recurrent layers of GRU4Rec, over whole histories or one event at a time.

Shape letters: B rows, L steps, d model width, H width of the states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from findrec.models.parts.activation_checkpointing import CheckpointedModule
from findrec.models.parts.layers import Dropout

GATES = 3  # reset, update, candidate: the order of torch's stacked weights


class GRULayers(CheckpointedModule):
    """GRUs one after the other, dropout after each, and a projection to width d if the states are wider.

    A `RecurrentStream` (`findrec.models.parts.streaming`), whose state is the list of the states `[B, H]`.
    """

    def __init__(self, dim: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1)
        self.grus = nn.ModuleList([nn.GRU(width, hidden, batch_first=True) for width in widths])
        self.dropout = Dropout(dropout)
        self.project: nn.Linear | None = nn.Linear(hidden, dim) if hidden != dim else None
        for gru in self.grus:
            assert isinstance(gru, nn.GRU)
            _initialise(gru)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        for gru in self.grus:
            x_BLd = self.dropout(self.run_layer(gru, x_BLd)[0])
        return self._output(x_BLd)

    def initial_state(self, batch_size: int) -> list[Tensor]:
        """The zero states of all layers."""
        first = next(self.parameters())
        return [first.new_zeros(batch_size, self._gru(i).hidden_size) for i in range(len(self.grus))]

    def prefill(
        self, x_BLd: Tensor, length_B: Tensor, states: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """See `RecurrentStream`; in evaluation mode, as there is no dropout here."""
        states = self.initial_state(len(x_BLd)) if states is None else states
        if x_BLd.shape[1] == 0:
            return x_BLd, states
        new_states = []
        for i, state_BH in enumerate(states):
            x_BLd, _ = self._gru(i)(x_BLd, state_BH[None].contiguous())
            # The state after n events is at index n: without events it is the one given.
            joined_BLH = torch.cat([state_BH[:, None], x_BLd], dim=1)
            new_states.append(joined_BLH[torch.arange(len(x_BLd), device=x_BLd.device), length_B])
        return self._output(x_BLd), new_states

    def step(self, x_Bd: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `RecurrentStream`; in evaluation mode, as there is no dropout here."""
        one_B = torch.ones(len(x_Bd), dtype=torch.int64, device=x_Bd.device)
        y_B1d, new_states = self.prefill(x_Bd[:, None], one_B, states)
        return y_B1d[:, 0], new_states

    def _output(self, x_BLH: Tensor) -> Tensor:
        if self.project is None:
            return x_BLH
        projected: Tensor = self.project(x_BLH)
        return projected

    def _gru(self, i: int) -> nn.GRU:
        gru = self.grus[i]
        assert isinstance(gru, nn.GRU)
        return gru


@torch.no_grad()
def _initialise(gru: nn.GRU) -> None:
    """Xavier initialisation of the matrix of each gate, not of the stack of the three; zero biases."""
    for name, parameter in gru.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
            continue
        for weight in parameter.chunk(GATES):
            nn.init.xavier_uniform_(weight)
