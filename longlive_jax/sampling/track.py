"""The actions of a stream: what was planned, what comes live, and all that was applied.

Row r of a stream's actions drives picture r + 1 with `actions.pad` 12, else picture r, as rows of a
sidecar do. A chunk reads the rows that drive its pictures when its first denoising pass begins;
these never change again, and are the stream's record.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND, TEMPORAL_COMPRESSION
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import actions as sidecar
from longlive_jax.data.sidecars import for_model
from longlive_jax.errors import InputError
from longlive_jax.sampling import controls as controls_lib
from longlive_jax.sampling.controls import Accepted, Applied, Command, Controls

Keys = Iterable[str] | Mapping[str, float]


class Track:
    """The actions of streams of equal age, `rows` of them.

    cfg: of a model with an action path. frames: latents of a chunk.

    Attributes:
      clipped: pictures in which the live mouse was cut at MAX_DEGREES.

    Raises:
      InputError: nothing names the model's keys.
    """

    def __init__(self, cfg: config_lib.Actions, frames: int, rows: int):
        self.cfg, self.frames, self.clipped = cfg, frames, 0
        self.keys = sidecars.model_keys(cfg)
        self._events = 0
        self._made: list[list[np.ndarray]] = [[] for _ in range(rows)]  # float32 [key + 2] each
        self._planned: list[sidecars.Actions | None] = [None] * rows
        self._controls = [Controls(len(self.keys), FRAMES_PER_SECOND) for _ in range(rows)]

    def plan(self, actions: Sequence[sidecars.Actions]) -> None:
        """Sets what each stream's pictures are driven by, from its first on.

        Behind their ends, or where nothing is planned, the live commands act.

        Raises:
          InputError: keys or a mouse that the model does not have, or another rate.
        """
        if len(actions) != len(self._made):
            raise InputError(
                f"actions: of {len(actions)} videos for {len(self._made)} rows; give as many"
            )
        for one in actions:
            one.check_video(fps=FRAMES_PER_SECOND)
        self._planned = [sidecars.aligned(one, self.cfg) for one in actions]

    def act(
        self, keys: Keys, mouse: tuple[float, float], time: float, row: int | None = None
    ) -> Accepted:
        """A command: see `Session.act`."""
        own = {key: 1.0 for key in keys} if not isinstance(keys, Mapping) else dict(keys)
        for name, value in own.items():
            if name not in self.keys:
                raise InputError(
                    f"actions: key {name!r:.60}: the model has none; its keys are "
                    f"{', '.join(self.keys)}"
                )
            if not 0 <= value <= 1:
                raise InputError(f"actions: key {name}={value}; it must be 0 (up) to 1 (down)")
        if len(mouse) != 2 or not all(map(math.isfinite, mouse)):
            raise InputError(f"actions: mouse={mouse}; it must be finite degrees, (pitch, yaw)")
        if any(mouse) and not self.cfg.mouse_dim:
            raise InputError(
                f"actions: mouse={mouse} for a model without a mouse (actions.mouse_dim=0)"
            )
        if not math.isfinite(time):
            raise InputError(f"actions: t={time}; it must be finite seconds")
        if row is not None and not 0 <= row < len(self._made):
            raise InputError(f"actions: row {row} of {len(self._made)}; rows count from 0")
        self._events += 1
        keyboard = np.asarray([own.get(name, 0.0) for name in self.keys], np.float32)
        command = Command(self._events, time, keyboard, np.asarray(mouse, np.float32))
        for one in self._controls if row is None else [self._controls[row]]:
            one.add(command)
        return Accepted(self._events)

    def take(self, chunk: int, cut_off: float) -> tuple[dict[str, np.ndarray], tuple[Applied, ...]]:
        """What chunk `chunk`, the next one, is made under, from now on part of the record.

        cut_off: s, on the clock of the commands; later ones wait.

        Returns:
          By path, float32 [row, 4 * frame, dim], as `ChunkInput.actions`; the receipts of commands.
        """
        size, lag = TEMPORAL_COMPRESSION * self.frames, for_model.lag(self.cfg.pad)
        # A video's first chunk has three pictures less, and with a lag its first is not driven.
        first = size * chunk - (TEMPORAL_COMPRESSION - 1) - lag
        stop = max(1, first + size)
        applied: dict[int, Applied] = {}
        for made, planned, controls in zip(self._made, self._planned, self._controls):
            if planned is not None:
                here = slice(len(made), stop)
                made.extend(np.concatenate([planned.keyboard[here], planned.mouse[here]], axis=1))
            if live := stop - len(made):
                begin = len(made)
                rows, events = controls.take(live, cut_off)
                rows[:, -2:], clipped = sidecar.clip(rows[:, -2:])
                if clipped and not self.clipped:
                    logging.warning(
                        "actions: the mouse moves more than %g degrees a picture, and is cut there",
                        sidecar.MAX_DEGREES,
                    )
                self.clipped += clipped
                made.extend(rows)
                for event, at in events:
                    applied.setdefault(event, Applied(event, chunk, begin + at + lag))
        index = np.maximum(first + np.arange(size), 0)
        rows = np.stack([np.stack([made[i] for i in index]) for made in self._made])
        given = {for_model.KEYBOARD: rows[..., :-2]}
        if self.cfg.mouse_dim:
            given[for_model.MOUSE] = rows[..., -2:] / np.float32(self.cfg.mouse_degrees)
        return given, tuple(applied[event] for event in sorted(applied))

    def record(self, chunks: int, row: int = 0) -> sidecars.Actions:
        """What was applied in the `chunks` made so far, as a sidecar of the video's pictures.

        Raises:
          InputError: there is no chunk yet.
        """
        if not chunks:
            raise InputError("actions: no record before the first chunk; step the session first")
        pictures = TEMPORAL_COMPRESSION * (self.frames * chunks - 1) + 1
        made = self._made[row]
        made = np.stack(made + [made[-1]] * (pictures - len(made)))[:pictures]
        planned = self._planned[row]
        return sidecars.Actions(
            keyboard=made[:, :-2], mouse=made[:, -2:], fps=FRAMES_PER_SECOND, keys=self.keys,
            view="first" if planned is None else planned.view, pad=self.cfg.pad,
            source="a stream of longlive_jax",
        )  # fmt: skip

    def made(self, since: int = 0, row: int = 0) -> np.ndarray:
        """float32 [action, key + 2]: the rows of all chunks so far from row `since` on.

        Without what `record` adds to them: these never change again.
        """
        made = self._made[row][since:]
        return np.asarray(made, np.float32).reshape(len(made), len(self.keys) + 2)

    def poses(self, row: int = 0) -> np.ndarray | None:
        """float32 [picture, 7], those that were planned; None: none were."""
        planned = self._planned[row]
        return None if planned is None else planned.pose

    def copy(self) -> "Track":
        other = copy.copy(self)
        other._made = [list(made) for made in self._made]
        other._controls = [controls.copy() for controls in self._controls]
        return other

    def saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Facts that JSON can hold, and arrays, for `restore`."""
        facts: dict[str, Any] = {"events": self._events, "clipped": self.clipped, "streams": []}
        arrays = {}
        for i, (made, planned, controls) in enumerate(
            zip(self._made, self._planned, self._controls)
        ):
            arrays[f"{i}/made"] = np.asarray(made, np.float32).reshape(-1, len(self.keys) + 2)
            if planned is not None:
                arrays[f"{i}/keyboard"], arrays[f"{i}/mouse"] = planned.keyboard, planned.mouse
                if planned.pose is not None:
                    arrays[f"{i}/pose"] = planned.pose
            facts["streams"].append(
                {
                    "view": planned and planned.view,
                    "held": controls.held.tolist(),
                    "waiting": [
                        [c.event_id, c.keyboard.tolist(), c.mouse.tolist()]
                        for c in sorted(controls.waiting, key=lambda c: c.time)
                    ],
                }
            )
        return facts, arrays

    def restore(self, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what `saved` gave; the clock of the commands begins anew."""
        self._events, self.clipped = facts["events"], facts["clipped"]
        for i, one in enumerate(facts["streams"]):
            self._made[i] = list(arrays[f"{i}/made"])
            if one["view"] is not None:
                self._planned[i] = sidecars.Actions(
                    keyboard=arrays[f"{i}/keyboard"], mouse=arrays[f"{i}/mouse"],
                    fps=FRAMES_PER_SECOND, keys=self.keys, view=one["view"], pad=self.cfg.pad,
                    pose=arrays.get(f"{i}/pose"),
                )  # fmt: skip
            waiting = [
                Command(event, 0.0, np.asarray(keyboard, np.float32), np.asarray(mouse, np.float32))
                for event, keyboard, mouse in one["waiting"]
            ]
            self._controls[i] = controls_lib.restored(
                len(self.keys), FRAMES_PER_SECOND, one["held"], waiting
            )
