"""The report of a tuning: the best configuration, the trials, and which keys mattered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from findrec import __version__
from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.evaluation.display.wording import format_number
from findrec.files import replacing
from findrec.progress import Console
from findrec.text import redacted
from findrec.training.checkpoints.validations import SELECTS
from findrec.tuning.space import Range, Space, with_values
from findrec.tuning.study import distributions, first_values, tuning_folder
from findrec.tuning.trials import Trial

BEST = "best.yaml"
_FEWEST = 4  # trials for an importance; it says little below about twenty
_SHOWN = 20  # trials in the report


def importances(space: Space, trials: Sequence[Trial]) -> dict[str, float] | None:
    """The share of each key in the variance of the validation metric, by fANOVA; None for too few trials.

    A random forest is fitted to the best metric of each trial, also of those that were stopped early; its
    variance over one key, averaged over the others, is the importance of the key (Hutter et al., An Efficient
    Approach for Assessing Hyperparameter Importance, ICML 2014).
    """
    import optuna

    measured = [trial for trial in trials if trial.best is not None]
    values = {json.dumps([trial.values[key] for key in space.keys]) for trial in measured}
    if len(values) < _FEWEST or len({trial.best for trial in measured}) < 2:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in measured:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.values), distributions=distributions(space), value=trial.best
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The trial with the best validation metric; raises `FindRecError` if none was validated."""
    measured = [trial for trial in trials if trial.best is not None]
    if not measured:
        raise FindRecError("no trial was validated; what ended them is above")
    return max(measured, key=lambda trial: trial.best or 0.0)


def write_report(config: RunConfig, space: Space, trials: Sequence[Trial], command: str) -> list[Path]:
    """Write `report.md`, `report.json` and `best.yaml` to the folder of the tuning; returns their paths."""
    folder, best = tuning_folder(config), best_trial(trials)
    mattered = importances(space, trials)
    name = f"{config.name}-tuned"
    given = config.model_dump(mode="json", exclude_unset=True)  # what the machine decides stays open
    tree = with_values(given, {**best.values, "name": name})
    start = (
        f"# The best of {len(trials)} trials of {config.name}: validation {SELECTS} {best.best:.4f}.\n"
        f"#   findrec train {folder / BEST}\n"
    )
    figures = {
        "command": command,
        "version": __version__,
        "metric": f"validation {SELECTS}",
        "space": space.tree,
        "best": {"trial": best.name, "value": best.best, "values": dict(best.values)},
        "importances": mattered,
        "trials": [
            {
                "trial": trial.name,
                "ended": trial.ended,
                "value": trial.best,
                "epochs": trial.epochs,
                "values": dict(trial.values),
            }
            for trial in trials
        ],
    }
    texts = {
        "report.md": "\n".join(_lines(config, space, trials, mattered, command)) + "\n",
        "report.json": json.dumps(figures, indent=1, allow_nan=False) + "\n",
        BEST: start + redacted(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)),
    }
    for file, text in texts.items():
        with replacing(folder / file) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def _lines(
    config: RunConfig,
    space: Space,
    trials: Sequence[Trial],
    mattered: Mapping[str, float] | None,
    command: str,
) -> Iterator[str]:
    best = best_trial(trials)
    ends = [trial.ended or "not ended" for trial in trials]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    yield from (f"# Tuning of {config.name}", "", f"Made by FindRec {__version__} with the command", "")
    yield from ("```sh", command, "```", "")
    yield f"{len(trials)} trials: {counts}. Values are the best validation {SELECTS} of a trial."
    yield ""
    yield f"Best: {format_number(best.best)} after {best.epochs} epochs, `{best.name}`; `{BEST}` trains it."
    first = first_values(config, space)
    given = next((trial for trial in trials if first is not None and trial.values == first), None)
    if given is not None and given.best is not None:
        yield f"The configuration as given: {format_number(given.best)}."
    yield ""
    yield (
        f"The best of {len(trials)} values is an optimistic one: it is selected by the metric that it is "
        "reported in. What it is worth shows on the test split with several seeds (`findrec leaderboard`)."
    )
    yield from ("", "## Which keys mattered", "", *_importance_lines(space, best, mattered))
    yield from ("", "## Trials", "", *_trial_lines(space, trials))


def _importance_lines(space: Space, best: Trial, mattered: Mapping[str, float] | None) -> Iterator[str]:
    if mattered is None:
        yield f"Unknown: it takes {_FEWEST} or more trials with different values and results."
        yield ""
    else:
        yield "The share of each key in the variance of the metric over the search space (fANOVA)."
        yield ""
    yield "| key | share | best | tried |"
    yield "| --- | ---: | ---: | --- |"
    shares = mattered or {}
    for key in sorted(space.keys, key=lambda key: -shares.get(key, 0.0)):
        share = f"{100 * shares[key]:.0f} %" if key in shares else "–"
        value = best.values[key]
        edge = "; the best is at an end: widen it" if space.at_edge(key, value) else ""
        yield f"| `{key}` | {share} | {_shown(value)} | {_tried(space.keys[key])}{edge} |"


def _trial_lines(space: Space, trials: Sequence[Trial]) -> Iterator[str]:
    yield f"| {' | '.join(['trial', 'value', 'epochs', 'ended', *(f'`{key}`' for key in space.keys)])} |"
    yield f"| {' | '.join(['---'] * 4 + ['---:'] * len(space.keys))} |"
    ordered = sorted(trials, key=lambda trial: -1.0 if trial.best is None else trial.best)[::-1]
    for trial in ordered[:_SHOWN]:
        cells = [trial.name, format_number(trial.best), str(trial.epochs), trial.ended or "not ended"]
        yield f"| {' | '.join(cells + [_shown(trial.values[key]) for key in space.keys])} |"
    if len(ordered) > _SHOWN:
        yield f"\nThe other {len(ordered) - _SHOWN} are in `report.json`."


def _tried(tried: Range | Sequence[Any]) -> str:
    if isinstance(tried, Range):
        return f"{_shown(tried.low)} to {_shown(tried.high)}{', logarithmic' if tried.log else ''}"
    return ", ".join(map(_shown, tried))


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_summary(space: Space, trials: Sequence[Trial]) -> None:
    """Print the best values, each with the share of its key in the variance."""
    best, shares = best_trial(trials), importances(space, trials) or {}
    title = f"best of {len(trials)} trials: valid {SELECTS} {format_number(best.best)}"
    table = Table(title=title, title_justify="left")
    for name in ("key", "best", "share of the variance"):
        table.add_column(name, justify="left" if name == "key" else "right")
    for key in sorted(space.keys, key=lambda key: -shares.get(key, 0.0)):
        share = f"{100 * shares[key]:.0f} %" if key in shares else "–"
        table.add_row(key, _shown(best.values[key]), share)
    Console().print(table)
