"""Which configurations may continue a run folder."""

import pytest
from planted import make_config

from findrec.errors import FindRecError
from findrec.training.runs import open_run_folder, read_run_config, training_jobs


def config_in(tmp_path, **changes):
    config = make_config().model_copy(update={"runs": str(tmp_path), "name": "r"})
    return config.model_copy(update=changes)


def other_seed(config):
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": 9})})


def test_resolved_configuration_is_saved_and_read_back(tmp_path):
    config = config_in(tmp_path)
    folder = open_run_folder(config)
    assert read_run_config(folder) == config
    baseline = training_jobs(config, folder)[1]
    assert read_run_config(baseline.folder).model.name == "sasrec"
    assert baseline.config.training == config.training


def test_another_configuration_is_refused_once_there_are_checkpoints(tmp_path):
    config = config_in(tmp_path)
    folder = open_run_folder(config)
    open_run_folder(other_seed(config))  # nothing learnt yet: nothing to protect
    open_run_folder(config)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(FindRecError, match=r"training\.seed: 0 there, 9 now"):
        open_run_folder(other_seed(config))
    assert read_run_config(folder) == config


def test_where_and_how_it_runs_may_change(tmp_path):
    config = config_in(tmp_path)
    folder = open_run_folder(config)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    cluster = config.cluster.model_copy(update={"workers": 4})
    open_run_folder(config.model_copy(update={"cluster": cluster}))


def test_a_folder_without_configuration_is_no_run(tmp_path):
    with pytest.raises(FindRecError, match="no run folder"):
        read_run_config(tmp_path)
