"""Errors raised before workers are placed; failures of workers are in test_failures.py."""

import pytest
from planted import make_config

from findrec.cluster.plan.machines import Machine
from findrec.cluster.supervise import _refuse_split_tracking
from findrec.config import parse_config
from findrec.errors import FindRecError


def test_a_database_file_that_only_one_of_the_machines_has_is_refused():
    overrides = ["cluster.workers=2", "tracking.uri=sqlite:////data/mlflow.db"]
    config = parse_config(make_config().model_dump(mode="json"), overrides)
    small = [Machine(name, cpus=1, memory=8 << 30) for name in ("a", "b")]
    with pytest.raises(FindRecError, match="sqlite"):
        _refuse_split_tracking(config, small, False)
    _refuse_split_tracking(config, [*small, Machine("c", cpus=2, memory=8 << 30)], False)  # all go there
    _refuse_split_tracking(config, small[:1], False)  # there is no room yet: nothing is known
