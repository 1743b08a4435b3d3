"""The actions of a video: one row a picture of what was held, and how far the mouse was moved."""

import dataclasses
import math

import numpy as np
from absl import logging

from longlive_jax.config.actions import PADS
from longlive_jax.data.sidecars import keys as keys_lib
from longlive_jax.errors import InputError

VIEWS = ("first", "third")
MAX_DEGREES = 20.0  # of the mouse a picture, either way; more is cut
POSE = 7  # position x, y, z and a quaternion
MAX_RATE = 1000.0  # pictures a second, as of videos


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Actions:
    """Row f is what was held, and how the mouse was moved, while picture f was shown.

    keyboard: float32 [picture, key], 0 (up) to 1 (down).
    mouse: float32 [picture, 2], degrees a picture: pitch (up is positive), yaw (right is positive).
      Past MAX_DEGREES they are cut, with a warning that counts the pictures.
    fps: pictures a second.
    keys: names of the keyboard's columns, W3C codes (`sidecars.keys`).
    view: of whom the video is: "first" person or "third".
    pose: float32 [picture, 7], position and quaternion, or None.
    pad: 12: row f drives picture f + 1; 11 and 8: picture f.
    source: where they are from, in words.
    where: what messages begin with, such as the name of a file; not kept in files.
    clipped: in how many pictures the mouse was cut.

    Raises:
      InputError: numbers that are not finite or out of range, other shapes, unknown keys.
    """

    keyboard: np.ndarray
    mouse: np.ndarray
    fps: float
    keys: tuple[str, ...]
    view: str = "first"
    pose: np.ndarray | None = None
    pad: int = 12
    source: str = ""
    where: str = dataclasses.field(default="actions", repr=False)
    clipped: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        where = self.where
        keys = keys_lib.check(self.keys, where)
        keyboard = _numbers(self.keyboard, "keyboard", len(keys), where)
        mouse = _numbers(self.mouse, "mouse", 2, where)
        counts = {"keyboard": len(keyboard), "mouse": len(mouse)}
        pose = self.pose
        if pose is not None:
            pose = _numbers(pose, "pose", POSE, where)
            counts["pose"] = len(pose)
        if len(set(counts.values())) > 1 or not len(keyboard):
            raise InputError(
                f"{where}: {', '.join(f'{n} rows of {name}' for name, n in counts.items())}; each "
                "needs one row a picture"
            )
        if keyboard.size and not (keyboard.min() >= 0 and keyboard.max() <= 1):
            bad = keyboard[(keyboard < 0) | (keyboard > 1)][0]
            raise InputError(
                f"{where}: keyboard has {bad:.6g}; it must be 0 (up) to 1 (down), a key a column"
            )
        if not (0 < self.fps <= MAX_RATE and math.isfinite(self.fps)):
            raise InputError(f"{where}: fps={self.fps}; it must be above 0, {MAX_RATE:g} at most")
        for name, value, known in (("view", self.view, VIEWS), ("pad", self.pad, PADS)):
            if value not in known:
                raise InputError(
                    f"{where}: {name}={value!r:.60}; it must be one of {', '.join(map(str, known))}"
                )
        mouse, clipped = clip(mouse)
        if clipped:
            logging.warning(
                "%s: the mouse moves more than %g degrees a picture in %d of %d pictures, and was "
                "cut there",
                where, MAX_DEGREES, clipped, len(mouse),
            )  # fmt: skip
        for name, value in (
            ("keys", keys), ("keyboard", keyboard), ("mouse", mouse), ("pose", pose),
            ("fps", float(self.fps)), ("pad", int(self.pad)), ("clipped", clipped),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.keyboard)

    def check_video(self, frames: int | None = None, fps: float | None = None) -> None:
        """Refuses actions that are not those of a video of `frames` pictures, `fps` a second.

        Raises:
          InputError: another number of pictures, or another rate.
        """
        where = self.where
        if frames is not None and frames != len(self):
            longer = "longer" if len(self) > frames else "shorter"
            raise InputError(
                f"{where}: {len(self)} rows for a video of {frames} pictures: {longer} than the "
                "video; there must be one row a picture"
            )
        if fps is not None and not math.isclose(fps, self.fps, rel_tol=1e-3):
            raise InputError(
                f"{where}: fps={self.fps:g}, the video has {fps:g} pictures a second; resample "
                "them (launch.import_actions --format=canonical --fps=RATE)"
            )

    def cut(self, start: int, stop: int) -> "Actions":
        """Those of pictures `start` to `stop` - 1."""
        here = slice(start, stop)
        pose = None if self.pose is None else self.pose[here]
        return dataclasses.replace(
            self, keyboard=self.keyboard[here], mouse=self.mouse[here], pose=pose
        )


def clip(mouse: np.ndarray) -> tuple[np.ndarray, int]:
    """Moves of at most MAX_DEGREES either way, and in how many pictures there were larger ones."""
    over = (np.abs(mouse) > MAX_DEGREES).any(axis=-1)
    return np.clip(mouse, -MAX_DEGREES, MAX_DEGREES), int(over.sum())


def _numbers(array, name: str, dim: int, where: str) -> np.ndarray:
    """float32 [picture, dim]."""
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] != dim or array.dtype.kind not in "fiub":
        raise InputError(
            f"{where}: {name} is {array.dtype}{list(array.shape)}; it must be numbers [picture, "
            f"{dim}]"
        )
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        row, column = np.argwhere(~finite)[0]
        raise InputError(
            f"{where}: {name} is {array[row, column]} in picture {row}; all must be finite"
        )
    # Past this a float64 may have no float32; nothing that is allowed is near.
    return np.clip(array, -1e30, 1e30).astype(np.float32)
