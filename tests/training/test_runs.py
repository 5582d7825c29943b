"""Which configurations may continue a run folder."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from planted import make_config

from findrec.errors import FindRecError
from findrec.schema import flatten
from findrec.training.runs import only_training_of, open_run_folder, read_run_config, training_jobs


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
    with pytest.raises(FindRecError, match=r"training\.seed: 0 before, 9 now"):
        open_run_folder(other_seed(config))
    assert read_run_config(folder) == config


def test_one_process_trains_a_run_and_the_second_is_told_which(tmp_path):
    config = config_in(tmp_path / "runs")

    def second():
        with only_training_of(config):
            return "trained"

    with ThreadPoolExecutor(1) as other, only_training_of(config):
        with only_training_of(config.model_copy(update={"name": "another"})):
            pass
        with pytest.raises(FindRecError, match=rf"process {os.getpid()} on .* is training .*/r: wait"):
            other.submit(second).result()
    assert second() == "trained"
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_of_a_newer_version_is_not_touched(tmp_path):
    config = config_in(tmp_path)
    folder = open_run_folder(config)
    path = folder / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text('{"format": 2, "files": {}}')
    (folder / "config.yaml").write_text(saved := (folder / "config.yaml").read_text() + "# kept\n")
    with pytest.raises(FindRecError, match="written by a newer version"):
        open_run_folder(config)
    assert (folder / "config.yaml").read_text() == saved


def test_where_and_how_it_runs_may_change(tmp_path):
    config = config_in(tmp_path)
    folder = open_run_folder(config)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    cluster = config.cluster.model_copy(update={"workers": 4})
    open_run_folder(config.model_copy(update={"cluster": cluster}))


def test_a_folder_without_configuration_is_no_run(tmp_path):
    with pytest.raises(FindRecError, match="not a run folder"):
        read_run_config(tmp_path)


def test_nested_settings_are_flattened_to_dotted_keys():
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {"a.b": 1, "a.c.d": [1, 2], "e": None}
