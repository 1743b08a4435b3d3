"""Goodput of a run: which share of its wall time went into steps that it has kept.

Useful are the seconds that the devices worked on steps which count: neither those that were left
out as they were not finite, nor those that a restart repeats. The wall time is that of all starts
of the run, from where the loop begins (it compiles, reads the state), and of what lies between
them: a crash, a hang or a kill costs the steps since the last save, and all the time until the run
is on its way again. Only the pause after a run that ended by itself, done or stopped by a signal
after it had saved, is nobody's loss.
"""

import pathlib
import time

from longlive_jax.errors import InputError
from longlive_jax.files import versioned

FILE = "goodput.json"
_FORM, _VERSION = "longlive_jax.goodput", 1
_SCHEMA = {"wall": float, "time": float, "over": bool, "useful": {str: float}}
_STATES = 1000  # whose useful seconds are kept


class Goodput:
    """Seconds of a run, those of its earlier starts included.

    Args:
      folder: has FILE, if the run was begun before; one that is damaged is as none.
      step: the state's that this start goes on from.
      began: when this start began, by `clock`.
      now: the time of day, seconds.
    """

    def __init__(self, folder: pathlib.Path, step: int, began: float, now: float):
        self._file, self._began = folder / FILE, began
        self._states: dict[int, float] = {}
        self._before = self.useful = 0.0
        if not self._file.exists():
            return
        try:
            had = versioned.read(self._file, _FORM, _VERSION, "", schema=_SCHEMA)
            states = {int(number): seconds for number, seconds in had["useful"].items()}
        except (InputError, ValueError):
            return
        self._states = {number: x for number, x in states.items() if number <= step}
        self.useful = self._states[max(self._states)] if self._states else 0.0
        pause = 0.0 if had["over"] else max(0.0, now - (clock() - began) - had["time"])
        self._before = had["wall"] + pause

    def share(self, at: float) -> float:
        """The goodput at a time by `clock`, 0 to 1."""
        return min(1.0, self.useful / max(self._before + at - self._began, 1e-9))

    def write(self, now: float, step: int | None = None, over: bool = False) -> None:
        """Writes FILE at a time of day.

        step: of a state that is about to be saved. over: the run ends here, by itself.
        """
        if step is not None:
            self._states[step] = self.useful
            self._states = dict(sorted(self._states.items())[-_STATES:])
        content = {
            "wall": self._before + clock() - self._began,
            "time": now,
            "over": over,
            "useful": self._states,
        }
        versioned.write(self._file, _FORM, _VERSION, content)


clock = time.perf_counter
