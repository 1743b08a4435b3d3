"""Keys and mouse of a stream's viewers: checked, on the server's clock, and kept as its record."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND, TEMPORAL_COMPRESSION
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import Actions, for_model
from longlive_jax.errors import InputError
from longlive_jax.sampling.controls import Applied
from longlive_jax.sampling.session import Session
from longlive_jax.serving.limits import Refused

DEGREES_PER_COUNT = 0.15
DEGREES_PER_PICTURE = 6.0  # more of a viewer's mouse is cut
_CLOCK_S = 1.0  # of messages, from which a client's clock is told
_COMMANDS = 1000  # that may wait for a chunk


def describe(cfg: config_lib.Actions) -> dict[str, Any] | None:
    """What a page shows of a model's controls; None: it has none."""
    if cfg.kind == "none":
        return None
    keys, mouse = list(sidecars.model_keys(cfg)), bool(cfg.mouse_dim)
    return {"keys": keys, "mouse": mouse, "degrees": DEGREES_PER_COUNT}


class Keys(NamedTuple):
    """A command. codes: held from `time` (s) on. mouse: degrees of pitch and yaw. event: or 0.

    since: s, when it came.
    """

    codes: tuple[str, ...]
    mouse: tuple[float, float]
    time: float
    event: int
    since: float


class Reader:
    """One client's messages as commands: its clock, and how fast its mouse may turn."""

    def __init__(self, model: str, cfg: config_lib.Actions):
        self._model, self._cfg = model, cfg
        self._offsets = collections.deque[tuple[float, float]]()
        self._last = 0.0
        self._room = np.full(2, DEGREES_PER_PICTURE)
        self.held: tuple[str, ...] = ()

    def read(self, message: Mapping[str, Any], now: float) -> Keys:
        """The command of a message of type keys that came at `now`, s.

        Raises:
          Refused: the model has no such keys, no mouse, or no action path.
        """
        if self._cfg.kind == "none":
            raise Refused(400, f"{self._model} takes no keys: direct it by prompts")
        known = sidecars.model_keys(self._cfg)
        for code in message["codes"]:
            if code not in known:
                raise Refused(
                    400, f"keys: {code!r} is no key of {self._model}; it has {', '.join(known)}"
                )
        counts = (message.get("dx", 0), message.get("dy", 0))
        if any(counts) and not self._cfg.mouse_dim:
            raise Refused(400, f"keys: {self._model} has no mouse; leave dx and dy out")
        time = self._time(message.get("t"), now)
        right, down = (DEGREES_PER_COUNT * count for count in counts)
        mouse = self._turn(np.asarray([-down, right]), time)
        self._last, self.held = time, tuple(dict.fromkeys(message["codes"]))
        return Keys(self.held, mouse, time, message.get("event_id", 0), now)

    def let_go(self, now: float) -> Keys | None:
        """The command of a client that has gone while it held keys; None: it held none."""
        held, self.held = self.held, ()
        return Keys((), (0.0, 0.0), now, 0, now) if held else None

    def _time(self, t: float | None, now: float) -> float:
        """When it was, s, by the server's clock: the message that came quickest tells the offset.

        Never after `now`, nor before an earlier message of the client.
        """
        if t is None:
            return now
        offset = now - t / 1000
        self._offsets.append((now, offset))
        while self._offsets[0][0] < now - _CLOCK_S:
            self._offsets.popleft()
        late = offset - min(other for _, other in self._offsets)
        return max(now - late, self._last)

    def _turn(self, degrees: np.ndarray, time: float) -> tuple[float, float]:
        """`degrees` cut to what the time since the last message allows, of one picture at most."""
        gained = (time - self._last) * FRAMES_PER_SECOND * DEGREES_PER_PICTURE
        self._room = np.minimum(self._room + gained, DEGREES_PER_PICTURE)
        cut = np.clip(degrees, -self._room, self._room)
        self._room -= np.abs(cut)
        return float(cut[0]), float(cut[1])


class Commands:
    """Commands of one stream on their way to its pictures; used under the scheduler's lock."""

    def __init__(self):
        self._early: list[Keys] = []  # before there is a session
        self._given: dict[int, Keys] = {}  # by the session's numbers

    def give(self, session: Session | None, keys: Keys) -> None:
        """Hands a command to the session, or keeps it until there is one.

        Raises:
          Refused: too many wait already.
        """
        if len(self._early) + len(self._given) >= _COMMANDS:
            raise Refused(
                409, f"keys: {_COMMANDS} commands wait already; the stream is paused, or slow"
            )
        if session is None:
            self._early.append(keys)
        else:
            self._given[session.act(keys.codes, keys.mouse, keys.time).event_id] = keys

    def begin(self, session: Session) -> None:
        """Hands over what came before the session did."""
        early, self._early = self._early, []
        for keys in early:
            self.give(session, keys)

    def applied(self, receipts: Sequence[Applied]) -> list[tuple[int, Keys]]:
        """(picture that it acts from, command) of the commands that a chunk took."""
        there = [(r.picture, self._given.pop(r.event_id, None)) for r in receipts]
        return [(picture, keys) for picture, keys in there if keys is not None]


class Record:
    """The actions that a stream's chunks were made under, in a file that grows chunk by chunk.

    The file has float32 rows of the model's keys and the mouse's two degrees, and is of use up to
    its last whole row, however its writer ended.

    Attributes:
      chunks: that it has all rows of.
    """

    def __init__(self, cfg: config_lib.Actions, frames: int, path: pathlib.Path):
        self._cfg, self._frames, self._path = cfg, frames, path
        self._keys = sidecars.model_keys(cfg)
        self._blocks: list[np.ndarray] = []
        self._length = self.chunks = 0

    def load(self, chunks: int) -> int:
        """Takes over the file of a stream of `chunks` chunks; of how many it has all rows."""
        numbers = np.fromfile(self._path, np.float32) if self._path.exists() else np.zeros(0, "f4")
        width, size = len(self._keys) + 2, TEMPORAL_COMPRESSION * self._frames
        rows = numbers[: len(numbers) // width * width].reshape(-1, width)
        before = TEMPORAL_COMPRESSION - 1 + for_model.lag(self._cfg.pad)
        chunks = min(chunks, (len(rows) + before) // size)
        rows = rows[: max(0, size * chunks - before)]
        self._blocks, self._length, self.chunks = [rows], len(rows), chunks
        return chunks

    def extend(self, session: Session) -> None:
        """Adds what the session's newest chunk was made under; what is there already stays."""
        assert session.actions is not None
        new = session.actions.made(self._length)
        if not len(new):
            return
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.seek(4 * self._length * new.shape[1])  # over a row that was left half written
            file.write(new.tobytes())
        self._blocks.append(new)
        self._length, self.chunks = self._length + len(new), session.index

    def _rows(self) -> np.ndarray:
        return np.concatenate(self._blocks)

    def whole(self, chunks: int) -> Actions:
        """Of all pictures of the first `chunks` chunks, as `Session.record`."""
        pictures = TEMPORAL_COMPRESSION * (self._frames * chunks - 1) + 1
        rows = self._rows()[:pictures]
        missing = pictures - len(rows)
        return self._actions(np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]))

    def plan(self, script: Actions | None) -> Actions | None:
        """What the chunks to come are made under before live commands are: those of before a
        restart once more, and a script's."""
        if not self._length or (script is not None and len(script) > self._length):
            return script
        return self._actions(self._rows())

    def _actions(self, rows):
        return Actions(
            keyboard=rows[:, :-2], mouse=rows[:, -2:], fps=FRAMES_PER_SECOND, keys=self._keys,
            pad=self._cfg.pad, source="a stream of longlive_jax",
        )  # fmt: skip


def of_script(rows: Any, cfg: config_lib.Actions, pictures: int) -> Actions:
    """The actions of a script that a client sent, in the model's keys and alignment.

    pictures: of its shots.

    Raises:
      Refused: they are none, do not fit the pictures, or are not the model's.
    """
    try:
        if cfg.kind == "none":
            raise InputError("script: actions for a model that takes no keys; leave them out")
        actions = sidecars.of_rows(rows, "script: actions")
        actions.check_video(pictures, FRAMES_PER_SECOND)
        return sidecars.aligned(actions, cfg)
    except InputError as error:
        raise Refused(400, str(error)) from error
