"""The errors that users see without a traceback: what happened, where, why, and how to fix it."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from itertools import islice

from findrec.text import printable

_FREE_SPACE = "Free some space, or set FINDREC_HOME to a larger disk; the same command continues."
_COMPARED = 10_000  # known names, and
_COMPARED_LENGTH = 1000  # characters, that are compared within a fraction of a second
_OTHER_FOLDER = "Change its rights, or choose another folder (FINDREC_HOME decides where relative ones are)."
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: _OTHER_FOLDER,
    errno.EACCES: _OTHER_FOLDER,
    errno.EPERM: _OTHER_FOLDER,
}


class FindRecError(ValueError):
    """An error in the configuration, the data or the machine, which the user can fix.

    The command line prints the message without a traceback and exits with code 2. Control characters in the
    message are escaped and credentials in addresses hidden.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in arguments))


class DivergedError(FindRecError):
    """Training produced values that are not finite; raised on every worker at the same step."""


class Preempted(Exception):  # noqa: N818 - not an error: the stop was requested
    """The run was stopped cleanly on request (SIGTERM); the same command continues it."""


def unwrap_user_error(error: BaseException | None) -> FindRecError | None:
    """The `FindRecError` that an error of another process wraps or quotes; None if there is none."""
    # The cause first, as Ray's wrapper also derives from the class of its cause.
    for candidate in (getattr(error, "cause", None), error):
        if isinstance(candidate, FindRecError):
            return candidate
    marker = f"{FindRecError.__name__}: "
    return FindRecError(str(error).rsplit(marker, 1)[1].strip()) if marker in str(error) else None


def system_error(error: BaseException | None) -> FindRecError | None:
    """The `FindRecError` for a full or read-only disk or a missing permission; None for other errors.

    An error of another process or library may only quote that of the system.
    """
    text = str(error)
    for code, remedy in _REMEDIES.items():
        quoted = remedy is _FREE_SPACE or code == errno.EROFS
        if getattr(error, "errno", None) == code or (quoted and os.strerror(code) in text):
            where = getattr(error, "filename", None)
            lines = [line.strip() for line in text.splitlines() if os.strerror(code) in line]
            return FindRecError(f"{f'{os.strerror(code)}: {where}' if where else lines[-1]}. {remedy}")
    return None


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string.

    It is empty too for long names and for more known names than are compared quickly.
    """
    names = list(islice(known, _COMPARED + 1))
    if len(names) > _COMPARED or len(name) > _COMPARED_LENGTH:
        return ""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
