"""Optional capabilities of models, which are protocols."""

from __future__ import annotations

import pytest
import torch
from small_models import make_model

from findrec.models.capabilities import Explains, LimitedHistory, SignedScores, Streams
from findrec.models.configs import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_members_of_a_protocol_come_together(name: str) -> None:
    """A model implements all members of a capability or none."""
    model = make_model({"name": name, "dim": 8}, {"text": 5})
    members = {
        Explains: ("alignment_diagnostics", "explain"),
        Streams: ("open_stream",),
        LimitedHistory: ("longest_history",),
        SignedScores: ("score_signs",),
    }
    for protocol, names in members.items():
        assert isinstance(model, protocol) == all(hasattr(model, member) for member in names)
        assert len({hasattr(model, member) for member in names}) == 1
    if isinstance(model, SignedScores):
        assert model.score_signs.abs().eq(torch.ones(8)).all()


def test_a_limit_is_that_of_the_learned_positions() -> None:
    for stream, limit in (("mamba", None), ("transformer", 20)):
        model = make_model({"dim": 8, "stream": {"kind": stream, "heads": 2}})
        assert isinstance(model, LimitedHistory)
        assert model.longest_history == limit
