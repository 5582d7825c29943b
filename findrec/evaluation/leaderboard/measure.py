"""Evaluates what the runs of a leaderboard have not been evaluated for: baselines and robustness suites.

Results are files of run folders and are reused while they are those of the same data and protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from findrec.baseline_configs import BaselineConfig
from findrec.config import RunConfig, dump_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.compare.results import Evaluated, read_models
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import write_results
from findrec.evaluation.run import rank_scorers
from findrec.evaluation.suites.inputs import longest_history
from findrec.evaluation.suites.suites import SUITES, Suite, read_suites, run_suite, write_suite
from findrec.files import replacing
from findrec.training.build import used_modalities
from findrec.training.runs import main_job, run_folder


def evaluate_baselines(config: RunConfig, folder: DataFolder) -> dict[str, Evaluated]:
    """The test results of the configuration's baselines that need no training, by title.

    They are saved in the run folder of `config`, which has results but no training, and read from there if
    they are those of this configuration and data.
    """
    titles = [baseline.title for baseline in config.baselines if isinstance(baseline, BaselineConfig)]
    if not titles:
        return {}
    path = run_folder(config)
    known = _saved(path, dump_config(config), folder)
    if known is not None:
        return known
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.json").unlink(missing_ok=True)  # the results of another configuration
    with replacing(path / "config.yaml") as part:
        part.write_text(dump_config(config), encoding="utf-8")
        part.chmod(0o600)  # addresses may hold credentials
    write_results(path, *rank_scorers(path, folder, titles, shards=config.evaluation.shards), folder)
    return {one.model: one for one in read_models(path, "test")}


def _saved(path: Path, config: str, folder: DataFolder) -> dict[str, Evaluated] | None:
    saved = path / "config.yaml"
    if not saved.is_file() or saved.read_text(encoding="utf-8") != config:
        return None
    try:
        results = {one.model: one for one in read_models(path, "test")}
    except FindRecError:  # cut short, or damaged: they are made again
        return None
    same = all(one.data.get("events_sha256") == folder.manifest.events_sha256 for one in results.values())
    return results if same else None


def suites_of(
    config: RunConfig, folder: DataFolder, wanted: Mapping[str, Sequence[int]], *, trained: bool = True
) -> Iterator[Suite]:
    """Yield the suites of a run at the wanted levels; those for which it has no scorer are left out.

    Saved suites are reused if they have these levels. Without `trained` they are those of the baselines.
    """
    path = run_folder(config)
    saved = {suite.kind: suite for suite in read_suites(path)}
    for kind, levels in wanted.items():
        if not _applies(kind, config, folder, trained=trained):
            continue
        suite = next((one for one in saved.values() if one.kind == kind), None)
        if suite is None or not _matches(suite, levels, config, folder, trained=trained):
            suite = run_suite(path, kind, levels=levels, trained=trained)
            write_suite(path, suite)
        yield suite


def _applies(kind: str, config: RunConfig, folder: DataFolder, *, trained: bool) -> bool:
    """Whether any scorer of the run uses what the suite alters."""
    if kind == "length":
        return True
    if trained:
        return bool(used_modalities(main_job(config, Path()).config, folder))
    return any(b.content for b in config.baselines if isinstance(b, BaselineConfig))


def _matches(
    suite: Suite, levels: Sequence[int], config: RunConfig, folder: DataFolder, *, trained: bool
) -> bool:
    """Whether a saved suite is what `run_suite` would give; models that skip long histories are run again."""
    path = run_folder(config)
    results, file = path / "metrics.json", path / SUITES / f"{suite.kind}.json"
    if file.stat().st_mtime_ns < results.stat().st_mtime_ns:
        return False  # perhaps of an earlier checkpoint
    if suite.protocol != RankingProtocol.of(config, folder).describe(folder):
        return False
    untrained = [baseline.title for baseline in config.baselines if isinstance(baseline, BaselineConfig)]
    models = [config.model.title] if trained else untrained
    reference = 0
    if suite.kind == "length":
        longest = longest_history(folder)
        reference = min(longest, config.data.max_length) if trained else longest
    have = [{point.level for point in curve.points} for curve in suite.curves if curve.model in models]
    return bool(have) and all(one == {*levels, reference} for one in have)
