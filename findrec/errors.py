"""The one error type a user is meant to see: what happened, where, why, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FindRecError(ValueError):
    """A mistake in what the user gave us (configuration, data, machine), told in plain words.

    The command line prints the message alone and exits with code 2; a traceback would only hide it.
    """


class DivergedError(FindRecError):
    """Training has run into values that are not finite; every worker notices at the same step."""


class Preempted(Exception):  # noqa: N818 - no error: it was asked for
    """The run was told to end (SIGTERM) and did so in order; the same command continues it."""


def find_mistake(error: BaseException | None) -> FindRecError | None:
    """The `FindRecError` that what came back from another process stands for, or tells in words; or None."""
    for one in (getattr(error, "cause", None), error):  # Ray's wrapper is of its cause's class as well
        if isinstance(one, FindRecError):
            return one
    marker = f"{FindRecError.__name__}: "
    return FindRecError(str(error).rsplit(marker, 1)[1].strip()) if marker in str(error) else None


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
