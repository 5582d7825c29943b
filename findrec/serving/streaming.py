"""Loads a trained run for streaming inference, one event at a time."""

from __future__ import annotations

from pathlib import Path

from findrec.errors import FindRecError
from findrec.evaluation.scoring.load import load_scorer
from findrec.models.capabilities import Stream, Streams
from findrec.serving.stored import open_stored
from findrec.training.runs import main_job


def load_streaming(run_folder: Path | str) -> Stream:
    """Load the run's model at its best checkpoint for streaming.

    Raises `FindRecError` if the model does not support streaming or there is no usable checkpoint.
    """
    stored = open_stored(Path(run_folder))
    config, folder = stored.config, stored.data
    scorer = load_scorer(main_job(config, Path(run_folder)), folder)
    if not isinstance(scorer.model, Streams):
        raise FindRecError(
            f"{run_folder} is a run of {config.model.name!r}, which does not support streaming. Use "
            "`findrec recommend`, which reads the complete history"
        )
    return scorer.model.open_stream(scorer.rows_Vd, scorer.catalogue)
