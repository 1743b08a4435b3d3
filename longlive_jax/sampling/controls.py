"""A live keyboard and mouse: commands with the time that each was given at, as rows of pictures.

A command says what is held from its time on, and how far the mouse was moved. A chunk takes the
commands of before its cut-off, each at its place in the time that the chunk plays: so a chunk that
took half a second to make is not steered by one vector. What is stamped later waits for the next
chunk; what comes late, stamped before the last cut-off, goes into the next chunk's first picture.
"""

import dataclasses
import math
import threading
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The receipt of a command. event_id: counts a stream's commands, from 1 on."""

    event_id: int


@dataclasses.dataclass(frozen=True)
class Applied:
    """The receipt of a command that acts: from which picture of the video, in which chunk."""

    event_id: int
    chunk: int
    picture: int


@dataclasses.dataclass(frozen=True, eq=False)
class Command:
    """keyboard: float32 [key], held from `time` (s) on. mouse: float32 [2], degrees moved."""

    event_id: int
    time: float
    keyboard: np.ndarray
    mouse: np.ndarray


class Controls:
    """The commands of one stream that no chunk has taken yet, and what is held.

    `add` may be called from another thread than `take`.

    keys: how many there are. rate: pictures a second.
    """

    def __init__(self, keys: int, rate: float):
        self.rate = rate
        self.held = np.zeros(keys, np.float32)
        self.waiting: list[Command] = []
        self.since = self.newest = -np.inf  # the last cut-off; the newest command that was taken
        self._lock = threading.Lock()

    def add(self, command: Command) -> None:
        with self._lock:
            self.waiting.append(command)

    def take(self, number: int, cut_off: float) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The rows of the next `number` pictures.

        A row has a key's largest value of its time, so that a key that was pressed and released
        within it shows, and the sum of the mouse's moves. Rows share the time since the last
        cut-off, or as long as they play if that is shorter: what is older goes into the first.

        Returns:
          float32 [picture, key + 2], and (event_id, row) of each command that is in them.
        """
        begin = max(self.since, cut_off - number / self.rate)
        each = (cut_off - begin) / number
        with self._lock:
            due = sorted((c for c in self.waiting if c.time <= cut_off), key=lambda c: c.time)
            self.waiting = [c for c in self.waiting if c.time > cut_off]
        rows, events, held = np.zeros((number, len(self.held) + 2), np.float32), [], self.held
        after = 0.0  # in rows, the time from which `held` is
        for command in due:
            place = (command.time - begin) / each if each > 0 else 0.0
            place = min(max(place, 0.0), float(np.nextafter(number, 0)))
            row = int(place)
            _hold(rows[int(after) : math.ceil(place)], held)
            _hold(rows[row : row + 1], command.keyboard)
            rows[row, -2:] += command.mouse
            events.append((command.event_id, row))
            after = place
            if command.time >= self.newest:  # not one that was overtaken on its way
                held, self.newest = command.keyboard, command.time
        _hold(rows[int(after) :], held)
        self.held, self.since = held, cut_off
        return rows, events

    def copy(self) -> "Controls":
        other = Controls(len(self.held), self.rate)
        other.held, other.waiting = self.held, list(self.waiting)
        other.since, other.newest = self.since, self.newest
        return other


def _hold(rows: np.ndarray, keyboard: np.ndarray) -> None:
    rows[:, :-2] = np.maximum(rows[:, :-2], keyboard)


def restored(keys: int, rate: float, held: Sequence[float], waiting: list[Command]) -> Controls:
    """Controls on another clock: all that waits is of before its first cut-off."""
    controls = Controls(keys, rate)
    controls.held = np.asarray(held, np.float32)
    controls.waiting = [dataclasses.replace(c, time=-np.inf) for c in waiting]
    return controls
