"""What workers say of themselves, and the actor that keeps it: without torch, which takes seconds to load."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What a worker says of itself."""

    rank: int
    node: str  # Ray's id of the machine
    host: str
    pid: int
    doing: str
    step: int
    ticks: int
    longest_s: float  # between two ticks of training
    waits: bool  # for other workers, in a collective
    place: str  # the line of FindRec it is at

    def __str__(self) -> str:
        where = f"{self.doing}, step {self.step}, at {self.place}"
        return f"rank {self.rank} (process {self.pid} on {self.host}), {where}"


@dataclass(frozen=True)
class Seen:
    """A worker's last sign, and how long ago it came and anything in it changed."""

    sign: Sign
    silent_s: float
    still_s: float


class Board:
    """The actor that keeps the signs of one group of workers."""

    def __init__(self) -> None:
        self._signs: dict[int, tuple[Sign, float, float]] = {}
        self._stop = False

    def beat(self, sign: Sign) -> bool:
        """Take a sign; returns whether workers are to stop."""
        now = time.monotonic()
        before = self._signs.get(sign.rank)
        moved = now
        if before is not None and (before[0].ticks, before[0].doing) == (sign.ticks, sign.doing):
            moved = before[2]
        self._signs[sign.rank] = (sign, now, moved)
        return self._stop

    def ask_to_stop(self) -> None:
        """Have all workers finish their step, save and end."""
        self._stop = True

    def look(self) -> list[Seen]:
        """Everybody's last sign, by rank."""
        now = time.monotonic()
        return [Seen(s, now - came, now - moved) for _, (s, came, moved) in sorted(self._signs.items())]
